import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from miti_detr.data import (
    DetrDatasetMapper,
    PatchDatasetMapper,
    build_mapper,
    build_test_loader,
    build_train_loader,
    check_datasets,
    register_coco_format,
    register_unlabeled,
)
from miti_detr.data.patches import sample_patch_boxes
from miti_detr.data.unlabeled import list_images

from .helpers import annotation, coco_content, make_cfg, write_coco

PATCHES = (
    *("INPUT.PATCHES.NUMBER", 4, "INPUT.PATCHES.SIZE", 16, "INPUT.RANDOM_FLIP", "none"),
    *("INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MAX_SIZE_TRAIN", 100, "INPUT.MIN_SIZE_TEST", 30),
    *("SOLVER.IMS_PER_BATCH", 2, "INPUT.FORMAT", "RGB"),
)


def picture(path: Path, width: int = 80, height: int = 60) -> Path:
    """Red rises from left to right, green from top to bottom: a place can be read from its colour.

    Red is 3 x, green 4 y.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = 3 * np.arange(width) % 256
    pixels[..., 1] = 4 * np.arange(height)[:, None] % 256
    Image.fromarray(pixels).save(path)
    return path


def mapped(path: Path, is_train: bool = False, **extra: Any) -> dict[str, Any]:
    record = {"file_name": str(path), "image_id": 1, **extra}
    output = PatchDatasetMapper(make_cfg(*PATCHES), is_train=is_train)(record)
    assert output is not None
    return output


@pytest.mark.parametrize(("width", "height"), [(17, 17), (80, 60), (20, 300)])
def test_sampled_boxes(width: int, height: int) -> None:
    """Sides in [8, side - 8], inside the image; both ends of every range are reached."""
    boxes = sample_patch_boxes(width, height, 20_000, np.random.default_rng(0))
    assert boxes.shape == (20_000, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min(0).tolist() == [8, 8]
    assert sides.max(0).tolist() == [width - 8, height - 8]
    assert boxes[:, :2].min() == 0
    # x < width - w: the last column is never part of a patch, as published
    assert (boxes[:, 2:].max(0) <= (width - 1, height - 1)).all()
    assert len(np.unique(boxes[:, 0])) == width - 8


@pytest.mark.parametrize(("width", "height"), [(16, 100), (100, 16)])
def test_too_small_an_image_has_no_patch(width: int, height: int) -> None:
    with pytest.raises(ValueError, match=f"{width} x {height} pixels; a patch needs at least 17"):
        sample_patch_boxes(width, height, 1, np.random.default_rng(0))


def test_output(tmp_path: Path) -> None:
    """60 x 80 becomes 30 x 40: boxes of the file are halved."""
    record = {"annotations": [{"bbox": [1, 2, 3, 4]}], "extra": "kept"}
    output = mapped(picture(tmp_path / "a.png"), **record)
    assert "annotations" not in output
    assert output["extra"] == "kept"
    assert (output["height"], output["width"]) == (60, 80)
    assert output["image"].shape == (3, 30, 40)
    assert output["patches"].shape == (4, 3, 16, 16)
    assert output["image"].dtype == output["patches"].dtype == torch.uint8
    instances = output["instances"]
    assert instances.gt_classes.tolist() == [1] * 4
    torch.testing.assert_close(
        instances.gt_boxes.tensor, output["patch_boxes"].float() / 2, rtol=0, atol=1e-5
    )


def test_patches_are_cut_at_their_boxes(tmp_path: Path) -> None:
    """Colours tell the place: the mean of a patch is the colour of the middle of its box."""
    output = mapped(picture(tmp_path / "a.png"))
    boxes = output["patch_boxes"].double()
    middle = (boxes[:, :2] + boxes[:, 2:] - 1) / 2
    means = output["patches"].double().mean((2, 3))[:, :2]
    torch.testing.assert_close(means, middle * torch.tensor([3.0, 4.0]), rtol=0, atol=1.5)


def test_order_of_channels(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    record = {"file_name": str(path)}
    rgb, bgr = (
        PatchDatasetMapper(make_cfg(*PATCHES, "INPUT.FORMAT", f), is_train=False)(record)
        for f in ("RGB", "BGR")
    )
    assert rgb is not None
    assert bgr is not None
    for key in ("image", "patches"):
        assert torch.equal(rgb[key], bgr[key].flip(-3))
        assert not torch.equal(rgb[key], bgr[key])
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is 'L'; patches need RGB or BGR"):
        PatchDatasetMapper(make_cfg(*PATCHES, "INPUT.FORMAT", "L"), is_train=False)


def test_patches_of_evaluation_depend_on_the_file(tmp_path: Path) -> None:
    one, same = mapped(picture(tmp_path / "x/a.png")), mapped(picture(tmp_path / "y/a.png"))
    other = mapped(picture(tmp_path / "x/b.png"))
    assert torch.equal(one["patch_boxes"], same["patch_boxes"])
    assert torch.equal(one["patches"], same["patches"])
    assert not torch.equal(one["patch_boxes"], other["patch_boxes"])


def test_patches_of_training_follow_the_seed_and_change_their_colours(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    draws = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        draws.append(mapped(path, is_train=True))
    assert torch.equal(draws[0]["patches"], draws[1]["patches"])
    assert not torch.equal(draws[0]["patch_boxes"], draws[2]["patch_boxes"])
    boxes = draws[0]["patch_boxes"]
    whole = Image.open(path)
    plain = [np.asarray(whole.crop(box).resize((16, 16))) for box in boxes.tolist()]
    got = draws[0]["patches"].permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(plain).astype(int) - got).mean() > 5
    assert draws[0]["image"][2].max() == 0  # the image itself has no blue, as the file


def test_images_that_cannot_be_used_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    tiny = picture(tmp_path / "tiny.png", 16, 40)
    mapper = PatchDatasetMapper(make_cfg(*PATCHES), is_train=True)
    with caplog.at_level(logging.WARNING, logger="miti_detr"):
        assert mapper({"file_name": str(broken)}) is None
        assert mapper({"file_name": str(tiny)}) is None
        assert mapper({"file_name": str(picture(tmp_path / "good.png"))}) is not None
    assert mapper.skipped == 2
    assert "broken.jpg" in caplog.text
    assert (
        "tiny.png: it is 16 x 40 pixels; a patch needs at least 17 (2 skipped so far)"
        in caplog.text
    )


def unlabeled_cfg(folder: Path, *overrides: Any) -> Any:
    return make_cfg(
        *PATCHES,
        *("DATASETS.COCO_FORMAT", [["photos", str(folder)]], "DATASETS.TRAIN", ("photos",)),
        *("DATASETS.TEST", ("photos",), "DATALOADER.ASPECT_RATIO_GROUPING", False, *overrides),
    )


def photos(folder: Path) -> Path:
    """Two good images, one of them in a sub-folder, a broken and a tiny one, and a text file."""
    picture(folder / "b.png")
    picture(folder / "a/c.JPEG")
    picture(folder / "tiny.png", 10, 10)
    (folder / "broken.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    return folder


def test_a_folder_is_a_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = unlabeled_cfg(photos(tmp_path / "photos"))
    register_unlabeled(cfg)
    register_unlabeled(cfg)  # again changes nothing
    names = [Path(r["file_name"]).name for r in DatasetCatalog.get("photos")]
    assert names == ["c.JPEG", "b.png", "broken.png", "tiny.png"]
    with caplog.at_level(logging.INFO, logger="miti_detr"):
        check_datasets(cfg)
    assert "photos: 4 images; their labels are not used" in caplog.text
    assert "2 of 4 images checked will be skipped. The first: " in caplog.text
    batches = iter(build_train_loader(cfg))
    seen = [Path(item["file_name"]).name for _ in range(4) for item in next(batches)]
    assert set(seen) == {"c.JPEG", "b.png"}
    tested = [x for batch in build_test_loader(cfg, "photos") for x in batch]
    assert {Path(item["file_name"]).name for item in tested} == {"c.JPEG", "b.png"}


def test_one_pair_needs_no_list(tmp_path: Path) -> None:
    photos(tmp_path)
    register_unlabeled(make_cfg("DATASETS.COCO_FORMAT", [["photos", str(tmp_path)]]))
    assert len(DatasetCatalog.get("photos")) == 4


def test_labels_of_a_data_set_are_ignored(tmp_path: Path) -> None:
    """Also faulty ones, and a number of classes that is not the model's."""
    bad = annotation(1, 1, bbox=[5, 5, 0, 0])
    path = write_coco(tmp_path, coco_content([bad], sizes=((40, 30), (30, 40))))
    entry = [["labelled", str(path), str(tmp_path)]]
    cfg = make_cfg(
        *PATCHES,
        *("DATASETS.COCO_FORMAT", entry, "DATASETS.TRAIN", ("labelled",)),
        *("DATASETS.TEST", (), "MODEL.DETR.NUM_CLASSES", 7),
    )
    register_coco_format(cfg)
    check_datasets(cfg)
    batch = next(iter(build_train_loader(cfg)))
    assert [len(x["instances"]) for x in batch] == [4, 4]


