"""Random damage to a sound checkpoint: it loads as it was, or one line says what is wrong."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miti_detr.checkpoint import CheckpointError, MitiDetrCheckpointer
from tests.checkpoint.helpers import tiny_model
from tests.fuzz.budget import budget

WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    MitiDetrCheckpointer(tiny_model(0), str(folder)).save("sound")
    return folder / "sound.pth"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(1)


def outcome(model: Any, path: Path) -> str:
    """Load a file; "" if that works, otherwise the one line that refuses it."""
    line = ""
    try:
        MitiDetrCheckpointer(model).load(str(path))
    except CheckpointError as error:
        line = str(error) or "\n"
    assert "\n" not in line
    return line


@budget
@given(data=st.data())
def test_flipped_and_missing_bytes(data: st.DataObject, sound: Path, model: Any) -> None:
    content = bytearray(sound.read_bytes())
    cut = data.draw(st.booleans())
    position = data.draw(st.integers(0, len(content) - 1))
    if cut:
        content = content[:position]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    path = sound.with_name("damaged.pth")
    path.write_bytes(content)
    expected = torch.load(sound)["model"]
    if not outcome(
        model, path
    ):  # the byte means nothing, such as one of the padding between the parts of an archive
        assert not cut
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


@budget
@given(key=st.sampled_from(["layer_residual", "nheads", "residual_strength", "config"]), value=WILD)
def test_records_of_any_kind(key: str, value: Any, sound: Path, model: Any) -> None:
    content = torch.load(sound)
    recorded = content["miti_detr"].get(key)
    content["miti_detr"][key] = value
    path = sound.with_name("record.pth")
    torch.save(content, path)
    if not outcome(model, path):
        assert key in ("config", "residual_strength") or value == recorded


@budget
@given(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_values_that_are_not_finite(
    data: st.DataObject, value: float, sound: Path, model: Any
) -> None:
    content = torch.load(sound)
    floats = sorted(k for k, v in content["model"].items() if v.is_floating_point())
    key = data.draw(st.sampled_from(floats))
    tensor = content["model"][key] = content["model"][key].contiguous()
    tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
    path = sound.with_name("nan.pth")
    torch.save(content, path)
    assert key in outcome(model, path)


@budget
@given(value=WILD)
def test_any_object_is_no_checkpoint(value: Any, sound: Path, model: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path = sound.with_name("object.pth")
    path.write_bytes(buffer.getvalue())
    assert outcome(model, path)
