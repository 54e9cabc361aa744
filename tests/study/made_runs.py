"""Output folders of runs with made-up numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(
    path: Path,
    aps: Sequence[float],
    *,
    seed: int | None = 0,
    residual: str = "none",
    dataset: str = "shapes_val",
    rank: float | None = None,
    depth: int = 6,
) -> Path:
    """Write a run of ours, evaluated every 100 iterations; other numbers follow from ``aps``."""
    last = 100 * len(aps)
    steps = [
        {"iteration": i, "total_loss": 20 - i / last + (i % 7) / 10, "grad_norm": 1 + (i % 5)}
        for i in range(last)
    ]
    metrics = [{**step, "lr": 0.1} for step in steps if step["iteration"] % 20 == 19]
    for index, ap in enumerate(aps, start=1):
        names = ("AP50", "AP75", "APs", "APm", "APl", "AR")
        values = {f"bbox/{name}": ap + i for i, name in enumerate(names, start=1)}
        layers = [] if rank is None else [rank, rank / 2]
        ranks = {
            f"rank/encoder/layer{i}/{measure}": value
            for i, value in enumerate(layers)
            for measure in ("residual", "effective_rank")
        }
        metrics.append({"iteration": 100 * index, "bbox/AP": ap, **values, **ranks})
    write_lines(path / "metrics.json", metrics)
    write_lines(path / "steps.json", steps)
    queries = [[[0, 1, 2], [0, 1, 1 + index]] for index in range(len(aps))]
    matches = [
        {"iteration": 100 * (i + 1), "num_queries": 10, "queries": q} for i, q in enumerate(queries)
    ]
    write_lines(path / "matches.json", matches)
    facts = {"weights": "0123456789abcdef", "parameters": 1234567, "iterations_per_epoch": 50}
    (path / "start.json").write_text(json.dumps(facts))
    timed = {"seconds": 4.25, "images": 300}
    (path / "evaluation.json").write_text(json.dumps(timed))
    (path / "finished.json").write_text(json.dumps({"iterations": last, "error": None}))
    config = {
        "SEED": -1 if seed is None else seed,
        "OUTPUT_DIR": str(path),
        "DATASETS": {"TEST": [dataset]},
        "MODEL": {"DETR": {"LAYER_RESIDUAL": residual, "ENC_LAYERS": depth}},
        "SOLVER": {"CLIP_GRADIENTS": {"CLIP_VALUE": 2.5}},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def write_foreign_run(path: Path) -> Path:
    """Write a run of stock Detectron2: no config, no recall, no gradient norm."""
    records: list[dict[str, Any]] = [
        {"iteration": i, "total_loss": 3 - i / 100, "lr": 0.1} for i in range(19, 200, 20)
    ]
    records.append({"iteration": 199, "bbox/AP": 30.5, "bbox/AP50": 50.25, "bbox/APs": "NaN"})
    write_lines(path / "metrics.json", records)
    return path


def write_detections(
    path: Path, dataset: str, found: Sequence[tuple[int, list[float], float]]
) -> None:
    """Write detections of category 1: image id, box (x, y, width, height), score."""
    results = [
        {"image_id": image, "category_id": 1, "bbox": box, "score": score}
        for image, box, score in found
    ]
    file = path / "inference" / dataset / "coco_instances_results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results))
