"""Data sets in COCO's panoptic format: a JSON file, and images of segment ids beside the images."""

import os
from collections.abc import Callable
from numbers import Real
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from miti_detr.data.coco.structure import read_coco_json, to_number
from miti_detr.data.coco_format import forget_earlier, is_entry

# Keys of the metadata that are read from the annotation file on first use
FACTS = (
    "thing_classes",
    "stuff_classes",
    "thing_dataset_id_to_contiguous_id",
    "stuff_dataset_id_to_contiguous_id",
)


class PanopticSource:
    """A registered panoptic data set. Its classes are the categories in the order of their ids."""

    def __init__(
        self,
        json_file: str,
        image_root: str,
        panoptic_root: str,
        *,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            json_file: annotations in COCO's panoptic format.
            image_root: folder of the images.
            panoptic_root: folder of the images of segment ids (PNG).
            prepare: makes the files unless they exist. It may be called often and by several
                processes.
        """
        self.json_file, self.image_root, self.panoptic_root = json_file, image_root, panoptic_root
        self._prepare = prepare
        self._facts: dict[str, Any] | None = None

    def read(self) -> dict[str, Any]:
        """Read and check the annotation file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is faulty; with the place.
        """
        if self._prepare is not None:
            self._prepare()
        content = read_coco_json(self.json_file)
        _check(self.json_file, content)
        content["categories"].sort(key=lambda category: category["id"])
        self._facts = _facts_of(content["categories"])
        return content

    def load(self) -> list[dict[str, Any]]:
        """Detectron2 dataset dicts in the order of the image ids, as for its own panoptic sets."""
        content = self.read()
        things = self.facts["thing_dataset_id_to_contiguous_id"]
        classes = {**things, **self.facts["stuff_dataset_id_to_contiguous_id"]}
        annotations = {a["image_id"]: a for a in content["annotations"]}
        dicts = []
        for image in sorted(content["images"], key=lambda image: image["id"]):
            annotation = annotations.get(image["id"])
            if annotation is None:
                continue
            segments = [
                {
                    **{key: segment[key] for key in ("id", "area", "bbox")},
                    "iscrowd": segment.get("iscrowd", 0),
                    "category_id": classes[segment["category_id"]],
                    "isthing": segment["category_id"] in things,
                }
                for segment in annotation["segments_info"]
            ]
            dicts.append(
                {
                    "file_name": os.path.join(self.image_root, image["file_name"]),
                    "height": image["height"],
                    "width": image["width"],
                    "image_id": image["id"],
                    "pan_seg_file_name": os.path.join(self.panoptic_root, annotation["file_name"]),
                    "segments_info": segments,
                }
            )
        return dicts

    @property
    def facts(self) -> dict[str, Any]:
        """Metadata that only the file knows: see :data:`FACTS`."""
        if self._facts is None:
            self.read()
        assert self._facts is not None
        return self._facts


class PanopticMetadata(Metadata):
    """Metadata that read the annotation file when they are first asked for what it contains."""

    def __getattr__(self, key: str) -> Any:
        source = self.__dict__.get("panoptic_source")
        if source is None or key not in FACTS:
            return super().__getattr__(key)
        try:
            self.__dict__[key] = source.facts[key]
        except FileNotFoundError:  # a model can be used without its data
            return super().__getattr__(key)
        return self.__dict__[key]


def register_panoptic(
    name: str,
    panoptic_json: str,
    image_root: str,
    panoptic_root: str,
    *,
    prepare: Callable[[], None] | None = None,
    **metadata: Any,
) -> None:
    """Register a data set in COCO's panoptic format.

    As Detectron2's ``register_coco_panoptic``: things and stuff share the classes 0..K-1, of which
    ``thing_classes`` and ``stuff_classes`` both name all. Images may have any name.

    Args:
        name: the name in the catalogs.
        panoptic_json: annotations.
        image_root: folder of the images.
        panoptic_root: folder of the images of segment ids.
        prepare: makes the files unless they exist.
        metadata: further keys of the metadata, such as ``json_file`` (objects in COCO's format) for
            the evaluation of things.
    """
    source = PanopticSource(panoptic_json, image_root, panoptic_root, prepare=prepare)
    DatasetCatalog.register(name, source.load)
    MetadataCatalog[name] = PanopticMetadata(name=name)
    MetadataCatalog.get(name).set(
        panoptic_json=panoptic_json,
        image_root=image_root,
        panoptic_root=panoptic_root,
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **metadata,
        panoptic_source=source,
    )


def register_panoptic_format(cfg: CfgNode) -> None:
    """Register the panoptic data sets of a config with Detectron2.

    These are the entries ``[name, panoptic json, image folder, folder of segment images]`` of
    ``DATASETS.COCO_FORMAT``. Nothing is read yet.

    Args:
        cfg: every process calls this with the same config. Calling it again with the same entries
            changes nothing.

    Raises:
        ValueError: the name of an entry belongs to another data set.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        if is_entry(entry, 4):
            name, *paths = entry[0], *(os.path.expanduser(path) for path in entry[1:])
            source = tuple(os.path.abspath(path) for path in paths)
            forget_earlier("DATASETS.COCO_FORMAT", name, source)
            register_panoptic(name, *paths, coco_format=source)


def _facts_of(categories: list[dict[str, Any]]) -> dict[str, Any]:
    names = [category["name"] for category in categories]
    ids: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for index, category in enumerate(categories):
        ids[bool(category["isthing"])][category["id"]] = index
    return dict(zip(FACTS, (names, names, ids[True], ids[False]), strict=True))


def _check(path: str, content: dict[str, Any]) -> None:
    for key in ("images", "categories"):
        ids = [entry["id"] for entry in content[key]]
        if not ids or set(map(type, ids)) != {int} or len(set(ids)) < len(ids):
            raise ValueError(f"{path}: the 'id' of all '{key}' must be different integers")
    for category in content["categories"]:
        if category.get("isthing") not in (0, 1):
            raise ValueError(
                f"{path}: the category {category['name']!r} has the 'isthing' "
                f"{category.get('isthing')!r:.50}. It must be 1 (thing) or 0 (stuff)"
            )
    images = {image["id"] for image in content["images"]}
    classes = {category["id"] for category in content["categories"]}
    for number, annotation in enumerate(content.setdefault("annotations", [])):
        place = f"{path}: entry {number} of 'annotations'"
        if annotation.get("image_id") not in images:
            raise ValueError(f"{place} has no image: 'image_id' {annotation.get('image_id')!r:.50}")
        if not isinstance(annotation.get("file_name"), str):
            raise ValueError(f"{place} has no 'file_name', the PNG file of its segments")
        segments = annotation.get("segments_info")
        if not isinstance(segments, list) or not all(isinstance(s, dict) for s in segments):
            raise ValueError(f"{place} has no list 'segments_info'")
        for segment in segments:
            if fault := _fault(segment, classes):
                raise ValueError(f"{place}, segment {segment.get('id')!r:.50}: {fault}")


def _fault(segment: dict[str, Any], classes: set[int]) -> str:
    """What is wrong with a segment, or ""."""
    box = segment.get("bbox")
    if type(segment.get("id")) is not int or not 0 < segment["id"] < 256**3:
        return "'id' must be an integer from 1 to 16777215, the colour of its pixels"
    if segment.get("category_id") not in classes:
        return f"unknown 'category_id' {segment.get('category_id')!r:.50}"
    if segment.get("iscrowd", 0) not in (0, 1):
        return "'iscrowd' must be 0 or 1"
    if not to_number(segment.get("area")) > 0:
        return "'area' must be its number of pixels"
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, Real) for v in box):
        return "'bbox' must be [x, y, width, height]"
    return ""
