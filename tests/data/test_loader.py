import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch.utils.data import TensorDataset

from miti_detr.data import (
    ImageError,
    build_test_loader,
    build_train_loader,
    register_coco_format,
)

from .helpers import annotation, coco_content, make_cfg, write_coco

SIZES = tuple((20 + i, 30 - i) for i in range(11))  # (width, height): six portraits, five wide


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    """11 images, the first without objects, the second with only a crowd."""
    records = [annotation(i, i, iscrowd=int(i == 2)) for i in range(2, 12)]
    path = write_coco(tmp_path, coco_content(records, SIZES))
    cfg = make_cfg(
        *("DATASETS.COCO_FORMAT", [["pets", str(path), str(tmp_path)]]),
        *(
            "DATASETS.TRAIN",
            ("pets",),
            "SOLVER.IMS_PER_BATCH",
            4,
            "OUTPUT_DIR",
            str(tmp_path / "o"),
        ),
        *("INPUT.MIN_SIZE_TRAIN", (16, 18, 20, 22, 24), "INPUT.MIN_SIZE_TEST", 16),
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range"),
        *("INPUT.CROP.SIZE", [8, 12], "INPUT.CROP.MIN_SIZE_BEFORE", (14, 18)),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
    )
    register_coco_format(cfg)
    return cfg


def _summary(batch: list[dict[str, Any]]) -> list[Any]:
    """What a batch holds, in a form that can be compared."""
    return [
        (d["image_id"], tuple(d["image"].shape), d["instances"].gt_boxes.tensor.tolist())
        for d in batch
    ]


def _take(cfg: CfgNode, count: int, **arguments: Any) -> list[list[Any]]:
    loader = build_train_loader(cfg, **arguments)
    try:
        return [_summary(batch) for batch in itertools.islice(loader, count)]
    except ImageError as error:
        del loader  # by the garbage collector, it would wait 5 seconds for each worker
        raise error.with_traceback(None) from None


def _ids(batches: list[list[Any]]) -> list[int]:
    return [sample[0] for batch in batches for sample in batch]


def test_workers_do_not_change_the_stream(cfg: CfgNode) -> None:
    alone = _take(cfg, 9)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert _take(cfg, 9) == alone
    # augmentation is random: image number 3 does not always look the same
    assert len({str(s) for batch in alone for s in batch if s[0] == 3}) > 1


def test_resume_continues_the_stream(cfg: CfgNode) -> None:
    batches = _take(cfg, 8)
    assert _take(cfg, 3, start_iter=5) == batches[5:]
    loader = build_train_loader(cfg)
    loader.batch_sampler.start_iter = 6
    assert [_summary(batch) for batch in itertools.islice(loader, 2)] == batches[6:]


def test_processes_share_each_batch(cfg: CfgNode, monkeypatch) -> None:
    whole = _take(cfg, 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(_take(cfg, 6))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    cfg.SOLVER.IMS_PER_BATCH = 5
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH 5"):
        build_train_loader(cfg)


def test_grouping_keeps_wide_images_together(cfg: CfgNode) -> None:
    def mixed() -> int:
        wide = [{SIZES[s[0] - 1][0] > SIZES[s[0] - 1][1] for s in b} for b in _take(cfg, 20)]
        return sum(len(kinds) > 1 for kinds in wide)

    assert mixed() == 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert mixed() > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_state_of_the_caller_is_left_alone(cfg: CfgNode, num_workers: int) -> None:
    cfg.DATALOADER.NUM_WORKERS = num_workers
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    _take(cfg, 3)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]


def test_all_generators_are_seeded_for_each_sample(cfg: CfgNode) -> None:
    def draw(record: dict[str, Any]) -> dict[str, Any]:
        return {"draws": (torch.rand(1).item(), np.random.rand(), random.random())}

    def draws() -> list[Any]:
        loader = build_train_loader(cfg, mapper=draw)
        return [d["draws"] for batch in itertools.islice(loader, 5) for d in batch]

    first = draws()
    assert draws() == first
    assert len({value for triple in first for value in triple}) == 60
    cfg.SEED = 8
    assert draws() != first


@pytest.mark.parametrize(("filtered", "expected"), [(False, range(1, 12)), (True, range(3, 12))])
def test_images_without_objects(cfg: CfgNode, filtered: bool, expected: range) -> None:
    """The first image has nothing, the second only a crowd."""
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filtered
    assert set(_ids(_take(cfg, 30))) == set(expected)


def test_mapper_may_skip_an_image(cfg: CfgNode) -> None:
    """None: the next image of the data set takes the place; image 1 follows the last."""

    def skip_last(record: dict[str, Any]) -> dict[str, Any] | None:
        return None if record["image_id"] == 11 else {"id": record["image_id"]}

    loader = build_train_loader(cfg, mapper=skip_last)
    ids = [d["id"] for batch in itertools.islice(loader, 11) for d in batch]
    assert 11 not in ids
    assert len(ids) == 44
    with pytest.raises(ImageError, match="the mapper skipped every one"):
        next(iter(build_train_loader(cfg, mapper=lambda record: None)))


def test_records_are_serialised(cfg: CfgNode) -> None:
    """Worker processes share one buffer instead of copying Python objects."""
    loader = build_train_loader(cfg)
    assert isinstance(loader.dataset._images._records, DatasetFromList)
    assert loader.dataset._images._records._serialize
    assert len(loader.dataset) == 11


