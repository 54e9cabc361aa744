from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch.testing import assert_close

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine.predictor import Predictor, load_config
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, with its config recorded."""
    folder = tmp_path_factory.mktemp("weights")
    cfg = tiny_config("SOLVER.AMP.ENABLED", True, "MODEL.DETR.LAYER_RESIDUAL", "after_norm")
    torch.manual_seed(0)
    MitiDetrCheckpointer(build_model(cfg), str(folder), cfg=cfg).save("tiny")
    return folder / "tiny.pth"


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_config_comes_from_the_checkpoint(weights: Path) -> None:
    cfg = load_config(weights=str(weights), overrides=["MODEL.DETR.PADDING_MASK", "nearest"])
    assert cfg.MODEL.DETR.LAYER_RESIDUAL == "after_norm"
    assert cfg.MODEL.DETR.PADDING_MASK == "nearest"
    assert str(weights) == cfg.MODEL.WEIGHTS
    assert cfg.is_frozen()


def test_a_config_file_goes_before_the_recorded_one(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("MODEL: {DETR: {NUM_OBJECT_QUERIES: 3}}")
    cfg = load_config(str(file), weights=str(weights))
    assert cfg.MODEL.DETR.NUM_OBJECT_QUERIES == 3
    assert cfg.MODEL.DETR.LAYER_RESIDUAL == "before_norm"


def test_without_any_config_it_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "bare.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"bare\.pth records no config\. .*--config-file"):
        load_config(weights=str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SEED: !!python/object/apply:os.getcwd []", "line 1: the tag !!python/object/apply:os"),
        ("_BASE_: http://127.0.0.1:9/a.yaml", "names _BASE_"),
        ("_BASE_: /etc/passwd", "names _BASE_"),
        ("MODEL: {TIMM: {NAME: 'hf-hub:someone/model'}}", "MODEL.TIMM.NAME is 'hf-hub:"),
        ("MODEL: {TIMM: {NAME: '/tmp/model'}}", "MODEL.TIMM.NAME is '/tmp/model'"),
        ("just text", "is a str"),
        ("[1, 2]", "is a list"),
        ("MODEL: {DETR: 5}", "MODEL.DETR is a section"),
    ],
)
def test_a_recorded_config_is_data(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "miti_detr": {"config": line}}, path)
    with pytest.raises(ValueError, match=message) as error:
        load_config(weights=str(path))
    assert str(error.value).startswith(f"the config recorded in {path}")
    assert "\n" not in str(error.value)


def test_a_recorded_config_downloads_and_trusts_nothing(tmp_path: Path) -> None:
    recorded = "MODEL: {TRUST_WEIGHTS: True, TIMM: {PRETRAINED: True}, WEIGHTS: 'http://a/b.pth'}"
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "miti_detr": {"config": recorded}}, path)
    cfg = load_config(weights=str(path))
    assert not cfg.MODEL.TRUST_WEIGHTS
    assert not cfg.MODEL.TIMM.PRETRAINED
    assert str(path) == cfg.MODEL.WEIGHTS


def test_weights_of_another_variant_are_refused(weights: Path) -> None:
    cfg = load_config(weights=str(weights), overrides=["MODEL.DETR.LAYER_RESIDUAL", "none"])
    with pytest.raises(ValueError, match="after_norm"):
        Predictor(cfg)


def test_a_batch_agrees_with_the_model(weights: Path) -> None:
    """Each image gets what the model says of its resized self, at its own size."""
    cfg = load_config(weights=str(weights))
    predictor = Predictor(cfg)
    images = [random_image(60, 120), random_image(200, 90), random_image(60, 120)]
    results = predictor(images)
    assert [r.image_size for r in results] == [(60, 120), (200, 90), (60, 120)]
    assert not predictor.model.training
    again = predictor(images[::-1])[::-1]
    for one, other in zip(results, again, strict=True):
        assert not one.scores.requires_grad
        assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=1e-4, atol=1e-2)

    item = predictor.prepare(images[1])
    longest = cfg.INPUT.MAX_SIZE_TEST
    assert tuple(item["image"].shape) == (3, longest, int(longest * 90 / 200 + 0.5))
    assert item["image"].is_contiguous()
    with torch.no_grad():
        alone = predictor.model([item])[0]["instances"]
    assert_close(alone.scores, predictor([images[1]])[0].scores, rtol=0, atol=0)


def test_a_line_of_pixels_is_an_image(weights: Path) -> None:
    """Its shorter side rounds to 0 when it is resized."""
    (result,) = Predictor(load_config(weights=str(weights)))([random_image(1, 3000)])
    assert result.image_size == (1, 3000)


def test_an_empty_batch(weights: Path) -> None:
    assert Predictor(load_config(weights=str(weights)))([]) == []


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 4), (0, 10, 3)])
def test_arrays_that_are_no_images_are_refused(weights: Path, shape: tuple[int, ...]) -> None:
    predictor = Predictor(load_config(weights=str(weights)))
    with pytest.raises(ValueError, match=r"image 0 has shape .*needed: \(H, W, 3\)"):
        predictor([np.zeros(shape, dtype=np.uint8)])
