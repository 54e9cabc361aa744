"""A run that ends when its evaluations no longer improve."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from miti_detr.engine import Trainer
from miti_detr.engine.hooks import read_records
from tests.engine.kills import differences
from tests.engine.stub import config

STOP = {
    "DATASETS__TEST": ("tiny_val",),
    "TEST__EVAL_PERIOD": 2,
    "SOLVER__MAX_ITER": 16,
    "SOLVER__STEPS": (12,),
    "SOLVER__CHECKPOINT_PERIOD": 3,
    "SOLVER__EARLY_STOP__PATIENCE": 2,
}


class Scripted(Trainer):
    """Evaluates to the score of each iteration."""

    scores: dict[int, float] = {}
    metric = "bbox", "AP"

    def build_hooks(self) -> Any:
        type(self).now = lambda: self.iter
        return super().build_hooks()

    @classmethod
    def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> Any:
        section, name = cls.metric
        return {section: {name: cls.scores[cls.now()]}}  # type: ignore[attr-defined]


def _run(
    data: Path,
    output: Path,
    scores: list[float],
    *,
    resume: bool = False,
    metric: tuple[str, str] = ("bbox", "AP"),
    **changes: Any,
) -> Trainer:
    """Train with given scores of the iterations 1, 3, 5, ... and of the end."""
    Scripted.scores = {2 * i + 1: score for i, score in enumerate(scores)} | {16: 99.0}
    Scripted.metric = metric
    trainer = Scripted(config(data, output, **{**STOP, **changes}))
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def _checkpoint(folder: Path, name: str) -> dict[str, Any]:
    content = torch.load(folder / name, weights_only=True)
    content["trainer"].pop("history")
    return content


def test_stops_resumes_and_goes_on(
    tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Scores 5, 7, 6, 7 | 8: the third is no better, nor the fourth. With more patience the run is
    one that had this patience from the start.
    """
    folder = tmp_path / "a"
    scores = [5.0, 7.0, 6.0, 7.0, 8.0, 8.0, 8.0]
    stopped = _run(tiny_data, folder, scores)
    reason = (
        "stopped early after iteration 7: 2 evaluations in a row have not improved bbox/AP by more "
        "than 0; the best was 7 at iteration 3. To continue, resume with "
        "SOLVER.EARLY_STOP.PATIENCE above 2"
    )
    assert reason in log.text
    assert stopped.iter == 7
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 7
    assert torch.load(folder / "model_best.pth", weights_only=True)["score"] == 7.0
    assert [r["iteration"] for r in read_records(str(folder / "metrics.json"))] == [7]

    log.clear()
    before = (folder / "metrics.json").read_text()
    assert _run(tiny_data, folder, scores, resume=True).iter == 7
    assert reason in log.text
    assert (folder / "metrics.json").read_text() == before

    patient = {"SOLVER__EARLY_STOP__PATIENCE": 3}
    _run(tiny_data, folder, scores, resume=True, **patient)
    straight = _run(tiny_data, tmp_path / "b", scores, **patient)
    assert straight.iter == 16  # the score of 8 would have been too old at the next evaluation
    files = [_checkpoint(tmp_path / name, "model_final.pth") for name in "ab"]
    for file in files:
        file.pop("miti_detr", None)
    assert differences(*files) == []


@pytest.mark.parametrize("stop", [6, 7])
def test_kill_between_checkpoint_and_evaluation(
    tiny_data: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation after the checkpoint of iteration 5 is counted once, done again or read."""
    scores = [5.0, 4.0, 6.0, 5.0, 5.0]
    whole = _run(tiny_data, tmp_path / "a", scores)
    assert whole.iter == 9

    class Killed(Exception):
        pass

    def before_step(self: Trainer) -> None:
        if self.iter == stop:
            raise Killed
        Trainer.before_step(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        patch.setattr(Scripted, "before_step", before_step, raising=False)
        _run(tiny_data, tmp_path / "b", scores)
    if stop == 6:  # as if the kill had come before the evaluation
        (tmp_path / "b" / "metrics.json").write_text("")
    resumed = _run(tiny_data, tmp_path / "b", scores, resume=True)
    assert (resumed.start_iter, resumed.iter) == (6, 9)
    files = [_checkpoint(tmp_path / name, "model_final.pth") for name in "ab"]
    assert files[0]["trainer"]["hooks"]["EarlyStop"] == files[1]["trainer"]["hooks"]["EarlyStop"]


@pytest.mark.parametrize(
    ("scores", "delta", "metric", "last"),
    [
        ([5.0, 5.4, 5.4, 6.0], 0.5, ("bbox", "AP"), 5),  # less than 0.5 above 5.0, twice
        ([5.0, 4.0, 3.0, 3.5, 3.2], 0.0, ("validation", "total_loss"), 9),  # lower is better
        ([math.nan, 1.0, math.nan, math.nan], 0.0, ("bbox", "AP"), 7),
        ([math.nan, math.nan], 0.0, ("bbox", "AP"), 3),
    ],
)
def test_what_counts_as_better(
    tiny_data: Path,
    tmp_path: Path,
    scores: list[float],
    delta: float,
    metric: tuple[str, str],
    last: int,
) -> None:
    changes = {"SOLVER__EARLY_STOP__METRIC": "/".join(metric)}
    changes |= {"SOLVER__EARLY_STOP__MIN_DELTA": str(delta)}
    assert _run(tiny_data, tmp_path, scores, metric=metric, **changes).iter == last


def test_a_metric_that_is_not_there_is_named(tiny_data: Path, tmp_path: Path) -> None:
    message = r"EARLY_STOP.METRIC is 'bbox/ap', which .* does not give. Choose one of bbox/AP"
    with pytest.raises(ValueError, match=message):
        _run(tiny_data, tmp_path, [1.0], SOLVER__EARLY_STOP__METRIC="bbox/ap")


def test_without_evaluations_it_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PATIENCE is 2, but there are no evaluations"):
        config(tiny_data, tmp_path, **{**STOP, "TEST__EVAL_PERIOD": 0})
