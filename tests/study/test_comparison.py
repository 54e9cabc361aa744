"""Arms and tables from the folders of runs with made-up numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miti_detr.report.page import Table, cell_text
from miti_detr.study.comparison import Comparison, compare_runs, compare_study
from miti_detr.study.drawing.figures import common_curve
from miti_detr.study.plan import Arm, Study, StudyRun
from miti_detr.study.tables import group_tables, runs_table
from tests.study.made_runs import write_foreign_run, write_run

APS = {"detr": ([10, 20], [12, 24], [11, 22]), "miti": ([11, 21], [13, 26], [10, 25])}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """The final APs are 20, 24, 22 for DETR and 21, 26, 25 for Miti-DETR."""
    paths = [
        write_run(tmp_path / arm / f"seed_{seed}", aps, seed=seed, residual=arm, rank=seed / 2)
        for arm, runs in APS.items()
        for seed, aps in enumerate(runs)
    ]
    return compare_runs(paths)


def tables_of(comparison: Comparison) -> dict[str, Table]:
    (arms,) = comparison.groups.values()
    return {table.key: table for table in group_tables(arms, comparison)}


def test_runs_that_differ_in_the_seed_are_one_arm(comparison: Comparison) -> None:
    assert [(arm.name, arm.reference) for arm in comparison.arms] == [
        ("detr", None),
        ("miti", "detr"),
    ]
    assert [run.seed for run in comparison.arms[0].runs] == [0, 1, 2]
    assert comparison.missing == []
    assert comparison.aps == (5.5, 11, 16)  # of 22: a quarter, a half, three quarters = 16.5 -> 16


def test_accuracy_and_difference(comparison: Comparison) -> None:
    """22 +- 2; d = 1, 2, 3: 2 -+ 4.302653 / sqrt(3)."""
    tables = tables_of(comparison)
    detr, miti = tables["accuracy"].rows
    assert detr[:3] == ["detr", 3, {"mean": 22.0, "sd": 2.0, "n": 3}]
    ar: Any = miti[-1]
    assert ar["mean"] == pytest.approx(24 + 6)
    (row,) = tables["differences"].rows
    assert row[:2] == ["miti \u2212 detr", 3]
    cell: Any = row[2]
    half = 4.302653 / math.sqrt(3)
    assert (cell["mean"], cell["low"], cell["high"]) == pytest.approx((2, 2 - half, 2 + half))
    assert cell_text(cell, 2) == "+2.00 [-0.48, +4.48]"


def test_epochs_to_reach(comparison: Comparison) -> None:
    """The curves 10, 20 and 12, 24 and 11, 22 reach AP 16 after 160, 133.3 and 145.5 iterations; an
    epoch has 50."""
    cell: Any = tables_of(comparison)["reached"].rows[0][3]
    expected = np.mean([160, 100 + 100 / 3, 100 + 500 / 11]) / 50
    assert cell["mean"] == pytest.approx(expected)


def test_an_ap_that_some_runs_do_not_reach(comparison: Comparison) -> None:
    (arms,) = comparison.groups.values()
    wanted = Comparison("", comparison.groups, (23.0, 90.0), 0.5, [])
    (table,) = [t for t in group_tables(arms, wanted) if t.key == "reached"]
    assert cell_text(table.rows[0][1], 1).endswith("(1 of 3 runs)")
    assert table.rows[0][2] == "not reached"


def test_stability_matching_and_queries(comparison: Comparison) -> None:
    """Norms cycle through 1..5: their median is 3, and 60 % exceed the clip value of 2.5. In layer
    2 the queries go from 0 1 1 to 0 1 2: one of three changes, and each finds one object."""
    tables = tables_of(comparison)
    row: Any = tables["stability"].rows[0]
    assert [cell["mean"] for cell in row[1:5]] == pytest.approx([3, 5, 5, 60])
    assert row[5]["mean"] == 0
    assert "Computed from every iteration" in tables["stability"].note
    matching: Any = tables["matching"].rows[0]
    assert [cell["mean"] for cell in matching[1:]] == pytest.approx([0, 100 / 3])
    queries: Any = tables["queries"].rows[0]
    assert queries[1:3] == [10, 3]
    assert [cell["mean"] for cell in queries[3:]] == pytest.approx([3, 3])


def test_table_2_and_rank(comparison: Comparison) -> None:
    tables = tables_of(comparison)
    row: Any = tables["efficiency"].rows[0]
    assert (row[1]["mean"], row[2], row[3]) == (4.25, 300, 1234567)
    expected = [{"mean": 0.25, "sd": 0.25, "n": 3}] * 2
    assert sorted(tables["rank"].rows) == [
        ["encoder, effective_rank", *expected],
        ["encoder, residual", *expected],
    ]
    assert [row[:4] for row in runs_table(comparison).rows][1] == [
        "detr/seed_1",
        1,
        200,
        "01234567",
    ]


def test_a_foreign_run_says_what_it_lacks(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "ours", [10, 20])
    comparison = compare_runs([write_foreign_run(tmp_path / "theirs"), ours])
    assert comparison.missing[0] == "theirs lacks bbox/AR (AR@100), config.yaml."
    assert (
        "different lengths: their last records are from the iterations 199, 200"
        in comparison.missing[1]
    )
    tables = tables_of(comparison)
    accuracy = tables["accuracy"].rows[0]
    assert [cell_text(cell, 2) for cell in accuracy] == [
        "theirs",
        "1",
        "30.50",
        "50.25",
        *["\u2013"] * 5,
    ]
    assert tables["differences"].rows[0][1:3] == [0, None]  # no seed, no pair
    assert "compare them with care" in tables["stability"].note
    assert tables["reached"].title == "Iterations to reach an AP"


def test_masks_are_compared_where_runs_have_them(tmp_path: Path) -> None:
    """Mask AP 30 and 34 with seed 1: the difference is 4. A run without masks has a gap."""
    paths = []
    for name, value in (("none", 30.0), ("b", 34.0), ("boxes", None)):
        path = write_run(tmp_path / name, [10, 20], residual=name)
        if value is not None:
            record = {"iteration": 200, "segm/AP": value, "panoptic_seg/PQ": 2 * value}
            with (path / "metrics.json").open("a") as file:
                file.write(json.dumps(record) + "\n")
        paths.append(path)
    tables = tables_of(compare_runs(paths))
    assert tables["accuracy"].columns[-2:] == ["segm/AP", "panoptic_seg/PQ"]
    cells = [[cell_text(cell, 1) for cell in row[-2:]] for row in tables["accuracy"].rows]
    assert cells == [["30.0", "60.0"], ["34.0", "68.0"], ["\u2013", "\u2013"]]
    assert cell_text(tables["differences"].rows[0][-2], 1) == "+4.0"
    assert len(runs_table(compare_runs(paths)).rows[0]) == len(
        runs_table(compare_runs(paths)).columns
    )


def test_runs_without_a_seed_are_not_paired(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, [10, 20], seed=None, residual=name) for name in ("none", "b")
    ]
    comparison = compare_runs(paths)
    assert comparison.missing[0] == "none lacks a seed in its config."
    assert tables_of(comparison)["differences"].rows[0][1] == 0


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.json: is this the output folder"):
        compare_runs([tmp_path])


def test_unfinished_and_diverged_runs_are_left_out(tmp_path: Path) -> None:
    arm = Arm("detr", "detr.yaml")
    runs = [StudyRun(arm, seed, tmp_path / f"seed_{seed}", (), 200) for seed in range(3)]
    study = Study("title", (arm,), {"All": ["detr"]})
    for run in runs:
        write_run(run.path, [10, 20], seed=run.seed)
    (runs[1].path / "finished.json").unlink()
    (runs[2].path / "finished.json").write_text('{"error": "the loss is not finite"}')
    comparison = compare_study(study, runs)
    assert [run.seed for run in comparison.arms[0].runs] == [0]
    assert comparison.missing == [
        "detr/seed_1 has not finished and is left out.",
        "detr/seed_2 stopped early: the loss is not finite",
    ]
    (runs[0].path / "finished.json").unlink()
    with pytest.raises(ValueError, match="no run has finished"):
        compare_study(study, runs)


def test_curves_meet_where_all_have_points() -> None:
    steps, values = common_curve(
        [(np.array([1, 2, 4]), np.array([1.0, 2, 4])), (np.array([2, 3, 4]), np.array([5.0, 6, 7]))]
    )
    assert steps.tolist() == [2, 4]
    assert values.tolist() == [[2, 4], [5, 7]]
