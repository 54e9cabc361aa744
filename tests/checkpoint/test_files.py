import argparse
import logging
import os
import pathlib
import pickle
import random
import struct
import zipfile
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from miti_detr.checkpoint import CheckpointError, MitiDetrCheckpointer, read_checkpoint
from miti_detr.checkpoint.files import weights_file
from miti_detr.checkpoint.variant import RECORD_TENSOR
from miti_detr.files import atomic_write, remove_incomplete
from tests.checkpoint.helpers import assert_same

WEIGHTS = {"a.weight": torch.arange(600.0).reshape(200, 3), "a.bias": torch.ones(2)}


class RunsCode:
    """Pickles to a call of ``open(path, "w")``: whoever loads it makes the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def _bytes(path, data):
    path.write_bytes(data)


def _cut(path, write, share=0.6):
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _zip(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x" * 100)


def _pickle(path, data):
    path.write_bytes(pickle.dumps(data))


def _legacy(path, data=WEIGHTS):
    torch.save(data, path, _use_new_zipfile_serialization=False)


BROKEN = {
    "missing.pth": (lambda p: None, "no such file or folder"),
    "empty.pth": (lambda p: _bytes(p, b""), "the file is empty"),
    "cut.pth": (lambda p: _cut(p, lambda q: torch.save(WEIGHTS, q)), "cut off while"),
    "cut_legacy.pth": (lambda p: _cut(p, _legacy), "cut off while"),
    "cut.safetensors": (
        lambda p: _cut(p, lambda q: save_file(WEIGHTS, q)),
        "cut off while",
    ),
    "record.safetensors": (
        lambda p: save_file({**WEIGHTS, RECORD_TENSOR: torch.zeros(3, dtype=torch.uint8)}, p),
        "miti_detr.record in it is damaged",
    ),
    "cut.pkl": (lambda p: _cut(p, lambda q: _pickle(q, {"a": np.ones(99)})), "cut off while"),
    "config.pth": (lambda p: _bytes(p, b"MODEL:\n  WEIGHTS: x\n"), "neither PyTorch, safetensors"),
    "page.pth": (lambda p: _bytes(p, b"<!DOCTYPE html><html>404</html>"), "an HTML or XML page"),
    "lfs.pth": (
        lambda p: _bytes(p, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "image.pth": (lambda p: _bytes(p, b"\x89PNG\r\n\x1a\n" + b"0" * 99), "a PNG image"),
    "archive.pth": (lambda p: _zip(p, "word/document.xml"), "not one that torch.save writes"),
    "script.pt": (lambda p: _zip(p, "m/constants.pkl"), "a TorchScript program"),
    "tensor.pth": (lambda p: torch.save(torch.ones(2), p), "holds a Tensor, not weights by name"),
    "module.pth": (
        lambda p: torch.save(nn.Linear(1, 1), p),
        "wants to use torch.nn.modules.linear.Linear.*MODEL.TRUST_WEIGHTS True",
    ),
    "optimizer.pth": (
        lambda p: torch.save({"optimizer": {}, "epoch": 3}, p),
        "no weights in it, only 'optimizer', 'epoch'",
    ),
    "no_weights.pth": (lambda p: torch.save({"model": {}}, p), "state dict is empty"),
    "text.pth": (lambda p: torch.save({"model": {"a": "b"}}, p), "'a': str, which is no tensor"),
    "numbered.pth": (
        lambda p: torch.save({0: torch.ones(1)}, p),
        "0: Tensor, which is no tensor by",
    ),
    "other.pth": (lambda p: torch.save(WEIGHTS, p), "of none of the known formats"),
    "folder": (lambda p: (p.mkdir(), _bytes(p / "model_final.pth", b"")), "model_final.pth"),
    "shards": (
        lambda p: (p.mkdir(), _bytes(p / "model.safetensors.index.json", b"{}")),
        "in shards",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_gives_one_line(name, tmp_path):
    """The message is one line, names the file, and states the fault."""
    write, message = BROKEN[name]
    path = tmp_path / name
    write(path)
    model = nn.Linear(1, 1)
    model.variant = {}
    with pytest.raises(CheckpointError, match=message) as caught:
        MitiDetrCheckpointer(model).load(str(path))
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < len(str(path)) + 400


def _random_bits(data: bytes, seed: int) -> bytes:
    generator = random.Random(seed)
    broken = bytearray(data)
    for _ in range(8):
        broken[generator.randrange(len(broken))] = generator.randrange(256)
    return bytes(broken)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors"])
def test_damaged_bytes_never_raise_anything_else(kind, tmp_path):
    """40 files with 8 random bytes each: read (the damage hit a value) or refused in one line."""
    path = tmp_path / "weights"
    {
        "zip": lambda: torch.save(WEIGHTS, path),
        "legacy": lambda: _legacy(path),
        "pickle": lambda: _pickle(path, {k: v.numpy() for k, v in WEIGHTS.items()}),
        "safetensors": lambda: save_file(WEIGHTS, path),
    }[kind]()
    whole = path.read_bytes()
    errors = []
    for seed in range(40):
        path.write_bytes(_random_bits(whole, seed))
        try:
            read_checkpoint(str(path))
        except CheckpointError as error:
            errors.append(str(error))
    assert errors
    assert not any("\n" in text for text in errors)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("storage key not found"),  # torch, of legacy files
        struct.error("unpack requires a buffer of 4 bytes"),  # the same
        SystemError("error return without exception set"),  # NumPy, of pickles
        zlib.error("invalid block type"),  # zipfile
    ],
    ids=lambda error: type(error).__name__,
)
def test_rare_errors_of_the_readers_mean_damage(error, tmp_path, monkeypatch):
    """They come from some files in thousands with random bytes."""

    def fail(*args, **kwargs):
        raise error

    torch.save(WEIGHTS, tmp_path / "w.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match="damaged or cut off while it was written"):
        read_checkpoint(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, _legacy, lambda data, path: _pickle(path, data)])
def test_code_in_a_file_does_not_run(write, name, tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / name
    data = {"model": {"a": RunsCode(mark)}}
    _legacy(path, data) if write is _legacy else write(data, path)
    with pytest.raises(CheckpointError, match=r"wants to use (io|_io|builtins)\.open") as caught:
        read_checkpoint(str(path))
    assert not mark.exists()
    assert "MODEL.TRUST_WEIGHTS" in str(caught.value)
    with pytest.raises(CheckpointError):  # trusted: it runs, and is still no tensor
        read_checkpoint(str(path), trust=True)
    assert mark.exists()


@pytest.mark.parametrize(
    "name", ["w.pth", "w.pt", "w.safetensors", "w.bin", "legacy.pth", "w.pkl", "hf", "bin"]
)
def test_every_kind_of_file_is_read(name, tmp_path):
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(WEIGHTS, path)
    elif name.endswith(".pkl"):
        _pickle(path, {"model": {k: v.numpy() for k, v in WEIGHTS.items()}, "__author__": "x"})
    elif name == "legacy.pth":
        _legacy(path)
    elif name == "hf":
        path.mkdir()
        save_file(WEIGHTS, path / "model.safetensors")
    elif name == "bin":
        path.mkdir()
        torch.save(WEIGHTS, path / "pytorch_model.bin")
    else:
        torch.save(WEIGHTS, path)
    model = read_checkpoint(str(path))["model"]
    assert_same({k: torch.as_tensor(v) for k, v in model.items()}, WEIGHTS)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "model_state"])
def test_envelopes(key, tmp_path):
    """The wrapper's ``module.`` goes, what else is in the file stays."""
    path = tmp_path / "w.pth"
    torch.save({key: {f"module.{k}": v for k, v in WEIGHTS.items()}, "epoch": 3}, path)
    checkpoint = read_checkpoint(str(path))
    assert_same(checkpoint.pop("model"), WEIGHTS)
    assert checkpoint == {"epoch": 3}


