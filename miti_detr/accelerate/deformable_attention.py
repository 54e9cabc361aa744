"""Deformable attention as sums of rows, for CPUs, and by ``deformops`` on GPUs.

What it computes: :func:`miti_detr.layers.deformable_attention`, on CPUs as ``sums_of_rows.py``
says.

Where: on CPUs in float32 and under autocast, in eager mode. On GPUs ``deformops`` (Triton), if it
is installed.

How exact: rounding. Sums have a fixed order for a given number of threads.
"""

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from miti_detr.layers import DeformableAttention, deformable_attention
from miti_detr.layers.deformable_attention import Shapes

from .exchange import exchange, is_recorded
from .sums_of_rows import can_sum, sample_rows

logger = logging.getLogger(__name__)


class FastDeformableAttention(DeformableAttention):
    """Deformable attention by :func:`sample_rows` or ``deformops``."""

    def _sample(
        self, value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor
    ) -> Tensor:
        if not is_recorded() and locations.dtype == torch.float32:
            if value.device.type == "cpu":
                if can_sum(value, spatial_shapes, locations) and _works():
                    return sample_rows(value, spatial_shapes, locations, weights)
            elif value.device.type == "cuda" and (operator := _deformops()) is not None:
                return operator(value, spatial_shapes, locations, weights)
        return super()._sample(value, spatial_shapes, locations, weights)


def apply(model: nn.Module) -> int:
    """Exchange the deformable attention modules below ``model``; return how many there were."""
    found = [module for module in model.modules() if type(module) is DeformableAttention]
    for module in found:
        exchange(module, FastDeformableAttention)
    return len(found)


@functools.cache
def _works() -> bool:
    """Compare with the plain form on a small problem, once per process."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = (
        torch.rand(shape, generator=generator)
        for shape in ((2, 16, 2, 4), (2, 3, 2, 2, 2, 2), (2, 3, 2, 2, 2))
    )
    inputs = [value, locations * 1.4 - 0.2, weights]
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse tensors are announced as a beta version
            found = _gradients(sample_rows, inputs, shapes)
            expected = _gradients(deformable_attention, inputs, shapes)
        difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        works, reason = difference < 1e-4, f"it differs from the plain one by {difference:.2g}"
    except (RuntimeError, AttributeError, TypeError) as error:
        works, reason = False, str(error).partition("\n")[0]
    if not works:
        logger.info("the fast deformable attention is not used: %s", reason)
    return works


def _gradients(function: Any, inputs: list[Tensor], shapes: Shapes) -> list[Tensor]:
    value, locations, weights = (x.detach().clone().requires_grad_() for x in inputs)
    result = function(value, shapes, locations, weights)
    result.square().sum().backward()
    found = [value.grad, locations.grad, weights.grad]
    return [result.detach(), *(x for x in found if x is not None)]


@functools.cache
def _deformops() -> Any:
    """The operator of ``deformops`` with our arguments, or None."""
    try:
        from deformops.registry import msda
    except ImportError:
        return None

    def operator(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.tensor(list(shapes), device=value.device)
        cells = sizes.prod(1)
        starts = cells.cumsum(0) - cells
        result: Tensor = msda(value, sizes, starts, locations, weights.to(value.dtype))
        return result

    return operator
