"""``miti-detr train``: from a folder of labelled images to a trained model."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import positive_int

if TYPE_CHECKING:
    from detectron2.config import CfgNode

PRESETS = ("laptop", "gpu", "quick")
# Features that the preset laptop computes, three minutes of two cores: the fewer images, the more
# variants of each
_FEATURES, _FEWEST, _MOST = 4200, 2, 16
# Keys that a run may change when it continues
_SCHEDULE = (
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD"),
    "TEST.EVAL_PERIOD",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "train",
        help="train on a folder of labelled images",
        description="Trains a Miti-DETR on labelled images: COCO JSON, YOLO or Pascal VOC, which "
        "is recognised. Writes a contact sheet of the training images, the model, its evaluation, "
        "a report on its faults, and pictures. Run again, it resumes.",
    )
    parser.add_argument("data", metavar="DATA", help="folder, COCO JSON file or data.yaml")
    parser.add_argument("--output", metavar="DIR", help="default: output/ and the name of the data")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="laptop",
        help="laptop: 20 minutes on two cores (default); gpu: a larger model; quick: a rough model "
        "in minutes",
    )
    parser.add_argument("--num-gpus", type=positive_int, help="processes, one for each GPU")
    parser.set_defaults(func=run, overrides=[])
    parser.epilog = "KEY VALUE pairs at the end override the preset, such as SOLVER.MAX_ITER 3000."


def run(args: argparse.Namespace) -> int:
    """Prepare the data and the config, train, and draw."""
    from miti_detr.engine import run as run_processes
    from miti_detr.engine.launch.start import TIMEOUT
    from miti_detr.engine.program import main
    from miti_detr.files import write_text

    output = Path(args.output or f"output/{Path(args.data).resolve().stem}")
    cfg = _config(args, output)
    file = output / "train.yaml"
    changed = _changed_keys(file, cfg)
    weights, table = output / "model_final.pth", output / "inference" / "coco_table.txt"
    if not changed and _is_newer(table, weights):
        print(f"{output} is trained already. To train again, remove that folder or choose another.")
    else:
        if not (output / "last_checkpoint").is_file():  # nothing is lost
            _draw_contact_sheet(cfg, output / "contact_sheet.png")
        elif others := [key for key in changed if key not in _SCHEDULE]:
            raise ValueError(
                f"{output} holds a run with other data or settings ({', '.join(others[:4])}). Give "
                "the same ones to continue it, or choose another folder with --output"
            )
        write_text(file, cfg.dump())
        arguments = argparse.Namespace(
            **{"config_file": str(file), "opts": [], "resume": True, "eval_only": False},
            **{"num_gpus": args.num_gpus, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"},
            **{"timeout": TIMEOUT, "traceback": args.traceback},
            command=shlex.join(["miti-detr", *sys.argv[1:]]),
        )
        status = run_processes(main, arguments)
        if status != 0:
            return status
    _draw_results(cfg, weights, output)
    print(table.read_text())
    made = "contact_sheet.png, train.yaml, model_final.pth, curves.png, detections.png"
    print(f"{output} contains {made}.")
    print(f"Where the model fails: {output / 'report' / 'report.html'}. To use it:")
    print(f"  miti-detr predict --weights {weights} --output predictions IMAGE ...")
    return 0


def _config(args: argparse.Namespace, output: Path) -> "CfgNode":
    """The preset for the data, which are converted into the output folder if necessary."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from miti_detr.data.formats import find_data, write_coco_files
    from miti_detr.engine import setup_config
    from miti_detr.model_zoo import get_config_file

    parts = write_coco_files(find_data(Path(args.data)), output / "data")
    name = Path(args.data).resolve().stem.replace(" ", "_")
    sets = [[f"my_{name}_{part}", *files] for part, files in parts.items()]
    options = [
        *("DATASETS.COCO_FORMAT", str(sets), "OUTPUT_DIR", str(output)),
        *("DATASETS.TRAIN", f"('{sets[0][0]}',)", "DATASETS.TEST", f"('{sets[1][0]}',)"),
        *args.overrides,
    ]
    preset = get_config_file(f"finetune/{args.preset}.yaml")
    cfg = setup_config(preset, options)
    if "SOLVER.MAX_ITER" in args.overrides and "SOLVER.STEPS" not in args.overrides:
        solver = setup_config(preset).SOLVER  # the steps keep their share of the run
        share = cfg.SOLVER.MAX_ITER / solver.MAX_ITER
        cfg.SOLVER.STEPS = tuple(max(1, int(step * share)) for step in solver.STEPS)
    images = len(DatasetCatalog.get(sets[0][0]))
    if args.preset == "laptop" and "MODEL.BACKBONE.CACHE_FEATURES" not in args.overrides:
        cfg.MODEL.BACKBONE.CACHE_FEATURES = min(max(_FEATURES // max(images, 1), _FEWEST), _MOST)
    if "MODEL.DETR.NUM_CLASSES" not in args.overrides:
        cfg.MODEL.DETR.NUM_CLASSES = len(MetadataCatalog.get(sets[0][0]).thing_classes)
    return cfg


def _changed_keys(file: Path, cfg: "CfgNode") -> list[str]:
    """Keys with other values than in the config of a run; none if there is no run."""
    from miti_detr.yaml_files import flatten, parse_yaml, read_yaml

    if not file.is_file():
        return []
    before, now = flatten(read_yaml(file)), flatten(parse_yaml(cfg.dump(), "the config"))
    return sorted(key for key in before | now if before.get(key) != now.get(key))


def _is_newer(table: Path, weights: Path) -> bool:
    """Whether a run has ended with the evaluation of its weights."""
    both = table.is_file() and weights.is_file()
    return both and table.stat().st_mtime >= weights.stat().st_mtime


def _draw_contact_sheet(cfg: "CfgNode", path: Path) -> None:
    from miti_detr.visualize.contact_sheet import draw_contact_sheet

    draw_contact_sheet(cfg, path)
    print(f"{path}: look whether the boxes are right")


def _draw_results(cfg: "CfgNode", weights: Path, output: Path) -> None:
    """Write the report and draw curves and detections, unless the run has them."""
    from miti_detr.engine.predictor import Predictor
    from miti_detr.visualize.curves import draw_curves, read_run
    from miti_detr.visualize.detections import draw_detections

    detections = output / "detections.png"
    if _is_newer(detections, weights):
        return
    dataset, classes = cfg.DATASETS.TEST[0], cfg.MODEL.DETR.NUM_CLASSES
    threshold = _report(dataset, weights, output / "report")
    # The weights, which now record the threshold, are still those of the table.
    (output / "inference" / "coco_table.txt").touch()
    draw_curves([read_run(output)], output / "curves.png")
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(weights)
    draw_detections(Predictor(cfg), dataset, detections, num_classes=classes, threshold=threshold)


def _report(dataset: str, weights: Path, folder: Path) -> float:
    """Write the report of a model, and record the threshold with the best F1 in the weights.

    Returns:
        The threshold, or the default if there is none.
    """
    from miti_detr.predict import load_predictor
    from miti_detr.predict.predictor import DEFAULT_THRESHOLD
    from miti_detr.report import ReportOptions, read_truth, report_model
    from miti_detr.report.store import store_threshold

    predictor = load_predictor(str(weights), threshold=0.0)
    command = shlex.join(["miti-detr", "report", str(weights), dataset])
    options = ReportOptions(f"{weights.name} on {dataset}", command=command)
    try:
        found = report_model(predictor, read_truth(dataset), folder, options).thresholds
    except ValueError as error:  # such as images of another size than the annotations say
        print(f"There is no report: {error}")
        return DEFAULT_THRESHOLD
    if not found.on_choice.true:
        return DEFAULT_THRESHOLD
    store_threshold(str(weights), found.chosen)
    print(f"the best threshold, {found.chosen:.3f}, is kept with the weights")
    return found.chosen
