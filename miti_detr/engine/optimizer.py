"""The optimizer of DETR: two learning rates, one weight decay, clipping over the whole model.

The published Detectron2 wrapper (facebookresearch/detr ``d2/train_net.py`` at 29901c5) does the
same in its trainer. This module uses Detectron2's helpers for most of it.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import Tensor, nn

from miti_detr.scalars import log_scalars

from .solver.freeze import is_backbone

logger = logging.getLogger(__name__)

# Devices whose fused AdamW and foreach norms torch supports; elsewhere its defaults are used.
_FAST_DEVICES = ("cpu", "cuda")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build ``SOLVER.OPTIMIZER`` with the parameter groups of DETR.

    Backbone parameters have the learning rate ``BASE_LR * BACKBONE_MULTIPLIER``, sampling offsets
    and reference points of Deformable-DETR ``BASE_LR * SAMPLING_MULTIPLIER``, all others
    ``BASE_LR``. As published, all parameters have the same ``WEIGHT_DECAY``, including those of
    normalisation layers; ``SOLVER.WEIGHT_DECAY_NORM`` is not used.

    With ``CLIP_TYPE: full_model`` the optimizer's ``step`` first scales all gradients together so
    that their norm is at most ``CLIP_VALUE``, and logs the norm before it as ``grad_norm``. If that
    is not finite, ``step`` raises ``FloatingPointError`` before the weights change. Where the
    optimizer has a tensor ``found_inf``, which fused optimizers look at on the device, it is set to
    1 instead, and the weights do not change either.

    Args:
        cfg: uses ``SOLVER``.
        model: its parameters with ``requires_grad`` are optimised.

    Raises:
        ValueError: ``SOLVER.OPTIMIZER`` is unknown.
    """
    device = next(model.parameters()).device.type
    fast = True if device in _FAST_DEVICES else None
    solver = cfg.SOLVER
    arguments: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    kind: type[torch.optim.Optimizer]
    if solver.OPTIMIZER == "ADAMW":
        kind = torch.optim.AdamW
        arguments["fused"] = fast
    elif solver.OPTIMIZER == "SGD":
        kind = torch.optim.SGD
        arguments.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
        arguments["fused" if device == "cuda" else "foreach"] = fast
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; possible: ADAMW, SGD")
    optimizer = _with_clipping(cfg, kind, foreach=fast)(_parameter_groups(cfg, model), **arguments)
    if solver.CLIP_GRADIENTS.ENABLED:
        # Fused optimizers remove the gradient scale of float16 training in their kernel, after the
        # clipping. Without this attribute, GradScaler removes it before ``step``.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer.register_load_state_dict_pre_hook(partial(_check_state, names))
    optimizer.register_load_state_dict_post_hook(_keep_layout)
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        logger.info("%s parameters with learning rate %g", f"{count:,}", group["lr"])
    return optimizer


def _check_state(
    names: Mapping[int, str], optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> None:
    """Refuse the state of another model or optimizer, on which fused kernels would corrupt memory.

    Args:
        names: of the parameters, by their id.
        optimizer: to be restored.
        state_dict: of a checkpoint.

    Raises:
        ValueError: names the parameters whose shapes differ.
    """
    remedy = "Resume with the config of that run, or start a new run from its weights."
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError(
            f"the optimizer of the checkpoint has {len(saved)} parameters in {len(sizes)} groups, "
            f"that of the model has {len(parameters)} in {len(optimizer.param_groups)}. {remedy}"
        )
    known = {"exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq"}
    if isinstance(optimizer, torch.optim.SGD):
        known = {"momentum_buffer"}
    different = []
    for index, parameter in zip(saved, parameters, strict=True):
        state = state_dict["state"].get(index, {})
        if not state.keys() <= known:
            raise ValueError(
                f"the optimizer of the checkpoint has the state {', '.join(sorted(state))}, which "
                f"{type(optimizer).__name__} does not use. Set SOLVER.OPTIMIZER as in that run."
            )
        shapes = {tuple(v.shape) for v in state.values() if isinstance(v, Tensor) and v.dim() > 0}
        if shapes - {tuple(parameter.shape)}:
            name = names.get(id(parameter), f"parameter {index}")
            different.append(
                f"{name} {shapes.pop()} in the checkpoint, {tuple(parameter.shape)} now"
            )
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise ValueError(
            "the shapes of the model differ from those of the resumed run: "
            f"{'; '.join(different[:4])}{more}. {remedy}"
        )


def _keep_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded states the memory layout of their parameters.

    Fused kernels read both in the order of memory, and a checkpoint may come from a run whose
    convolution weights had another layout.
    """
    for parameter, states in optimizer.state.items():
        for name, value in states.items():
            same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
            if same_shape and value.stride() != parameter.stride():
                states[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    solver = cfg.SOLVER

    def factor(name: str) -> float:
        """Learning rate of a parameter relative to ``BASE_LR``."""
        if is_backbone(name.lstrip(".")):
            return solver.BACKBONE_MULTIPLIER
        samples = any(part in name for part in ("sampling_offsets", "reference_points"))
        return solver.SAMPLING_MULTIPLIER if samples else 1.0

    return get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=factor,
    )


def _with_clipping(
    cfg: CfgNode, kind: type[torch.optim.Optimizer], *, foreach: bool | None
) -> type[torch.optim.Optimizer]:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        made: type[torch.optim.Optimizer] = maybe_add_gradient_clipping(cfg, kind)
        return made

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> Any:
        """Scale all gradients together, record their norm, and do the step."""
        norm = torch.nn.utils.clip_grad_norm_(
            (p for group in self.param_groups for p in group["params"]),
            clip.CLIP_VALUE,
            clip.NORM_TYPE,
            foreach=foreach,
        )
        skip: Tensor | None = getattr(self, "found_inf", None)  # of :class:`TrainStep`
        if skip is not None:
            skip.logical_or_(~torch.isfinite(norm))
        elif not math.isfinite(value := norm.item()):
            raise FloatingPointError(f"the norm of the gradients is {value}")
        log_scalars({"grad_norm": norm})
        return kind.step(self, closure)

    # As in Detectron2's clipping; its function knows the parameters but not the optimizer
    return type(kind.__name__ + "WithGradientClip", (kind,), {"step": step})
