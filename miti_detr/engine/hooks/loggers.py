"""Writers of ``LOGGERS``: the metrics of a run to Weights & Biases, to MLflow, or elsewhere."""

import functools
import importlib
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from miti_detr.checks import shown
from miti_detr.files import write_text

_WINDOW = 20  # iterations over which scalars are smoothed, as in ``metrics.json``
_EXTRA = "{} is not installed. `pip install miti_detr[loggers]`, or take it out of LOGGERS."


class RunWriter(EventWriter):
    """Base of writers that send what is new in the event storage, by iterations.

    A resumed run continues the record of the interrupted one, by an id in ``OUTPUT_DIR``.
    """

    _last_write = -1  # last iteration that was sent

    def __init__(self, cfg: CfgNode) -> None:
        """Take the config of the run: its ``OUTPUT_DIR``, ``OUTPUT_NOTE`` and all else."""
        self.cfg = cfg

    def write(self) -> None:
        """Send the scalars of iterations that were not sent before."""
        new: dict[int, dict[str, float]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(_WINDOW)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                new.setdefault(iteration, {})[name] = value
        for iteration in sorted(new):
            self.send(iteration, new[iteration])
            self._last_write = iteration

    def send(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of an iteration."""
        raise NotImplementedError

    def recorded_id(self, name: str, make: Callable[[], str]) -> str:
        """Return the id of the run in a service, which is made once and kept in ``OUTPUT_DIR``."""
        path = Path(self.cfg.OUTPUT_DIR, f"{name}_id.txt")
        if not path.is_file():
            write_text(path, make())
        return path.read_text(encoding="utf-8").strip()


class WandbWriter(RunWriter):
    """Weights & Biases; needs the package ``wandb``."""

    def __init__(self, cfg: CfgNode, **arguments: Any) -> None:
        """Begin or continue a run.

        Args:
            cfg: of the run.
            arguments: of ``wandb.init``, such as ``project`` and ``mode``.

        Raises:
            ImportError: ``wandb`` is not installed.
        """
        super().__init__(cfg)
        try:
            import wandb
        except ImportError as error:
            raise ImportError(_EXTRA.format("wandb")) from error
        defaults = {
            "dir": cfg.OUTPUT_DIR,
            "name": Path(cfg.OUTPUT_DIR).name,
            "notes": cfg.OUTPUT_NOTE,
            "config": yaml.safe_load(cfg.dump()),
            "id": self.recorded_id("wandb", lambda: uuid.uuid4().hex[:8]),
            "resume": "allow",
        }
        self._run = wandb.init(**{**defaults, **arguments})

    def send(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """See the base class."""
        self._run.log(dict(scalars), step=iteration)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflowWriter(RunWriter):
    """MLflow; needs the package ``mlflow``."""

    def __init__(self, cfg: CfgNode, *, tracking_uri: str = "", experiment: str = "") -> None:
        """Begin or continue a run.

        Args:
            cfg: of the run.
            tracking_uri: of the server or database; "": as MLflow finds it, for example from the
                environment variable ``MLFLOW_TRACKING_URI``.
            experiment: name, is made if it does not exist; "": MLflow's default.

        Raises:
            ImportError: ``mlflow`` is not installed.
        """
        super().__init__(cfg)
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        except ImportError as error:
            raise ImportError(_EXTRA.format("mlflow")) from error
        self._metric = Metric
        self._client = MlflowClient(tracking_uri or None)
        self._id = self.recorded_id("mlflow", lambda: self._create(experiment or "Default"))
        self._client.update_run(self._id, status="RUNNING")
        self._client.set_tag(self._id, "mlflow.note.content", cfg.OUTPUT_NOTE)
        self._client.log_text(self._id, cfg.dump(), "config.yaml")

    def _create(self, experiment: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        name = Path(self.cfg.OUTPUT_DIR).resolve().name
        created: str = self._client.create_run(number, run_name=name).info.run_id
        return created

    def send(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """See the base class."""
        now = int(1000 * time.time())
        metrics = [
            self._metric(re.sub(r"[^\w\-./ ]", "_", name), value, now, iteration)
            for name, value in scalars.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


def build_loggers(cfg: CfgNode) -> list[Callable[[], EventWriter]]:
    """Find the classes of ``LOGGERS``.

    Args:
        cfg: of the run. Each entry is the dotted name of a subclass of ``EventWriter``, or a list
            of it and its arguments. Subclasses of :class:`RunWriter` get the config as well.

    Returns:
        For each a function that makes the writer.

    Raises:
        ValueError: there is no such class, or it is no writer.
    """
    makers: list[Callable[[], EventWriter]] = []
    for entry in cfg.LOGGERS:
        name, arguments = (entry, {}) if isinstance(entry, str) else (entry[0], dict(*entry[1:]))
        module, _, attribute = name.rpartition(".")
        try:
            kind: Any = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"LOGGERS: {name!r} cannot be imported ({error})") from error
        if not (isinstance(kind, type) and issubclass(kind, EventWriter)):
            raise ValueError(
                f"LOGGERS: {name!r} is no subclass of detectron2.utils.events.EventWriter"
            )
        of_run = (cfg,) if issubclass(kind, RunWriter) else ()
        makers.append(functools.partial(kind, *of_run, **arguments))
    return makers


def check_loggers(entries: Any) -> None:
    """Check the form of ``LOGGERS``, without an import.

    Raises:
        ValueError: names the entry and the form.
    """
    for entry in entries:
        parts = [entry] if isinstance(entry, str) else entry
        is_list = isinstance(parts, list | tuple) and 1 <= len(parts) <= 2
        if not (is_list and isinstance(parts[0], str) and _are_arguments(parts[1:])):
            raise ValueError(
                f"LOGGERS has the entry {shown(entry)}; each must be the dotted name of a class, "
                "or a list of that name and a mapping of arguments"
            )


def _are_arguments(parts: Any) -> bool:
    return all(isinstance(x, dict) and all(isinstance(key, str) for key in x) for x in parts)
