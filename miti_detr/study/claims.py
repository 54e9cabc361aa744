"""Which differences between arms a study has shown, as a family of claims."""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import optimize, stats

from miti_detr.report.page import Cell, Table

from .comparison import Comparison
from .statistics import Numbers, paired_difference

LEVEL = 0.05  # probability of a wrong verdict anywhere in the family
POWER = 0.8
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a study says about a metric of an arm, AP unless the study names another.

    Attributes:
        arm: name of the arm.
        reference: name of its reference.
        metric: what is compared.
        difference: arm minus reference, of :func:`paired_difference`.
        bootstrap: the same with the interval of :func:`bootstrap_interval`.
        p: p value of the paired t test after Holm's correction.
        verdict: "higher", "lower" or "undecided".
        detectable: of :func:`detectable_difference`.
    """

    arm: str
    reference: str
    metric: str
    difference: dict[str, Any]
    bootstrap: dict[str, Any]
    p: float
    verdict: str
    detectable: float


def find_claims(comparison: Comparison) -> list[Claim]:
    """Return the verdict on each arm that has two pairs or more with its reference.

    Args:
        comparison: comparison; all its arms with a reference form the family.
    """
    by_name = {arm.name: arm for arm in comparison.arms}
    names, differences = [], []
    for arm in comparison.arms:
        reference = by_name.get(arm.reference or "")
        pairs = [] if reference is None else arm.pairs(reference)
        found = np.array([a.final(arm.metric) - b.final(arm.metric) for a, b in pairs])
        found = found[np.isfinite(found)]
        if len(found) > 1:
            names.append((arm.name, arm.reference or "", arm.metric))
            differences.append(found)
    adjusted = holm([p_value(found) for found in differences])
    return [
        Claim(
            *pair,
            difference=paired_difference(found, np.zeros(len(found))) or {},
            bootstrap=_bootstrap_cell(found),
            p=p,
            verdict=verdict(float(found.mean()), p),
            detectable=detectable_difference(found),
        )
        for pair, found, p in zip(names, differences, adjusted, strict=True)
    ]


def claims_table(comparison: Comparison) -> Table | None:
    """Return a table of :func:`find_claims`; None without claims."""
    rows: list[list[Cell]] = [
        [
            f"{claim.arm} \u2212 {claim.reference}",
            claim.metric,
            claim.difference["n"],
            claim.difference,
            claim.bootstrap,
            f"{claim.p:.2g}",
            claim.verdict,
            claim.detectable,
        ]
        for claim in find_claims(comparison)
    ]
    if not rows:
        return None
    return Table(
        "claims",
        "Claims: each arm against its reference",
        [
            "models",
            "metric",
            "pairs",
            "difference",
            "bootstrap",
            "p (Holm)",
            "verdict",
            "detectable",
        ],
        rows,
        digits=1,
        note="Paired by seed, with the 95 % intervals of Student's t and of the bootstrap over the "
        f"seeds. p is that of the paired t test after Holm's correction for the {len(rows)} claims "
        f"of this table. The verdict is undecided where it is {LEVEL:g} or more. Detectable is the "
        f"difference that this number of seeds with this spread shows in {POWER:.0%} of studies.",
    )


def verdict(mean: float, p: float) -> str:
    """Return "higher", "lower" or "undecided" for a mean difference and its adjusted p value."""
    if not p < LEVEL:
        return "undecided"
    return "higher" if mean > 0 else "lower"


def p_value(differences: Numbers) -> float:
    """Return the two-sided p value of the paired t test; 1 if all differences are 0.

    Args:
        differences: two or more differences, one per seed.
    """
    array = np.asarray(differences, dtype=float)
    error = array.std(ddof=1) / math.sqrt(len(array))
    if error == 0:
        return 1.0 if array.mean() == 0 else 0.0
    return float(2 * stats.t.sf(abs(array.mean()) / error, len(array) - 1))


def holm(p_values: Numbers) -> list[float]:
    """Adjust p values for their number by the step-down method of Holm (1979).

    With the m values in increasing order, the i-th is multiplied by m - i + 1; a value is at least
    as large as the one before it and at most 1.

    Args:
        p_values: p values of a family of tests.

    Returns:
        Adjusted values, in the order of the arguments.
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return [float(value) for value in adjusted]


def bootstrap_interval(differences: Numbers, confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of the mean over resamples of the seeds (seeded).

    Args:
        differences: one difference per seed.
        confidence: confidence level of the interval.
    """
    array = np.asarray(differences, dtype=float)
    rows = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(array[rows].mean(axis=1), (tail, 100 - tail))
    return float(low), float(high)


def detectable_difference(differences: Numbers) -> float:
    """Return the mean difference that a paired t test with this spread finds with a power of 80 %.

    The test is two-sided at 5 %. With noncentrality d * sqrt(n) / sd, the statistic follows the
    noncentral t distribution with n - 1 degrees of freedom; the other tail is neglected.

    Args:
        differences: two or more differences, one per seed.
    """
    array = np.asarray(differences, dtype=float)
    n = len(array)
    limit = stats.t.ppf(1 - LEVEL / 2, n - 1)
    shift = optimize.brentq(lambda nc: stats.nct.sf(limit, n - 1, nc) - POWER, 0, 10 * limit)
    return float(shift * array.std(ddof=1) / math.sqrt(n))


def _bootstrap_cell(differences: np.ndarray) -> dict[str, Any]:
    low, high = bootstrap_interval(differences)
    return {"mean": float(differences.mean()), "low": low, "high": high, "n": len(differences)}
