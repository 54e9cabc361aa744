import argparse
import multiprocessing
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import train_net
from miti_detr.checkpoint.errors import CheckpointError
from miti_detr.engine import NonFiniteError, run
from miti_detr.engine.hooks import read_records
from miti_detr.engine.launch import resume_command
from tests.data.helpers import annotation, coco_content, write_coco
from tests.engine import stub
from tests.helpers import tiny_config


def _args(opts: list[str], **changes: Any) -> argparse.Namespace:
    values = {"config_file": "", "num_gpus": 1, "num_machines": 1, "machine_rank": 0}
    values |= {"dist_url": "auto", "resume": False, "eval_only": False, "opts": opts}
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--num-gpus", "2", "SEED", "3"])


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Same seed, same global batch, no dropout: the same losses and weights in 3 steps, by gloo.

    Two processes also cut their shares into parts. Both runs average their weights and stop early.

    The images have 0 to 5 objects, so that each process' own normalisers would be others, and one
    size, so that none is padded: by how much depends on the images of a process.
    """
    counts = (0, 3, 1, 0, 2, 0, 5, 1)
    owners = [image for image, count in enumerate(counts, start=1) for _ in range(count)]
    records = [annotation(i, image, category_id=(5, 9)[i % 2]) for i, image in enumerate(owners, 1)]
    data = write_coco(tmp_path, coco_content(records, ((32, 24),) * len(counts)))
    cfg = tiny_config(
        *("MODEL.DETR.NUM_CLASSES", 2, "MODEL.DETR.DROPOUT", 0.0, "SOLVER.MAX_ITER", 9),
        *("DATASETS.COCO_FORMAT", [["uneven", str(data), str(tmp_path)]]),
        *("DATASETS.TRAIN", ("uneven",), "DATASETS.TEST", ("uneven",)),
        *("SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 4, "SOLVER.OPTIMIZER", "SGD"),
        *("MODEL.DETR.NUM_OBJECT_QUERIES", 4, "MODEL.RESNETS.NORM", "FrozenBN"),
        *("INPUT.MIN_SIZE_TRAIN", (72,)),
        *("SOLVER.EARLY_STOP.PATIENCE", 2, "SOLVER.EARLY_STOP.MIN_DELTA", 99.0),
        *("TEST.EVAL_PERIOD", 1, "TEST.LOSS", True),
        *("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5, "SOLVER.EMA.WARMUP", 0),
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())
    results = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        arguments = {"config_file": str(tmp_path / "config.yaml"), "num_gpus": processes}
        opts = ["OUTPUT_DIR", str(output), "SOLVER.ACCUMULATE", str(processes)]
        assert run(train_net.main, _args(opts, **arguments)) == 0
        saved = torch.load(output / "model_final.pth", weights_only=True)
        weights = {"average": saved["model"], "last": saved["trainer"]["average"]["weights"]}
        results.append((weights, read_records(str(output / "metrics.json"))))
        log = (output / "log.txt").read_text()
        assert log.count("1 of 8 images have more objects") == 1
        assert re.search(r"\n\W+1 +9 +dog +6\n", log)  # class, id in the data, name, objects
    (one, one_records), (two, two_records) = results
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert not torch.equal(one["average"]["class_embed.bias"], one["last"]["class_embed.bias"])
    names = ("total_loss", "loss_ce", "loss_bbox", "loss_giou_0")
    for key in (*names, "grad_norm", *(f"validation/{name}" for name in names)):
        assert two_records[0][key] == pytest.approx(one_records[0][key], rel=1e-4)
    assert two_records[0]["bbox/AP"] == pytest.approx(one_records[0]["bbox/AP"], abs=1e-9)
    assert [record["iteration"] for record in two_records] == [2]
    assert (tmp_path / "2" / "log.txt.rank1").is_file()


def _press_ctrl_c_after(file: Path, ended: threading.Event) -> None:
    """Once ``file`` exists: SIGINT, as from a terminal, to this process and those it started."""
    while not file.is_file():
        if ended.wait(0.05):
            return
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_with_two_processes(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130, no traceback, the command that resumes; the last checkpoint does resume."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    changes = {"SOLVER__MAX_ITER": 10**6, "SOLVER__CHECKPOINT_PERIOD": 5}
    opts = stub.options(tiny_data, tmp_path, **changes)
    tag = tmp_path / "last_checkpoint"
    ended = threading.Event()
    threading.Thread(
        target=_press_ctrl_c_after, args=(tmp_path / "model_0000004.pth", ended), daemon=True
    ).start()
    try:
        assert run(stub.main, _args(opts, num_gpus=2)) == 130
    finally:
        ended.set()
    assert multiprocessing.active_children() == []

    screen = "".join(capfd.readouterr())
    assert "Traceback" not in screen
    for text in (screen, (tmp_path / "log.txt").read_text()):
        assert f"interrupted; the last checkpoint is {tmp_path / tag.read_text()}" in text
        assert "train_net.py --resume --num-gpus 2 SEED 3" in text

    done = torch.load(tmp_path / tag.read_text(), weights_only=True)["iteration"] + 1
    opts = stub.options(tiny_data, tmp_path, SOLVER__MAX_ITER=done + 2)
    assert run(stub.main, _args(opts, resume=True)) == 0
    assert f"Starting training from iteration {done}" in (tmp_path / "log.txt").read_text()
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == done + 1


def _interrupted(_: argparse.Namespace) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_a_checkpoint(
    tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    assert run(_interrupted, _args(stub.options(tiny_data, tmp_path))) == 130
    assert "there is no checkpoint yet" in (tmp_path / "log.txt").read_text()


def test_resume_command_quotes_and_names_resume_once() -> None:
    argv = [
        "train_net.py",
        "--resume",
        "--num-gpus",
        "2",
        "DATASETS.COCO_FORMAT",
        "[['a', 'b', 'c']]",
    ]
    command = resume_command(argv)
    assert command.endswith(
        "train_net.py --resume --num-gpus 2 DATASETS.COCO_FORMAT '[['\"'\"'a'\"'\"', "
        "'\"'\"'b'\"'\"', '\"'\"'c'\"'\"']]'"
    )


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"SOLVER__OPTIMIZER": "LAMB"}, {}, "error: SOLVER.OPTIMIZER is 'LAMB'; it must be one of"),
        ({"MODEL__WEIGHTS": "no/such.pth"}, {}, "MODEL.WEIGHTS: there is no file no/such.pth"),
        ({"MODEL__DETR__NUM_CLASSES": 80}, {}, "MODEL.DETR.NUM_CLASSES 2"),
        ({}, {"eval_only": True}, "error: MODEL.WEIGHTS is empty"),
        ({}, {"num_gpus": 3}, "error: SOLVER.IMS_PER_BATCH is 4, which 3 processes"),
        ({"OUTPUT_DIR": "/proc/no"}, {}, "error: OUTPUT_DIR /proc/no cannot be made"),
        ({}, {"config_file": "no.yaml"}, "error: the config file no.yaml does not exist"),
    ],
)  # fmt: skip
def test_errors_of_the_user_are_one_line(
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    arguments: dict[str, Any],
    message: str,
) -> None:
    opts = stub.options(tiny_data, tmp_path, **changes)
    assert run(stub.main, _args(opts, **arguments)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not tmp_path.joinpath("config.yaml").exists()


def _bad_weights(_: argparse.Namespace) -> None:
    raise CheckpointError("a.pth: cut off")


def _not_finite(_: argparse.Namespace) -> None:
    raise NonFiniteError("the loss is nan")


def _bug(_: argparse.Namespace) -> None:
    raise TypeError("a fault of the program")


def test_errors_of_the_program_are_raised(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = _args(stub.options(tiny_data, tmp_path))
    with pytest.raises(TypeError, match="a fault of the program"):
        run(_bug, args)
    assert run(_bad_weights, args) == 1
    assert capsys.readouterr().err == "error: a.pth: cut off\n"
    assert run(_not_finite, args) == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"


@pytest.mark.slow
def test_errors_in_one_of_two_processes(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = _args(stub.options(tiny_data, tmp_path), num_gpus=2)
    assert run(_not_finite, args) == 1
    screen = capfd.readouterr().err
    assert "error: the loss is nan\n" in screen
    assert "Traceback" not in screen


@pytest.mark.slow
def test_evaluation_alone(tiny_data: Path, tmp_path: Path) -> None:
    """Of given weights, and with --resume of the last checkpoint; EXPECTED_RESULTS decide the exit
    code.
    """
    changes = {"SOLVER__MAX_ITER": 3, "DATASETS__TEST": ("tiny_val",)}
    assert run(stub.main, _args(stub.options(tiny_data, tmp_path / "a", **changes))) == 0
    weights = str(tmp_path / "a" / "model_final.pth")
    table = (tmp_path / "a" / "inference" / "coco_table.txt").read_text()
    opts = stub.options(tiny_data, tmp_path / "b", **changes, MODEL__WEIGHTS=weights)
    assert run(stub.main, _args(opts, eval_only=True)) == 0
    assert (tmp_path / "b" / "inference" / "coco_table.txt").read_text() == table
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]"]
    opts = stub.options(tiny_data, tmp_path / "a", **changes) + expected
    with pytest.raises(SystemExit) as stop:
        run(stub.main, _args(opts, eval_only=True, resume=True))
    assert stop.value.code == 1
