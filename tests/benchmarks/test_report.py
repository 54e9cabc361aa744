"""Tables and charts of benchmark results."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import chart, report
from benchmarks.steps import _compare_losses, _compare_outputs
from benchmarks.worker import times_as_fast
from miti_detr.bench.evaluation import Evaluation


def marks(start: float, peak: float) -> dict[str, float]:
    return {"start": start, "peak": peak, "added": peak - start, "device_peak": 0.0}


def training(other: str = "hf") -> dict[str, Any]:
    """Ours takes 12 s, the other twice that, with numbers as wide as they come."""
    parts = {"step": 12.0, "forward": 4.0, "criterion": 1.0, "backward": 6.0, "optimizer": 1.0}
    ours = {part: [s, 1.1 * s, 0.9 * s] for part, s in parts.items()}
    theirs = {part: [2 * s for s in values] for part, values in ours.items()}
    return {
        "seconds": {"ours": ours, other: theirs},
        "memory": {"ours": marks(1_000, 12_000), other: marks(1_000, 23_000)},
        "times_as_fast": times_as_fast(ours, theirs),
        "times_the_memory": {"peak": 12 / 23, "added": 0.5},
        "agreement": _compare_losses([2.0, 3.0], [2.0, 3.00003]),
    }


INFERENCE = {
    "seconds": {"ours": {"inference": [0.5, 0.4, 0.6]}},
    "memory": {"ours": marks(700, 1_000)},
}


def test_the_table_of_two_peers() -> None:
    lines = report.steps_table("training", training(), 6).splitlines()
    assert max(len(line) for line in lines) <= 100
    header, _, *rows = (re.split(r"\s{2,}", line.strip()) for line in lines)
    cells = {name: values for name, *values in rows}
    assert header == ["this package", "Hugging Face", "ours is"]
    assert cells["training, ms"] == [
        "12,000 (10,800..13,200)",
        "24,000 (21,600..26,400)",
        "2.00x as fast (2.00..2.00)",
    ]
    assert cells["images/s"] == ["0.50", "0.25"]
    assert cells["peak MiB, process"] == ["12,000", "23,000", "0.52x as large"]
    assert cells["- added by steps"] == ["11,000", "22,000", "0.50x as large"]
    assert lines[-1] == (
        "first losses 2.00000, 3.00000: largest difference 3.0e-05 (relative 1.0e-05)"
    )


def test_the_table_of_one_peer() -> None:
    lines = report.steps_table("inference", INFERENCE, 2).splitlines()
    assert lines[2].split() == ["inference,", "ms", "500", "(400..600)"]
    assert lines[3].split() == ["images/s", "4.00"]
    assert "ours is" not in lines[0]


def test_memory_of_a_gpu_stands_for_that_of_the_process() -> None:
    result = training()
    for peer, peak in (("ours", 300.0), ("hf", 600.0)):
        result["memory"][peer]["device_peak"] = peak
    result["times_the_memory"]["device_peak"] = 0.5
    text = report.steps_table("training", result, 2)
    assert "peak MiB, GPU" in text
    assert "0.50x as large" in text
    assert "process" not in text


def test_agreement_of_outputs() -> None:
    ours, other = (np.zeros(3), np.ones(2)), (np.full(3, 2e-5), np.ones(2))
    text = "\n".join(report._agreement_lines(_compare_outputs(ours, other)))
    assert text == "largest difference of logits 2.0e-05, of boxes 0.0e+00"


def test_ratios_are_of_neighbours() -> None:
    """The machine was twice as slow in the second round: the ratio is the same."""
    found = times_as_fast({"a": [1.0, 2.0, 1.0]}, {"a": [3.0, 6.0, 4.0]})
    assert found == {"a": {"median": 3.0, "min": 3.0, "max": 4.0}}


def points() -> list[dict[str, Any]]:
    def peer(seconds: float, added: float) -> dict[str, Any]:
        return {"seconds": seconds, "memory": marks(500, 500 + added)}

    ratio = {"median": 2.0, "min": 1.5, "max": 2.5}
    both = {"ours": peer(0.1, 10), "plain": peer(0.2, 100), "times_as_fast": ratio}
    more = {"ours": peer(0.3, 20), "plain": peer(0.9, 400), "times_as_fast": ratio}
    return [
        {"value": 0, **both},
        {"value": 1_000, **both},
        {"value": 2_000, **more},
    ]


def test_scaling() -> None:
    lines = report.scaling_table("tokens", points()).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[4].split()[:5] == ["2,000", "300.0", "20", "900.0", "400"]
    assert "2.00x as fast (1.50..2.50)" in lines[4]
    assert lines[5] == "this package, 1,000 to 2,000 (2.00x): time 3.00x, memory 2.00x"
    assert lines[6] == "plain path, 1,000 to 2,000 (2.00x): time 4.50x, memory 4.00x"


def test_evaluation_and_loader() -> None:
    found = {
        "images": 5_000,
        "ours": {"seconds": 4.0, "metrics": 2.0},
        "detectron2": {"seconds": 40.0, "metrics": 30.0},
        "max_difference": 0.0,
    }
    text = report.evaluation_table(found)
    assert [line.split("  ")[-1].strip() for line in text.splitlines()[2:4]] == [
        "10.0x as fast",
        "15.0x as fast",
    ]
    assert text.endswith("5,000 images x 100 detections; largest difference of a statistic 0.0e+00")
    data = {"batch": 10, "workers": 0, "loader_seconds": [1.0, 1.0], "step_seconds": [5.0]}
    lines = report.loader_lines(data).splitlines()
    assert lines[0] == "loader: 10.0 images/s, 0 workers, batches of 10"
    assert lines[1] == "training step: 2.0 images/s; the loader is 5.00x as fast"
    assert report.loader_lines({"missing": "x: gone"}) == "training data are missing: x: gone"


def test_the_papers_table() -> None:
    rows = [
        Evaluation("detr", 41_302_368, 5_000, 1_234.5, 40.55, "detr.pth"),
        Evaluation("miti", 41_302_368, note="no weights"),
    ]
    lines = report.paper_table(rows).splitlines()
    assert "484" in lines[2]
    assert lines[5].split() == ["detr", "1,234.5", "5,000", "41,302,368", "40.5"]
    assert lines[6].split() == ["miti", "41,302,368"]
    assert lines[7:] == ["detr: detr.pth", "miti: no weights"]


ROOFLINE = {
    "rates": {"product": 2e11, "convolution": 3e11, "copy": 1e10},
    "parts": {"backbone": {"forward": 1.0, "backward": 2.0, "flops": 6e9, "share": 0.5}},
    "step": 3.0,
}


@pytest.mark.slow
def test_charts(tmp_path: Path) -> None:
    chart.draw_steps("inference", INFERENCE, tmp_path / "inference.png")
    chart.draw_steps("training", training(), tmp_path / "training.png")
    chart.draw_scaling("tokens", points(), tmp_path / "scaling.png")
    chart.draw_roofline(ROOFLINE, tmp_path / "roofline.png")
    assert len(list(tmp_path.iterdir())) == 4
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            picture.load()
            assert picture.width > 1_000


def test_a_chart_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chart.png"
    path.write_text("old")

    def half(figure: Any, target: Path, **options: Any) -> None:
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(chart.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        chart.draw_roofline(ROOFLINE, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
