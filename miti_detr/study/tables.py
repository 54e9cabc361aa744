"""The tables of a comparison.

A cell is a text, a number, None, or what :mod:`miti_detr.study.statistics` gives: ``mean`` with
``sd``, or ``mean`` with ``low`` and ``high``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .comparison import ArmResult, Comparison
from .results import METRICS, RunResult
from .series import has_epochs, last_layer, mean_changes, rank_keys, step_series
from .statistics import (
    SPIKE_FACTOR,
    SPIKE_WINDOW,
    largest_fall,
    loss_spikes,
    mean_and_spread,
    paired_difference,
    query_use,
)

Cell = str | int | float | dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the report.

    Attributes:
        key: its name in files.
        title: above it.
        columns: of the head; the first is that of the names of the rows.
        rows: as long as ``columns``.
        digits: after the decimal point.
        note: below it: what the numbers are.
    """

    key: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    digits: int = 2
    note: str = ""


def cell_text(cell: Cell, digits: int) -> str:
    """Write a cell as people read it.

    Args:
        cell: see this module.
        digits: after the decimal point; of whole numbers none.
    """
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "\u2013"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    if not isinstance(cell, dict):
        return f"{cell:.{digits}f}"
    signed = "low" in cell
    text = f"{cell['mean']:{'+' if signed else ''}.{digits}f}"
    if signed and cell["low"] is not None:
        text += f" [{cell['low']:+.{digits}f}, {cell['high']:+.{digits}f}]"
    elif cell.get("sd") is not None:
        text += f" \u00b1 {cell['sd']:.{digits}f}"
    return text + (f" ({cell['said']})" if "said" in cell else "")


def group_tables(arms: Sequence[ArmResult], comparison: Comparison) -> list[Table]:
    """Return the tables of a group of arms, those without any number left out."""
    makers: list[Callable[[Sequence[ArmResult], Comparison], Table | None]] = [
        _accuracy,
        _differences,
        _efficiency,
        _reached,
        _stability,
        _matching,
        _queries,
        _rank,
    ]
    return [table for make in makers if (table := make(arms, comparison)) is not None]


def runs_table(comparison: Comparison) -> Table:
    """Return all runs with their own numbers."""
    rows: list[list[Cell]] = []
    for arm in comparison.arms:
        for run in arm.runs:
            weights = run.facts.get("weights", "")[:8]
            finals: list[Cell] = [run.final(metric) for metric in METRICS]
            last = max(run.metrics.records)
            rows.append([run.metrics.name, run.seed, last, weights or None, *finals])
    note = (
        "Runs with the same initial weights began from the same numbers in every parameter (equal "
        "SHA-256). The seed and the iteration alone decide order and augmentation of the images."
    )
    columns = ["run", "seed", "last iteration", "initial weights", *METRICS]
    return Table("runs", "All runs", columns, rows, note=note)


def _accuracy(arms: Sequence[ArmResult], comparison: Comparison) -> Table:
    rows: list[list[Cell]] = [
        [arm.name, len(arm.runs), *(mean_and_spread(arm.values(metric)) for metric in METRICS)]
        for arm in arms
    ]
    return Table(
        "accuracy",
        "Table 1: accuracy",
        ["model", "runs", *METRICS],
        rows,
        note="COCO metrics of the last evaluation in percent, mean \u00b1 standard deviation over "
        "the seeds. AR is AR@100.",
    )


