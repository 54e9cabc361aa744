"""Checks of a run that is resumed, and the metrics that its last checkpoint holds."""

import glob
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from .hooks import read_records

logger = logging.getLogger(__name__)

# Keys of SOLVER that a checkpoint records, and whether a resumed run uses the value of the new
# config (True) or the one in the state of optimizer and scheduler (False).
_SCHEDULE_KEYS = {
    "MAX_ITER": True,
    "STEPS": True,
    "GAMMA": True,
    "WARMUP_ITERS": True,
    "IMS_PER_BATCH": True,
    "ACCUMULATE": True,
    "BASE_LR": False,
    "BACKBONE_MULTIPLIER": False,
    "WEIGHT_DECAY": False,
}
WINDOW = 20  # iterations over which Detectron2's writers smooth a scalar
History = dict[str, tuple[bool, list[tuple[float, int]]]]


def check_resumable(output_dir: str) -> None:
    """Check that the last checkpoint of a folder is known, or that there is none.

    Args:
        output_dir: local or remote folder of the run; remote ones are not checked.

    Raises:
        ValueError: ``last_checkpoint`` is missing although there are checkpoints, or is damaged.
    """
    if "://" in output_dir:
        return
    tag = os.path.join(output_dir, "last_checkpoint")
    pattern = os.path.join(glob.escape(output_dir), "model_*.pth")
    names = sorted(
        name for name in map(os.path.basename, glob.glob(pattern)) if name != "model_best.pth"
    )
    hint = f"Write the name of the checkpoint to resume from into {tag}"
    if names:
        hint += f" (found: {', '.join(names)})"
    if not os.path.isfile(tag):
        if names:
            raise ValueError(
                f"{tag} does not exist, although there are checkpoints. {hint}, or choose another "
                "OUTPUT_DIR."
            )
        return
    with open(tag, "rb") as file:
        content = file.read(4096).strip()
    name = content.decode("utf-8", errors="replace")
    if not name.isprintable() or not name.endswith(".pth") or os.path.basename(name) != name:
        raise ValueError(f"{tag} is damaged: it holds {name[:80]!r}, not a file name. {hint}.")


def save_schedule(cfg: CfgNode) -> dict[str, Any]:
    """Copy the keys of ``SOLVER`` that a resumed run is compared with. Plain values."""
    values = {key: getattr(cfg.SOLVER, key) for key in _SCHEDULE_KEYS}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def log_changes(cfg: CfgNode, saved: Mapping[str, Any]) -> None:
    """Log what differs between a config and :func:`save_schedule` of the run that is resumed."""
    for key, new in save_schedule(cfg).items():
        old = saved.get(key, new)
        if new != old:
            kept = new if _SCHEDULE_KEYS[key] else old
            logger.warning("SOLVER.%s was %s, is now %s: %s is used", key, old, new, kept)


def restore_rates(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give a restored optimizer the learning rates of the current schedule for the next step."""
    if isinstance(scheduler, LRMultiplier):
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate


def skip_batches(data_loader: Any, iteration: int) -> None:
    """Let a data loader, which was not used yet, begin at an iteration."""
    sampler: Any = getattr(data_loader, "batch_sampler", None)
    if hasattr(sampler, "start_iter"):
        sampler.start_iter = iteration
    else:
        logger.warning("this data loader cannot skip images: it starts at the first")


def save_history(storage: EventStorage) -> History:
    """Copy the scalars that writers still need.

    Args:
        storage: of the running training.

    Returns:
        For each scalar whether it is smoothed, and its values of the last :data:`WINDOW`
        iterations (at least the latest) with their iterations. Plain values.
    """
    hints = storage.smoothing_hints()
    history: History = {}
    for name, buffer in storage.histories().items():
        values = buffer.values()
        first = values[-1][1] - WINDOW
        history[name] = (hints[name], [(v, int(i)) for v, i in values[-WINDOW:] if i > first])
    return history


def restore_history(storage: EventStorage, history: History) -> None:
    """Put the scalars of :func:`save_history` into the storage of a resumed run."""
    for name, (smoothed, values) in history.items():
        for value, iteration in values:
            storage.put_scalar(name, value, smoothing_hint=smoothed, cur_iter=iteration)


def results_beside(history: History, record: Mapping[str, Any], iteration: int) -> dict[str, float]:
    """Find what was recorded of an iteration after its checkpoint: the results of an evaluation.

    Args:
        history: of the checkpoint.
        record: of that iteration in ``metrics.json``.
        iteration: of both.

    Returns:
        Metrics by name, such as ``bbox/AP``; empty if they are not recorded.
    """
    before = {name for name, (_, values) in history.items() if values[-1][1] == iteration}
    return {key: record[key] for key in record.keys() - before - {"iteration"}}


def read_results(output_dir: str, history: History, iteration: int) -> dict[str, float]:
    """Find the results of an evaluation after a checkpoint in ``metrics.json``.

    Args:
        output_dir: of the run.
        history: of the checkpoint.
        iteration: of the checkpoint.

    Returns:
        See :func:`results_beside`; empty in all processes except the main one.
    """
    results: dict[str, float] = {}
    if comm.is_main_process():
        for record in read_records(os.path.join(output_dir, "metrics.json")):
            if record["iteration"] == iteration:
                results.update(results_beside(history, record, iteration))
    return results


def has_final_results(output_dir: str, max_iter: int, metric: str) -> bool:
    """Say whether ``metrics.json`` has the results of the evaluation at the end of a run.

    Args:
        output_dir: of the run.
        max_iter: iterations of the run.
        metric: end of the name of one of the results.
    """
    records = read_records(os.path.join(output_dir, "metrics.json"))
    final = [record for record in records if record["iteration"] >= max_iter]
    return any(key.endswith(metric) for record in final for key in record)
