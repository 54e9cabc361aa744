import logging
import os
import signal

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn

from miti_detr.checkpoint import (
    CheckpointError,
    MitiDetrCheckpointer,
    convert_state_dict,
    to_official,
)
from tests.checkpoint.helpers import assert_same, r50_config, tiny_config, tiny_model

RESNET18 = (
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.DETR.ENC_LAYERS", 1),
    *("MODEL.DETR.DEC_LAYERS", 1),
    *("MODEL.DETR.DIM_FEEDFORWARD", 32),
)


@pytest.fixture(scope="module")
def resnet18():
    """A DETR that the published formats can hold, with 1 + 1 layers."""
    torch.manual_seed(0)
    return build_model(r50_config(*RESNET18)).eval()


def fresh(*overrides):
    return build_model(r50_config(*RESNET18, *overrides))


def test_round_trip_keeps_everything(tmp_path):
    """Model, optimizer and further data come back bit-equal; the record is not handed on."""
    model = tiny_model(0)
    optimizer = torch.optim.AdamW(model.parameters())
    cfg = tiny_config()
    saver = MitiDetrCheckpointer(model, str(tmp_path), cfg=cfg, optimizer=optimizer)
    saver.save("model_0000007", iteration=7)
    other = tiny_model(1)
    optimizer2 = torch.optim.AdamW(other.parameters(), lr=1.0)
    loader = MitiDetrCheckpointer(other, str(tmp_path), optimizer=optimizer2)
    assert loader.resume_or_load("nowhere", resume=True) == {"iteration": 7}
    assert_same(other.state_dict(), model.state_dict())
    assert optimizer2.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    record = torch.load(tmp_path / "model_0000007.pth")["miti_detr"]
    assert record["config"] == cfg.dump()
    assert record["layer_residual"] == "before_norm"


@pytest.mark.parametrize("suffix", ["official.pth", "official.safetensors", "ours.pth"])
def test_official_file_with_coco_rows(suffix, resnet18, tmp_path, caplog):
    path = str(tmp_path / suffix)
    official = to_official(resnet18.state_dict())
    if suffix.endswith("safetensors"):
        save_file(official, path)
    else:
        torch.save({"model": resnet18.state_dict() if suffix == "ours.pth" else official}, path)
    model = fresh()
    with caplog.at_level(logging.INFO):
        assert MitiDetrCheckpointer(model).load(path) == {}
    assert_same(model.state_dict(), resnet18.state_dict())
    if "official" in suffix:
        assert "official DETR: " in caplog.text
        assert "class head: 92 -> 81 rows" in caplog.text
    assert "not found in the checkpoint" not in caplog.text


def test_other_classes_and_queries(resnet18, tmp_path, caplog):
    """Only the class head is initialised; 100 queries are copied into 120, or trimmed to 30."""
    path = str(tmp_path / "official.pth")
    torch.save(to_official(resnet18.state_dict()), path)
    trained = resnet18.state_dict()
    for queries in (120, 30):
        model = fresh("MODEL.DETR.NUM_CLASSES", 5, "MODEL.DETR.NUM_OBJECT_QUERIES", queries)
        own = {key: value.clone() for key, value in model.state_dict().items()}
        caplog.clear()
        with caplog.at_level(logging.INFO):
            MitiDetrCheckpointer(model, for_training=True).load(path)
        new = model.state_dict()
        kept = min(queries, 100)
        expected = dict(trained)
        expected["query_embed.weight"] = torch.cat(
            [trained["query_embed.weight"][:kept], own["query_embed.weight"][kept:]]
        )
        for key in ("class_embed.weight", "class_embed.bias"):
            expected[key] = own[key]
        assert_same(new, expected)
        assert "2 re-initialised (class_embed.weight, class_embed.bias)" in caplog.text
        assert f"{kept} of 100 copied into {queries}" in caplog.text
        assert "not found in the checkpoint" not in caplog.text


