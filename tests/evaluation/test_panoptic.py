"""Panoptic quality of cases that can be computed by hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from miti_detr.evaluation import PanopticEvaluator, coco_table
from miti_detr.evaluation.panoptic import encode_ids

pytest.importorskip("hotcoco")
NAME = "panoptic_evaluation_test"
CAT, DOG, SKY = 11, 12, 99  # ids of the data set: classes 0, 1 (things) and 2 (stuff)


def write_truth(folder: Path, images: list[tuple[np.ndarray, list[dict[str, Any]]]]) -> None:
    """A panoptic data set of images of ids, and their segments."""
    (folder / "segments").mkdir()
    annotations = []
    for number, (ids, segments) in enumerate(images, start=1):
        (folder / "segments" / f"{number}.png").write_bytes(encode_ids(ids))
        info = [
            {"iscrowd": 0, "area": int((ids == s["id"]).sum()), "bbox": [0, 0, 1, 1], **s}
            for s in segments
        ]
        file = {"image_id": number, "file_name": f"{number}.png"}
        annotations.append({**file, "segments_info": info})
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": ids.shape[0], "width": ids.shape[1]}
            for i, (ids, _) in enumerate(images, start=1)
        ],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": name, "isthing": int(i != SKY)}
            for i, name in ((CAT, "cat"), (DOG, "dog"), (SKY, "sky"))
        ],
    }
    (folder / "truth.json").write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def metadata(tmp_path: Path) -> Iterator[None]:
    MetadataCatalog.get(NAME).set(
        panoptic_json=str(tmp_path / "truth.json"),
        panoptic_root=str(tmp_path / "segments"),
        thing_dataset_id_to_contiguous_id={CAT: 0, DOG: 1},
        stuff_dataset_id_to_contiguous_id={SKY: 2},
    )
    yield
    MetadataCatalog.remove(NAME)


def evaluate(
    folder: Path, predictions: dict[int, tuple[np.ndarray, list[int]]]
) -> dict[str, float]:
    """Evaluate ids and the classes of segments 1, 2, ... for each image."""
    evaluator = PanopticEvaluator(NAME, str(folder))
    for image_id, (ids, classes) in predictions.items():
        segments = [{"id": i, "category_id": c} for i, c in enumerate(classes, start=1)]
        output = {"panoptic_seg": (torch.from_numpy(ids).int(), segments)}
        evaluator.process([{"image_id": image_id}], [output])
    result: dict[str, float] = evaluator.evaluate()["panoptic_seg"]
    return result


def columns(*widths: int, ids: tuple[int, ...]) -> np.ndarray:
    return np.repeat(ids, widths)[None].repeat(10, axis=0)


def test_right_wrong_and_missing_segments(tmp_path: Path) -> None:
    """cat: IoU 8/10 matched, PQ = SQ = 0.8. dog: found as cat: 1 FP (cat), 1 FN (dog), PQ 0.

    cat: PQ = 0.8 / (1 + 1/2) = 8/15, SQ = 0.8, RQ = 2/3. sky: IoU 20/22.
    """
    truth = columns(10, 10, 20, ids=(1000, 70_000, 3))
    segments = [(1000, CAT), (70_000, DOG), (3, SKY)]
    write_truth(tmp_path, [(truth, [{"id": i, "category_id": c} for i, c in segments])])
    found = columns(8, 2, 10, 20, ids=(1, 3, 2, 3))
    result = evaluate(tmp_path, {1: (found, [0, 0, 2])})
    sky = 100 * 20 / 22
    expected = {
        **{"PQ-cat": 800 / 15, "PQ-dog": 0, "PQ-sky": sky},
        **{"PQ_th": 400 / 15, "SQ_th": 40, "RQ_th": 100 / 3},
        **{"PQ_st": sky, "SQ_st": sky, "RQ_st": 100},
        **{"PQ": (800 / 15 + sky) / 3, "SQ": (80 + sky) / 3, "RQ": (200 / 3 + 100) / 3},
    }
    assert result == pytest.approx(expected, abs=1e-9)


def test_void_does_not_count(tmp_path: Path) -> None:
    """Pixels without a segment in the truth leave the union; a segment mostly there is no error.

    cat: 10 columns of truth, found 10 + 6 of void: IoU 1. dog: only on void: ignored.
    """
    truth = columns(10, 20, 10, ids=(1, 0, 2))
    write_truth(tmp_path, [(truth, [{"id": 1, "category_id": CAT}, {"id": 2, "category_id": SKY}])])
    found = columns(16, 12, 12, ids=(1, 2, 3))
    result = evaluate(tmp_path, {1: (found, [0, 1, 2])})
    assert result["PQ-cat"] == pytest.approx(100, abs=1e-9)
    assert result["PQ-sky"] == pytest.approx(100, abs=1e-9)
    assert np.isnan(result["PQ-dog"])
    assert result["PQ"] == pytest.approx(100, abs=1e-9)


def test_crowds_are_neither_missed_nor_found(tmp_path: Path) -> None:
    """A crowd of cats that is not found costs nothing; cats found in it cost nothing either.

    A dog found there is an error: the crowd belongs to cats.
    """
    truth = columns(10, 20, 10, ids=(1, 2, 3))
    segments = [(1, CAT, 0), (2, CAT, 1), (3, DOG, 0)]
    write_truth(
        tmp_path,
        [(truth, [{"id": i, "category_id": c, "iscrowd": k} for i, c, k in segments])] * 2,
    )
    in_crowd = columns(10, 8, 12, 10, ids=(1, 2, 3, 4))
    result = evaluate(
        tmp_path,
        {1: (in_crowd, [0, 0, 0, 1]), 2: (columns(10, 20, 10, ids=(1, 2, 3)), [0, 1, 1])},
    )
    assert result["PQ-cat"] == pytest.approx(100, abs=1e-9)
    assert result["PQ-dog"] == pytest.approx(100 * 2 / (2 + 1 / 2), abs=1e-9)


def test_an_iou_of_one_half_is_no_match(tmp_path: Path) -> None:
    write_truth(tmp_path, [(columns(20, 20, ids=(1, 2)), [{"id": 1, "category_id": CAT}])])
    # 20 columns, 10 of them found, on nothing else: IoU 1/2; one column more is a match.
    assert evaluate(tmp_path, {1: (columns(10, 30, ids=(1, 0)), [0])})["PQ-cat"] == 0
    more = evaluate(tmp_path, {1: (columns(11, 29, ids=(1, 0)), [0])})
    assert more["PQ-cat"] == pytest.approx(55, abs=1e-9)


def test_an_image_without_result_counts_as_missed(tmp_path: Path) -> None:
    whole = (columns(40, ids=(1,)), [{"id": 1, "category_id": CAT}])
    write_truth(tmp_path, [whole, whole])
    result = evaluate(tmp_path, {2: (columns(40, ids=(1,)), [0])})
    assert result["PQ-cat"] == pytest.approx(100 / 1.5, abs=1e-9)
    stored = json.loads((tmp_path / "panoptic_results.json").read_text())
    assert [len(a["segments_info"]) for a in stored["annotations"]] == [0, 1]


def test_table(tmp_path: Path) -> None:
    whole = (columns(40, ids=(1,)), [{"id": 1, "category_id": CAT}])
    write_truth(tmp_path, [whole])
    result = evaluate(tmp_path, {1: (columns(40, ids=(1,)), [0])})
    table = coco_table({"pets": {"panoptic_seg": result}})
    assert "pets, panoptic_seg" in table
    for text in ("PQ_th", "RQ_st", "cat", "100.00"):
        assert text in table
    assert max(map(len, table.splitlines())) <= 80
