"""Size of a model: parameters and floating point operations of an inference step."""

import logging
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape
from torch import nn

from .spec import BenchSpec, bench_config, make_inputs

_ADDITIONS = ("aten::add", "aten::add_")
_PARTS = ("backbone", "input_proj", "transformer", "class_embed", "bbox_embed")


def count_model(spec: BenchSpec, side: str = "ours") -> dict[str, Any]:
    """Count parameters and operations.

    Args:
        spec: its first image size, one image.
        side: ``ours`` or ``detr``.

    Returns:
        ``parameters`` and ``trainable``; ``flops``: fused multiply-adds of matrix products,
        convolutions, attention and norms, as fvcore counts, of one image of ``size``, and
        ``flops_of`` the parts; ``additions``: of tensors, such as residual paths; ``uncounted``:
        operators that fvcore knows nothing of, by name.
    """
    cfg = bench_config(spec, side)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ACCELERATE = False  # folded norms would be counted at each step
    model = build_model(cfg).eval()
    one = BenchSpec(spec.config_file, spec.overrides, batch=1, sizes=spec.sizes[:1])
    logging.getLogger("fvcore").setLevel(logging.ERROR)  # it warns of each operator it skips
    analysis = FlopCountAnalysis(model, make_inputs(cfg, one))
    add = elementwise_flop_counter(0, 1)
    analysis.set_op_handle(**dict.fromkeys(_ADDITIONS, add))
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    additions = {
        module: sum(counts[name.removeprefix("aten::")] for name in _ADDITIONS)
        for module, counts in analysis.by_module_and_operator().items()
    }
    flops = analysis.by_module()
    return {
        **count_parameters(model),
        "size": spec.sizes[0],
        "flops": int(flops[""] - additions[""]),
        "flops_of": {
            part: int(flops[f"model.{part}"] - additions[f"model.{part}"]) for part in _PARTS
        },
        "additions": int(additions[""]),
        "uncounted": dict(analysis.unsupported_ops()),
    }


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of a model: ``parameters`` and, of these, ``trainable``."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(count for count, _ in counts),
        "trainable": sum(count for count, trainable in counts if trainable),
    }


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of softmax(q k^T) v with q (N, heads, Lq, d), k (N, heads, Lk, d)."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return int(torch.tensor(query[:3]).prod()) * key[2] * (query[3] + value[3])
