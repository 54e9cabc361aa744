"""Stops a run whose loss is not finite, and writes a file from which the step can be replayed."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from miti_detr.config import add_miti_detr_config
from miti_detr.engine.parallel import Batch, count_objects, part_of_batch, unwrapped
from miti_detr.engine.seed import seed_step
from miti_detr.engine.setup import resolve_device
from miti_detr.files import replacing
from miti_detr.yaml_files import parse_config

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is infinite or not a number."""


class NonFiniteGuard:
    """Stops a run whose values are not finite, and saves the data needed to find the cause."""

    def __init__(self, cfg: CfgNode) -> None:
        """Remember the config of the run; uses ``SEED`` and ``OUTPUT_DIR``."""
        self.cfg = cfg

    def stop(
        self,
        model: nn.Module,
        batch: Batch,
        losses: Mapping[str, Tensor],
        iteration: int,
        reason: str,
        *,
        part: tuple[int, Sequence[int]] | None = None,
    ) -> NoReturn:
        """Write the replay file and raise.

        The file ``OUTPUT_DIR/nonfinite_iter{N}_rank{R}.pth`` holds tensors and plain Python objects
        only, so that ``torch.load(weights_only=True)`` reads it: the batch of this process, the
        weights, the config, the iteration, the seed and the rank.

        Args:
            model: as it was in the step.
            batch: the inputs of this process.
            losses: weighted losses by name, scalars.
            iteration: index of the step.
            reason: first words of the message.
            part: index of the batch among the parts of a larger one, and the objects of each image
                of that; None: the batch is whole.

        Raises:
            NonFiniteError: always; names the iteration, the images, each loss, and the file.
        """
        rank = comm.get_rank()
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        path = Path(self.cfg.OUTPUT_DIR) / f"nonfinite_iter{iteration}_rank{rank}.pth"
        content = {
            "iteration": iteration,
            "rank": rank,
            "seed": self.cfg.SEED,
            "config": self.cfg.dump(),
            "losses": values,
            "batch": [_plain(inputs) for inputs in batch],
            "part": None if part is None else [part[0], list(part[1])],
            "model": unwrapped(model).state_dict(),
        }
        with replacing(path) as temporary:
            torch.save(content, temporary)
        files = "\n  ".join(str(inputs.get("file_name")) for inputs in batch)
        terms = "\n  ".join(f"{name}: {value:g}" for name, value in values.items())
        raise NonFiniteError(
            f"{reason} at iteration {iteration}, rank {rank}.\n"
            f"Losses:\n  {terms}\nImages:\n  {files}\n"
            f"To find the first value that is not finite: miti-detr replay {path}"
        )


@dataclasses.dataclass(frozen=True)
class ReplayReport:
    """What a replayed step shows.

    Attributes:
        iteration: index of the step in its run.
        rank: of the process.
        seed: of the run.
        file_names: images of the batch.
        recorded_losses: by name, as in the run.
        losses: by name, as replayed.
        parameter: first parameter that was not finite before the step; None if all were.
        module: first module, in the order of the forward pass, with an output that is not finite;
            None if there is none.
        gradient: first parameter, in the order of the model, whose gradient is not finite; None if
            there is none.
    """

    iteration: int
    rank: int
    seed: int
    file_names: list[str]
    recorded_losses: dict[str, float]
    losses: dict[str, float]
    parameter: str | None
    module: str | None
    gradient: str | None

    def __str__(self) -> str:
        """Format the report for printing."""
        lines = [f"iteration {self.iteration}, rank {self.rank}, seed {self.seed}", "images:"]
        lines += [f"  {name}" for name in self.file_names]
        lines.append("losses (in the run, replayed):")
        lines += [
            f"  {name}: {value:g}, {self.losses.get(name, math.nan):g}"
            for name, value in self.recorded_losses.items()
        ]
        lines.append(f"first parameter that is not finite: {self.parameter or 'none'}")
        lines.append(f"first module with an output that is not finite: {self.module or 'none'}")
        lines.append(f"first gradient that is not finite: {self.gradient or 'none'}")
        return "\n".join(lines)


