"""The tables of a comparison; :mod:`miti_detr.study.statistics` has cells with spreads."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from miti_detr.report.page import Cell, Table

from .comparison import ArmResult, Comparison
from .results import RunResult, metrics_of
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


def group_tables(arms: Sequence[ArmResult], comparison: Comparison) -> list[Table]:
    """Return the tables of a group of arms; tables without numbers are left out."""
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
    """Return a table with one row per run."""
    metrics = _metrics_of(comparison.arms)
    rows: list[list[Cell]] = []
    for arm in comparison.arms:
        for run in arm.runs:
            weights = run.facts.get("weights", "")[:8]
            finals: list[Cell] = [run.final(metric) for metric in metrics]
            last = max(run.metrics.records)
            rows.append([run.metrics.name, run.seed, last, weights or None, *finals])
    note = (
        "Runs with the same hash of initial weights (SHA-256) started from the same value of every "
        "parameter. Order and augmentation of the images depend only on the seed and the iteration."
    )
    columns = ["run", "seed", "last iteration", "initial weights", *metrics]
    return Table("runs", "All runs", columns, rows, note=note)


def _metrics_of(arms: Sequence[ArmResult]) -> list[str]:
    return metrics_of(run for arm in arms for run in arm.runs)


def _accuracy(arms: Sequence[ArmResult], comparison: Comparison) -> Table:
    metrics = _metrics_of(arms)
    rows: list[list[Cell]] = [
        [arm.name, len(arm.runs), *(mean_and_spread(arm.values(metric)) for metric in metrics)]
        for arm in arms
    ]
    return Table(
        "accuracy",
        "Table 1: accuracy",
        ["model", "runs", *metrics],
        rows,
        note="COCO metrics of the last evaluation in percent, mean \u00b1 standard deviation over "
        "the seeds. AR is AR@100.",
    )


def _differences(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    by_name = {arm.name: arm for arm in comparison.arms}
    metrics = _metrics_of(arms)
    rows: list[list[Cell]] = []
    for arm in arms:
        reference = by_name.get(arm.reference or "")
        if reference is None:
            continue
        pairs = arm.pairs(reference)
        cells: list[Cell] = [
            paired_difference([a.final(m) for a, _ in pairs], [b.final(m) for _, b in pairs])
            for m in metrics
        ]
        name = f"{arm.name} \u2212 {reference.name}"
        rows.append([name, len(pairs), *cells])
    if not rows:
        return None
    return Table(
        "differences",
        "Difference, paired by seed",
        ["models", "pairs", *metrics],
        rows,
        note="Mean difference in points, with its 95 % interval by Student's t over the seeds that "
        "both have. If the interval contains 0, these runs do not show a difference. A single pair "
        "has no interval.",
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
        note="Time of a complete evaluation of the final weights (reading, inference, metrics), "
        "measured once per run, one run at a time, on all cores. Only trainable parameters.",
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
                cell["note"] = f"{len(found)} of {len(arm.runs)} runs"
            row.append("not reached" if cell is None else cell)
        rows.append(row)
    unit = "epochs" if in_epochs else "iterations"
    return Table(
        "reached",
        f"{unit.capitalize()} to reach an AP",
        ["model", *(f"AP {ap:g}" for ap in comparison.aps)],
        rows,
        digits=1 if in_epochs else 0,
        note="Interpolated linearly between evaluations, starting from AP 0.",
    )


def _stability(arms: Sequence[ArmResult], comparison: Comparison) -> Table | None:
    names = [
        "gradient norm, median",
        "99th percentile",
        "largest",
        "steps clipped (%)",
        "loss spikes per 1000",
        "largest loss / median before",
        "largest drop of AP",
    ]
    rows: list[list[Cell]] = []
    for arm in arms:
        columns = zip(*(_run_stability(run) for run in arm.runs), strict=True)
        rows.append([arm.name, *(mean_and_spread(column) for column in columns)])
    if all(cell is None for row in rows for cell in row[1:]):
        return None
    every = all(run.steps for arm in arms for run in arm.runs)
    source = (
        "Computed from every iteration."
        if every
        else "Some runs have only metrics.json, whose medians over 20 iterations hide the spike of "
        "a single step: compare them with care."
    )
    return Table(
        "stability",
        "Stability: gradient norm and loss",
        ["model", *names],
        rows,
        note=f"{source} Gradient norm before clipping. A spike is a loss above median + "
        f"{SPIKE_FACTOR:g} \u00d7 1.4826 \u00d7 MAD of the {SPIKE_WINDOW} records before it. The "
        "drop of AP is that of an evaluation below the best earlier one, in points.",
    )


def _run_stability(run: RunResult) -> list[float]:
    norms, losses = step_series(run, "grad_norm")[1], step_series(run, "total_loss")[1]
    count, largest = loss_spikes(losses)
    rate = 1000 * count / (len(losses) - SPIKE_WINDOW) if len(losses) > SPIKE_WINDOW else math.nan
    fall = largest_fall(run.curve("AP")[1])
    if not len(norms):
        return [math.nan, math.nan, math.nan, math.nan, rate, largest, fall]
    limit = run.config.get("SOLVER.CLIP_GRADIENTS.CLIP_VALUE")
    clipped = 100 * float((norms > limit).mean()) if isinstance(limit, int | float) else math.nan
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
        note="Share of the objects in a fixed set of test images whose matched query differs from "
        "the previous evaluation, by decoder layer, averaged over the evaluations.",
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
        ["model", "queries", "objects", "queries matched", "effective number"],
        rows,
        digits=1,
        note="At the last evaluation, in the last decoder layer, on the images used for matching. "
        "The effective number is exp(H), with H the entropy of the shares of objects per query.",
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
        note="Last measured values. The residual is that of equation (2) in the 1,inf norm, "
        "divided by the norm of the tokens: 0 means rank one.",
    )
