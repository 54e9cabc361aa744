"""What the memory of a training step is made of."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from miti_detr.engine.optimizer import build_optimizer

from .inputs import autocast
from .meters import MIB, memory_marks, start_memory
from .steps import BenchModel

# Parts of a model whose tensors are counted by themselves, and the names of their modules.
PARTS = {
    "backbone": ("backbone",),
    "encoder": ("transformer.encoder",),
    "decoder": ("transformer.decoder",),
    "heads": ("class_embed", "bbox_embed", "bbox_attention", "mask_head"),
    "losses": ("criterion",),
}
INPUT = "input"
OTHERS = "other"


class KeptTensors:
    """Counts the memory that a forward pass keeps for its backward pass, by part of the model.

    Memory that several tensors share counts once, for the part that keeps it first; weights and
    buffers do not count. The batch of images that the backbone gets counts as input.

    Attributes:
        sizes: bytes of the input, of each part, and of the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a model, whose parts need not all be there."""
        self._model = model
        self._part = [OTHERS]
        self._seen = {_place(x) for x in (*model.parameters(), *model.buffers())}
        self.sizes = dict.fromkeys((INPUT, *PARTS, OTHERS), 0)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """While entered, count what the model keeps."""
        modules = dict(self._model.named_modules())
        with contextlib.ExitStack() as stack:
            for part, names in PARTS.items():
                found = [modules[name] for name in names if name in modules]
                for module in itertools.chain.from_iterable(map(_called, found)):
                    enter = module.register_forward_pre_hook(functools.partial(self._enter, part))
                    leave = module.register_forward_hook(self._leave, always_call=True)
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)
            stack.enter_context(hooks)
            yield

    def _enter(self, part: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if part == "backbone":
            self._part.append(INPUT)
            self._keep(getattr(inputs[0], "tensor", inputs[0]))
            self._part.pop()
        self._part.append(part)

    def _leave(self, *_: Any) -> None:
        self._part.pop()

    def _keep(self, tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in self._seen:
            self._seen.add(place)
            self.sizes[self._part[-1]] += tensor.untyped_storage().nbytes()
        return tensor


def _called(module: nn.Module) -> list[nn.Module]:
    """The module, or instead of a list or stack without a forward pass, what it contains."""
    if type(module).forward is not nn.Module.forward:
        return [module]
    return [each for child in module.children() for each in _called(child)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure_memory(bench: BenchModel, precision: str = "float32") -> dict[str, float]:
    """Count the memory of a training step.

    Args:
        bench: model and images.
        precision: as for :func:`~miti_detr.bench.steps.bench_model`.

    Returns:
        MiB of ``weights`` (with buffers), ``gradients``, ``optimizer state``, ``input`` (the padded
        images), what each part of :data:`PARTS` and the rest keep for the backward pass
        (``backbone: activations``), and the ``peak``: of the tensors on a GPU, or what the process
        has added on a CPU since before the first step.
    """
    model = bench.model.train()
    optimizer = build_optimizer(bench.cfg, model)
    start_memory()
    step = functools.partial(_step, bench, optimizer, precision)
    kept = KeptTensors(model)
    step(kept.counted)
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    sizes = {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": _bytes(gradients),
        "optimizer state": _bytes(states),
        "input": kept.sizes.pop(INPUT),
        **{f"{part}: activations": size for part, size in kept.sizes.items()},
    }
    del gradients
    optimizer.zero_grad()
    step(contextlib.nullcontext)
    marks = memory_marks()
    sizes["peak"] = (marks["device_peak"] or marks["added"]) * MIB
    return {name: size / MIB for name, size in sizes.items()}


def _step(
    bench: BenchModel,
    optimizer: torch.optim.Optimizer,
    precision: str,
    counted: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    device = next(bench.model.parameters()).device
    with counted(), autocast(device, precision):
        total = torch.stack(list(bench.model(bench.inputs).values())).sum()
    total.backward()
    optimizer.step()


def _bytes(tensors: list[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def memory_table(sizes: dict[str, float], device: str) -> str:
    """Format the result of :func:`measure_memory`."""
    peak = sizes["peak"]
    rows = [[name, f"{size:,.1f}"] for name, size in sizes.items() if name != "peak"]
    rows.append(["sum", f"{sum(sizes.values()) - peak:,.1f}"])
    measured = "peak of the tensors" if device.startswith("cuda") else "added by the process, peak"
    rows.append([measured, f"{peak:,.1f}"])
    return tabulate(
        rows, ("training step", "MiB"), colalign=("left", "right"), disable_numparse=True
    )