def replay(path: str | os.PathLike[str]) -> ReplayReport:
    """Repeat the forward and backward pass of a step that :class:`NonFiniteGuard` stopped.

    Args:
        path: the file it left.

    Returns:
        The replayed losses, and where the first value that is not finite occurred.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a replay file.
    """
    content = _read(path)
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(parse_config(content["config"], f"the config in {path}")))
    resolve_device(cfg)
    cfg.MODEL.COMPILE = cfg.MODEL.CUDA_GRAPHS = False  # so that every module can be observed
    model = build_model(cfg)
    model.load_state_dict(content["model"])
    model.train()
    parameter = next((n for n, p in model.named_parameters() if not _all_finite(p)), None)
    batch = [_inputs(plain) for plain in content["batch"]]

    amp, device = cfg.SOLVER.AMP, torch.device(cfg.MODEL.DEVICE).type
    index, counts = content.get("part") or (0, count_objects(batch))
    seed_step(content["seed"], content["iteration"], content["rank"], index)
    with EventStorage(content["iteration"]), _FirstNonFinite(model) as first:
        with (
            part_of_batch(model, batch, counts) as factor,
            torch.autocast(device, getattr(torch, amp.PRECISION), enabled=amp.ENABLED),
        ):
            losses: dict[str, Tensor] = {k: v * factor for k, v in model(batch).items()}
        total: Any = sum(losses.values())
        total.backward()
    gradients = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    return ReplayReport(
        iteration=content["iteration"],
        rank=content["rank"],
        seed=content["seed"],
        file_names=[str(inputs["file_name"]) for inputs in content["batch"]],
        recorded_losses=content["losses"],
        losses={name: float(loss.detach()) for name, loss in losses.items()},
        parameter=parameter,
        module=first.name,
        gradient=next((name for name, grad in gradients if not _all_finite(grad)), None),
    )


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a replay file and check its parts."""
    kinds = {
        "iteration": int,
        "rank": int,
        "seed": int,
        "config": str,
        "losses": dict,
        "batch": list,
        "model": dict,
    }
    foreign = f"{path} is not a replay file. A stopped run names its nonfinite_iter*_rank*.pth"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises errors of many kinds for other files
        raise ValueError(f"{foreign} ({type(error).__name__} while reading it).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{foreign}.")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{foreign} (it has no {kind.__name__} called {key}).")
    parts = {"file_name", "image_id", "height", "width", "image"}
    if not all(isinstance(item, dict) and parts <= item.keys() for item in content["batch"]):
        raise ValueError(f"{foreign} (its batch has no images).")
    return content


class _FirstNonFinite:
    """While entered, notes the first module whose output has a value that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.name: str | None = None
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> "_FirstNonFinite":
        for name, module in self._model.named_modules():
            name = name or type(module).__name__
            self._handles.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: self._look(name, out))
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str, output: Any) -> None:
        if self.name is None and not all(_all_finite(t) for t in _tensors(output)):
            self.name = name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a dataset dict that a training step reads, without classes of Detectron2."""
    plain = {key: inputs.get(key) for key in ("file_name", "image_id", "height", "width", "image")}
    if "instances" in inputs:
        instances = inputs["instances"]
        plain["image_size"] = list(instances.image_size)
        plain["boxes"] = instances.gt_boxes.tensor
        plain["classes"] = instances.gt_classes
    if "patches" in inputs:
        plain["patches"] = inputs["patches"]
    return plain


def _inputs(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_plain`."""
    inputs = {key: plain[key] for key in ("file_name", "image_id", "height", "width", "image")}
    if "boxes" in plain:
        instances = Instances(tuple(plain["image_size"]))
        instances.gt_boxes = Boxes(plain["boxes"])
        instances.gt_classes = plain["classes"]
        inputs["instances"] = instances
    if "patches" in plain:
        inputs["patches"] = plain["patches"]
    return inputs
