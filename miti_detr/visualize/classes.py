"""The classes of a model: their names and their ids in a data set.

Exported models use :class:`ClassTable` without Detectron2, which is imported where it is needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ClassTable:
    """Names and data set ids of the contiguous classes 0..K-1.

    Attributes:
        names: K names; the index as text if the data set is unknown.
        dataset_ids: K category ids used by the data set; the index if the data set is unknown.
    """

    names: list[str]
    dataset_ids: list[int]


def class_table(dataset: str | None, num_classes: int) -> ClassTable:
    """Read the classes of a data set from Detectron2's catalog, or from its annotation file.

    Args:
        dataset: registered name. If it is unknown or its file is missing, classes are numbered, so
            that a model can be used without its data.
        num_classes: number of classes K of the model. A data set with another number of classes is
            not used.
    """
    from detectron2.data import MetadataCatalog
    from detectron2.data.catalog import Metadata

    plain = list(range(num_classes))
    metadata = MetadataCatalog.get(dataset) if dataset else Metadata()
    if metadata.get("thing_classes") is None:
        _load_metadata(dataset, metadata)
    names = metadata.get("thing_classes")
    if names is None or len(names) != num_classes:
        return ClassTable([str(index) for index in plain], plain)
    kinds = ("stuff", "thing") if metadata.get("panoptic_json") else ("thing",)
    mapping: dict[int, int] = {}
    for kind in kinds:
        mapping |= metadata.get(f"{kind}_dataset_id_to_contiguous_id", {})
    to_dataset_id = {index: category_id for category_id, index in mapping.items()}
    return ClassTable(list(names), [to_dataset_id.get(index, index) for index in plain])


def _load_metadata(dataset: str | None, metadata: Any) -> None:
    """Load a data set whose file exists; Detectron2 reads most class names only then."""
    from detectron2.data import DatasetCatalog

    json_file = next(iter(metadata.get("coco_format", ())), metadata.get("json_file"))
    if dataset in DatasetCatalog and json_file and Path(json_file).is_file():
        DatasetCatalog.get(dataset)
