"""Adds a trained model to the zoo, and writes the tables of ``docs/model_zoo.md``.

    python -m tools.zoo NAME RUN [RUN ...]   # the weights of the first run; the others are seeds
    python -m tools.zoo                      # only the tables

A run is the output folder of a training that has ended. All figures come from its files.
"""

import argparse
import dataclasses
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from miti_detr.bench.evaluation import count_parameters
from miti_detr.bench.machine import describe_machine
from miti_detr.checkpoint import read_checkpoint
from miti_detr.checkpoint.export import write_weights
from miti_detr.checkpoint.variant import AVERAGE, RECORD_KEY
from miti_detr.engine import Trainer, setup_config
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.evaluation.build import best_metric
from miti_detr.files import atomic_write, write_text
from miti_detr.model_zoo import ZooModel, get_config_file, zoo_models
from miti_detr.model_zoo.zoo import sha256_of, zoo_file, zoo_folder
from miti_detr.visualize.curves import read_metrics
from miti_detr.yaml_files import flatten, parse_config

PAGE = Path(__file__).parents[1] / "docs" / "model_zoo.md"
TABLES = re.compile(r"(?<=<!-- tables, by python -m tools.zoo -->\n).*(?=<!-- end -->)", re.DOTALL)
LARGEST = 15_000_000  # bytes of all weights together
TOLERANCE = 0.1  # AP in percent, between the run and its weights in the zoo
# Keys that do not belong to the recipe of a model. Weights that the run started from have a path of
# its machine; those of the config stand in the zoo.
_START_KEYS = ("MODEL.WEIGHTS", "MODEL.DETR.FROZEN_WEIGHTS")
_OWN_KEYS = ("OUTPUT_DIR", "OUTPUT_NOTE", "SEED", "MODEL.DEVICE", *_START_KEYS)
_LOG = {
    "commit": r"miti_detr \S+, git commit (\w+)",
    "miti_detr": r"miti_detr (\S+), git commit",
    "torch": r"^PyTorch +(\d\S*)",
    "detectron2": r"^detectron2 +(\S+)",
    "python": r"^Python +(\S+)",
}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="behind zoo://, such as shapes/miti_detr")
    add("runs", nargs="*", type=Path, metavar="RUN", help="output folder of a training that ended")
    add("--config", metavar="C", help="YAML file below configs/; default: NAME.yaml")
    add("--weights", default="model_final.pth", metavar="F", help="default: model_final.pth")
    add("--hardware", metavar="TEXT", help="where it was trained; default: this machine")
    args = parser.parse_args()
    if args.name and not args.runs:
        parser.error("name the output folder of a run")
    try:
        if args.name:
            config = args.config or f"{args.name}.yaml"
            model = add_model(args.name, args.runs, config, args.weights, args.hardware)
            print(f"{model.name}: AP {model.AP:.2f}, {model.megabytes:.2f} MB")
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), zoo_models()))
    except (ValueError, OSError) as error:
        print(f"zoo: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {PAGE}")
    return 0