def _differences(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    by_name = {arm.name: arm for arm in comparison.arms}
    rows: list[list[Cell]] = []
    for arm in arms:
        reference = by_name.get(arm.reference or "")
        if reference is None:
            continue
        pairs = arm.pairs(reference)
        cells: list[Cell] = [
            paired_difference([a.final(m) for a, _ in pairs], [b.final(m) for _, b in pairs])
            for m in METRICS
        ]
        name = f"{arm.name} \u2212 {reference.name}"
        rows.append([name, len(pairs), *cells])
    if not rows:
        return None
    return Table(
        "differences",
        "Difference, paired by seed",
        ["models", "pairs", *METRICS],
        rows,
        note="Mean difference in points, with its 95 % interval by Student's t over the seeds that "
        "both have. An interval that holds 0 means that these runs cannot tell the two apart; one "
        "pair has no interval.",
    )


def _efficiency(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    facts = [[run.facts for run in arm.runs] for arm in arms]
    if not any("parameters" in fact or "seconds" in fact for known in facts for fact in known):
        return None
    rows: list[list[Cell]] = []
    for arm, known in zip(arms, facts, strict=True):
        seconds = [fact["seconds"] for fact in known if fact.get("seconds") is not None]
        images = next((fact["images"] for fact in known if fact.get("images")), None)
        parameters = next((fact["parameters"] for fact in known if "parameters" in fact), None)
        accuracy = mean_and_spread(arm.values("AP"))
        rows.append([arm.name, mean_and_spread(seconds), images, parameters, accuracy])
    return Table(
        "efficiency",
        "Table 2: evaluation time, parameters, AP",
        ["model", "evaluation (s)", "images", "parameters", "AP"],
        rows,
        note="Time of a whole evaluation of the final weights (reading, inference, metrics), one "
        "after the other on all cores, once for each run. Trainable parameters.",
    )


def _reached(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    if not comparison.aps:
        return None
    in_epochs = has_epochs(arms)
    rows: list[list[Cell]] = []
    for arm in arms:
        row: list[Cell] = [arm.name]
        for ap in comparison.aps:
            found = [
                step / (run.facts["iterations_per_epoch"] if in_epochs else 1)
                for run in arm.runs
                if (step := run.reached(ap)) is not None
            ]
            cell = mean_and_spread(found)
            if cell is not None and len(found) < len(arm.runs):
                cell["said"] = f"{len(found)} of {len(arm.runs)} runs"
            row.append("not reached" if cell is None else cell)
        rows.append(row)
    unit = "epochs" if in_epochs else "iterations"
    return Table(
        "reached",
        f"{unit.capitalize()} to reach an AP",
        ["model", *(f"AP {ap:g}" for ap in comparison.aps)],
        rows,
        digits=1 if in_epochs else 0,
        note="Linear between two evaluations, from AP 0 at the start.",
    )


def _stability(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    names = [
        "gradient norm, median",
        "99th percentile",
        "largest",
        "steps clipped (%)",
        "loss spikes per 1000",
        "largest loss / median before",
        "largest fall of AP",
    ]
    rows: list[list[Cell]] = []
    for arm in arms:
        columns = zip(*(_run_stability(run) for run in arm.runs), strict=True)
        rows.append([arm.name, *(mean_and_spread(column) for column in columns)])
    if all(cell is None for row in rows for cell in row[1:]):
        return None
    every = all(run.steps for arm in arms for run in arm.runs)
    source = (
        "Of every iteration."
        if every
        else "Some runs have only the records of metrics.json, medians of 20 iterations each, in "
        "which the spike of a single step is hidden: compare them with care."
    )
    return Table(
        "stability",
        "Stability: gradient norm and loss",
        ["model", *names],
        rows,
        note=f"{source} Gradient norm before clipping. A spike is a loss above median + "
        f"{SPIKE_FACTOR:g} \u00d7 1.4826 \u00d7 MAD of the {SPIKE_WINDOW} records before it. The "
        "fall of AP is that of an evaluation below the best one before it, in points.",
    )


def _run_stability(run: RunResult) -> list[float]:
    norms, losses = step_series(run, "grad_norm")[1], step_series(run, "total_loss")[1]
    count, largest = loss_spikes(losses)
    rate = 1000 * count / (len(losses) - SPIKE_WINDOW) if len(losses) > SPIKE_WINDOW else math.nan
    fall = largest_fall(run.curve("AP")[1])
    if not len(norms):
        return [math.nan, math.nan, math.nan, math.nan, rate, largest, fall]
    limit = run.config.get("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", math.nan)
    clipped = 100 * float((norms > limit).mean()) if math.isfinite(limit) else math.nan
    tail = float(np.percentile(norms, 99))
    return [float(np.median(norms)), tail, float(norms.max()), clipped, rate, largest, fall]


def _matching(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    shares = {arm.name: [mean_changes(run) for run in arm.runs] for arm in arms}
    layers = max((len(s) for found in shares.values() for s in found), default=0)
    if not layers:
        return None
    rows: list[list[Cell]] = []
    for name, found in shares.items():
        by_layer = [[100 * float(s[i]) for s in found if len(s) > i] for i in range(layers)]
        rows.append([name, *(mean_and_spread(values) for values in by_layer)])
    return Table(
        "matching",
        "Matching: objects whose query changes (%)",
        ["model", *(f"layer {i + 1}" for i in range(layers))],
        rows,
        digits=1,
        note="Share of the objects of a fixed set of test images that the matcher gives another "
        "query than at the evaluation before, by decoder layer, averaged over the evaluations.",
    )


def _queries(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    rows: list[list[Cell]] = []
    for arm in arms:
        last = [run.matches[-1] for run in arm.runs if run.matches]
        if not last:
            continue
        uses = [query_use(np.array(record["queries"][-1])) for record in last]
        used, effective = zip(*uses, strict=True)
        objects = len(last[0]["queries"][-1])
        cells = (mean_and_spread(used), mean_and_spread(effective))
        rows.append([arm.name, int(last[0]["num_queries"]), objects, *cells])
    if not rows:
        return None
    return Table(
        "queries",
        "Use of the object queries",
        ["model", "queries", "objects", "that find objects", "effective number"],
        rows,
        digits=1,
        note="At the last evaluation, in the last decoder layer, on the images of the matching. "
        "The effective number is exp(H) of the shares of the objects.",
    )


def _rank(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    rows: list[list[Cell]] = [
        [
            f"{stack}, {measure}",
            *(
                mean_and_spread([run.final(last_layer(run, keys)) for run in arm.runs])
                for arm in arms
            ),
        ]
        for (stack, measure), keys in rank_keys(arms).items()
    ]
    if not rows:
        return None
    return Table(
        "rank",
        "Rank of the tokens after the last layer",
        ["stack and measure", *(arm.name for arm in arms)],
        rows,
        digits=3,
        note="The last measured values; residual is that of equation (2) in the "
        "1,inf norm, relative to the norm of the tokens: 0 is rank one.",
    )
