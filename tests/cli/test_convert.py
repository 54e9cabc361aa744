import pytest
import torch
from detectron2.modeling import build_model
from safetensors.torch import load_file

from miti_detr.checkpoint import (
    CheckpointError,
    MitiDetrCheckpointer,
    convert_state_dict,
    make_record,
    read_checkpoint,
    to_official,
)
from miti_detr.cli.main import main
from tests.checkpoint.helpers import assert_same, r50_config, slim
from tests.checkpoint.test_checkpointer import RESNET18


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write our ``detr.pth`` and ``miti.pth``, and ``official.pth`` with the published keys."""
    folder = tmp_path_factory.mktemp("convert")
    for name, residual in (("detr", "none"), ("miti", "before_norm")):
        cfg = r50_config(*RESNET18, "MODEL.DETR.LAYER_RESIDUAL", residual)
        MitiDetrCheckpointer(build_model(cfg), str(folder), cfg=cfg).save(name)
    torch.save({"model": slim("detr_r50")}, folder / "official.pth")
    return folder


def convert(source, target, *options):
    return main(["convert", str(source), str(target), *options])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["detr", "d2-wrapper", "hf"])
def test_there_and_back(to, folder, tmp_path, capsys):
    assert convert(folder / "detr.pth", tmp_path / "there", "--to", to) == 0
    assert convert(tmp_path / "there", tmp_path / "back.pth", "--to", "ours") == 0
    back = read_checkpoint(str(tmp_path / "back.pth"))
    assert_same(back["model"], read_checkpoint(str(folder / "detr.pth"))["model"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("recognised miti_detr: ")
    assert lines[-1] == f"wrote {tmp_path / 'back.pth'}"


@pytest.mark.slow
def test_number_of_classes(folder, tmp_path):
    for options, rows in (([], 92), (["--num-classes", "91"], 92), (["--num-classes", "80"], 81)):
        assert convert(folder / "detr.pth", tmp_path / "w", "--to", "detr", *options) == 0
        assert len(read_checkpoint(str(tmp_path / "w"))["model"]["class_embed.bias"]) == rows
    assert convert(folder / "official.pth", tmp_path / "w", "--to", "ours") == 0
    assert len(read_checkpoint(str(tmp_path / "w"))["model"]["class_embed.bias"]) == 81
    options = ("--to", "ours", "--num-classes", "7")
    assert convert(folder / "official.pth", tmp_path / "w", *options) == 0
    assert "class_embed.bias" not in read_checkpoint(str(tmp_path / "w"))["model"]


@pytest.mark.slow
def test_record_is_kept_or_stated(folder, tmp_path):
    assert convert(folder / "miti.pth", tmp_path / "w", "--to", "ours") == 0
    record = read_checkpoint(str(tmp_path / "w"))["miti_detr"]
    assert record == read_checkpoint(str(folder / "miti.pth"))["miti_detr"]
    assert convert(folder / "official.pth", tmp_path / "w", "--to", "ours") == 0
    assert "miti_detr" not in read_checkpoint(str(tmp_path / "w"))
    options = ("--to", "ours", "--residual", "before_norm")
    assert convert(folder / "official.pth", tmp_path / "w", *options) == 0
    record = read_checkpoint(str(tmp_path / "w"))["miti_detr"]
    assert (record["layer_residual"], record["pre_norm"]) == ("before_norm", False)


def test_formats_without_a_record_say_so(folder, tmp_path, capsys):
    assert convert(folder / "miti.pth", tmp_path / "w", "--to", "detr") == 0
    assert "state MODEL.DETR.WEIGHTS_RESIDUAL before_norm" in capsys.readouterr().out
    assert_same(
        read_checkpoint(str(tmp_path / "w"))["model"],
        to_official(read_checkpoint(str(folder / "miti.pth"))["model"]),
    )


@pytest.mark.slow
def test_huggingface_needs_what_the_file_does_not_say(folder, tmp_path, capsys):
    """Heads and DC5 come from the recorded config; without one the assumed values are printed."""
    for source, printed in (("detr.pth", False), ("official.pth", True)):
        assert convert(folder / source, tmp_path / "hf", "--to", "hf") == 0
        assert ('set "dilation": true there' in capsys.readouterr().out) == printed


def test_a_folder_is_no_file_to_write(folder, tmp_path, capsys):
    assert convert(folder / "detr.pth", tmp_path, "--to", "ours") == 1
    assert f"{tmp_path}: a folder; give the name of a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.RESNETS.STRIDE_IN_1X1", True), "has no MODEL.RESNETS.STRIDE_IN_1X1"),
        (
            ("MODEL.RESNETS.RES5_DILATION", 2, "MODEL.BACKBONE.NAME", "build_resnet_backbone"),
            "is not that of build_resnet_backbone",
        ),
    ],
)
def test_resnets_that_compute_something_else_are_not_exported(overrides, message, tmp_path, capsys):
    state, _ = convert_state_dict(slim("detr_r50"), num_classes=80)
    record = make_record({"layer_residual": "none"}, r50_config(*overrides))
    torch.save({"model": state, "miti_detr": record}, tmp_path / "w.pth")
    for to in ("detr", "hf"):
        assert convert(tmp_path / "w.pth", tmp_path / "out", "--to", to) == 1
        assert message in capsys.readouterr().err
    assert convert(tmp_path / "w.pth", tmp_path / "out", "--to", "d2-wrapper") == 0


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("miti.pth", ("--to", "hf"), "Hugging Face's models have no layer residual before_norm"),
        ("miti.pth", ("--to", "ours", "--residual", "none"), "records before_norm as its layer"),
        ("official.pth", ("--to", "hf", "--num-classes", "7"), "a whole model is needed for hf"),
        ("nothing.pth", ("--to", "detr"), "no such file or folder"),
        ("foreign.pth", ("--to", "detr"), "of none of the known formats"),
    ],
)
def test_errors_are_one_line_and_write_nothing(source, options, message, folder, tmp_path, capsys):
    torch.save({"x": torch.ones(1)}, folder / "foreign.pth")
    assert convert(folder / source, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"miti-detr: error: {folder / source}: ")
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_safetensors_keep_the_record(folder, tmp_path):
    """Also where only the tensors of the file are read, by any program."""
    path = tmp_path / "miti.safetensors"
    assert convert(folder / "miti.pth", path, "--to", "ours") == 0
    before, after = read_checkpoint(str(folder / "miti.pth")), read_checkpoint(str(path))
    assert_same(after["model"], before["model"])
    assert after["miti_detr"] == before["miti_detr"]
    detr = build_model(r50_config(*RESNET18)).eval()
    detr.load_state_dict(load_file(path))
    with pytest.raises(CheckpointError, match="the weights have before_norm"):
        detr([{"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}])