def test_training_checkpoints_load_safely(tmp_path):
    """Arguments of the published script (with a path, as on a cluster), random states of NumPy."""
    path = tmp_path / "w.pth"
    args = argparse.Namespace(lr=1e-4, job_dir=pathlib.PosixPath("out"))
    torch.save(
        {
            "model": OrderedDict(WEIGHTS),
            "args": args,
            "optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict(),
            "random": np.random.RandomState(0).get_state(),
            "best": np.float64(0.5),
        },
        path,
    )
    checkpoint = read_checkpoint(str(path))
    assert checkpoint["args"] == args
    assert checkpoint["best"] == 0.5
    np.testing.assert_array_equal(checkpoint["random"][1], np.random.RandomState(0).get_state()[1])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickled_arrays_of_every_protocol(protocol, order, tmp_path):
    """Model-zoo files; Fortran order and other types included."""
    path = tmp_path / "w.pkl"
    arrays = {
        "a": np.asarray(np.arange(6, dtype=np.float32).reshape(2, 3), order=order),
        "b": np.array(3, dtype=np.int64),
    }
    path.write_bytes(pickle.dumps({"model": OrderedDict(arrays), "x": 1}, protocol=protocol))
    model = read_checkpoint(str(path))["model"]
    for key, value in arrays.items():
        np.testing.assert_array_equal(model[key], value)


def test_caffe2_files_are_left_to_detectron2(tmp_path):
    path = tmp_path / "w.pkl"
    blobs = {"conv1_w": np.ones(1), "conv1_w_momentum": np.ones(1)}
    _pickle(path, {"blobs": blobs})
    checkpoint = read_checkpoint(str(path))
    assert checkpoint["matching_heuristics"]
    assert checkpoint["__author__"] == "Caffe2"
    assert list(checkpoint["model"]) == ["conv1_w"]


def test_trusted_file_is_read_with_a_warning(tmp_path, caplog):
    path = tmp_path / "w.pth"
    torch.save({"model": WEIGHTS, "criterion": nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(str(path))
    with caplog.at_level(logging.WARNING):
        checkpoint = read_checkpoint(str(path), trust=True)
    assert isinstance(checkpoint["criterion"], nn.Linear)
    assert "as it is trusted" in caplog.text


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(str(path)) as file:
        file.write(b"old")

    def fail():
        with atomic_write(str(path)) as file:
            file.write(b"ne")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_remove_incomplete(tmp_path):
    (tmp_path / "model_1.pth.incomplete").touch()
    (tmp_path / "model_0.pth").touch()
    remove_incomplete(str(tmp_path))
    assert os.listdir(tmp_path) == ["model_0.pth"]
    remove_incomplete(str(tmp_path / "not there"))


def test_weights_file_prefers_safetensors(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
    assert weights_file(str(tmp_path)) == str(tmp_path / "model.safetensors")
