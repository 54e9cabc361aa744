"""What is measured: this package's model or its plain form; Hugging Face's is in :mod:`.hf`.

N images, Q queries, K classes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr.engine import prepare_cpu
from miti_detr.engine.optimizer import build_optimizer, is_backbone

from .meters import Clock
from .plain import build_plain
from .spec import BenchSpec, Weights, bench_config, make_inputs


class Side:
    """One implementation with its optimizer and its inputs.

    Attributes:
        model: the network.
        device: where it is.
    """

    def __init__(self, spec: BenchSpec, side: str, weights: str) -> None:
        """Build a model of this package with given weights.

        Args:
            spec: of the benchmark.
            side: ``ours``, ``detr`` or ``plain``.
            weights: checkpoint of :func:`make_weights`.
        """
        cfg = bench_config(spec, side)
        if side != "plain" and cfg.MODEL.DEVICE == "cpu":
            prepare_cpu()  # as the commands of this package do
        self.cfg = cfg
        self.precision = spec.precision
        self.inputs = make_inputs(cfg, spec)
        model = build_plain(cfg) if side == "plain" else build_model(cfg)
        model.load_state_dict(torch.load(weights, map_location="cpu")["model"], strict=True)
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.optimizer = self._plain_optimizer() if side == "plain" else build_optimizer(cfg, model)

    def infer(self) -> None:
        """One inference step, from images of uint8 to boxes in pixels."""
        with torch.no_grad(), self.autocast():
            self.model(self.inputs)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Last decoder layer's logits (N, Q, K+1) and boxes (N, Q, 4), in inference."""
        with torch.no_grad(), self.autocast():
            prediction = self.model.predict(self.inputs)
        return prediction.logits[-1], prediction.boxes[-1]

    def loss(self, clock: Clock) -> Tensor:
        """Total loss of a training step; marks ``forward`` and ``criterion``."""
        with self.autocast():
            prediction = self.model.predict(self.inputs)
            clock.mark("forward")
            queries = self.model.embed_queries(self.inputs)
            losses = self.model.losses(prediction, self.inputs, queries)
            total = torch.stack(list(losses.values())).sum()
        clock.mark("criterion")
        return total

    def train_step(self, clock: Clock) -> float:
        """One training step, with marks ``forward``, ``criterion``, ``backward``, ``optimizer``."""
        total = self.loss(clock)
        total.backward()
        clock.mark("backward")
        self.update()
        clock.mark("optimizer")
        return total.item()

    def update(self) -> None:
        """Clip the gradients, change the weights, drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the benchmark."""
        return autocast(self.device, self.precision)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """AdamW of torch with its defaults, and clipping before the step."""
        optimizer = torch.optim.AdamW(list(self._groups()), weight_decay=self._solver.WEIGHT_DECAY)
        self._clip_before(optimizer)
        return optimizer

    @property
    def _solver(self) -> CfgNode:
        return self.cfg.SOLVER

    def _groups(self) -> Iterator[dict[str, Any]]:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for backbone in (False, True):
            params = [p for name, p in named if is_backbone(name) == backbone]
            factor = self._solver.BACKBONE_MULTIPLIER if backbone else 1.0
            yield {"params": params, "lr": self._solver.BASE_LR * factor}

    def _clip_before(self, optimizer: torch.optim.Optimizer) -> None:
        clip = self._solver.CLIP_GRADIENTS
        if not clip.ENABLED:
            return

        def hook(*_: Any) -> None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(hook)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Autocast to ``bfloat16`` or ``float16``; with ``float32`` nothing is cast."""
    dtype = None if precision == "float32" else getattr(torch, precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model of any side, also those that are numbers of a module."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), int | float):
                setattr(module, name, probability)


def build_side(spec: BenchSpec, side: str, weights: Weights) -> Side:
    """Build one of ``SIDES`` with given weights."""
    if side == "hf":
        from .huggingface import HuggingFaceSide

        return HuggingFaceSide(spec, weights.hf_folder)
    return Side(spec, side, weights.path)
