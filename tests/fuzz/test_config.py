"""Whatever value a key is given: the config works, or one line names the key."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from hypothesis import given
from hypothesis import strategies as st

from miti_detr import add_miti_detr_config
from miti_detr.engine import setup_config
from miti_detr.engine.predictor import load_config
from tests.helpers import ROOT

from .budget import budget

SOUND = str(ROOT / "configs/shapes/miti_detr.yaml")


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def ours() -> CfgNode:
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    return cfg


def our_keys() -> list[str]:
    theirs = dict(leaves(get_cfg()))
    return [key for key, _ in leaves(ours()) if key not in theirs]


def our_numbers() -> list[str]:
    """Keys of ours that hold numbers, or lists of numbers."""
    values = dict(leaves(ours()))
    number = (int, float, tuple)
    return [k for k in our_keys() if isinstance(values[k], number) and type(values[k]) is not bool]


READ = [  # keys of Detectron2 with numbers that this project reads
    *("SEED", "SOLVER.BASE_LR", "SOLVER.GAMMA", "SOLVER.STEPS", "SOLVER.MAX_ITER"),
    *("SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.MOMENTUM"),
    *("SOLVER.WEIGHT_DECAY", "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS"),
    *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "TEST.EVAL_PERIOD"),
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST"),
    *("INPUT.MAX_SIZE_TEST", "INPUT.CROP.SIZE", "INPUT.RANDOM_FLIP", "DATALOADER.NUM_WORKERS"),
    *("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.DEPTH", "MODEL.BACKBONE.FREEZE_AT"),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**32, 2**63, -(2**64), 10**30, 10**400]),
    st.floats(),
    st.floats(0, 2),
    st.text(max_size=6),
    st.sampled_from(["none", "both", "nan", "inf", "1e400", "(1,", "[" * 300, "../x", "\u0000"]),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.lists(st.integers(-1, 900), max_size=4),
    st.lists(st.lists(st.text(max_size=4), max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), scalars, max_size=2),
)


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def accepts(key: str, config: Any, options: list[Any]) -> CfgNode | None:
    """The config, or None if one line names ``key``; anything else fails the test."""
    section = key.split(".")[1] if key.startswith(("MODEL.SWIN", "MODEL.VIT", "MODEL.TIMM")) else ""
    backbone = f"build_{section.lower() or 'detr_resnet'}_backbone"  # one that reads the key
    common = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", backbone]
    try:
        return setup_config(config, [*common, *options])
    except ValueError as error:
        message = str(error)
    assert "\n" not in message, message
    assert len(message) < 1000, message
    assert key in message, message
    return None


def is_sane(value: Any) -> bool:
    """No number of an accepted config is nan, infinite (except a norm's type), or huge."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [v for v in values if isinstance(v, int | float)]
    return all(abs(v) <= 3e38 or v == float("inf") for v in numbers)


@budget
@given(st.sampled_from([*our_keys(), *READ]), values)
def test_any_value_of_a_key_works_or_is_named(key: str, value: Any) -> None:
    cfg = accepts(key, nested(key, value), [])
    if cfg is None:
        return
    found = dict(leaves(cfg))[key]
    assert is_sane(found)
    assert found != float("inf") or key.endswith("NORM_TYPE")


@budget
@given(st.sampled_from([*our_keys(), *READ]), values)
def test_any_override_works_or_is_named(key: str, value: Any) -> None:
    cfg = accepts(key, SOUND, [key, "" if value is None else shorten(value)])
    assert cfg is None or is_sane(dict(leaves(cfg))[key])


@pytest.mark.parametrize("key", our_numbers())
def test_no_number_is_negative_nan_or_huge(key: str) -> None:
    """Where a key is a list, its elements are not."""
    huge = 10**39 if key.endswith("_WEIGHT") else 10**12  # a loss may have any finite weight
    for value in (-5, float("nan"), huge, 10**400):
        wrapped = [value] if isinstance(dict(leaves(ours()))[key], tuple | list) else value
        assert accepts(key, nested(key, wrapped), []) is None, value


def shorten(value: Any) -> str:
    try:
        return str(value)
    except ValueError:
        return "9" * 5000


def refusal(read: Callable[[str], object], path: str) -> str | None:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return None


@budget
@given(st.one_of(st.text(), values, st.binary(max_size=40)))
def test_any_file_works_or_is_named(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else yaml.safe_dump(content)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        for read in (setup_config, lambda name: load_config(name, weights="w.pth")):
            message = refusal(read, str(path))
            assert message is None or message.startswith(str(path)), message
            assert "\n" not in (message or ""), message
