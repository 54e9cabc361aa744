"""Data sets in COCO format, registered from the config, so that users need no code of their own."""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from miti_detr.files import write_text

from .coco.annotations import summarise
from .coco.coco_file import CocoFile, read_coco_file

logger = logging.getLogger(__name__)

BAD_ANNOTATIONS = ("error", "drop")


def register_coco_format(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.COCO_FORMAT`` with Detectron2.

    Each entry is ``[name, annotation json, image folder]``. Relative paths start at the working
    directory. In a YAML file::

        DATASETS:
          COCO_FORMAT:
            - [cells_train, /data/cells/train.json, /data/cells/images]

    and as an override::

        DATASETS.COCO_FORMAT "[['cells_train', '/data/cells/train.json', '/data/cells/images']]"

    Nothing is read yet. The categories become the classes 0..K-1 in the order of their ids. See
    :class:`CocoSource` for what happens to files that other tools cannot read as they are.

    Args:
        cfg: every process calls this with the same config. Calling it again with the same entries
            changes nothing.

    Raises:
        ValueError: an entry is neither such a triple nor one of
            :func:`~miti_detr.data.unlabeled.register_unlabeled`, or its name belongs to another
            data set.
    """
    check_bad_annotations_key(cfg)
    for entry in cfg.DATASETS.COCO_FORMAT:
        if is_entry(entry, 2) and not entry[1].endswith(".json"):
            continue  # images without labels: register_unlabeled
        if is_entry(entry, 4):
            continue  # a panoptic data set: register_panoptic_format
        if not is_entry(entry, 3):
            raise ValueError(
                "DATASETS.COCO_FORMAT must be a list of [name, annotation json, image folder], "
                "[name, panoptic json, image folder, folder of segment images], "
                "or [name, image folder] for images without labels, "
                f"such as \"[['name','train.json','images']]\"; got the entry {entry!r}"
            )
        name, json_file, image_root = entry[0], *(os.path.expanduser(path) for path in entry[1:])
        source = (os.path.abspath(json_file), os.path.abspath(image_root))
        forget_earlier("DATASETS.COCO_FORMAT", name, source)
        copy = os.path.join(cfg.OUTPUT_DIR, "annotations", f"{name}.json")
        register_coco(
            name,
            json_file,
            image_root,
            copy=copy,
            # Pre-training ignores the annotations, so it does not matter whether they are sound.
            drop_faulty=cfg.DATASETS.BAD_ANNOTATIONS == "drop" or cfg.INPUT.PATCHES.NUMBER > 0,
            with_masks=cfg.MODEL.MASK_ON,
            coco_format=source,
        )


class CocoSource:
    """A registered data set in COCO format.

    Training reads :meth:`load`; evaluators read :attr:`json_file`. Both come from the same
    normalised content (:func:`~miti_detr.data.coco.coco_file.read_coco_file`). A file that every
    tool can read is used as it is. Otherwise evaluators get a normalised copy.
    """

    def __init__(
        self,
        name: str,
        json_file: str,
        image_root: str,
        *,
        copy: str,
        drop_faulty: bool = False,
        with_masks: bool = False,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            name: of the data set.
            json_file: annotations in COCO format.
            image_root: folder of the images.
            copy: where a normalised copy is written, if one is needed.
            drop_faulty: drop faulty annotations instead of raising an error.
            with_masks: check and keep ``segmentation``.
            prepare: makes the files unless they exist. It may be called often and by several
                processes.
        """
        self.name, self.source, self.image_root = name, json_file, image_root
        self._copy, self._drop_faulty, self._with_masks = copy, drop_faulty, with_masks
        self._prepare = prepare
        self._facts: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Make the files of the data set if they are made on first use."""
        if self._prepare is not None:
            self._prepare()

    def read(self) -> CocoFile:
        """Read and normalise the annotation file; the first time, log what was repaired.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file cannot be repaired, or annotations are faulty and are not to be
                dropped.
        """
        self.prepare()
        file = read_coco_file(self.source, self.image_root, with_masks=self._with_masks)
        faults = file.annotations.faults()
        dropped = int((faults >= 0).sum())
        if dropped and not self._drop_faulty:
            advice = "correct them, or drop them with the override DATASETS.BAD_ANNOTATIONS drop"
            raise ValueError(file.annotations.report(faults, advice))
        if self._facts is None:
            if file.repairs:
                logger.warning("%s: repaired %s", self.source, describe_repairs(file))
            if dropped:
                logger.warning("%s: %s. They are dropped", self.source, summarise(faults))
            self._facts = self._facts_of(file, normalised=bool(file.repairs or dropped))
        return file

    def load(self) -> list[dict[str, Any]]:
        """Detectron2 dataset dicts; see :meth:`CocoFile.to_dicts`."""
        return self.read().to_dicts(self.image_root)

    @property
    def facts(self) -> dict[str, Any]:
        """Metadata that only the file knows: see :data:`FACTS`."""
        if self._facts is None:
            self.read()
        assert self._facts is not None
        return self._facts

    @property
    def json_file(self) -> str:
        """The file for evaluators: the original, or the normalised copy, which is written here.

        Raises:
            ValueError: see :meth:`read`.
            OSError: the copy cannot be written.
        """
        if self.facts["is_normalised"] and self._copy:
            # Every process writes the same.
            write_text(self._copy, json.dumps(self.read().to_json()))
            return self._copy
        return self.source

    def _facts_of(self, file: CocoFile, normalised: bool) -> dict[str, Any]:
        numbers, originals = file.image_ids, file.original_image_ids
        return {
            "is_normalised": normalised,
            "thing_classes": list(file.classes),
            "thing_dataset_id_to_contiguous_id": {k: i for i, k in enumerate(file.category_ids)},
            "original_category_ids": list(file.original_category_ids),
            "original_image_ids": (
                None if numbers is originals else dict(zip(numbers, originals, strict=True))
            ),
        }


# Keys of the metadata that are read from the annotation file on first use
FACTS = (
    "thing_classes",
    "thing_dataset_id_to_contiguous_id",
    "original_category_ids",
    "original_image_ids",
)


class CocoMetadata(Metadata):
    """Metadata that read the annotation file when they are first asked for what it contains."""

    def __getattr__(self, key: str) -> Any:
        source = self.__dict__.get("source")
        if source is None or key not in ("json_file", *FACTS):
            return super().__getattr__(key)
        try:
            value = source.json_file if key == "json_file" else source.facts[key]
        except FileNotFoundError:  # a model can be used without its data
            if key != "json_file":
                return super().__getattr__(key)
            return source.source
        self.__dict__[key] = value
        return value


def register_coco(
    name: str,
    json_file: str,
    image_root: str,
    *,
    copy: str = "",
    drop_faulty: bool = False,
    with_masks: bool = False,
    prepare: Callable[[], None] | None = None,
    **metadata: Any,
) -> None:
    """Register a data set in COCO format; see :class:`CocoSource`.

    Like Detectron2's ``register_coco_instances``, with normalised content, and with the metadata
    known before the data set is loaded.

    Args:
        name: the name in the catalogs.
        json_file: annotations in COCO format.
        image_root: folder of the images.
        copy: where a normalised copy is written, if one is needed; "": evaluators read the
            original.
        drop_faulty: drop faulty annotations instead of raising an error.
        with_masks: check and keep ``segmentation``.
        prepare: makes the files unless they exist.
        metadata: further keys of the metadata.
    """
    source = CocoSource(
        name,
        json_file,
        image_root,
        copy=copy,
        drop_faulty=drop_faulty,
        with_masks=with_masks,
        prepare=prepare,
    )
    DatasetCatalog.register(name, source.load)
    MetadataCatalog[name] = CocoMetadata(name=name)
    MetadataCatalog.get(name).set(
        image_root=image_root, evaluator_type="coco", **metadata, source=source
    )


def coco_source(name: str) -> CocoSource | None:
    """The source of a data set that :func:`register_coco` registered, otherwise None."""
    source: CocoSource | None = MetadataCatalog.get(name).__dict__.get("source")
    return source if isinstance(source, CocoSource) else None


def prepare_files(name: str) -> None:
    """Make the files of a registered data set, if they are made on first use."""
    source = coco_source(name)
    if source is not None:
        source.prepare()


def describe_repairs(file: CocoFile) -> str:
    """What was repaired, as ``3 x 'area', 1 x image 'id'``."""
    return ", ".join(f"{count} x {what}" for what, count in file.repairs.items())


def check_bad_annotations_key(cfg: CfgNode) -> None:
    """Raise ValueError unless ``DATASETS.BAD_ANNOTATIONS`` is one of its values."""
    if cfg.DATASETS.BAD_ANNOTATIONS not in BAD_ANNOTATIONS:
        raise ValueError(
            f"DATASETS.BAD_ANNOTATIONS must be one of {BAD_ANNOTATIONS}, "
            f"got {cfg.DATASETS.BAD_ANNOTATIONS!r}"
        )


def is_entry(entry: Any, length: int) -> bool:
    """Whether an entry of a config is a list of ``length`` texts, none of them empty."""
    return (
        isinstance(entry, list | tuple)
        and len(entry) == length
        and all(isinstance(part, str) and part for part in entry)
    )


def forget_earlier(key: str, name: str, source: tuple[str, ...]) -> None:
    """Unregister what an earlier call registered under a name, from the same paths.

    Args:
        key: of the config, for the error.
        name: of the data set.
        source: its annotation file ("" if it has none), its image folder and further folders.

    Raises:
        ValueError: the name belongs to another data set.
    """
    if name not in DatasetCatalog:
        return
    metadata = MetadataCatalog.get(name)
    known = metadata.get("coco_format")
    if known != source:
        known = known or (metadata.__dict__.get("json_file"), metadata.get("image_root"))
        raise ValueError(
            f"{key}: the name {name!r} with {source} already belongs to a data set "
            f"with {known}. Choose another name"
        )
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
