"""Rank tables at initialisation, which need neither data nor weights."""

import itertools
import math
from collections.abc import Mapping

from tabulate import tabulate

from miti_detr.rank.theory import Panel, TheorySpec, decoder_panel, encoder_panel, pure_attention

# Measure -> title of its table
TITLES = {
    "residual": "relative residual r",
    "std": "standard deviation over the channels",
}
OTHERS = {
    "cosine": "cosine",
    "effective_rank": "eff. rank",
    "stable_rank": "st. rank",
    "residual_fro": "r Frob",
    "entropy": "entropy",
}


def theory(spec: TheorySpec) -> tuple[dict[str, Panel], dict[str, list[float]]]:
    """Compute all panels.

    Args:
        spec: sizes.

    Returns:
        Panels ``encoder, shared``, ``encoder, independent`` and ``decoder``, and the relative
        residuals of pure attention in float64, by column.
    """
    panels = {f"encoder, {kind}": encoder_panel(spec, kind) for kind in ("shared", "independent")}
    panels["decoder"] = decoder_panel(spec)
    pure = {}
    for mlp, positions in itertools.product((False, True), repeat=2):
        name = f"{'att.+MLP' if mlp else 'attention'} {'with' if positions else 'no'} positions"
        pure[name] = pure_attention(spec, "shared", positions=positions, mlp=mlp)
    return panels, pure


def theory_tables(panels: Mapping[str, Panel], pure: Mapping[str, list[float]]) -> list[str]:
    """Return the tables as text, each with its title."""
    tables = []
    for name, panel in panels.items():
        inputs = f"{name} tokens" if name != "decoder" else "decoder, queries before the final norm"
        for measure, title in TITLES.items():
            if measure == "residual" or "independent" not in name:
                tables.append(f"{title}: {inputs}\n{_layers(panel, measure)}")
    tables.append(f"encoder, shared tokens\n{_others(panels)}")
    tables.append(f"relative residual r of pure attention, float64\n{_pure(pure)}")
    return tables


def _layers(panel: Panel, measure: str) -> str:
    depth = len(next(iter(panel.values())))
    rows = [
        [str(layer), *(_number(layers[layer][measure]) for layers in panel.values())]
        for layer in range(depth)
    ]
    return _table(rows, ["layer", *map(_heading, panel)])


def _others(panels: Mapping[str, Panel]) -> str:
    panel = panels["encoder, shared"]
    last = len(next(iter(panel.values()))) - 1
    rows = [
        [f"{title}, {at}", *(_number(layers[at][key]) for layers in panel.values())]
        for key, title in OTHERS.items()
        for at in (max(last // 2, 1), last)
    ]
    return _table(rows, ["of layer", *map(_heading, panel)])


def _pure(pure: Mapping[str, list[float]]) -> str:
    """Tabulate residuals, and how many decimal digits each layer removes from them."""
    rows = []
    for layer in range(len(next(iter(pure.values())))):
        cells = []
        for values in pure.values():
            value, before = values[layer], values[max(layer - 1, 0)]
            log = f"{math.log10(before / value):.1f}" if layer and value > 1e-15 else ""
            cells += [_number(value), log]
        rows.append([str(layer), *cells])
    headers = [part for name in pure for part in (_heading(name), "digits\nlost")]
    return _table(rows, ["layer", *headers])


def _heading(text: str) -> str:
    """Put each word on its own line."""
    return text.replace("_", "_\n").replace(" ", "\n")


def _table(rows: list[list[str]], headers: list[str]) -> str:
    colalign = ("left", *("right",) * (len(headers) - 1))
    return tabulate(rows, headers, colalign=colalign, disable_numparse=True)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if 0 < abs(value) < 0.1:
        return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