@pytest.mark.parametrize("kind", ["torchvision.pth", "R-18.pkl"])
def test_backbone_weights(kind, resnet18, tmp_path, caplog):
    """Only the backbone is loaded, without a message about the rest."""
    body = {
        key.removeprefix("backbone.body."): value
        for key, value in resnet18.state_dict().items()
        if key.startswith("backbone")
    }
    path = tmp_path / kind
    if kind == "R-18.pkl":
        import pickle

        arrays = {key: value.numpy() for key, value in body.items()}
        data = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(data))
    else:
        official = to_official(resnet18.state_dict())
        prefix = "backbone.0.body."
        weights = {k.removeprefix(prefix): v for k, v in official.items() if prefix in k}
        torch.save(weights | {"fc.weight": torch.ones(1)}, path)
    model = fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        MitiDetrCheckpointer(model, for_training=True).load(str(path))
    for key, value in model.state_dict().items():
        source = resnet18.state_dict() if key.startswith("backbone") else before
        torch.testing.assert_close(value, source[key], rtol=0, atol=0)
    assert "ResNet: 100 tensors mapped" in caplog.text
    assert "not found in the checkpoint" not in caplog.text


def test_backbone_weights_below_a_feature_pyramid(resnet18):
    """With an FPN the ResNet is below ``backbone.body.bottom_up``."""
    from miti_detr.checkpoint.fit import fit_to_model

    state = {k: v for k, v in resnet18.state_dict().items() if k.startswith("backbone")}
    own = {k.replace("body.", "body.bottom_up."): v for k, v in state.items()}
    fitted = dict(state)
    fit_to_model(fitted, own)
    assert_same(fitted, own)


def test_wrong_network_is_refused(resnet18, tmp_path):
    """Deeper, wider or foreign weights are named, and the model stays as it was."""
    path = str(tmp_path / "w.pth")
    torch.save(to_official(resnet18.state_dict()), path)
    with pytest.raises(CheckpointError, match=r"res2.0.conv1.weight has shape .*in the model"):
        MitiDetrCheckpointer(fresh("MODEL.RESNETS.RES2_OUT_CHANNELS", 32)).load(path)
    deep = dict(to_official(resnet18.state_dict()))
    deep["backbone.0.body.layer3.7.conv1.weight"] = torch.ones(1)
    torch.save(deep, path)
    with pytest.raises(CheckpointError, match=r"no key 'backbone.body.res4.7.conv1.weight'.*near"):
        MitiDetrCheckpointer(fresh()).load(path)


@pytest.mark.parametrize("for_training", [True, False])
def test_random_parts_of_an_evaluated_model_are_named(for_training, resnet18, tmp_path, caplog):
    """A class head or a whole detector without weights is normal in training only."""
    official = to_official(resnet18.state_dict())
    torch.save(official, tmp_path / "other_classes.pth")
    backbone = {k.removeprefix("backbone.0.body."): v for k, v in official.items() if "body" in k}
    torch.save(backbone, tmp_path / "backbone.pth")
    for name, part in (("other_classes", "class_embed"), ("backbone", "query_embed")):
        caplog.clear()
        model = fresh("MODEL.DETR.NUM_CLASSES", 5)
        MitiDetrCheckpointer(model, for_training=for_training).load(str(tmp_path / f"{name}.pth"))
        messages = [
            r.getMessage() for r in caplog.records if "not found in the check" in r.getMessage()
        ]
        assert len(messages) == (not for_training)
        assert all(part in text for text in messages)


def test_missing_keys_are_still_reported(resnet18, tmp_path, caplog):
    state = to_official(resnet18.state_dict())
    del state["input_proj.bias"]
    torch.save(state, tmp_path / "w.pth")
    MitiDetrCheckpointer(fresh()).load(str(tmp_path / "w.pth"))
    assert "not found in the checkpoint" in caplog.text
    assert "input_proj" in caplog.text


