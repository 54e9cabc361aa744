import json
import uuid
from pathlib import Path

from miti_detr.data.coco_format import register_coco
from miti_detr.visualize.classes import ClassTable, class_table

PLAIN = ClassTable(["0", "1"], [0, 1])


def test_names_and_ids_of_a_registered_data_set() -> None:
    assert class_table("shapes_val", 3).dataset_ids == [1, 2, 3]
    assert class_table("shapes_val", 3).names[0].isalpha()
    assert class_table("coco_2017_val", 80).dataset_ids[-1] == 90


def test_names_come_from_the_annotation_file(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "b"}, {"id": 4, "name": "a"}]
    file = tmp_path / "val.json"
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    name = f"table_{uuid.uuid4().hex}"
    register_coco(name, str(file), str(tmp_path))
    assert class_table(name, 2) == ClassTable(["a", "b"], [4, 7])


def test_without_the_data_classes_are_numbers() -> None:
    name = f"table_{uuid.uuid4().hex}"
    register_coco(name, "/nowhere/val.json", "/nowhere")
    assert class_table(name, 2) == PLAIN
    assert class_table(f"unknown_{name}", 2) == PLAIN
    assert class_table(None, 2) == PLAIN


def test_names_of_another_number_of_classes_are_not_used() -> None:
    assert class_table("shapes_val", 2) == PLAIN
