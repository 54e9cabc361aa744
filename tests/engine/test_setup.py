import logging
from pathlib import Path

import pytest
from detectron2.utils import comm

from miti_detr.engine import seed as seed_module
from miti_detr.engine import setup_config
from miti_detr.engine.seed import resolve_seed
from miti_detr.engine.setup import check_config
from miti_detr.engine.solver import resolve_schedule

CPU = ["MODEL.DEVICE", "cpu"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.OPTIMISER", "SGD"], "key SOLVER.OPTIMISER; did you mean SOLVER.OPTIMIZER"),
        (["SOLVER.MAX_ITER"], "'SOLVER.MAX_ITER' has no value"),
        (["SOLVER.OPTIMIZER", "LAMB"], "SOLVER.OPTIMIZER is 'LAMB'; it must be one of 'ADAMW'"),
        (["SOLVER.AMP.PRECISION", "int8"], "PRECISION is 'int8'; it must be one of 'float16'"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"], "CLIP_TYPE is 'all'; it must be one of"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "CHECKPOINT_PERIOD is 0; it must be an integer from 1"),
        (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR"),
        (["SOLVER.EPOCH_STEPS", "(2,)"], "needs SOLVER.EPOCHS > 0"),
        (["SOLVER.EPOCHS", "3", "SOLVER.EPOCH_STEPS", "(2, 3)"], "between 0 and SOLVER.EPOCHS"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16"], "set it to bfloat16"),
        (["MODEL.DETR.NHEADS", "3"], "HIDDEN_DIM 256 is not divisible by MODEL.DETR.NHEADS 3"),
        (["MODEL.DETR.NUM_OBJECT_QUERIES", "0"], "MODEL.DETR.NUM_OBJECT_QUERIES is 0"),
        (["MODEL.DETR.LAYER_RESIDUAL", "after"], "'after'; it must be one of 'none'"),
        (["MODEL.DETR.LAYER_RESIDUAL_IN", "all"], "'all'; it must be one of 'both', 'encoder'"),
        (["MODEL.DETR.PADDING_MASK", "floor"], "'floor'; it must be one of 'ceil', 'nearest'"),
        (["MODEL.DETR.POSITION_EMBEDDING", "v3"], "'v3'; it must be one of 'sine', 'learned'"),
        (["MODEL.DEVICE", "gpu0"], "MODEL.DEVICE 'gpu0'"),
        (["TEST.PRECISE_BN.ENABLED", "True"], "TEST.PRECISE_BN.ENABLED"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
    ],
)  # fmt: skip
def test_faulty_overrides_are_named(opts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        setup_config(opts=CPU + opts)


def test_faulty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml"):
        setup_config(str(tmp_path / "nothing.yaml"))
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER:\n  MAX_ITERS: 3\n")
    with pytest.raises(
        ValueError, match=r"config.yaml: unknown config key SOLVER.MAX_ITERS; did you"
    ):
        setup_config(str(path), CPU)
    path.write_text("SOLVER: [1, {\n")
    with pytest.raises(ValueError, match=r"config.yaml, line 2: "):
        setup_config(str(path), CPU)
    path.write_text("SOLVER:\n  MAX_ITER: soon\n")
    with pytest.raises(ValueError, match=r"config.yaml: .*SOLVER.MAX_ITER"):
        setup_config(str(path), CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(f"MODEL.DETR.{name}_WEIGHT", "-0.5") for name in ("CLASS", "L1", "GIOU", "NO_OBJECT")],
        ("MODEL.DETR.DIM_FEEDFORWARD", "0"),
        ("MODEL.DETR.DIM_FEEDFORWARD", "-1"),
        ("MODEL.DETR.HIDDEN_DIM", "0"),
        ("MODEL.DETR.HIDDEN_DIM", "10000000000"),
        ("MODEL.DETR.HIDDEN_DIM", "8.5"),
        ("MODEL.DETR.HIDDEN_DIM", "None"),
        ("MODEL.DETR.ENC_LAYERS", "-1"),
        ("MODEL.DETR.DEC_LAYERS", "0"),
        ("MODEL.DETR.DROPOUT", "nan"),
        ("MODEL.DETR.DROPOUT", "1"),
        ("MODEL.DETR.DROPOUT", "9" * 400),
        ("MODEL.DETR.DROPOUT", "True"),
        ("MODEL.DETR.SIZE_DIVISIBILITY", "-1"),
        ("MODEL.DETR.IN_FEATURES", "[3]"),
        ("MODEL.DETR", "{}"),
        ("MODEL.BACKBONE.NAME", "abc"),
        ("MODEL.META_ARCHITECTURE", "abc"),
        ("MODEL.PIXEL_STD", "[1, 1, 0]"),
        ("MODEL.PIXEL_STD", "[1, 1]"),
        ("MODEL.RESNETS.DEPTH", "51"),
        ("MODEL.RESNETS.DEPTH", "18"),
        ("MODEL.RESNETS.RES5_DILATION", "4"),
        ("SOLVER.BASE_LR", "1e400"),
        ("SOLVER.GAMMA", "-1"),
        ("SOLVER.WARMUP_FACTOR", "-1"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0"),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "0"),
        ("SOLVER.STEPS", "(5, 3)"),
        ("SOLVER.STEPS", "(0,)"),
        ("SOLVER.STEPS", "('a',)"),
        ("SEED", str(2**32)),
        ("DATASETS.TRAIN_SHARE", "0"),
        ("DATALOADER.NUM_WORKERS", "-1"),
        ("INPUT.CROP.SIZE", "[2.0, 2.0]"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
        ("INPUT.RANDOM_FLIP", "both"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=key) as error:
        setup_config(opts=[*CPU, key, value])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("swin", "SWIN.EMBED_DIM", "0"),
        ("swin", "SWIN.DEPTHS", "('a',)"),
        ("vit", "VIT.IMG_SIZE", "-16"),
        ("vit", "VIT.EMBED_DIM", "0"),
        ("timm", "TIMM.NAME", ""),
    ],
)
def test_keys_of_the_chosen_backbone_are_checked(name: str, key: str, value: str) -> None:
    chosen = ["MODEL.BACKBONE.NAME", f"build_{name}_backbone"]
    with pytest.raises(ValueError, match=rf"MODEL\.{key}"):
        setup_config(opts=[*CPU, *chosen, f"MODEL.{key}", value])
    setup_config(opts=[*CPU, f"MODEL.{key}", value])  # another backbone does not read it


def test_values_take_the_type_of_their_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {DETR: {DROPOUT: 0}}\nSOLVER: {STEPS: [1, 2], BASE_LR: 1e-3}\n")
    cfg = setup_config(str(path), [*CPU, "SOLVER.GAMMA", "1", "OUTPUT_DIR", "2026"])
    assert (cfg.MODEL.DETR.DROPOUT, type(cfg.MODEL.DETR.DROPOUT)) == (0, float)
    assert (cfg.SOLVER.GAMMA, type(cfg.SOLVER.GAMMA)) == (1, float)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.BASE_LR) == ((1, 2), 0.001)
    assert cfg.OUTPUT_DIR == "2026"


def test_a_config_of_version_1_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("VERSION: 1\n")
    with pytest.raises(ValueError, match=r"config.yaml: VERSION is 1"):
        setup_config(str(path), CPU)


def test_overrides_go_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("VERSION: 2\nSOLVER:\n  MAX_ITER: 30\n  BASE_LR: 0.5\n")
    cfg = setup_config(str(path), [*CPU, "SOLVER.MAX_ITER", "7"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 0.5)


def test_batch_must_divide_among_processes() -> None:
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 16, which 3 processes"):
        setup_config(opts=CPU, world_size=3)
    cfg = setup_config(opts=[*CPU, "SOLVER.REFERENCE_WORLD_SIZE", "8"], world_size=3)
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    cfg = setup_config(opts=CPU, world_size=2)
    with pytest.raises(ValueError, match="5 processes"):
        check_config(cfg, world_size=5)


def test_cuda_falls_back_to_cpu_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(logging.getLogger("miti_detr"), "propagate", True)
    cfg = setup_config(opts=["MODEL.DEVICE", "cuda"])
    assert cfg.MODEL.DEVICE == "cpu"
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == ["there is no CUDA device: MODEL.DEVICE cuda becomes cpu"]


@pytest.mark.parametrize(
    ("images", "max_iter", "steps"),
    [(1000, 5 * 62, (2 * 62, 4 * 62)), (16, 5, (2, 4)), (3, 5, (2, 4))],
)
def test_epochs_become_iterations(images: int, max_iter: int, steps: tuple[int, ...]) -> None:
    """floor(images / batch) iterations an epoch, at least one: 1000 // 16 = 62."""
    cfg = setup_config(opts=[*CPU, "SOLVER.EPOCHS", "5", "SOLVER.EPOCH_STEPS", "(2, 4)"])
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    resolve_schedule(cfg, images)
    assert (max_iter, steps) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS)


def test_schedule_without_epochs_stays() -> None:
    cfg = setup_config(opts=[*CPU, "SOLVER.MAX_ITER", "77", "SOLVER.STEPS", "(5,)"])
    resolve_schedule(cfg, 1000)
    resolve_schedule(cfg, None)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (77, (5,))
    cfg.SOLVER.EPOCHS = 2
    with pytest.raises(ValueError, match=r"SOLVER\.EPOCHS is 2"):
        resolve_schedule(cfg, None)


def test_negative_seed_is_drawn_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = setup_config(opts=CPU)
    assert cfg.SEED < 0
    resolve_seed(cfg)
    assert 0 <= cfg.SEED < 2**31
    drawn = cfg.SEED
    resolve_seed(cfg)
    assert drawn == cfg.SEED
    cfg.SEED = -1
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 12)
    assert seed_module.comm is comm
    resolve_seed(cfg)
    assert cfg.SEED == 12