def test_bad_keys(cfg: CfgNode) -> None:
    cfg.SEED = -1
    with pytest.raises(ValueError, match="SEED -1"):
        build_train_loader(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ValueError, match="'RepeatFactorTrainingSampler' is not supported"):
        build_train_loader(cfg)


def test_drop_reaches_data_sets_of_others(cfg: CfgNode) -> None:
    """A user's own function, with one sound box and two faulty ones: the mapper sees the sound."""
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "number": i}
        for i, (box, label) in enumerate([([1, 1, 1, 5], 0), ([1, 1, 4, 5], 1), ([1, 1, 4, 5], 2)])
    ]
    records = [{"file_name": "x", "width": 9, "height": 9, "annotations": annotations}]
    DatasetCatalog.register("own", lambda: records)
    MetadataCatalog.get("own").set(thing_classes=["a", "b"])
    cfg.merge_from_list(["DATASETS.TRAIN", ("own",), "DATASETS.BAD_ANNOTATIONS", "drop"])
    batch = next(iter(build_train_loader(cfg, mapper=dict)))
    assert [[a["number"] for a in d["annotations"]] for d in batch] == [[1]] * 4
    assert len(records[0]["annotations"]) == 3


def test_records_that_cannot_be_grouped_or_listed(cfg: CfgNode) -> None:
    DatasetCatalog.register("sizeless", lambda: [{"file_name": "a.png", "annotations": []}])
    cfg.DATASETS.TRAIN = ("sizeless",)
    with pytest.raises(ValueError, match=r"a\.png has no width and height"):
        build_train_loader(cfg)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    build_train_loader(cfg)
    DatasetCatalog.register("torch", lambda: TensorDataset(torch.zeros(3)))
    cfg.DATASETS.TRAIN = ("torch",)
    with pytest.raises(ValueError, match=r"'torch' is a TensorDataset"):
        build_train_loader(cfg)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_loader(cfg: CfgNode, num_workers: int) -> None:
    """In order, in batches of TEST.IMS_PER_BATCH, each image once, only resized."""
    cfg.merge_from_list(["TEST.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", num_workers])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batches = list(build_test_loader(cfg, "pets"))
    assert [[d["image_id"] for d in b] for b in batches] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11],
    ]
    assert all(min(d["image"].shape[1:]) == 16 for b in batches for d in b)
    assert all("instances" not in d for b in batches for d in b)
    assert torch.equal(torch.get_rng_state(), state)


def test_test_loader_divides_the_images_among_processes(cfg: CfgNode, monkeypatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    ids = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = build_test_loader(cfg, "pets", mapper=lambda d: d["image_id"])
        ids.append([i for batch in loader for i in batch])
    assert ids == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]


def test_test_loader_groups_like_shapes(cfg: CfgNode, monkeypatch) -> None:
    """Portraits, squares, landscapes; each image once in all processes together."""
    sizes = [(30, 20), (20, 30), (20, 20), (60, 40), (40, 60), (20, 20), (33, 20)]
    records = [
        {"file_name": str(i), "image_id": i, "width": width, "height": height}
        for i, (width, height) in enumerate(sizes)
    ]
    DatasetCatalog.register("mixed", lambda: records)
    cfg.TEST.IMS_PER_BATCH = 2
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    batches = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        batches += list(build_test_loader(cfg, "mixed", mapper=lambda d: d["image_id"]))
    assert batches == [[1, 4], [2, 5], [0, 3], [6]]
    cfg.TEST.IMS_PER_BATCH = 1
    assert list(build_test_loader(cfg, "mixed", mapper=lambda d: d["image_id"])) == [[4], [5], [6]]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_stop_or_are_skipped(cfg: CfgNode, tmp_path: Path, num_workers: int) -> None:
    """A truncated image is named with its data set in one line, or the next one takes its place."""
    path = tmp_path / "5.png"
    path.write_bytes(path.read_bytes()[:-30])
    cfg.DATALOADER.NUM_WORKERS = num_workers
    with pytest.raises(ImageError) as error:
        _take(cfg, 9)
    assert "\n" not in str(error.value)
    assert f"data set 'pets': The image {path} cannot be read" in str(error.value)
    assert "DATASETS.BAD_IMAGES skip" in str(error.value)
    cfg.DATASETS.BAD_IMAGES = "skip"
    batches = _take(cfg, 9)
    assert 5 not in _ids(batches)
    assert _ids(batches).count(6) > 3
    assert _take(cfg, 3, start_iter=6) == batches[6:]  # a resume
    seen = [item["image_id"] for batch in build_test_loader(cfg, "pets") for item in batch]
    assert seen == [1, 2, 3, 4, 6, *range(6, 12)]
    for name in range(1, 12):
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"^no image of the data set can be used"):
        _take(cfg, 1)


def test_bad_image_keys(cfg: CfgNode) -> None:
    cfg.DATASETS.BAD_IMAGES = "drop"
    with pytest.raises(ValueError, match=r"BAD_IMAGES must be one of .*'skip'.* got 'drop'"):
        build_train_loader(cfg)
    cfg.DATASETS.EXIF_ORIENTATION = "yes"
    with pytest.raises(ValueError, match=r"EXIF_ORIENTATION must be one of .* got 'yes'"):
        build_train_loader(cfg)
