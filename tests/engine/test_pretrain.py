"""Pre-training from start to fine-tuning, on a folder of small pictures."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.cli.main import main
from miti_detr.engine import NonFiniteError, RankHook, Trainer, replay, setup_config
from miti_detr.engine.setup import check_config
from tests.engine.test_trainer import Losses
from tests.helpers import tiny_config
from tests.small_shapes import small_shapes

CONFIG = "configs/shapes/up_detr_pretrain.yaml"
TINY = (
    *("MODEL.DETR.HIDDEN_DIM", 32, "MODEL.DETR.NHEADS", 2, "MODEL.DETR.DIM_FEEDFORWARD", 64),
    *("MODEL.DETR.DEC_LAYERS", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 2),
    *("INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48, "MODEL.DETR.DROPOUT", 0.2),
    *("DATALOADER.ASPECT_RATIO_GROUPING", False, "TEST.EVAL_PERIOD", 2, "SEED", 3),
)


@pytest.fixture
def photos(tmp_path: Path) -> Any:
    """Six pictures of noise, one of them broken; unregistered afterwards."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        pixels = np.random.RandomState(index).randint(0, 256, (40 + 8 * index, 64, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"")
    yield folder
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "photos" in catalog:
            catalog.remove("photos")


def config(photos: Path, output: Path, *overrides: Any) -> Any:
    data = ("DATASETS.COCO_FORMAT", [["photos", str(photos)]], "DATASETS.TRAIN", ("photos",))
    options = [*TINY, *data, "DATASETS.TEST", ("photos",), "OUTPUT_DIR", str(output), *overrides]
    return setup_config(CONFIG, [str(x) for x in options])


def train(cfg: Any, *, resume: bool = False, stop: int = -1) -> Trainer:
    """Train; ``stop``: as if killed before that iteration."""
    trainer = Trainer(cfg)
    trainer.register_hooks([Losses(stop)])
    trainer.resume_or_load(resume)
    with contextlib.suppress(SystemExit):
        trainer.train()
    return trainer


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    """Draws of patches, colours, dropped patches and dropout are functions of the iteration."""
    straight = train(config(photos, tmp_path / "a", "SOLVER.MAX_ITER", 4))
    stopped = train(config(photos, tmp_path / "b", "SOLVER.MAX_ITER", 4), stop=3)
    assert stopped.iter == 3
    resumed = train(config(photos, tmp_path / "b", "SOLVER.MAX_ITER", 4), resume=True)
    torch.testing.assert_close(
        resumed.model.state_dict(), straight.model.state_dict(), rtol=0, atol=0
    )
    records = [json.loads(x) for x in (tmp_path / "a/metrics.json").read_text().splitlines()]
    assert {"loss_feature", "loss_feature_0", "bbox/AP50"} <= {k for r in records for k in r}
    truth = json.loads((tmp_path / "a/inference/photos/patches.json").read_text())
    assert (len(truth["images"]), len(truth["annotations"])) == (5, 25)  # not the broken one


def test_a_stopped_step_is_replayed(photos: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(photos, tmp_path / "a"))
    trainer.model.input_proj.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteError):
        trainer.train()
    (path,) = (tmp_path / "a").glob("nonfinite_iter0_rank0.pth")
    report = replay(path)
    assert report.losses == pytest.approx(report.recorded_losses, nan_ok=True)
    assert report.parameter == "input_proj.bias"
    assert report.module is not None


def test_rank_is_logged_in_pretraining(photos: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(photos, tmp_path / "a", "SOLVER.MAX_ITER", 1))
    trainer.register_hooks([RankHook.on_dataset(trainer.cfg, period=20)])
    trainer.train()
    assert "rank/encoder/layer0/residual" in (tmp_path / "a/metrics.json").read_text()


@pytest.mark.slow
def test_picture_of_patches(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(photos, tmp_path / "a", "SOLVER.MAX_ITER", 1))
    output = tmp_path / "patches.png"
    weights = str(tmp_path / "a/model_final.pth")
    assert main(["detections", "--weights", weights, "--output", str(output)]) == 0
    assert Image.open(output).width > 300
    alone = ["predict", str(photos / "0.png"), "--weights", weights, "--output", str(tmp_path)]
    assert main(alone) == 1
    assert "has no 'patches'" in capsys.readouterr().err


@pytest.mark.parametrize("residual", ["none", "before_norm"])
@pytest.mark.parametrize("how", ["checkpointer", "load_state_dict"])
def test_fine_tuning_takes_over_all_but_the_heads_of_pretraining(
    photos: Path, tmp_path: Path, residual: str, how: str, log: pytest.LogCaptureFixture
) -> None:
    """Also into a model of two classes, whose class head has the shape of the pre-trained one."""
    pretrained = build_model(config(photos, tmp_path, "MODEL.DEVICE", "cpu"))
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.uniform_(-1, 1)
    MitiDetrCheckpointer(pretrained, str(tmp_path)).save("pretrained")
    keys = (
        *("MODEL.DETR.NUM_OBJECT_QUERIES", 10, "MODEL.DETR.PRE_NORM", True),
        *("MODEL.DETR.NUM_CLASSES", 2, "MODEL.DETR.LAYER_RESIDUAL", residual),
    )
    model = build_model(tiny_config(*keys)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if how == "checkpointer":
        checkpointer = MitiDetrCheckpointer(model, for_training=True)
        checkpointer.load(str(tmp_path / "pretrained.pth"))
    else:
        model.load_state_dict(pretrained.state_dict(), strict=False)
    theirs = pretrained.state_dict()
    for key, value in model.state_dict().items():
        source = before if key.startswith("class_embed") else theirs
        torch.testing.assert_close(value, source[key], rtol=0, atol=0)
    assert "8 dropped (" in log.text
    assert "2 re-initialised (class_embed.weight, class_embed.bias)" in log.text
    assert "weights of UP-DETR pre-training" in log.text


def test_pretraining_starts_from_a_detector(
    photos: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    keys = ("MODEL.DETR.NUM_OBJECT_QUERIES", 10, "MODEL.DETR.PRE_NORM", True)
    detector = build_model(tiny_config(*keys, "MODEL.DETR.LAYER_RESIDUAL", "none"))
    MitiDetrCheckpointer(detector, str(tmp_path)).save("detector")
    model = build_model(config(photos, tmp_path, "MODEL.DEVICE", "cpu"))
    MitiDetrCheckpointer(model, for_training=True).load(str(tmp_path / "detector.pth"))
    state = model.state_dict()
    for key, value in detector.state_dict().items():
        if not key.startswith("class_embed"):
            torch.testing.assert_close(state[key], value, rtol=0, atol=0)


def test_patches_of_a_labelled_data_set(tmp_path: Path) -> None:
    with small_shapes(tmp_path):
        options = [*TINY, "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", 1]
        trainer = train(setup_config(CONFIG, [str(x) for x in options]))
    assert len(trainer.model.query_mask) == 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("INPUT.PATCHES.NUMBER", 0), r"NUMBER is 0; a UpDetr needs at least 1"),
        (("MODEL.META_ARCHITECTURE", "MitiDetr"), r"NUMBER is 5; a MitiDetr needs 0"),
        (("INPUT.CROP.ENABLED", True), r"INPUT\.CROP\.ENABLED is True"),
    ],
)
def test_keys_that_contradict_each_other(
    photos: Path, tmp_path: Path, overrides: Any, message: str
) -> None:
    cfg = config(photos, tmp_path)
    cfg.merge_from_list(list(overrides))
    with pytest.raises(ValueError, match=message):
        check_config(cfg)
