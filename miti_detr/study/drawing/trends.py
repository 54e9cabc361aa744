"""Measures against a config key: the arms of a group that differ in one number form a line.

With six arms of two variants and three depths, AP and the rank after the last encoder layer are
drawn against ``MODEL.DETR.ENC_LAYERS``, one line per variant.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from miti_detr.study.comparison import RUN_KEYS, ArmResult, common_beginning
from miti_detr.study.results import RunResult
from miti_detr.study.series import last_layer, rank_keys
from miti_detr.study.statistics import mean_and_spread
from miti_detr.visualize.curves import COLOURS

MIN_POINTS = 3  # fewer arms on a line show no trend
Line = list[tuple[float, ArmResult]]  # value of the key, arm
Draw = Callable[[Axes, Any], bool]


def trend_panels(arms: Sequence[ArmResult]) -> Iterator[tuple[str, str, Draw]]:
    """Return name, caption and drawing function of the panels of each key that arms differ in."""
    measures: list[tuple[str, str, Callable[[RunResult], float]]] = [
        ("ap", "AP", lambda run: run.final("AP"))
    ]
    for (stack, measure), keys in rank_keys(arms).items():
        if measure == "effective_rank":
            name, label = f"rank_{stack.replace(', ', '_')}", f"effective rank, {stack}"
            measures.append((name, label, partial(_last, keys=keys)))
    for key, lines in find_lines(arms).items():
        short = key.rpartition(".")[2]
        for name, label, read in measures:
            caption = (
                f"{label[0].upper()}{label[1:]}, after training against {key}: mean over the seeds "
                "and \u00b1 1 standard deviation. Ranks are those after the last layer."
            )
            yield f"trend_{short.lower()}_{name}", caption, _drawing(lines, read, short, label)


def find_lines(arms: Sequence[ArmResult]) -> dict[str, list[Line]]:
    """Group arms into lines whose configs differ in one number.

    Args:
        arms: arms of a group; those without a config are left out.

    Returns:
        Config key -> lines of at least :data:`MIN_POINTS` arms, each sorted by the key's value.
    """
    configs = []
    for arm in arms:
        config = arm.runs[0].config
        configs.append((arm, {k: v for k, v in config.items() if not RUN_KEYS.fullmatch(k)}))
    keys = {key for _, config in configs for key, value in config.items() if _is_number(value)}
    found = {}
    for key in sorted(keys):
        lines: dict[str, Line] = {}
        for arm, config in configs:
            if key in config and _is_number(config[key]):
                others = {name: item for name, item in config.items() if name != key}
                line = lines.setdefault(json.dumps(others, sort_keys=True, default=str), [])
                line.append((float(config[key]), arm))
        kept = [
            sorted(line, key=lambda point: point[0])
            for line in lines.values()
            if len({value for value, _ in line}) >= MIN_POINTS
        ]
        if kept:
            found[key] = kept
    return found


def _drawing(
    lines: Sequence[Line], read: Callable[[RunResult], float], x_label: str, y_label: str
) -> Draw:
    def draw(axis: Axes, _styles: Any) -> bool:
        drawn = False
        for index, line in enumerate(lines):
            points = [
                (value, spread)
                for value, arm in line
                if (spread := mean_and_spread([read(run) for run in arm.runs])) is not None
            ]
            if not points:
                continue
            x = [value for value, _ in points]
            mean = [spread["mean"] for _, spread in points]
            colour = COLOURS[index % len(COLOURS)]
            axis.plot(x, mean, "o-", color=colour, ms=4.5, lw=1.6, label=_line_name(line))
            half = [spread["sd"] or 0.0 for _, spread in points]
            low = [value - sd for value, sd in zip(mean, half, strict=True)]
            high = [value + sd for value, sd in zip(mean, half, strict=True)]
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            axis.set_xticks(x)
            drawn = True
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        return drawn

    return draw


def _last(run: RunResult, keys: Sequence[str]) -> float:
    return run.final(last_layer(run, keys))


def _line_name(line: Line) -> str:
    """Return the first arm's name without the part that differs along the line."""
    names = [arm.name for _, arm in line]
    return common_beginning(names).rstrip(" _+.-") or " + ".join(names)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
