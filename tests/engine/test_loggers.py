"""Writers that a config names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.events import EventWriter, get_event_storage

from miti_detr.engine import Trainer, setup_config
from miti_detr.engine.hooks.loggers import RunWriter, build_loggers
from tests.engine.stub import config

SCHEDULE = {"SOLVER__MAX_ITER": 25, "SOLVER__STEPS": (), "SOLVER__CHECKPOINT_PERIOD": 10}


class Plain(EventWriter):
    """Any writer of Detectron2's kind, with one more argument."""

    found: list[Any] = []

    def __init__(self, note: str = "") -> None:
        self.note = note

    def write(self) -> None:
        self.found.append((self.note, get_event_storage().iter))

    def close(self) -> None:
        self.found.append("closed")


class Sent(RunWriter):
    """Keeps what a service would get."""

    sent: list[tuple[int, Mapping[str, float]]] = []

    def send(self, iteration: int, scalars: Mapping[str, float]) -> None:
        assert self.recorded_id("sent", lambda: "once") == "once"
        self.sent.append((iteration, scalars))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def test_writers_by_name(tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """With arguments or without. What is new is sent once, with the values of metrics.json, and a
    resumed run continues after the iterations that were sent before its checkpoint.
    """
    Plain.found, Sent.sent = [], []
    loggers = [[_name(Plain), {"note": "a"}], _name(Sent)]
    cfg = config(tiny_data, tmp_path, **SCHEDULE, LOGGERS=loggers, OUTPUT_NOTE="a first try")
    Trainer(cfg).train()
    assert Plain.found[:2] == [("a", 19), ("a", 24)]
    assert Plain.found[-1] == "closed"
    records = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    expected = {r.pop("iteration"): r for r in records}
    assert {i: dict(sorted(scalars.items())) for i, scalars in Sent.sent} == expected
    assert "note: a first try" in log.text
    assert "OUTPUT_NOTE: a first try" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    Sent.sent = []
    resumed = Trainer(cfg)
    resumed.resume_or_load()
    resumed.train()
    assert [i for i, _ in Sent.sent] == [19, 24]  # the record of the checkpoint is made again


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere.Writer", r"'nowhere.Writer' cannot be imported"),
        ("json.nothing", r"'json.nothing' cannot be imported"),
        ("WandbWriter", r"'WandbWriter' cannot be imported"),
        ("json.JSONDecoder", r"'json.JSONDecoder' is no subclass of"),
    ],
)
def test_names_of_no_writers(entry: str, message: str) -> None:
    cfg = setup_config(opts=["LOGGERS", str([entry])])
    with pytest.raises(ValueError, match=message):
        build_loggers(cfg)


@pytest.mark.parametrize("entry", [3, [], ["a", "b"], ["a", {}, {}], ["a", {1: 2}], {"a": 1}])
def test_form_of_entries(entry: Any) -> None:
    with pytest.raises(ValueError, match=r"LOGGERS has the entry .* dotted name of a class"):
        setup_config(opts=["LOGGERS", str([entry])])


def _train_twice(cfg: Any, tag: str) -> None:
    """A run, and the same resumed from a checkpoint before its end."""
    Trainer(cfg).train()
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text(tag)
    resumed = Trainer(cfg)
    resumed.resume_or_load()
    resumed.train()


@pytest.mark.slow
def test_wandb_offline(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in two parts, with the id of the first."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = {"project": "tiny", "mode": "offline"}
    loggers = [["miti_detr.engine.hooks.loggers.WandbWriter", arguments]]
    cfg = config(tiny_data, tmp_path / "run", **SCHEDULE, LOGGERS=loggers, OUTPUT_NOTE="try")
    _train_twice(cfg, "model_0000009.pth")
    number = (tmp_path / "run" / "wandb_id.txt").read_text()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{number}/*.wandb"))
    assert files
    content = b"".join(file.read_bytes() for file in files)
    for word in (b"total_loss", b"grad_norm", b"MAX_ITER", b"try"):
        assert word in content


@pytest.mark.slow
def test_mlflow_in_a_file(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics of metrics.json in one run, the config and the note."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no database")
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = {"experiment": "tiny", "tracking_uri": uri}
    loggers = [["miti_detr.engine.hooks.loggers.MLflowWriter", arguments]]
    cfg = config(tiny_data, tmp_path / "run", **SCHEDULE, LOGGERS=loggers, OUTPUT_NOTE="try")
    _train_twice(cfg, "model_0000009.pth")
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] == "try"
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    records = {r["iteration"]: r for r in map(json.loads, lines)}
    history = client.get_metric_history(run.info.run_id, "total_loss")
    assert {m.step for m in history} == {19, 24}
    for metric in history:
        assert metric.value == pytest.approx(records[metric.step]["total_loss"], rel=1e-6)
    assert client.list_artifacts(run.info.run_id)[0].path == "config.yaml"
