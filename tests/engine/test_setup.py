import logging
from pathlib import Path

import pytest
from detectron2.utils import comm

from miti_detr.engine import seed as seed_module
from miti_detr.engine import setup_config
from miti_detr.engine.seed import resolve_seed
from miti_detr.engine.setup import check_config, resolve_schedule

CPU = ["MODEL.DEVICE", "cpu"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.OPTIMISER", "SGD"], "key SOLVER.OPTIMISER; did you mean SOLVER.OPTIMIZER"),
        (["SOLVER.MAX_ITER"], "'SOLVER.MAX_ITER' has no value"),
        (["SOLVER.OPTIMIZER", "LAMB"], "SOLVER.OPTIMIZER is 'LAMB'; possible: ADAMW, SGD"),
        (["SOLVER.AMP.PRECISION", "int8"], "SOLVER.AMP.PRECISION is 'int8'; possible: float16"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"], "possible: value, norm, full_model"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD is 0; it must be at least 1"),
        (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR"),
        (["SOLVER.EPOCH_STEPS", "(2,)"], "needs SOLVER.EPOCHS > 0"),
        (["SOLVER.EPOCHS", "3", "SOLVER.EPOCH_STEPS", "(2, 3)"], "between 0 and SOLVER.EPOCHS"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16"], "set it to bfloat16"),
        (["MODEL.DETR.NHEADS", "3"], "HIDDEN_DIM 256 is not divisible by MODEL.DETR.NHEADS 3"),
        (["MODEL.DETR.NUM_OBJECT_QUERIES", "0"], "MODEL.DETR.NUM_OBJECT_QUERIES is 0"),
        (["MODEL.DETR.LAYER_RESIDUAL", "after"], "'after'; possible: none, before_norm"),
        (["MODEL.DETR.LAYER_RESIDUAL_IN", "all"], "'all'; possible: both, encoder, decoder"),
        (["MODEL.DETR.PADDING_MASK", "floor"], "'floor'; possible: ceil, nearest"),
        (["MODEL.DETR.POSITION_EMBEDDING", "v3"], "'v3'; possible: sine, learned"),
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
    with pytest.raises(ValueError, match=r"config.yaml: "):
        setup_config(str(path), CPU)
    path.write_text("SOLVER:\n  MAX_ITER: soon\n")
    with pytest.raises(ValueError, match=r"config.yaml: .*SOLVER.MAX_ITER"):
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