def test_which_mapper() -> None:
    assert isinstance(build_mapper(make_cfg(), is_train=True), DetrDatasetMapper)
    assert isinstance(build_mapper(make_cfg(*PATCHES), is_train=True), PatchDatasetMapper)


def test_faults_of_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*gone does not exist"):
        list_images(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="has no images"):
        list_images(str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"")
    cfg = unlabeled_cfg(tmp_path)
    register_unlabeled(cfg)
    with pytest.raises(ValueError, match=r"'photos' has no image that can be used: .*broken\.png"):
        check_datasets(cfg)
    with pytest.raises(ValueError, match=r"UNLABELED: the name 'photos' .* Choose another name"):
        register_unlabeled(unlabeled_cfg(tmp_path / "other"))
    cfg = unlabeled_cfg(tmp_path, "DATASETS.TEST", ("unknown",))
    with pytest.raises(ValueError, match="'unknown' is not registered"):
        check_datasets(cfg, eval_only=True)


def test_a_share_of_the_training_images(tmp_path: Path) -> None:
    for index in range(10):
        picture(tmp_path / f"{index}.png")
    cfg = unlabeled_cfg(tmp_path, "DATASETS.TRAIN_SHARE", 0.4)
    register_unlabeled(cfg)
    loader: Any = build_train_loader(cfg)
    kept = [Path(record["file_name"]).stem for record in loader.dataset._images._records]
    assert kept == ["0", "2", "5", "7"]
    assert len(build_test_loader(cfg, "photos").dataset) == 10  # only training images are shared
    with pytest.raises(ValueError, match=r"TRAIN_SHARE is 1\.5\. It must be above 0"):
        build_train_loader(unlabeled_cfg(tmp_path, "DATASETS.TRAIN_SHARE", 1.5))
