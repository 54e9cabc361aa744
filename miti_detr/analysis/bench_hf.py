"""Hugging Face's DETR on the same work as ours."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr.modeling import MitiDetr, targets_from_instances

from .bench_child import Clock
from .bench_sides import Side
from .bench_spec import BenchSpec, bench_config, make_inputs


class HuggingFaceSide(Side):
    """``transformers.DetrForObjectDetection`` as its trainer runs it.

    Its image processor and its post-processing are left out, which is in its favour: images come in
    normalised and padded.
    """

    def __init__(self, spec: BenchSpec, folder: str) -> None:
        """Load the folder that :func:`make_weights` wrote.

        Raises:
            ImportError: if ``transformers`` or ``timm`` is missing.
            ValueError: if its trainable parameters are not those of the config's model.
        """
        try:
            import timm  # noqa: F401
            from transformers import DetrForObjectDetection
        except ImportError as error:
            raise ImportError("--against hf needs `pip install miti_detr[hf,timm]`") from error
        self.cfg = bench_config(spec, "hf")
        self.precision = spec.precision
        detr = self.cfg.MODEL.DETR
        model = DetrForObjectDetection.from_pretrained(
            folder,
            local_files_only=True,
            auxiliary_loss=detr.DEEP_SUPERVISION,
            dropout=detr.DROPOUT,
            attention_dropout=detr.DROPOUT,
            activation_dropout=detr.DROPOUT,
            **_loss_weights(detr),
            eos_coefficient=detr.NO_OBJECT_WEIGHT,
        )
        self.device = torch.device(self.cfg.MODEL.DEVICE)
        self.model = model.to(self.device)
        self._prepare(build_model(self.cfg), make_inputs(self.cfg, spec))
        # The optimizer of transformers.Trainer
        self.optimizer = torch.optim.AdamW(
            list(self._groups()), weight_decay=self._solver.WEIGHT_DECAY, fused=True
        )
        self._clip_before(self.optimizer)

    def _prepare(self, ours: MitiDetr, inputs: list[dict[str, Any]]) -> None:
        """Turn the inputs into its form; train the same layers."""
        if self._solver.BACKBONE_MULTIPLIER <= 0:
            self.model.model.freeze_backbone()
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

    def infer(self) -> None:
        """See :meth:`Side.infer`."""
        self.outputs()

    def outputs(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Side.outputs`."""
        with torch.no_grad(), self.autocast():
            output = self.model(**self._batch)
        return output.logits, output.pred_boxes

    def loss(self, clock: Clock) -> Tensor:
        """See :meth:`Side.loss`; its loss is part of its forward, so it is timed from within."""
        criterion = self.model.loss_function

        def timed(*args: Any, **kwargs: Any) -> Any:
            clock.mark("forward")
            result = criterion(*args, **kwargs)
            clock.mark("criterion")
            return result

        self.model.loss_function = timed
        try:
            with self.autocast():
                return self.model(**self._batch, labels=self._labels).loss
        finally:
            self.model.loss_function = criterion


def _num_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _loss_weights(detr: CfgNode) -> dict[str, int]:
    """Weights of matching cost and losses, which are whole numbers in its config."""
    weights = {
        "class_cost": detr.CLASS_WEIGHT,
        "bbox_cost": detr.L1_WEIGHT,
        "giou_cost": detr.GIOU_WEIGHT,
        "bbox_loss_coefficient": detr.L1_WEIGHT,
        "giou_loss_coefficient": detr.GIOU_WEIGHT,
    }
    if detr.CLASS_WEIGHT != 1 or any(weight != int(weight) for weight in weights.values()):
        raise ValueError(
            "Hugging Face's DETR has MODEL.DETR.CLASS_WEIGHT 1 and whole numbers as L1_WEIGHT and "
            "GIOU_WEIGHT"
        )
    return {name: int(weight) for name, weight in weights.items()}
