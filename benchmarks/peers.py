"""The implementations that are measured. Hugging Face's is in :mod:`.huggingface`.

N images, Q queries, K classes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr.bench.inputs import autocast
from miti_detr.bench.meters import Clock
from miti_detr.engine import prepare_cpu
from miti_detr.engine.optimizer import build_optimizer
from miti_detr.engine.solver import is_backbone

from .loop_criterion import LoopCriterion
from .spec import BenchSpec, Weights, bench_config, make_inputs


class Peer:
    """An implementation with its optimizer and its inputs.

    Attributes:
        model: the network.
        device: device of the network.
    """

    def __init__(self, spec: BenchSpec, peer: str, weights: str) -> None:
        """Build a model of this package and load weights.

        Args:
            spec: what to measure.
            peer: ``ours``, ``detr`` or ``plain``.
            weights: checkpoint of :func:`make_weights`.
        """
        cfg = bench_config(spec, peer)
        if peer != "plain" and cfg.MODEL.DEVICE == "cpu":
            prepare_cpu()  # as the commands of this package do
        self.cfg = cfg
        self.precision = spec.precision
        self.inputs = make_inputs(cfg, spec)
        model = build_plain(cfg) if peer == "plain" else build_model(cfg)
        model.load_state_dict(torch.load(weights, map_location="cpu")["model"], strict=True)
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.optimizer = self._plain_optimizer() if peer == "plain" else build_optimizer(cfg, model)

    def infer(self) -> None:
        """Run one inference step, from uint8 images to boxes in pixels."""
        with torch.no_grad(), autocast(self.device, self.precision):
            self.model(self.inputs)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return logits (N, Q, K+1) and boxes (N, Q, 4) of the last decoder layer, in inference."""
        with torch.no_grad(), autocast(self.device, self.precision):
            prediction = self.model.predict(self.inputs)
        return prediction.logits[-1], prediction.boxes[-1]

    def loss(self, clock: Clock) -> Tensor:
        """Return the total loss of a training step; marks ``forward`` and ``criterion``."""
        with autocast(self.device, self.precision):
            prediction = self.model.predict(self.inputs)
            clock.mark("forward")
            losses = self.model.losses(prediction, self.inputs)
            total = torch.stack(list(losses.values())).sum()
        clock.mark("criterion")
        return total

    def train_step(self, clock: Clock) -> float:
        """Run a training step; marks ``forward``, ``criterion``, ``backward``, ``optimizer``."""
        total = self.loss(clock)
        total.backward()
        clock.mark("backward")
        self.update()
        clock.mark("optimizer")
        return total.item()

    def update(self) -> None:
        """Clip the gradients, update the weights and release the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW with the defaults of torch, and clip the gradients before each step."""
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


def build_plain(cfg: CfgNode) -> nn.Module:
    """Build the model of a config without acceleration, with the set loss as published.

    Args:
        cfg: config of a ``MitiDetr``; it is not changed.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ACCELERATE = False
    model = build_model(cfg)
    detr = cfg.MODEL.DETR
    model.criterion = LoopCriterion(
        num_classes=detr.NUM_CLASSES,
        class_weight=detr.CLASS_WEIGHT,
        l1_weight=detr.L1_WEIGHT,
        giou_weight=detr.GIOU_WEIGHT,
        no_object_weight=detr.NO_OBJECT_WEIGHT,
        deep_supervision=detr.DEEP_SUPERVISION,
    ).to(model.device)
    return model


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout probability of a model of any peer, modules and attributes alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), int | float):
                setattr(module, name, probability)


def build_peer(spec: BenchSpec, peer: str, weights: Weights) -> Peer:
    """Build one of ``PEERS`` and load weights."""
    if peer == "hf":
        from .huggingface import HuggingFacePeer

        return HuggingFacePeer(spec, weights.hf_folder)
    return Peer(spec, peer, weights.path)
