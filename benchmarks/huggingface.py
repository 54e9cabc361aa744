"""Hugging Face's DETR, doing the same work as ours."""

import re
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr.bench.inputs import autocast
from miti_detr.bench.meters import Clock
from miti_detr.modeling import MitiDetr, targets_from_instances

from .peers import Peer
from .spec import BenchSpec, bench_config, make_inputs


class HuggingFacePeer(Peer):
    """``transformers.DetrForObjectDetection`` as ``transformers.Trainer`` runs it.

    Its image processor and its post-processing are omitted, which is in its favour: it gets images
    that are normalised and padded.
    """

    def __init__(self, spec: BenchSpec, folder: str) -> None:
        """Load the folder that :func:`make_weights` wrote.

        Raises:
            ImportError: ``transformers`` or ``timm`` is missing.
            ValueError: it trains other parameters than the model of the config.
        """
        try:
            import timm  # noqa: F401
            from transformers import DetrForObjectDetection
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise ImportError(
                "transformers or timm is missing. Run `pip install miti_detr[hf,timm]`"
            ) from error
        disable_progress_bar()
        self.cfg = bench_config(spec, "hf")
        self.precision = spec.precision
        detr = self.cfg.MODEL.DETR
        settings: dict[str, Any] = {
            "auxiliary_loss": detr.DEEP_SUPERVISION,
            "dropout": detr.DROPOUT,
            "attention_dropout": detr.DROPOUT,
            "activation_dropout": detr.DROPOUT,
            "eos_coefficient": detr.NO_OBJECT_WEIGHT,
            **_loss_weights(detr),
        }
        model: Any = DetrForObjectDetection.from_pretrained(
            folder, local_files_only=True, **settings
        )
        self.device = torch.device(self.cfg.MODEL.DEVICE)
        self.model = model.to(self.device)
        _repair_decoder(model)
        self._prepare(build_model(self.cfg), make_inputs(self.cfg, spec))
        # The optimizer of transformers.Trainer
        self.optimizer = torch.optim.AdamW(
            list(self._groups()), weight_decay=self._solver.WEIGHT_DECAY, fused=True
        )
        self._clip_before(self.optimizer)

    def _prepare(self, ours: MitiDetr, inputs: list[dict[str, Any]]) -> None:
        """Convert the inputs, and train the same layers as ours."""
        self._freeze()
        counts = [_num_trainable(model) for model in (self.model, ours)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"Hugging Face trains {counts[0]:,} parameters, the config {counts[1]:,}"
            )
        batch = ours.preprocess_image(inputs)
        mask = torch.zeros(len(inputs), *batch.tensor.shape[-2:], dtype=torch.int64)
        for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
            row[:height, :width] = 1
        self._batch = {"pixel_values": batch.tensor, "pixel_mask": mask.to(self.device)}
        targets = targets_from_instances(
            [x["instances"] for x in inputs],
            num_classes=ours.num_classes,
            device=self.device,
            dtype=torch.float32,
        )
        self._labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]

    def _freeze(self) -> None:
        """Freeze what the config freezes; the model itself freezes nothing of a timm backbone."""
        stages = self.cfg.MODEL.BACKBONE.FREEZE_AT - 1  # layer1, layer2, ...; below 0 not the stem
        whole = self._solver.BACKBONE_MULTIPLIER <= 0
        for name, parameter in self.model.model.backbone.model.named_parameters():
            stage = re.match(r"layer(\d)", name)
            frozen = whole or (int(stage[1]) if stage else 0) <= stages
            parameter.requires_grad_(not frozen)

    def infer(self) -> None:
        """See :meth:`Peer.infer`."""
        self.outputs()

    def outputs(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Peer.outputs`."""
        with torch.no_grad(), autocast(self.device, self.precision):
            output = self.model(**self._batch)
        return output.logits, output.pred_boxes

    def loss(self, clock: Clock) -> Tensor:
        """See :meth:`Peer.loss`. The loss is part of the forward pass and is timed inside it."""
        criterion = self.model.loss_function

        def timed(*args: Any, **kwargs: Any) -> Any:
            clock.mark("forward")
            result = criterion(*args, **kwargs)
            clock.mark("criterion")
            return result

        self.model.loss_function = timed
        try:
            with autocast(self.device, self.precision):
                return self.model(**self._batch, labels=self._labels).loss
        finally:
            self.model.loss_function = criterion


def _repair_decoder(model: Any) -> None:
    """Keep auxiliary losses from changing the function of the decoder.

    With auxiliary losses, ``transformers`` 5.23 applies the decoder's norm to the input of each
    following layer, and twice to the last state. DETR does not, and neither does the same model
    without auxiliary losses. So the decoder runs without them while hooks collect its states.
    """
    decoder = model.model.decoder
    states: list[Tensor] = []

    def begin(*_: Any) -> None:
        states.clear()
        model.config.auxiliary_loss = False

    def note(_layer: nn.Module, _arguments: Any, state: Tensor) -> None:
        states.append(state)

    def end(_decoder: nn.Module, _arguments: Any, output: Any) -> None:
        model.config.auxiliary_loss = wanted
        if wanted:
            output.intermediate_hidden_states = decoder.layernorm(torch.stack(states))

    wanted = model.config.auxiliary_loss
    decoder.register_forward_pre_hook(begin)
    for layer in decoder.layers:
        layer.register_forward_hook(note)
    decoder.register_forward_hook(end)


def _num_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _loss_weights(detr: CfgNode) -> dict[str, int]:
    """Return the weights of matching cost and losses, which are integers in its config."""
    weights = {
        "class_cost": detr.CLASS_WEIGHT,
        "bbox_cost": detr.L1_WEIGHT,
        "giou_cost": detr.GIOU_WEIGHT,
        "bbox_loss_coefficient": detr.L1_WEIGHT,
        "giou_loss_coefficient": detr.GIOU_WEIGHT,
    }
    if detr.CLASS_WEIGHT != 1 or any(weight != int(weight) for weight in weights.values()):
        raise ValueError(
            "Hugging Face's DETR needs MODEL.DETR.CLASS_WEIGHT 1 and integers as L1_WEIGHT and "
            f"GIOU_WEIGHT, not {detr.CLASS_WEIGHT}, {detr.L1_WEIGHT} and {detr.GIOU_WEIGHT}. "
            "Change these values"
        )
    return {name: int(weight) for name, weight in weights.items()}
