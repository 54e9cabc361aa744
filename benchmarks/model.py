"""Size of a model: parameters and floating point operations of inference."""

import logging
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape

from miti_detr.bench.evaluation import count_parameters

from .spec import BenchSpec, bench_config, make_inputs

_ADDITIONS = ("aten::add", "aten::add_")
_PARTS = ("backbone", "input_proj", "transformer", "class_embed", "bbox_embed")


def count_model(spec: BenchSpec, peer: str = "ours") -> dict[str, Any]:
    """Count parameters and operations.

    Args:
        spec: what to measure. One image of its first size is counted.
        peer: ``ours`` or ``detr``.

    Returns:
        ``parameters`` and ``trainable``; ``size`` of the image; ``flops``: multiply-adds of matrix
        products, convolutions, attention and norms, as fvcore counts them, and ``flops_of`` the
        parts; ``additions``: elementwise additions of tensors, such as residual paths;
        ``uncounted``: names of the operators that fvcore does not count.
    """
    cfg = bench_config(spec, peer)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ACCELERATE = False  # folding would be counted as part of the step
    model = build_model(cfg).eval()
    one = BenchSpec(spec.config_file, spec.overrides, batch=1, sizes=spec.sizes[:1])
    logging.getLogger("fvcore").setLevel(
        logging.ERROR
    )  # it warns about each operator it does not count
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


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of softmax(q k^T) v with q (N, heads, Lq, d), k (N, heads, Lk, d)."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return int(torch.tensor(query[:3]).prod()) * key[2] * (query[3] + value[3])
