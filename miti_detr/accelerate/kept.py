"""Values computed from weights and kept while the weights stay the same.

Weights can change in ways that leave no trace in a tensor's address or version: a write through
``.data``, or a new tensor at the address of an old one. So a kept value is used only while its
sources still hold the numbers that it was made from. Small sources are compared with a copy. Large
ones are compared by their product with a fixed random vector, which reads them once: an eighth of
the time that it takes to fold or cast them again. A change that the product's rounding hides would
change the output of the layer by no more than its rounding.

Only float32 sources on a CPU are kept; for others the value is computed each time, and on a GPU the
comparison would wait for the device.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_SMALL = 4096  # elements
_random_vectors: dict[int, Tensor] = {}


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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept[T]":
        """Return an empty one."""
        return Kept()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle as an empty one."""
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
    """The values of a small tensor, or the products of a large one's rows with random numbers.

    A NaN in it never equals itself, so that the value is then computed each time.
    """
    flat = tensor.detach().reshape(len(tensor), -1) if tensor.dim() else tensor.detach()
    if tensor.numel() <= _SMALL:
        return flat.clone() if copy else flat
    if tensor.dim() == 4 and not tensor.is_contiguous():
        flat = tensor.detach().permute(0, 2, 3, 1).reshape(len(tensor), -1)
    return torch.mv(flat, _random_vector(flat.shape[1]))  # unlike matmul, not cast by autocast


def _random_vector(length: int) -> Tensor:
    vector = _random_vectors.get(length)
    if vector is None:
        generator = torch.Generator().manual_seed(length)  # not the global generator
        vector = _random_vectors[length] = torch.rand(length, generator=generator) + 0.5
    return vector
