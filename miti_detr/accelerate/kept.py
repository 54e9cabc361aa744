"""Values computed from weights and kept while the weights stay the same.

Weights can change in ways that leave no trace in a tensor's address or version: a write through
``.data``, or a new tensor at the address of an old one. So a kept value is used only while its
sources still hold the numbers that it was made from. Small sources are compared with a copy, large
ones by their products with fixed random numbers, which reads them once. A change that the rounding
of a product hides would change the output of the layer by about its rounding.

Only float32 sources on a CPU are kept; on a GPU the comparison would wait for the device.
"""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_SMALL = 4096  # elements


class _Source(NamedTuple):
    """A tensor as it was when a value was made from it."""

    tensor: "weakref.ref[Tensor]"
    version: int
    print: Tensor


class Kept(Generic[T]):
    """A value computed from tensors, and again whenever one of them has changed.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._kept: tuple[list[_Source], tuple[object, ...], T] | None = None

    def get(self, make: Callable[[], T], sources: Sequence[Tensor | None], *others: object) -> T:
        """Return what ``make`` returns, without gradient, or returned for the same arguments.

        Args:
            make: called without arguments.
            sources: the tensors that it uses; None is skipped.
            others: what else it depends on; compared by ``==``.
        """
        tensors = [t for t in sources if t is not None]
        with torch.inference_mode(False), torch.no_grad():
            if not all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors):
                return make()
            kept = self._kept  # another thread may replace it meanwhile
            if kept is not None and kept[1] == others and _unchanged(kept[0], tensors):
                return kept[2]
            noted = [_Source(weakref.ref(t), version(t), _fingerprint(t)) for t in tensors]
            value = make()
            self._kept = noted, others, value
            return value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy or pickle as an empty one."""
        return Kept, ()


def _unchanged(noted: list[_Source], tensors: list[Tensor]) -> bool:
    return len(noted) == len(tensors) and all(
        source.tensor() is tensor
        and source.version == version(tensor)
        and torch.equal(source.print, _fingerprint(tensor, copy=False))
        for source, tensor in zip(noted, tensors, strict=True)
    )


def version(tensor: Tensor) -> int:
    """Count of the changes of a tensor in place; -1 where none is kept."""
    return -1 if tensor.is_inference() else tensor._version


def _fingerprint(tensor: Tensor, *, copy: bool = True) -> Tensor:
    """The values of a small tensor, or the products of a large one's parts with random numbers.

    A NaN in it never equals itself, so that the value is then computed each time.
    """
    if tensor.numel() <= _SMALL:
        return tensor.detach().clone() if copy else tensor
    values = tensor.detach()
    if tensor.dim() == 4 and not tensor.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    length = math.gcd(tensor.numel(), _SMALL)  # short rows take up to three times as long
    rows = values.reshape(-1, length if length >= _SMALL // 4 else tensor.numel() // len(tensor))
    return torch.mv(rows, _random_vector(rows.shape[1]))  # unlike matmul, not cast by autocast


@functools.cache
def _random_vector(length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(length))
