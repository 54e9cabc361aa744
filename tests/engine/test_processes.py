from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import distributed

from miti_detr.engine.parallel import gradients_kept, unwrapped, wrap_for_processes
from tests.helpers import tiny_config, training_input
from tests.modeling.backbones.test_backbones import FPN_KEYS


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one process that believes to be one of two."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    yield
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("fpn", [False, True])
def test_backbone_with_idle_parts_trains_in_several_processes(
    fpn: bool, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels of a feature pyramid that are not used have no gradient: torch must be told."""
    overrides = FPN_KEYS if fpn else ()
    switch = ("MODEL.DETR.ACTIVATION_CHECKPOINT", recomputed)
    model = build_model(tiny_config("MODEL.RESNETS.NORM", "FrozenBN", *overrides, *switch))
    inputs = [training_input((48, 64), [[4, 5, 20, 30]], [1])]
    wrapped = wrap_for_processes(model)
    monkeypatch.setattr(comm, "get_world_size", lambda: 1)  # there is nobody to ask for boxes
    for _ in range(2):  # torch notices in the next step
        total = sum(wrapped(inputs).values())
        assert isinstance(total, torch.Tensor)
        total.backward()
    assert wrapped.find_unused_parameters == fpn


@pytest.mark.usefixtures("group")
def test_gradients_of_the_last_part_are_exchanged() -> None:
    """And with them those of the parts before; outside of DistributedDataParallel nothing is."""
    model = torch.nn.Linear(2, 1)
    wrapped = wrap_for_processes(model)
    for kept in (True, False):
        with gradients_kept(wrapped, kept):
            assert wrapped.require_backward_grad_sync != kept
        with gradients_kept(model, kept):
            pass
    assert unwrapped(wrapped) is unwrapped(model) is model


@pytest.mark.slow
@pytest.mark.usefixtures("group")
def test_a_compiled_model_trains_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With recomputed layers, too; without generating code."""
    overrides = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DETR.ACTIVATION_CHECKPOINT", True)
    model = build_model(tiny_config(*overrides))
    for part in (model.backbone.body, model.transformer):
        part.compile(backend="aot_eager")
    wrapped = wrap_for_processes(model)
    monkeypatch.setattr(comm, "get_world_size", lambda: 1)  # there is nobody to ask for boxes
    losses = wrapped([training_input((48, 64), [[4, 5, 20, 30]], [1])])
    total = sum(losses.values())
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert model.transformer.encoder.layers[0].linear1.weight.grad is not None