def test_caffe2_file_goes_to_the_heuristics(resnet18, tmp_path, caplog):
    """Detectron2 finds ``conv1_w`` its place by itself."""
    import pickle

    value = torch.randn(64, 3, 7, 7)
    (tmp_path / "R.pkl").write_bytes(pickle.dumps({"conv1_w": value.numpy()}))
    model = fresh()
    with caplog.at_level(logging.INFO):
        MitiDetrCheckpointer(model).load(str(tmp_path / "R.pkl"))
    assert "matched by Detectron2's heuristics" in caplog.text
    torch.testing.assert_close(model.state_dict()["backbone.body.stem.conv1.weight"], value)


def test_someone_elses_model_is_none_of_our_business(tmp_path):
    """No variant: files are written and read exactly as Detectron2 does it."""
    model = nn.Linear(2, 2)
    MitiDetrCheckpointer(model, str(tmp_path)).save("model")
    assert list(torch.load(tmp_path / "model.pth")) == ["model"]
    other = nn.Linear(2, 2)
    MitiDetrCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert_same(other.state_dict(), model.state_dict())


def test_files_load_with_the_stock_checkpointer(tmp_path):
    model, other = tiny_model(0), tiny_model(1)
    MitiDetrCheckpointer(model, str(tmp_path)).save("model")
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert_same(other.state_dict(), model.state_dict())


def test_checkpointer_can_go_on_after_an_error(tmp_path):
    """Detectron2's own asserts that the last load came to an end."""
    checkpointer = MitiDetrCheckpointer(tiny_model(), str(tmp_path))
    (tmp_path / "bad.pth").touch()
    with pytest.raises(CheckpointError):
        checkpointer.load(str(tmp_path / "bad.pth"))
    checkpointer.save("good")
    checkpointer.load(str(tmp_path / "good.pth"))


def test_crash_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = MitiDetrCheckpointer(tiny_model(), str(tmp_path))
    checkpointer.save("model_0")

    def full_disk(data, file):
        file.write(b"PK\x03\x04 half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        checkpointer.save("model_1")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0.pth")


def test_kill_while_saving_leaves_nothing_that_is_picked_up(tmp_path, monkeypatch):
    """SIGKILL in the middle of writing; the next save sweeps up."""
    model = nn.Linear(2, 2)
    model.variant = {}
    checkpointer = MitiDetrCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0")

    def killed(data, file):
        file.write(b"PK\x03\x04 half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(torch, "save", killed)
        checkpointer.save("model_1")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert f"model_1.pth.{child}.incomplete" in os.listdir(tmp_path)
    assert checkpointer.get_all_checkpoint_files() == [str(tmp_path / "model_0.pth")]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0.pth")
    checkpointer.save("model_2")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth", "model_2.pth"]


@pytest.mark.parametrize("tag", ["", "model_9.pth", "gone/model_9.pth"])
def test_empty_or_stale_tag(tag, tmp_path, caplog):
    """The newest checkpoint is taken instead; if there is none, there is nothing to resume."""
    checkpointer = MitiDetrCheckpointer(tiny_model(), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    (tmp_path / "last_checkpoint").write_text(tag)
    assert not checkpointer.has_checkpoint()
    assert "names no file that exists; ignored" in caplog.text
    for age, name in enumerate(("model_2.pth", "model_1.pth", "other.pth")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_2.pth")


def test_periodic_checkpointer_of_fvcore(tmp_path):
    checkpointer = MitiDetrCheckpointer(tiny_model(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=1, max_iter=3, max_to_keep=1)
    for iteration in range(3):
        periodic.step(iteration)
    assert sorted(os.listdir(tmp_path)) == [
        *("last_checkpoint", "model_0000002.pth", "model_final.pth")
    ]
    assert checkpointer.get_checkpoint_file().endswith("model_final.pth")


def test_only_the_main_process_writes(tmp_path):
    MitiDetrCheckpointer(tiny_model(), str(tmp_path / "x"), save_to_disk=False).save("model")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_conversion_result_needs_no_model(resnet18):
    """The result of ``convert_state_dict`` is one that ``load_state_dict(strict=True)`` takes."""
    state, _ = convert_state_dict(to_official(resnet18.state_dict()), num_classes=80)
    fresh().load_state_dict(state, strict=True)
