"""timm's frozen batch norm in one operation.

What it computes: timm multiplies by a scale and adds a shift, which reads and writes the feature
map twice. ``F.batch_norm`` with fixed statistics does it in one pass.

Where: timm's ``FrozenBatchNormAct2d``, where input and statistics have the same precision. Not when
compiling, where the compiler fuses the plain form. This file imports timm, so it is imported only
where timm already is.

How exact: rounding.
"""

import torch.nn.functional as F
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn

from .exchange import exchange, is_recorded


def apply(model: nn.Module) -> int:
    """Exchange the frozen norms of timm below ``model``; return how many there were."""
    found = [module for module in model.modules() if type(module) is FrozenBatchNormAct2d]
    for module in found:
        exchange(module, OnePassFrozenBatchNormAct2d)
    return len(found)


class OnePassFrozenBatchNormAct2d(FrozenBatchNormAct2d):
    """timm's frozen batch norm and activation, with one operation for the norm."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate (N, C, H, W)."""
        if is_recorded() or x.dtype != self.weight.dtype:
            result: Tensor = super().forward(x)
            return result
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps
        )
        activated: Tensor = self.act(self.drop(x))
        return activated
