"""Compilation of parts of a model, without generating code."""

import functools
import logging

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from miti_detr.accelerate import compile_parts, uncompiled
from tests.fill import filled
from tests.helpers import tiny_config, training_input


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are traced, and what was traced runs in eager mode."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager")
    )


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_parts_by_name_and_each_compilation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.ModuleList([nn.Linear(4, 4)]))
    keys = list(model.state_dict())
    with caplog.at_level(logging.INFO):
        assert compile_parts(model, ["0", "2", "missing"]) == ["0"]
        with uncompiled():
            model[0](torch.ones(2, 3))
        assert "took" not in caplog.text
        for _ in range(2):
            model[0](torch.ones(2, 3))
        messages = [record.getMessage() for record in caplog.records]
    assert list(model.state_dict()) == keys
    assert messages[0] == "compiled when first used, which can take minutes: 0"
    assert [" took " in message for message in messages] == [False, True]


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_heads_and_losses_are_compiled_for_any_number_of_objects() -> None:
    """After the second batch; losses as those of a model that is not compiled, to 1e-5."""
    models = []
    for _ in range(2):
        made = build_model(tiny_config("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DETR.DROPOUT", 0.0))
        made.load_state_dict(filled(made.state_dict()))
        models.append(made.train())
    names = ["class_embed", "bbox_embed", "criterion.class_loss", "criterion.box_loss"]
    assert compile_parts(models[0], names) == names

    def check(*counts: int) -> None:
        inputs = [
            training_input((64, 48), [[4, 5, 20 + i, 40] for i in range(n)], [1] * n, seed)
            for seed, n in enumerate(counts)
        ]
        losses, expected = (made(inputs) for made in models)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)

    check(2, 3)
    check(1, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(5, 4)
        check(7, 0)