def add_model(
    name: str, runs: list[Path], config: str, weights: str, hardware: str | None
) -> ZooModel:
    """Add the weights of the first run, or replace those of this name.

    Args:
        name: of the model.
        runs: output folders; of the others only seed and AP are used.
        config: YAML file below ``configs/``.
        weights: file in the folders.
        hardware: None: this machine.

    Raises:
        FileNotFoundError: a run has not ended, or there is no such config.
        ValueError: the runs have other configs, the AP of the weights is not that of the run, or
            the zoo becomes too large.
    """
    checkpoints = [read_checkpoint(str(run / weights)) for run in runs]
    overrides = [_overrides(config, checkpoint) for checkpoint in checkpoints]
    seeds = [str(_config_of(checkpoint)["SEED"]) for checkpoint in checkpoints]
    if any(each != overrides[0] for each in overrides) or len(set(seeds)) < len(seeds):
        raise ValueError(f"not runs of one config with different seeds: {seeds}, {overrides}")
    metrics = [_metrics(run, each) for run, each in zip(runs, checkpoints, strict=True)]
    content = _config_of(checkpoints[0])
    content["OUTPUT_DIR"] = f"output/{name}"  # of the run it may be a path of this machine
    cfg = CfgNode(content)
    recipe = flatten(yaml.safe_load(setup_config(get_config_file(config)).dump()))
    cfg.merge_from_list([word for key in _START_KEYS for word in (key, recipe[key])])
    record = {**checkpoints[0][RECORD_KEY], "config": cfg.dump()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        write_weights(str(path), checkpoints[0]["model"], record)
        parameters = _check(path, best_metric(cfg), metrics[0])
        model = ZooModel(
            name=name,
            config=config,
            overrides=overrides[0],
            weights=", ".join(filter(None, [weights, record.get(AVERAGE)])),
            train=list(cfg.DATASETS.TRAIN),
            test=cfg.DATASETS.TEST[0],
            AP=metrics[0]["bbox/AP"],
            AP50=metrics[0]["bbox/AP50"],
            mask_AP=metrics[0].get("segm/AP"),
            seeds={seed: each["bbox/AP"] for seed, each in zip(seeds, metrics, strict=True)},
            hardware=hardware or this_machine(),
            figures="measured",
            parameters=parameters,
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            **training_of(runs[0]),
        )
        _save(model, path)
    return model


def _save(model: ZooModel, path: Path) -> None:
    """Copy a file of weights into the zoo and write the entry of its model."""
    entries = {**zoo_models(), model.name: model}
    if sum(each.bytes for each in entries.values()) > LARGEST:
        raise ValueError(f"with {model.name} the zoo is larger than {LARGEST / 1e6:.0f} MB")
    texts = {name: dataclasses.asdict(entries[name]) for name in sorted(entries)}
    for entry in texts.values():
        del entry["name"]
    with atomic_write(str(zoo_file(model.name))) as file:
        file.write(path.read_bytes())
    write_text(zoo_folder() / "zoo.json", json.dumps(texts, indent=2, ensure_ascii=False) + "\n")


def evaluate(weights: str) -> tuple[dict[str, float], int]:
    """Evaluate weights on the data set of their own config.

    Returns:
        The metrics by the names that ``metrics.json`` has, and the number of parameters.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(weights=weights, overrides=["OUTPUT_DIR", folder])
        model = Predictor(cfg).model
        results = Trainer.test(cfg, model)
    metrics = {f"{task}/{key}": v for task, values in results.items() for key, v in values.items()}
    return metrics, count_parameters(model)["parameters"]


def _check(path: Path, metric: str, recorded: dict[str, float]) -> int:
    """Compare the weights with what the run says of them; return the number of parameters."""
    metrics, parameters = evaluate(str(path))
    if not abs(metrics[metric] - recorded[metric]) <= TOLERANCE:
        raise ValueError(
            f"{metric} of the weights is {metrics[metric]:.2f}, metrics.json says "
            f"{recorded[metric]:.2f}"
        )
    return parameters


def _config_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return parse_config(checkpoint[RECORD_KEY]["config"], "the recorded config")


def _overrides(config: str, checkpoint: dict[str, Any]) -> list[str]:
    """What the config of a run has in addition to a YAML file, as words of a command line."""
    base = flatten(yaml.safe_load(setup_config(get_config_file(config)).dump()))
    run = flatten(_config_of(checkpoint))
    changed = [key for key in sorted(run) if run[key] != base.get(key) and key not in _OWN_KEYS]
    return [word for key in changed for word in (key, str(run[key]))]


def _metrics(run: Path, checkpoint: dict[str, Any]) -> dict[str, float]:
    """The metrics of the evaluation of a checkpoint, from the run's own file."""
    records = read_metrics(run / "metrics.json")
    last = int(checkpoint["iteration"])
    for step in (last, last + 1):  # what is evaluated after the training has the next number
        if "bbox/AP" in records.get(step, {}):
            return records[step]
    raise ValueError(f"{run}: metrics.json has no evaluation of these weights")


def training_of(run: Path) -> dict[str, Any]:
    """Iterations, minutes, versions and commit of a run, from its own files."""
    log = (run / "log.txt").read_text(encoding="utf-8")
    found = {name: re.findall(rule, log, re.MULTILINE) for name, rule in _LOG.items()}
    if not all(found.values()):
        missing = ", ".join(name for name, texts in found.items() if not texts)
        raise ValueError(f"{run / 'log.txt'} does not have the {missing} of the run")
    versions = {name: texts[-1] for name, texts in found.items()}
    commit = versions.pop("commit")
    records = read_metrics(run / "metrics.json")
    times = {step: record["time"] for step, record in records.items() if "time" in record}
    return {
        "iterations": max(times) + 1,
        "minutes": round(_seconds(log, times) / 60, 2),
        "versions": versions,
        "commit": commit,
    }


def _seconds(log: str, times: dict[int, float]) -> float:
    """Time of a training: by the clock, or of one that was resumed by its median iterations."""
    clock = re.findall(r"Overall training speed: .* in (?:(\d+) days?, )?(\d+):(\d+):(\d+)", log)
    if len(clock) == log.count("Starting training from iteration") == 1:
        days, hours, minutes, seconds = (int(number or 0) for number in clock[0])
        return ((24 * days + hours) * 60 + minutes) * 60 + seconds
    steps = [-1, *times]
    return sum(times[now] * (now - last) for last, now in itertools.pairwise(steps))


def this_machine() -> str:
    """Describe the processor, and the GPU if there is one."""
    machine = describe_machine()
    cores = f"{machine['cores']} cores of {machine['processor']}"
    return f"{machine['gpu']}, {cores}" if machine["gpu"] else cores


def page(text: str, models: dict[str, ZooModel]) -> str:
    """Replace the tables of the page.

    Raises:
        ValueError: it has no place for them.
    """
    if not TABLES.search(text):
        raise ValueError("the page has no marks for the tables")
    tables = "\n".join([_results(models), "", _origins(models), ""])
    return TABLES.sub(lambda _: tables, text)


def _results(models: dict[str, ZooModel]) -> str:
    rows = [
        [
            f"`zoo://{m.name}`",
            m.test,
            f"{m.AP:.1f}",
            m.spread,
            f"{m.AP50:.1f}",
            "-" if m.mask_AP is None else f"{m.mask_AP:.1f}",
            f"{m.parameters:,}",
            f"{m.megabytes:.1f}",
            f"{m.minutes:.1f}",
            m.hardware,
        ]
        for m in models.values()
    ]
    names = ("AP", "mean ± sd (n)", "AP50", "mask AP", "parameters", "MB", "minutes")
    return markdown_table(rows, ["weights", "data", *names, "hardware"])


def _origins(models: dict[str, ZooModel]) -> str:
    rows = [
        [
            f"`zoo://{m.name}`",
            " ".join(f"`{words}`" for words in (f"configs/{m.config}", *_pairs(m.overrides))),
            m.weights,
            f"{m.iterations:,}",
            m.figures,
            ", ".join(f"{name} {version}" for name, version in m.versions.items()),
            f"`{m.commit[:10]}`",
            f"`{m.sha256[:16]}`",
        ]
        for m in models.values()
    ]
    names = ("file of the run", "iterations", "figures", "versions", "commit", "sha256")
    return markdown_table(rows, ["weights", "config", *names])


def _pairs(words: list[str]) -> list[str]:
    return [" ".join(pair) for pair in zip(words[::2], words[1::2], strict=True)]


def markdown_table(rows: list[list[str]], headers: list[str]) -> str:
    """Return a table of GitHub's Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
