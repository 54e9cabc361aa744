"""The config of a run: a preset, and what follows from the data."""

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from miti_detr.data.formats import find_data, write_coco_files
from miti_detr.engine import setup_config
from miti_detr.model_zoo import get_config_file
from miti_detr.yaml_files import flatten, parse_yaml, read_yaml

# Keys that a run may change when it continues
_SCHEDULE = (
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD"),
    "TEST.EVAL_PERIOD",
)
# Features that the preset laptop computes, three minutes of two cores: the fewer images, the more
# variants of each
_FEATURES, _FEWEST, _MOST = 4200, 2, 16


def preset_config(
    data: Path, output: Path, preset: str = "laptop", overrides: Sequence[str] = ()
) -> CfgNode:
    """Return the config of a preset for labelled images, which are converted if necessary.

    Args:
        data: folder, COCO JSON file or ``data.yaml``.
        output: folder of the run; converted labels go to ``output/data``.
        preset: name of a file in ``configs/finetune``.
        overrides: alternating config keys and values.

    Raises:
        ValueError: the data are not recognised or faulty, or a key or value is wrong.
        OSError: a file cannot be read.
    """
    parts = write_coco_files(find_data(data), output / "data")
    name = data.resolve().stem.replace(" ", "_")
    sets = [[f"my_{name}_{part}", *files] for part, files in parts.items()]
    options = [
        *("DATASETS.COCO_FORMAT", str(sets), "OUTPUT_DIR", str(output)),
        *("DATASETS.TRAIN", f"('{sets[0][0]}',)", "DATASETS.TEST", f"('{sets[1][0]}',)"),
        *overrides,
    ]
    file = get_config_file(f"finetune/{preset}.yaml")
    cfg = setup_config(file, options)
    if "SOLVER.MAX_ITER" in overrides and "SOLVER.STEPS" not in overrides:
        solver = setup_config(file).SOLVER  # the steps keep their share of the run
        share = cfg.SOLVER.MAX_ITER / solver.MAX_ITER
        cfg.SOLVER.STEPS = tuple(max(1, int(step * share)) for step in solver.STEPS)
    images = len(DatasetCatalog.get(sets[0][0]))
    if "MODEL.BACKBONE.CACHE_FEATURES" not in overrides:
        if cfg.MODEL.MASK_ON:  # masks need the images
            cfg.MODEL.BACKBONE.CACHE_FEATURES = 0
        elif preset == "laptop":
            variants = min(max(_FEATURES // max(images, 1), _FEWEST), _MOST)
            cfg.MODEL.BACKBONE.CACHE_FEATURES = variants
    if "MODEL.DETR.NUM_CLASSES" not in overrides:
        cfg.MODEL.DETR.NUM_CLASSES = len(MetadataCatalog.get(sets[0][0]).thing_classes)
    return cfg


def changed_keys(cfg: CfgNode, file: Path, *, begun: bool) -> list[str]:
    """Return the keys with other values than in the config of a run; none if there is no run.

    Args:
        cfg: the config now.
        file: YAML file with the config of the run.
        begun: the run has a checkpoint, so that only its schedule may change.

    Raises:
        ValueError: ``begun``, and anything else has changed.
    """
    if not file.is_file():
        return []
    before, now = flatten(read_yaml(file)), flatten(parse_yaml(cfg.dump(), "the config"))
    changed = sorted(key for key in before | now if before.get(key) != now.get(key))
    others = [key for key in changed if key not in _SCHEDULE]
    if begun and others:
        raise ValueError(
            f"{file.parent} holds a run with other data or settings ({', '.join(others[:4])}). "
            "Give the same ones to continue it, or choose another folder with --output"
        )
    return changed
