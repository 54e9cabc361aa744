import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from miti_detr.visualize.curves import (
    AP,
    AR,
    Run,
    _draw_loss,
    draw_curves,
    read_metrics,
    read_run,
    run_names,
    smooth,
)


def write_metrics(folder: Path, *lines: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def test_last_record_of_an_iteration_wins(tmp_path: Path) -> None:
    path = write_metrics(
        tmp_path,
        {"iteration": 39, "total_loss": 5.0, "lr": 0.1},
        {"iteration": 19, "total_loss": 9.0},
        {"iteration": 39, "total_loss": 4.0},
        {"iteration": 39, "bbox/AP": 12.5},
        {"no": "iteration"},
        '{"iteration": 59, "total_l',
    )
    metrics = read_metrics(path)
    assert metrics == {
        19: {"total_loss": 9.0},
        39: {"total_loss": 4.0, "lr": 0.1, "bbox/AP": 12.5},
    }
    assert list(metrics) == [19, 39]


def test_missing_keys_leave_gaps() -> None:
    run = Run("a", {1: {"x": 1.0}, 2: {"y": 5.0}, 3: {"x": 2.0}})
    steps, values = run.series("x")
    assert steps.tolist() == [1, 3]
    assert values.tolist() == [1.0, 2.0]
    assert run.series("z")[0].tolist() == []


@pytest.mark.parametrize("text", ["", "\n", '{"iteration"'])
def test_a_file_without_records_is_named(tmp_path: Path, text: str) -> None:
    path = write_metrics(tmp_path, text)
    with pytest.raises(ValueError, match=r"metrics\.json holds no metrics"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.json.*output folder"):
        read_run(tmp_path)


def test_keys_of_one_and_several_test_sets() -> None:
    record = {"bbox/AP": 1.0, "b/bbox/AP": 2.0, "bbox/AP-disk": 3.0, "bbox/AP50": 4.0}
    run = Run("a", {1: {**record, "bbox/AR": 5.0, "bbox/ARs": 6.0}})
    assert run.keys(AP) == ["b/bbox/AP", "bbox/AP"]
    assert run.keys(AR) == ["bbox/AR"]


def test_smooth_is_the_symmetric_average() -> None:
    """60 points are averaged over two neighbours on each side; a straight line does not change."""
    line = np.arange(60.0)
    np.testing.assert_allclose(smooth(line), line, rtol=0, atol=1e-9)
    spike = np.zeros(60)
    spike[30] = 1.0
    expected = np.zeros(60)
    expected[28:33] = 1 / 5
    np.testing.assert_allclose(smooth(spike), expected, rtol=0, atol=1e-12)


def test_smooth_leaves_out_what_is_not_finite() -> None:
    values = np.ones(60)
    values[[10, 20]] = math.nan, math.inf
    np.testing.assert_allclose(smooth(values), np.ones(60), rtol=0, atol=1e-12)
    assert np.isnan(smooth(np.full(3, math.nan))).all()


def test_runs_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [write_metrics(tmp_path / p / "run", {"iteration": 1}) for p in ("a", "b")]
    assert run_names(paths) == ["a/run", "b/run"]
    assert run_names([paths[0].parent]) == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("records", "panels"),
    [
        ([{"iteration": 1, "total_loss": math.nan}], 1),
        ([{"iteration": 1, "bbox/AP": 0.0, "bbox/AP50": math.nan}], 1),
        ([{"iteration": 1, "total_loss": 3.0}, {"iteration": 2, "bbox/AP": 9.0}], 2),
        ([{"iteration": 1, "total_loss": 3.0, "bbox/AP": 9.0, "bbox/AR": 8.0}], 3),
        ([{"iteration": 1, "total_loss": 3.0, "validation/total_loss": 2.0}], 1),
    ],
)
def test_one_panel_for_each_thing_there_is(
    tmp_path: Path, records: list[dict], panels: int
) -> None:
    runs = [read_run(write_metrics(tmp_path / name, *records), name) for name in ("a", "b")]
    draw_curves(runs, tmp_path / "out" / "curves.png")
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert picture.width == panels * 576
        assert picture.height == 468
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours  # both runs are in the legend
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.png"]


def test_the_validation_loss_is_drawn_beside_that_of_training() -> None:
    record = {"total_loss": 3.0, "validation/total_loss": 2.0, "b/validation/total_loss": 1.0}
    axis = Figure().subplots()
    _draw_loss(axis, Run("a", {1: record}), "C0")
    dashed = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata().tolist() for line in dashed] == [[1.0], [2.0]]
    assert axis.get_title() == "loss of training (solid) and validation (dashed)"
    _draw_loss(other := Figure().subplots(), Run("a", {1: {"total_loss": 3.0}}), "C0")
    assert other.get_title() == "training loss"


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    run = read_run(write_metrics(tmp_path / "bare", {"iteration": 1, "lr": 0.1}))
    with pytest.raises(ValueError, match=r"no total_loss, .* in bare"):
        draw_curves([run], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_masks_and_panoptic_quality_have_panels(tmp_path: Path) -> None:
    """4.8 inches at 120 points each: loss, AP, mask AP and PQ; only the loss without them."""
    record = {"total_loss": 2.0}
    masks = {"bbox/AP": 40.0, "segm/AP": 30.0, "segm/AP50": 50.0, "panoptic_seg/PQ": 45.0}
    for metrics, panels in ((record, 1), ({**record, **masks}, 4)):
        draw_curves([Run("a", {1: metrics, 2: metrics})], tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").width == pytest.approx(576 * panels, abs=2)
