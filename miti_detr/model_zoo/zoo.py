"""The trained models that this package brings: ``zoo.json`` and the files below ``weights/``."""

import dataclasses
import hashlib
import json
import statistics
from pathlib import Path

PREFIX = "zoo://"


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """What is known about a model of the zoo; ``tools/zoo.py`` takes it from the run's own files.

    Attributes:
        name: behind ``zoo://``.
        config: its YAML file, below ``configs/``.
        overrides: keys and values that the run had in addition to the YAML file.
        weights: file of the run, and over which steps it is an average, if it is.
        train: data sets of the training.
        test: data set of the evaluation.
        AP: of boxes on ``test``, in percent; so are the others.
        AP50: of boxes.
        mask_AP: None without masks.
        seeds: seed and AP of each run of this config; the weights are those of the first one.
        iterations: of the run.
        minutes: of its training, without evaluations.
        hardware: on which it was trained.
        figures: ``measured`` here or ``quoted`` from elsewhere.
        versions: of the packages that trained it.
        commit: of this repository.
        parameters: number of them.
        bytes: size of the file.
        sha256: of the file.
    """

    name: str
    config: str
    overrides: list[str]
    weights: str
    train: list[str]
    test: str
    AP: float
    AP50: float
    mask_AP: float | None
    seeds: dict[str, float]
    iterations: int
    minutes: float
    hardware: str
    figures: str
    versions: dict[str, str]
    commit: str
    parameters: int
    bytes: int
    sha256: str

    @property
    def megabytes(self) -> float:
        """Size of the file in 10^6 bytes."""
        return self.bytes / 1e6

    @property
    def spread(self) -> str:
        """Mean and standard deviation of AP over the seeds, and their number, in words."""
        values = list(self.seeds.values())
        if len(values) < 2:
            return "one seed"
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        return f"{mean:.1f} ± {deviation:.1f} ({len(values)})"


def zoo_folder() -> Path:
    """Return the folder with ``zoo.json`` and ``weights/``."""
    return Path(__file__).parent


def zoo_models() -> dict[str, ZooModel]:
    """Return the models of the zoo by name, in alphabetical order."""
    content = json.loads((zoo_folder() / "zoo.json").read_text(encoding="utf-8"))
    return {name: ZooModel(name=name, **content[name]) for name in sorted(content)}


def zoo_file(name: str) -> Path:
    """Return where the weights of a model are; the file need not exist."""
    return zoo_folder() / "weights" / f"{name}.safetensors"


def find_zoo_weights(name: str) -> str:
    """Return the file of weights of a model.

    Raises:
        FileNotFoundError: there is no such model; the message lists those that exist.
        ValueError: the file is damaged.
    """
    models = zoo_models()
    if name not in models:
        known = ", ".join(PREFIX + each for each in models)
        raise FileNotFoundError(f"{PREFIX}{name}: there is no such model in the zoo; use {known}")
    path = zoo_file(name)
    if not path.is_file() or sha256_of(path) != models[name].sha256:
        raise ValueError(
            f"{PREFIX}{name}: {path} is missing or damaged: its sha256 is not that of zoo.json. "
            "Install the package again"
        )
    return str(path)


def sha256_of(path: Path) -> str:
    """Return the checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
