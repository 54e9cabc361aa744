"""An accelerated model is the plain model, computed faster."""

import copy
import pickle
import threading

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.func import functional_call

from miti_detr.accelerate import accelerate
from miti_detr.accelerate.channels_last import apply as use_channels_last
from tests.fill import filled
from tests.helpers import threads, tiny_config, training_input

WIDE = (
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DETR.HIDDEN_DIM", 128, "MODEL.DETR.DROPOUT", 0.0),
    *("MODEL.DETR.DIM_FEEDFORWARD", 256, "MODEL.DETR.NUM_OBJECT_QUERIES", 40),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3"], "MODEL.DETR.ENC_LAYERS", 1),
)
INPUTS = [
    training_input((96, 128), [[4, 5, 30, 40], [20, 20, 44, 60]], [0, 2]),
    training_input((80, 96), [[1, 2, 9, 9]], [1], seed=1),
]


def model(accelerated: bool) -> nn.Module:
    made = build_model(tiny_config(*WIDE, "MODEL.ACCELERATE", accelerated))
    made.load_state_dict(filled(made.state_dict()))
    return made


def logits(made: nn.Module, dtype: torch.dtype, *, train: bool) -> torch.Tensor:
    """Raw output, in training mode with gradients."""
    made.train(train)
    enabled = dtype == torch.bfloat16
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return made.predict(INPUTS).logits.detach().float()


