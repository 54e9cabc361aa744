from pathlib import Path

import pytest
from PIL import Image

from miti_detr.cli.main import main
from miti_detr.engine import setup_config
from miti_detr.finetune import preset_config
from tests.small_shapes import small_shapes

TINY = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", "4"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
    *("MODEL.DETR.ENC_LAYERS", "1", "MODEL.DETR.DEC_LAYERS", "1", "MODEL.DEVICE", "cpu"),
)


@pytest.mark.slow
def test_from_a_folder_to_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; again it changes nothing; train_net.py takes the config that it writes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    output = tmp_path / "run"
    with small_shapes(tmp_path / "datasets") as data:
        words = ["train", str(data), "--output", str(output), "--preset", "quick", *TINY]
        assert main(words) == 0
        screen = capsys.readouterr().out
        made = ("contact_sheet.png", "curves.png", "detections.png", "report/figures/f1.png")
        times = {}
        for name in made:
            with Image.open(output / name) as picture:
                assert picture.width > 300
            times[name] = (output / name).stat().st_mtime_ns
        assert "my_shapes_val, bbox (COCO, in percent)" in screen
        assert f"miti-detr predict --weights {output}/model_final.pth" in screen
        assert "ENC_LAYERS" in (output / "log.txt").read_text()
        assert not any(word in screen for word in ("ENC_LAYERS", "loss_ce", "copypaste", "csv"))
        assert "total_loss" in screen
        cfg = setup_config(str(output / "train.yaml"))
        assert cfg.MODEL.DETR.NUM_CLASSES == 3
        assert cfg.MODEL.WEIGHTS == "package://efficientnet_lite0"

        assert main(words) == 0
        assert "is trained already" in capsys.readouterr().out
        assert times == {name: (output / name).stat().st_mtime_ns for name in made}

        longer = ["SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)"]
        assert main([*words, *longer]) == 0
        assert "is trained already" not in capsys.readouterr().out
        assert '"iteration": 2' in (output / "metrics.json").read_text()

        assert main([*words, *longer, "SEED", "4"]) == 1
        assert "holds a run with other data or settings (SEED)" in capsys.readouterr().err
        assert (
            main(
                [
                    "predict",
                    "--weights",
                    str(output / "model_final.pth"),
                    "--output",
                    str(tmp_path / "found"),
                    str(next((data / "train").iterdir())),
                ]
            )
            == 0
        )


def test_an_unknown_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "holds no labelled data that is known" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_not_begun_takes_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to lose before the first checkpoint."""
    monkeypatch.setattr("miti_detr.engine.run", lambda main, args: 3)  # fails at once
    with small_shapes(tmp_path / "datasets") as shapes:
        data = shapes.rename(tmp_path / "begun")
        words = ["train", str(data), "--output", str(tmp_path / "run"), "--preset", "quick"]
        assert main([*words, "SOLVER.MAX_ITER", "60"]) == 3
        assert setup_config(str(tmp_path / "run/train.yaml")).SOLVER.STEPS == (40,)
        assert main([*words, "SOLVER.MAX_ITER", "90"]) == 3
        assert setup_config(str(tmp_path / "run/train.yaml")).SOLVER.MAX_ITER == 90
        (tmp_path / "run/last_checkpoint").write_text("model_0000009.pth")
        assert main([*words, "SOLVER.BASE_LR", "1.0"]) == 1
        assert "other data or settings (SOLVER.BASE_LR)" in capsys.readouterr().err


def test_few_images_get_more_variants(tmp_path: Path) -> None:
    """4,200 features, of 2 to 16 variants of each image, unless the key says otherwise.

    Masks need the images.
    """
    with small_shapes(tmp_path) as shapes:
        data = shapes.rename(tmp_path / "few")
        key = "MODEL.BACKBONE.CACHE_FEATURES"
        for words, expected in (([], 16), ([key, "3"], 3), (["MODEL.MASK_ON", "True"], 0)):
            cfg = preset_config(data, tmp_path / "run", overrides=words)
            variants = cfg.MODEL.BACKBONE.CACHE_FEATURES
            assert variants == expected
