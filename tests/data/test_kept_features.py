"""Features of a frozen backbone that are computed once: the same training, without images."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

from miti_detr.data import register_coco_format
from miti_detr.data.images import ImageError
from miti_detr.data.kept_features import FeatureStore
from miti_detr.data.loader import build_train_loader, training_records
from miti_detr.engine import Trainer
from miti_detr.engine.features import keep_features
from tests.data.helpers import annotation, coco_content, write_coco
from tests.helpers import tiny_config

SIZES = ((40, 32), (32, 48), (64, 40), (32, 32))


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    records = [annotation(i, i, category_id=(5, 9)[i % 2]) for i in (1, 2, 3)]
    path = write_coco(tmp_path, coco_content(records, SIZES))
    cfg: CfgNode = tiny_config(
        *("DATASETS.COCO_FORMAT", [["few", str(path), str(tmp_path)]]),
        *("DATASETS.TRAIN", ("few",), "DATASETS.TEST", (), "MODEL.DETR.NUM_CLASSES", 2),
        *("MODEL.BACKBONE.CACHE_FEATURES", 3, "SOLVER.BACKBONE_MULTIPLIER", 0.0),
        *("INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MAX_SIZE_TRAIN", 96),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()),
        *("SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.RESNETS.NORM", "FrozenBN"),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "OUTPUT_DIR", str(tmp_path / "run")),
    )
    register_coco_format(cfg)
    return cfg


def _files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "datasets" / "features").rglob("*.pt"))


def _weights(output: str, name: str = "model_final.pth") -> dict[str, Any]:
    weights: dict[str, Any] = torch.load(f"{output}/{name}", weights_only=True)["model"]
    return weights


def test_losses_are_those_of_the_images(cfg: CfgNode) -> None:
    """Image by image, because convolutions see the padding of a batch."""
    trainer = Trainer(cfg)
    model, store, records = trainer.model, FeatureStore(cfg), training_records(cfg)
    keep_features(store, model, records)
    drawn = set()
    for position, record in enumerate(records[:3] * 4):
        torch.manual_seed(0)
        (kept,) = next(iter(build_train_loader(cfg, store, start_iter=position)))[:1]
        record = next(r for r in records if r["file_name"] == kept["file_name"])
        variants = [store.variant(record, number) for number in range(3)]
        assert "image" not in kept
        number, mapped = next(
            (n, v)
            for n, v in enumerate(variants)
            if v["image"].shape[-2:] == torch.Size(kept["size"])
            and torch.equal(v["instances"].gt_boxes.tensor, kept["instances"].gt_boxes.tensor)
        )
        drawn.add(number)
        torch.manual_seed(1)
        expected = model([mapped])
        torch.manual_seed(1)
        torch.testing.assert_close(model([kept]), expected, rtol=5e-3, atol=5e-3)  # float16
    assert len(drawn) > 1


def test_a_batch_is_padded_as_images_are(cfg: CfgNode) -> None:
    """Masks and shapes are those of the padded images; features agree away from the padding."""
    model = Trainer(cfg).model
    store, records = FeatureStore(cfg), training_records(cfg)
    keep_features(store, model, records)
    mapped = [store.variant(record, 0) for record in records[:3]]
    inputs = []
    for each in mapped:
        features = model.backbone(model.preprocess_image([each]))
        kept = {name: feature.tensor[0] for name, feature in features.items()}
        inputs.append({"features": kept, "size": tuple(each["image"].shape[-2:])})
    found = model.backbone(model.preprocess_image(inputs))
    expected = model.backbone(model.preprocess_image(mapped))
    for name, feature in expected.items():
        assert torch.equal(found[name].mask, feature.mask)
        assert found[name].tensor.shape == feature.tensor.shape
        torch.testing.assert_close(found[name].tensor[..., 0, 0], feature.tensor[..., 0, 0])


def test_runs(cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files are made once for all transformers; a resumed run equals one that ran through."""
    with caplog.at_level(logging.INFO, logger="miti_detr"):
        Trainer(cfg).train()
    files = _files(tmp_path)
    assert len(files) == 3 * len(SIZES)
    assert "3 variants of each of 4 images: 12 were computed" in caplog.text
    files[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in files[1:]}

    other = copy.deepcopy(cfg)
    other.merge_from_list(["OUTPUT_DIR", str(tmp_path / "b")])
    other.merge_from_list(["MODEL.DETR.LAYER_RESIDUAL", "none", "MODEL.DETR.ENC_LAYERS", 3])
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="miti_detr"):
        Trainer(other).train()
    assert "1 were computed" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in files[1:]} == times

    half = copy.deepcopy(cfg)
    half.merge_from_list(["OUTPUT_DIR", str(tmp_path / "c")])
    trainer = Trainer(half)
    trainer.max_iter = 2
    trainer.train()
    trainer = Trainer(half)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    torch.testing.assert_close(_weights(half.OUTPUT_DIR), _weights(cfg.OUTPUT_DIR), rtol=0, atol=0)

    changed = copy.deepcopy(cfg)
    changed.merge_from_list(["INPUT.RANDOM_FLIP", "vertical", "OUTPUT_DIR", str(tmp_path / "d")])
    Trainer(changed).train()
    assert len(_files(tmp_path)) == 2 * len(files)


def test_what_cannot_be_kept(cfg: CfgNode) -> None:
    trained = copy.deepcopy(cfg)
    trained.SOLVER.BACKBONE_MULTIPLIER = 0.1
    with pytest.raises(ValueError, match="CACHE_FEATURES needs a backbone that is not trained"):
        Trainer(trained)
    for key, value in (("MODEL.MASK_ON", True), ("INPUT.PATCHES.NUMBER", 2)):
        other = copy.deepcopy(cfg)
        other.merge_from_list([key, value])
        with pytest.raises(ValueError, match=rf"CACHE_FEATURES keeps no images, and {key} is"):
            FeatureStore(other)


def test_a_damaged_file_is_named(cfg: CfgNode, tmp_path: Path) -> None:
    store, records = FeatureStore(cfg), training_records(cfg)
    keep_features(store, Trainer(cfg).model, records)
    for path in _files(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageError, match=r"features .*\.pt of .* cannot be read. Delete that file"):
        store(dict(records[0]))
