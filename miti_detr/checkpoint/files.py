"""Checkpoint files: read without running what is in them, written whole or not at all."""

import argparse
import collections
import logging
import os
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .errors import CheckpointError
from .variant import RECORD_KEY, take_record

logger = logging.getLogger(__name__)

TRUST_KEY = "MODEL.TRUST_WEIGHTS"
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face model
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state")
_TORCH_LEGACY = (
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number that such files start with
)
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "an HTML or XML page, perhaps of a failed download",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x1f\x8b": "a gzip archive: unpack it first",
}
# What damaged files raise inside the libraries. Anything else is a fault of this program.
_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,  # damaged lengths
    OSError,
    RuntimeError,
    SystemError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
# What pickled arrays are made of, under the module names of NumPy 1 and 2.
_ARRAY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.{module}", name): make
        for core in ("core", "_core")
        for module, name, make in (
            ("multiarray", "_reconstruct", np.zeros(1).__reduce__()[0]),
            ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
            ("numeric", "_frombuffer", np.zeros(1).__reduce_ex__(5)[0]),
        )
    },
}
# What training checkpoints hold beside tensors: command-line arguments, random states.
_TORCH_GLOBALS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    *((make, ".".join(name)) for name, make in _ARRAY_GLOBALS.items()),
    *(type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OVSU"),
]


def read_checkpoint(path: str, *, trust: bool = False) -> dict[str, Any]:
    """Read a file of weights on the CPU.

    Args:
        path: ``.pth``, ``.pt``, ``.bin``, ``.safetensors`` or ``.pkl`` file (told apart by their
            content), or the folder of a Hugging Face model.
        trust: if a file needs more than plain values and tensors, read it all the same. It can
            then run any code.

    Returns:
        ``model`` with the state dict (tensors or arrays, not empty), and all other entries.

    Raises:
        CheckpointError: names the file, what is wrong with it, and what to do.
    """
    path = weights_file(path)
    try:
        return _unwrap(_read(path, trust))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def weights_file(path: str) -> str:
    """Find the file of weights in a folder; a file is returned as it is.

    Raises:
        CheckpointError: if there is none.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such file or folder; `miti-detr zoo` lists models")
    for name in _FOLDER_WEIGHTS:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
        if os.path.isfile(os.path.join(path, f"{name}.index.json")):
            raise CheckpointError(f"{path}: its weights are in shards; save them as one file")
    found = sorted(name for name in os.listdir(path) if name.endswith((".pth", ".pkl", ".bin")))
    hint = f"; name one of its files: {', '.join(found)}" if found else ""
    raise CheckpointError(f"{path}: a folder without {' or '.join(_FOLDER_WEIGHTS)}{hint}")


def _read(path: str, trust: bool) -> object:
    """Read a file by what its first bytes say it is."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError("the file is empty")
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise CheckpointError(f"this is {name}")
    if head.startswith(b"PK"):
        return _guarded(path, trust, _load_archive)
    if head[8:9] == b"{" or path.endswith(".safetensors"):
        return _guarded(path, False, _load_safetensors)
    if head.startswith(_TORCH_LEGACY):
        return _guarded(path, trust, _load_torch)
    if head.startswith(b"\x80") or path.endswith(".pkl"):
        return _guarded(path, trust, _load_pickle)
    raise CheckpointError(
        f"no checkpoint: it starts with {head[:16]!r}, which is neither PyTorch, safetensors nor "
        "pickle"
    )


def _guarded(path: str, trust: bool, load: Any) -> object:
    """Turn what a reader raises into one line; read again with everything allowed if trusted."""
    try:
        return load(path, safe=True)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        refused = re.search(r"(?:GLOBAL|refused) ([\w.]+\w)", str(error))
        if refused is None:
            text = " ".join(str(error).rpartition("error:")[2].split())
            reason = text[:150] or type(error).__name__
            raise CheckpointError(f"damaged or cut off while it was written ({reason})") from None
    name = refused[1]
    if not trust:
        raise CheckpointError(
            f"it wants to use {name}, and reading that can run any code. Save only the state "
            f"dict, or, if you trust whoever made the file, set {TRUST_KEY} True (on the command "
            "line of miti-detr convert: --trust)"
        )
    logger.warning("%s uses %s; reading it all the same, as it is trusted", path, name)
    try:
        return load(path, safe=False)
    except _DAMAGE as error:
        raise CheckpointError(f"trusted, but not readable here: {error}") from error


def _load_archive(path: str, *, safe: bool) -> object:
    if not zipfile.is_zipfile(path):
        raise CheckpointError("cut off while it was written: the archive has no end")
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        damaged = archive.testzip()  # torch does not look at the checksums
    if "constants.pkl" in names:
        raise CheckpointError("a TorchScript program; save the state dict of the model instead")
    if "data.pkl" not in names:
        raise CheckpointError("an archive, but not one that torch.save writes (no data.pkl in it)")
    if damaged is not None:
        raise CheckpointError(
            f"damaged: the checksum of {damaged} in it is wrong. Copy the file again, or use "
            "another checkpoint"
        )
    return _load_torch(path, safe=safe)


def _load_torch(path: str, *, safe: bool) -> object:
    if not safe:
        return torch.load(path, map_location="cpu", weights_only=False)
    with torch.serialization.safe_globals(_TORCH_GLOBALS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_safetensors(path: str, *, safe: bool) -> object:
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    record = take_record(state)
    return {"model": state} if record is None else {"model": state, RECORD_KEY: record}


def _load_pickle(path: str, *, safe: bool) -> object:
    """Read a pickle of arrays, as of Detectron2's model zoo; latin1 as some are of Python 2."""
    with open(path, "rb") as file:
        unpickler = _ArrayUnpickler if safe else pickle.Unpickler
        data = unpickler(file, encoding="latin1").load()
    if not isinstance(data, dict) or "model" in data:
        return data
    # Caffe2 and Detectron1, which Detectron2 matches by heuristics.
    blobs = data.get("blobs", data)
    weights = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds built-in containers and NumPy arrays, and nothing that could run code."""

    allowed = {
        **_ARRAY_GLOBALS,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Look up a global of the pickle; refuse what is not in the list."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"refused {module}.{name}")
        return self.allowed[module, name]


def _unwrap(data: object) -> dict[str, Any]:
    """Find the state dict in what was read, and check it."""
    if not isinstance(data, Mapping):
        raise CheckpointError(
            f"it holds a {type(data).__name__}, not weights by name; save model.state_dict()"
        )
    checkpoint = dict(data)
    name = next((key for key in _STATE_KEYS if isinstance(data.get(key), Mapping)), None)
    if name is not None:
        checkpoint["model"] = checkpoint.pop(name)
    elif any(isinstance(value, (Tensor, np.ndarray)) for value in data.values()):
        checkpoint = {"model": data}
    else:
        keys = ", ".join(repr(key) for key in list(data)[:5]) or "nothing"
        raise CheckpointError(f"there are no weights in it, only {keys}; needed: a key 'model'")
    state = checkpoint["model"]
    _check_state_dict(state)
    if all(key.startswith("module.") for key in state):  # of DistributedDataParallel
        consume_prefix_in_state_dict_if_present(state, "module.")
    return checkpoint


def _check_state_dict(state: Mapping[Any, Any]) -> None:
    if not state:
        raise CheckpointError("its state dict is empty")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, (Tensor, np.ndarray)):
            raise CheckpointError(
                f"its state dict has {key!r}: {type(value).__name__}, which is no tensor by name"
            )