def new_values(made: nn.Module) -> dict[str, torch.Tensor]:
    """Other values for every tensor of the state, near the present ones."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: value * (1 + 0.3 * torch.rand(value.shape, generator=generator))
        for key, value in made.state_dict().items()
    }


def step(made):
    named = list(made.named_parameters())
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    for (_, p), value in zip(named, (new_values(made)[n] for n, _ in named), strict=True):
        p.grad = (p - value).detach()
    optimizer.step()
    optimizer.zero_grad()


def load(made):
    made.load_state_dict(new_values(made))


def assign_twice(made):
    """The second load may put other values at an address that the first has freed."""
    first = new_values(made)
    second = {k: v.clone() + 0.01 for k, v in first.items()}
    made.load_state_dict(first, assign=True)
    del first
    made.load_state_dict(second, assign=True)


def edit_in_place(made):
    values = new_values(made)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            tensor.copy_(values[key])


def write_through_data(made):
    """Leaves no trace in a version counter."""
    values = new_values(made)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(values[name])
    for name, buffer in made.named_buffers():
        if name in values:
            buffer.data.copy_(values[name])


def write_one_element_through_data(made):
    for parameter in made.parameters():
        parameter.data[(0,) * parameter.dim()] += 0.5


def replace_data(made):
    values = new_values(made)
    for name, parameter in made.named_parameters():
        parameter.data = values[name]


def swap_with_average(made):
    """As an average of the weights does around an evaluation, back and forth."""
    average = new_values(made)
    parameters = dict(made.named_parameters())
    for name, parameter in parameters.items():
        kept = parameter.data.clone()
        parameter.data.copy_(average[name])
        average[name] = kept


def to_double_and_back(made):
    made.double()
    edit_in_place(made)
    made.float()


CHANGES = [
    step,
    load,
    assign_twice,
    edit_in_place,
    write_through_data,
    write_one_element_through_data,
    replace_data,
    swap_with_average,
    to_double_and_back,
]


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_follows_the_weights_however_they_change(dtype, train):
    """After every kind of change, the output is that of a fresh plain model."""
    ours = model(accelerated=True)
    limit = 1e-3 if dtype == torch.float32 else 0.25
    before = logits(ours, dtype, train=train)
    for change in CHANGES:
        change(ours)
        plain = model(accelerated=False)
        plain.load_state_dict(dict(ours.state_dict()))
        expected = logits(plain, dtype, train=train)
        found = logits(ours, dtype, train=train)
        error = float((found - expected).norm() / expected.norm())
        changed = float((found - before).norm() / expected.norm())
        assert error < limit, f"{change.__name__}: {error}"
        assert changed > 2 * error, f"{change.__name__} changed the output by {changed} only"
        before = found


def test_functional_call_uses_the_given_weights():
    ours, plain = model(accelerated=True).eval(), model(accelerated=False).eval()
    values = new_values(ours)
    with torch.no_grad():
        first = ours.predict(INPUTS).logits
        plain.load_state_dict(values)
        expected = plain.predict(INPUTS).logits
        # The model's own forward pass returns detections, so a part of it is called.
        part = {k.removeprefix("backbone."): v for k, v in values.items() if "backbone." in k}
        images = ours.preprocess_image(INPUTS)
        found = functional_call(ours.backbone, part, (images,))["res3"].tensor
        torch.testing.assert_close(
            found, plain.backbone(images)["res3"].tensor, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(ours.predict(INPUTS).logits, first, rtol=0, atol=0)
    assert (first - expected).abs().max() > 1e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_weights_of_their_own(copied):
    ours = model(accelerated=True)
    expected = logits(ours, torch.float32, train=False)
    other = copied(ours)
    torch.testing.assert_close(logits(other, torch.float32, train=False), expected)
    edit_in_place(other)
    assert (logits(other, torch.float32, train=False) - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours, torch.float32, train=False), expected, rtol=0, atol=0)


def test_threads_share_a_model():
    ours = model(accelerated=True)
    expected = logits(ours, torch.bfloat16, train=False)
    found = []

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(ours.predict(INPUTS).logits.float())

    workers = [threading.Thread(target=run) for _ in range(4)]
    edit_in_place(ours)
    load_expected = model(accelerated=True)
    load_expected.load_state_dict(dict(ours.state_dict()))
    expected = logits(load_expected, torch.bfloat16, train=False)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for output in found:
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_keys_identity_and_hooks_stay():
    ours, plain = model(accelerated=True), model(accelerated=False)
    assert list(ours.state_dict()) == list(plain.state_dict())
    torch.manual_seed(0)
    first = build_model(tiny_config(*WIDE, "MODEL.ACCELERATE", True))
    torch.manual_seed(0)
    second = build_model(tiny_config(*WIDE, "MODEL.ACCELERATE", False))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    seen = []
    linear = nn.Linear(3, 3)
    linear.register_forward_hook(lambda *_: seen.append(1))
    net = nn.Sequential(linear, nn.Dropout(0.5))
    assert accelerate(net) is net
    assert net[0] is linear
    net(torch.ones(2, 3))
    assert seen == [1]


def test_report_says_what_was_replaced_once(caplog):
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with caplog.at_level("INFO"):
        text = str(accelerate(net).acceleration)
    assert text == "accelerated: 1 linear layers, 1 dropout modules"
    assert text in caplog.text
    assert str(accelerate(net).acceleration) == "accelerated: nothing to replace"


def test_tracing_sees_public_operators():
    ours = model(accelerated=True).eval()
    images = ours.preprocess_image(INPUTS).tensor
    for part, x in ((ours.backbone.body, images), (ours.transformer.encoder.layers[0], None)):
        x = torch.rand(1, 700, 128) if x is None else x

        for parameter in part.parameters():
            parameter.requires_grad_(False)

        def features(x, part=part):
            found = part(x)
            return tuple(found.values()) if isinstance(found, dict) else found

        with torch.no_grad():
            graph = torch.jit.trace(features, x, check_trace=False).inlined_graph
        kinds = {node.kind() for node in graph.nodes()}
        assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds


@pytest.mark.parametrize("count", [1, 4])
def test_narrow_networks_train(count):
    """Fewer than 16 channels before a strided 1x1 convolution, for which torch corrupts memory in
    channels_last layout; see findings of torch 2.11 and 2.14.
    """
    overrides = (
        *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
    )
    made = build_model(tiny_config(*overrides))
    plain = build_model(tiny_config(*overrides, "MODEL.ACCELERATE", False)).double()
    plain.load_state_dict(dict(made.state_dict()))
    image = training_input((96, 128), [[4, 5, 30, 40]], [0])
    image["image"] = image["image"].permute(1, 2, 0).contiguous().permute(2, 0, 1)  # HWC in memory
    images = [made.train().preprocess_image([image]), plain.train().preprocess_image([image])]
    images[1].tensor = images[1].tensor.double()
    gradients = []
    with threads(count):
        for m, batch in zip((made, plain), images, strict=True):
            ((_, feature),) = m.backbone(batch).items()
            feature.tensor.square().mean().backward()
            named = m.backbone.named_parameters()
            gradients.append({n: p.grad.double() for n, p in named if p.grad is not None})
    for name, expected in gradients[1].items():
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=atol, msg=name)


def test_layout_is_kept_where_torch_is_unsafe():
    unsafe = nn.Sequential(nn.Conv2d(32, 8, 3), nn.Conv2d(8, 16, 1, stride=2))
    assert use_channels_last(unsafe) == 0
    safe = nn.Sequential(nn.Conv2d(32, 16, 3), nn.Conv2d(16, 16, 1, stride=2))
    assert use_channels_last(safe) == 2
