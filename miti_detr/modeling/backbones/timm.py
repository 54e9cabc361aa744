"""Backbones of timm (``pip install 'miti_detr[timm]'``), as a backbone of Detectron2."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from miti_detr.pixels import Pixels, warn_if_pixels_differ

OUTPUT = "timm"  # name of the last output; earlier ones are timm0, timm1, ...


class TimmBackbone(Backbone):
    """Feature maps of a network of timm that takes images of any size: the last one, or all.

    Its batch norms are frozen, as DETR needs for small batches.

    Attributes:
        net: timm's feature extractor, without the layers behind that feature map.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        freeze_at: int = 0,
        in_channels: int = 3,
        all_features: bool = False,
    ) -> None:
        """Make the network.

        Args:
            name: of the model in timm.
            pretrained: take timm's weights, which it downloads.
            freeze_at: how many of timm's feature maps are computed by frozen layers.
            in_channels: of the image.
            all_features: return the earlier feature maps as well.

        Raises:
            ImportError: timm is not installed.
            ValueError: there is no such model, or it has no feature maps.
        """
        super().__init__()
        timm = require_timm("this backbone")
        try:
            net = timm.create_model(
                name,
                pretrained=pretrained,
                features_only=True,
                out_indices=None if all_features else (-1,),
                in_chans=in_channels,
            )
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(f"MODEL.TIMM.NAME is {name!r}; timm says: {error}") from error
        self.net: Any = timm.layers.freeze_batch_norm_2d(net)
        self._is_nhwc = "NHWC" in str(getattr(net, "output_fmt", ""))
        channels, strides = net.feature_info.channels(), net.feature_info.reduction()
        names = [*(f"{OUTPUT}{i}" for i in range(len(channels) - 1)), OUTPUT]
        self._shapes = {
            name: ShapeSpec(channels=c, stride=s)
            for name, c, s in zip(names, channels, strides, strict=True)
        }
        if freeze_at > 0:
            infos = net.feature_info.info
            _freeze_up_to(net, infos[min(freeze_at, len(infos)) - 1]["module"])

    @property
    def size_divisibility(self) -> int:
        """The stride: some of these networks drop the rest of a larger image."""
        return int(self._shapes[OUTPUT].stride)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of the outputs."""
        return dict(self._shapes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features (N, C', h, w) of images (N, 3, H, W)."""
        return {
            name: feature.permute(0, 3, 1, 2) if self._is_nhwc else feature
            for name, feature in zip(self._shapes, self.net(x), strict=True)
        }


def require_timm(what: str) -> Any:
    """Import timm; the ImportError where it is missing says that ``what`` needs it."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{what} needs timm: `pip install 'miti_detr[timm]'`") from error
    return timm


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """A network of timm from the keys ``MODEL.TIMM.*`` and ``MODEL.BACKBONE.FREEZE_AT``.

    It returns all feature maps if masks need them (``MODEL.MASK_ON``) or ``MODEL.DETR.IN_FEATURES``
    chooses among them, otherwise the last one.
    """
    keys = cfg.MODEL.TIMM
    backbone = TimmBackbone(
        keys.NAME,
        pretrained=keys.PRETRAINED,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
        all_features=cfg.MODEL.MASK_ON or bool(cfg.MODEL.DETR.IN_FEATURES),
    )
    if keys.PRETRAINED:
        origin = backbone.net.pretrained_cfg
        mean, std = ([255 * x for x in origin[key]] for key in ("mean", "std"))
        expected = Pixels(mean, std, "RGB")
        warn_if_pixels_differ(f"{keys.NAME} of timm", expected, Pixels.of_config(cfg))
    return backbone


def _freeze_up_to(net: nn.Module, last: str) -> None:
    """Freeze the modules in the order of their use, to the end of the one called ``last``."""
    names = (last, last.replace(".", "_"), f"model.{last}")  # as timm's wrappers rename it
    found = False
    for name, module in net.named_modules():
        inside = any(name == n or name.startswith(f"{n}.") for n in names)
        if found and not inside:
            return
        found = found or inside
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
