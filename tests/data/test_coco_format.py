import json
import logging
import math
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from miti_detr.data import register_coco_format
from miti_detr.data.coco_format import prepare_files

from .helpers import annotation, coco_content, make_cfg, write_coco


def _entry(folder: Path, name: str = "pets") -> list[str]:
    return [name, str(folder / "truth.json"), str(folder)]


def test_override_registers_a_data_set(tmp_path: Path) -> None:
    """Categories 5 and 9 become the classes 0 and 1, in the order of their ids."""
    write_coco(tmp_path, coco_content([annotation(1, 1), annotation(2, 2, category_id=9)]))
    register_coco_format(make_cfg("DATASETS.COCO_FORMAT", str([_entry(tmp_path)])))
    dicts = DatasetCatalog.get("pets")
    assert [d["file_name"] for d in dicts] == [str(tmp_path / f"{i}.png") for i in (1, 2)]
    assert [a["category_id"] for d in dicts for a in d["annotations"]] == [0, 1]
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    assert metadata.json_file == str(tmp_path / "truth.json")
    assert metadata.evaluator_type == "coco"


def test_yaml_registers_a_data_set(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content([annotation(1, 1)]))
    config = tmp_path / "config.yaml"
    name, json_file, root = _entry(tmp_path)
    config.write_text(f"DATASETS:\n  COCO_FORMAT:\n    - [{name}, {json_file}, {root}]\n")
    cfg = make_cfg()
    cfg.merge_from_file(str(config))
    register_coco_format(cfg)
    assert len(DatasetCatalog.get("pets")) == 2


def test_the_same_entry_twice_is_fine(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content([annotation(1, 1)]))
    cfg = make_cfg("DATASETS.COCO_FORMAT", [_entry(tmp_path)])
    register_coco_format(cfg)
    DatasetCatalog.get("pets")
    register_coco_format(cfg)
    assert len(DatasetCatalog.get("pets")) == 2


def test_the_same_name_with_other_paths_is_an_error(tmp_path: Path) -> None:
    register_coco_format(make_cfg("DATASETS.COCO_FORMAT", [_entry(tmp_path / "a")]))
    with pytest.raises(ValueError, match="'pets'") as error:
        register_coco_format(make_cfg("DATASETS.COCO_FORMAT", [_entry(tmp_path / "b")]))
    for folder in ("a", "b"):
        assert str(tmp_path / folder / "truth.json") in str(error.value)
    with pytest.raises(ValueError, match="instances_train2017"):
        register_coco_format(
            make_cfg("DATASETS.COCO_FORMAT", [_entry(tmp_path, "coco_2017_train")])
        )


@pytest.mark.parametrize(
    "entry", ["pets", ["pets", "a.json"], ["pets", "a.json", 3], ["", "a", "b"]]
)
def test_bad_entries(entry: object) -> None:
    with pytest.raises(ValueError, match="must be a list of"):
        register_coco_format(make_cfg("DATASETS.COCO_FORMAT", [entry]))


def test_bad_key() -> None:
    with pytest.raises(ValueError, match=r"BAD_ANNOTATIONS must be one of .* got 'ignore'"):
        register_coco_format(make_cfg("DATASETS.BAD_ANNOTATIONS", "ignore"))


def test_drop_keeps_faulty_annotations_from_everyone(tmp_path: Path, caplog) -> None:
    """Loader and evaluator read the same copy, which holds only the sound annotation."""
    bad = [
        annotation(2, 1, category_id=6),
        annotation(3, 1, bbox=[1, 1, 0, 5]),
        annotation(4, 2, bbox=[1, 1, math.nan, 5]),
        annotation(5, 2, bbox=[]),
        annotation(6, 7),
        annotation(7, 2, ignore=1),
    ]
    path = write_coco(tmp_path, coco_content([annotation(1, 1), *bad]))
    cfg = make_cfg(
        *("DATASETS.COCO_FORMAT", [_entry(tmp_path)], "DATASETS.BAD_ANNOTATIONS", "drop"),
        *("OUTPUT_DIR", str(tmp_path / "out")),
    )
    register_coco_format(cfg)
    with caplog.at_level(logging.WARNING):
        dicts = DatasetCatalog.get("pets")
        prepare_files("pets")
    assert [len(d["annotations"]) for d in dicts] == [1, 0]
    assert caplog.text.count("6 of 7 annotations are faulty") == 1
    clean = Path(MetadataCatalog.get("pets").json_file)
    assert [a["id"] for a in json.loads(clean.read_text())["annotations"]] == [1]
    assert clean.is_relative_to(tmp_path / "out")
    assert list(clean.parent.iterdir()) == [clean]
    assert len(json.loads(path.read_text())["annotations"]) == 7
    # back to the original file when the key changes
    cfg.DATASETS.BAD_ANNOTATIONS = "error"
    register_coco_format(cfg)
    with pytest.raises(ValueError, match="6 of 7 annotations are faulty"):
        DatasetCatalog.get("pets")


def test_a_sound_file_gives_the_dicts_of_detectron2(tmp_path: Path) -> None:
    """But for the segmentation, which only masks need; images in the order of their ids."""
    records = [
        annotation(i, 2 - i % 2, category_id=9 if i % 3 else 5, segmentation=[[1, 1, 9, 1, 9, 9]])
        for i in range(1, 8)
    ]
    content = coco_content([*records, annotation(9, 1, iscrowd=1)])
    content["images"].reverse()
    path = write_coco(tmp_path, content)
    cfg = make_cfg("DATASETS.COCO_FORMAT", [_entry(tmp_path)])
    register_coco_format(cfg)
    expected = load_coco_json(str(path), str(tmp_path), "the same")
    MetadataCatalog.remove("the same")
    for record in expected:
        for found in record["annotations"]:
            found.pop("segmentation", None)
    assert DatasetCatalog.get("pets") == expected


def test_metadata_are_known_before_the_data_are_loaded(tmp_path: Path) -> None:
    """And a data set whose file is missing has none, so that a model can be used without it."""
    write_coco(tmp_path, coco_content([annotation(1, 1)]))
    cfg = make_cfg("DATASETS.COCO_FORMAT", [_entry(tmp_path)])
    register_coco_format(cfg)
    assert MetadataCatalog.get("pets").thing_classes == ["cat", "dog"]
    (tmp_path / "truth.json").unlink()
    register_coco_format(cfg)
    assert MetadataCatalog.get("pets").get("thing_classes") is None
    assert MetadataCatalog.get("pets").json_file == str(tmp_path / "truth.json")


def test_masks_are_kept_where_they_are_trained(tmp_path: Path) -> None:
    square = [1, 1, 9, 1, 9, 9]
    records = [annotation(1, 1, segmentation=[square]), annotation(2, 1, segmentation=square)]
    write_coco(tmp_path, coco_content(records))
    cfg = make_cfg("DATASETS.COCO_FORMAT", [_entry(tmp_path)], "MODEL.MASK_ON", True)
    register_coco_format(cfg)
    masks = [a["segmentation"] for a in DatasetCatalog.get("pets")[0]["annotations"]]
    assert masks == [[square], [square]]
    write_coco(tmp_path, coco_content([annotation(1, 1, segmentation=[])]))
    with pytest.raises(ValueError, match="1 x 'segmentation' is neither"):
        DatasetCatalog.get("pets")
