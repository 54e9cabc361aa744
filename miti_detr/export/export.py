"""From a checkpoint to a file that runs without this package's model code."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

import miti_detr
from miti_detr.checkpoint.variant import THRESHOLD
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.modeling import MitiDetr
from miti_detr.predict.backends import SessionBackend
from miti_detr.predict.predictor import DEFAULT_THRESHOLD
from miti_detr.predict.record import MASKS, OUTPUTS, ExportRecord
from miti_detr.predict.sessions import open_session
from miti_detr.predict.torch_backend import checkpoint_record, classes_of

from .accuracy import average_precision, check_dataset, eager_detector, session_detector
from .parity import PIXELS, TOLERANCE, compare
from .quantise import quantise
from .tensor_detector import TensorDetector
from .writers import (
    add_onnx_record,
    record_program,
    write_onnx,
    write_openvino,
    write_program,
)

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
PRECISIONS = ("float32", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        format: ``torch``, ``onnx`` or ``openvino``.
        precision: ``float32``, ``float16`` or ``int8`` (the last two not for ``torch``).
        calibration: image files for ``int8``.
        dataset: data set for AP; "": the first of ``DATASETS.TEST``, for lower precision only.
        static_shape: N, H and W of the only batch that the file takes; None: any.
        image_type: ``uint8`` or ``float32`` images.
        masks: with the masks of a model that has any.
        top_k: the best detections of an image that the file returns; None: all.
    """

    format: str = "onnx"
    precision: str = "float32"
    calibration: Sequence[Path] = ()
    dataset: str = ""
    static_shape: tuple[int, int, int] | None = None
    image_type: str = "uint8"
    masks: bool = True
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is not possible.
        """
        if self.format not in SUFFIXES:
            raise ValueError(f"format is {self.format!r}. Use {', '.join(SUFFIXES)}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}. Use {', '.join(PRECISIONS)}.")
        if self.format == "torch" and self.precision != "float32":
            raise ValueError(f"precision {self.precision} needs format onnx or openvino.")
        if self.precision == "int8" and not self.calibration:
            raise ValueError("int8 needs images for its calibration. Name some with --calibration.")
        if self.image_type not in ("uint8", "float32"):
            raise ValueError(f"image type is {self.image_type!r}. Use uint8 or float32.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}. It must be 1 or more.")


def export_model(
    weights: str,
    output: str | os.PathLike[str] | None = None,
    options: ExportOptions = ExportOptions(),
    *,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Export a model, and compare the file with the model before it appears.

    Args:
        weights: checkpoint.
        output: file to write; None: the name of the checkpoint with the suffix of the format,
            beside it or, if it is an address, in the working folder.
        options: format, precision and shape.
        config_file: None takes the config in the checkpoint.
        overrides: alternating config keys and values.
        say: called with lines about differences and AP.

    Returns:
        The file. OpenVINO has a second one beside it, with the suffix ``.bin``.

    Raises:
        ImportError: a package of the extra ``export`` is missing.
        ValueError: the model cannot be exported, or the file of a float32 model computes something
            else, which the message quantifies. There is no file then.
    """
    suffix = SUFFIXES[options.format]
    source = weights.rpartition("/")[2] if "://" in weights else weights
    target = Path(source).with_suffix(suffix) if output is None else Path(output)
    if target.suffix.lower() != suffix:
        raise ValueError(f"{target} does not end in {suffix}, as files of {options.format} do.")
    # The plain model: exported files are optimised by their own runtimes.
    plain = ["MODEL.ACCELERATE", "False", "TEST.AMP.ENABLED", "False", "MODEL.DEVICE", "cpu"]
    plain += ["TEST.MASK_MIN_SCORE", "0.0"]
    cfg = load_config(config_file, weights=weights, overrides=[*overrides, *plain])
    dataset = options.dataset
    if options.precision != "float32":
        dataset = dataset or next(iter(cfg.DATASETS.TEST), "")
        check_dataset(cfg, dataset)
    model = Predictor(cfg).model
    half = options.precision == "float16" and options.format == "onnx"
    detector = TensorDetector(model, half=half, masks=_masks(model, options), top_k=options.top_k)
    if getattr(model, "stuff_classes", ()):
        say("the model is panoptic: its objects are exported, without stuff and merged segments")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}.") as folder:
        written = Path(folder) / target.name
        say("recording the model and writing the file, which can take minutes")
        _write(detector, make_record(cfg, model, options), written, options)
        _check(model, cfg, written, options, dataset, say)
        if options.format == "openvino":
            os.replace(written.with_suffix(".bin"), target.with_suffix(".bin"))
        os.replace(written, target)
    return target


def make_record(cfg: CfgNode, model: MitiDetr, options: ExportOptions) -> ExportRecord:
    """What the file says about the model."""
    recorded = checkpoint_record(cfg)
    classes = classes_of(cfg, recorded)
    pixels: dict[str, Any] = dict(model.pixels)
    return ExportRecord(
        version=miti_detr.__version__,
        variant=model.variant,
        class_names=classes.names,
        category_ids=classes.dataset_ids,
        input_format=pixels["input_format"],
        pixel_mean=pixels["pixel_mean"],
        pixel_std=pixels["pixel_std"],
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        orientation=cfg.DATASETS.EXIF_ORIENTATION,
        precision=options.precision,
        image_type=options.image_type,
        threshold=float(recorded.get(THRESHOLD, DEFAULT_THRESHOLD)),
        static_shape=options.static_shape,
        outputs=(*OUTPUTS, MASKS) if _masks(model, options) else OUTPUTS,
        **model.backbone.padding_constraints(),
    )


def _masks(model: MitiDetr, options: ExportOptions) -> bool:
    return model.predicts_masks and options.masks


def _write(
    detector: TensorDetector, record: ExportRecord, path: Path, options: ExportOptions
) -> None:
    """Write the file of a format, with its record."""
    program = record_program(detector, shape=options.static_shape, image_type=options.image_type)
    if options.format == "torch":
        write_program(program, record, path)
        return
    graph = path.with_name("graph.onnx")
    write_onnx(program, graph)
    add_onnx_record(graph, record)
    if options.precision == "int8":
        float_graph = graph.rename(path.with_name("float.onnx"))
        quantise(float_graph, graph, options.calibration)
        add_onnx_record(graph, record)
    if options.format == "onnx":
        graph.rename(path)
    else:
        write_openvino(graph, record, path)


def _check(
    model: MitiDetr,
    cfg: CfgNode,
    path: Path,
    options: ExportOptions,
    dataset: str,
    say: Callable[[str], object],
) -> None:
    """Compare a written file with the model, and with a data set that is named their AP.

    Raises:
        ValueError: a float32 file differs.
    """
    session = open_session(path, "cpu")
    parity = compare(model, session, options.top_k)
    if options.precision == "float32" and parity.exceeds(TOLERANCE):
        raise ValueError(
            f"the exported model computes something else: {parity}; allowed are {TOLERANCE:.0e}"
            f"{'' if parity.masks is None else f', of pixels {PIXELS * TOLERANCE:.0e}'}. "
            "No file was written."
        )
    if options.precision == "float32":
        say(f"compared with the model by {session.provider}: {parity}")
    if dataset:
        backend = SessionBackend(session)
        detectors = eager_detector(model), session_detector(backend)
        before, after = (
            average_precision(detect, cfg, dataset, masks=backend.with_masks)
            for detect in detectors
        )
        for name, ap in before.items():
            say(
                f"{name} on {dataset}: model {ap:.2f}, exported {after[name]:.2f}, difference "
                f"{after[name] - ap:+.2f}"
            )
