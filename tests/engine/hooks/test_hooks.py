import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.logger import setup_logger

from miti_detr.engine import Trainer
from miti_detr.engine.hooks import drop_records, read_records
from tests.engine.stub import config


def test_records_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    """A cut last line goes, too; the order of the others stays."""
    path = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i, "total_loss": float(i)}) for i in (19, 9, 39, 40, 59)]
    path.write_text("\n".join(lines) + '\n{"iteration": 5, "total')
    drop_records(str(path), 40)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [19, 9, 39]
    assert [r["iteration"] for r in read_records(str(path))] == [19, 9, 39]
    drop_records(str(path), 0)
    assert path.read_text() == ""
    drop_records(str(tmp_path / "none.json"), 0)
    assert read_records(str(tmp_path / "none.json")) == []


def test_metrics_are_not_doubled_by_a_resume(tiny_data: Path, tmp_path: Path) -> None:
    """40 iterations; resumed from 20, as if the checkpoint after them were the last: 19, 39 once
    each.
    """
    cfg = config(tiny_data, tmp_path, SOLVER__MAX_ITER=40, SOLVER__CHECKPOINT_PERIOD=20)
    Trainer(cfg).train()
    iterations = [r["iteration"] for r in read_records(str(tmp_path / "metrics.json"))]
    assert iterations == [19, 39]
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    assert trainer.start_iter == 20
    assert [r["iteration"] for r in read_records(str(tmp_path / "metrics.json"))] == iterations


class _Scripted(Trainer):
    """Evaluates to given scores, one after the other."""

    scores: list[float] = []

    @classmethod
    def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> Any:
        return {"bbox": {"AP": cls.scores.pop(0)}}


def test_best_weights_survive_a_resume(tiny_data: Path, tmp_path: Path) -> None:
    """Scores 5, 9 (best), 7 | resume | 8, 6: the file stays that of 9, and is never resumed
    from.
    """
    cfg = config(
        tiny_data, tmp_path, DATASETS__TEST=("tiny_val",), TEST__EVAL_PERIOD=2, SOLVER__MAX_ITER=6
    )
    _Scripted.scores = [5.0, 9.0, 7.0]
    _Scripted(cfg).train()

    def best() -> dict[str, Any]:
        return torch.load(tmp_path / "model_best.pth", weights_only=True)

    assert (best()["score"], best()["iteration"]) == (9.0, 3)
    assert "trainer" not in best()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"

    cfg.SOLVER.MAX_ITER = 10
    _Scripted.scores = [8.0, 6.0]
    trainer = _Scripted(cfg)
    trainer.resume_or_load()
    assert trainer.start_iter == 6
    trainer.train()
    assert _Scripted.scores == []
    assert (best()["score"], best()["iteration"]) == (9.0, 3)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_in_a_terminal_and_lines_in_the_log(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar has iteration and loss; the periodic line is in log.txt and not on the screen; other
    lines are.
    """
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    logger = logging.getLogger("detectron2")
    monkeypatch.setattr(logger, "handlers", [])
    setup_logger(str(tmp_path))
    handlers = list(logger.handlers)
    Trainer(config(tiny_data, tmp_path)).train()
    screen, log = terminal.getvalue(), (tmp_path / "log.txt").read_text()
    assert "6/6" in screen
    assert "loss 0." in screen or "loss 1." in screen
    assert "total_loss: " in log
    assert "total_loss: " not in screen
    assert "Total training time" in screen
    assert logger.handlers == handlers


def test_no_bar_elsewhere(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("detectron2").handlers.clear()
    Trainer(config(tiny_data, tmp_path)).train()
    out, err = capsys.readouterr()
    assert "6/6" not in out + err
