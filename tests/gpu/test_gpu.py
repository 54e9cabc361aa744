"""The model on a GPU: equal to the CPU, in all precisions, compiled and from CUDA graphs."""

import copy
import warnings

import pytest
import torch
from detectron2.modeling import build_model

from tests.checkpoint.helpers import r50_config
from tests.fill import filled
from tests.helpers import tiny_config, training_input

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NORM = ("MODEL.RESNETS.NORM", "FrozenBN")
PADDED = [
    training_input((96, 128), [[4, 5, 30, 40], [20, 20, 44, 60]], [0, 2]),
    training_input((80, 96), [[1, 2, 9, 9]], [1], seed=1),
]
UNPADDED = [
    training_input((96, 128), [[4, 5, 30, 40], [20, 20, 44, 60]], [0, 2], seed=s) for s in (2, 3)
]


@pytest.fixture(autouse=True)
def no_tf32():
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def tiny(*overrides):
    made = build_model(tiny_config(*NORM, "MODEL.DETR.DROPOUT", 0.0, *overrides))
    made.load_state_dict(filled(made.state_dict()))
    return made


def pair(*overrides):
    """The same weights on the GPU with ``overrides``, and on the CPU without."""
    return tiny("MODEL.DEVICE", "cuda", *overrides), tiny("MODEL.DEVICE", "cpu")


def gradients(made, inputs, dtype=torch.float32, times=1):
    """Losses of the last of several backward passes, and the accumulated gradients."""
    made.train().zero_grad()
    for _ in range(times):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            losses = made(inputs)
        sum(losses.values()).backward()
    found = {n: p.grad.float().cpu() for n, p in made.named_parameters() if p.grad is not None}
    return {n: v.detach().float().cpu() for n, v in losses.items()}, found


def assert_same_steps(one, other, rtol):
    """Losses to ``rtol``, each gradient to ``rtol`` of its largest value, or 1e-4 of all."""
    largest = max(float(g.abs().max()) for g in other[1].values())
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=rtol)
    assert one[1].keys() == other[1].keys()
    for name, expected in other[1].items():
        atol = rtol * float(expected.abs().max()) + 1e-4 * largest
        torch.testing.assert_close(one[1][name], expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("residual", ["none", "before_norm"])
def test_r50_equals_the_cpu(residual):
    """Padded batch, float32 without TF32: logits to 1e-4, boxes to 1e-5."""
    results = []
    for device in ("cuda", "cpu"):
        made = build_model(
            r50_config("MODEL.DEVICE", device, "MODEL.DETR.LAYER_RESIDUAL", residual)
        )
        made.load_state_dict(filled(made.state_dict()))
        with torch.no_grad():
            results.append(made.eval().predict(PADDED))
    torch.testing.assert_close(results[0].logits.cpu(), results[1].logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(results[0].boxes.cpu(), results[1].boxes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inputs", [PADDED, UNPADDED], ids=["padded", "unpadded"])
def test_training_step_equals_the_cpu(inputs):
    ours, expected = pair()
    assert_same_steps(gradients(ours, inputs), gradients(expected, inputs), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    ours, expected = pair()
    with torch.no_grad(), torch.autocast("cuda", dtype):
        found = ours.eval().predict(PADDED).logits.float().cpu()
    with torch.no_grad():
        plain = expected.eval().predict(PADDED).logits
    limit = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (found - plain).norm() < limit * plain.norm()


@pytest.mark.parametrize("inputs", [PADDED, UNPADDED], ids=["padded", "unpadded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_equal_eager(inputs, dtype):
    """Over steps in which the weights change, with two backward passes accumulated in each."""
    eager = tiny("MODEL.DEVICE", "cuda")
    graphs = tiny("MODEL.DEVICE", "cuda", "MODEL.CUDA_GRAPHS", True)
    rtol = 1e-3 if dtype == torch.float32 else 0.05
    for _ in range(4):
        results = [gradients(made, inputs, dtype, times=2) for made in (graphs, eager)]
        assert_same_steps(*results, rtol)
        with torch.no_grad():
            for made in (graphs, eager):
                for p in made.parameters():
                    p.mul_(0.99)
    recordings = [r for r in graphs.transformer._graphs._recordings.values() if r is not None]
    assert len(recordings) == len(graphs.backbone.body._graphs._recordings) == 1


def test_cuda_graphs_in_inference():
    eager = tiny("MODEL.DEVICE", "cuda").eval()
    graphs = tiny("MODEL.DEVICE", "cuda", "MODEL.CUDA_GRAPHS", True).eval()
    with torch.no_grad():
        for inputs in (UNPADDED, PADDED, UNPADDED, PADDED, UNPADDED[::-1], PADDED):
            found, expected = graphs.predict(inputs), eager.predict(inputs)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-4)


def test_cuda_graphs_with_dropout_draw_new_numbers():
    graphs = tiny("MODEL.DEVICE", "cuda", "MODEL.CUDA_GRAPHS", True)
    for part in graphs.modules():
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.2
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.2
    losses = [float(sum(gradients(graphs, UNPADDED)[0].values())) for _ in range(5)]
    assert len(set(losses)) == 5


def test_cuda_graphs_follow_other_weights():
    graphs = tiny("MODEL.DEVICE", "cuda", "MODEL.CUDA_GRAPHS", True).eval()
    eager = tiny("MODEL.DEVICE", "cuda").eval()
    with torch.no_grad():
        graphs.predict(UNPADDED), graphs.predict(UNPADDED)
        state = {k: v * 1.1 for k, v in copy.deepcopy(graphs.state_dict()).items()}
        for assign in (False, True):
            graphs.load_state_dict(state, assign=assign)
            eager.load_state_dict(state)
            for _ in range(3):
                found, expected = graphs.predict(UNPADDED), eager.predict(UNPADDED)
                torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_waits_of_a_step():
    """A step of the model waits for the device only for the costs of its matches."""
    made = tiny("MODEL.DEVICE", "cuda").train()
    sum(made(UNPADDED).values()).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sum(made(UNPADDED).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    places = "\n".join(f"{w.filename}:{w.lineno}" for w in waits)
    assert len(waits) <= 1, places


@pytest.mark.slow
def test_compiled_step():
    compiled = tiny("MODEL.DEVICE", "cuda", "MODEL.COMPILE", True)
    eager = tiny("MODEL.DEVICE", "cuda")
    assert_same_steps(gradients(compiled, UNPADDED), gradients(eager, UNPADDED), 1e-3)
