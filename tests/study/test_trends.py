"""Lines of arms that differ in one number, against that number."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from miti_detr.study.comparison import ArmResult
from miti_detr.study.drawing.trends import find_lines, trend_panels
from miti_detr.study.results import read_result

from .made_runs import write_run

KEY = "MODEL.DETR.ENC_LAYERS"
APS = {("none", 2): (20, 22), ("none", 6): (15, 19), ("none", 12): (0, 2)}
APS |= {("before_norm", depth): (30 + depth, 32 + depth) for depth in (2, 6, 12)}


def make_arms(folder: Path) -> list[ArmResult]:
    """Two variants at three depths with two seeds, the deepest first."""
    arms = []
    for (residual, depth), aps in sorted(APS.items(), key=lambda entry: -entry[0][1]):
        name = f"{residual}_{depth}"
        runs = [
            write_run(
                folder / name / f"seed_{seed}",
                [1, ap],
                seed=seed,
                residual=residual,
                rank=4.0 * depth,
                depth=depth,
            )
            for seed, ap in enumerate(aps)
        ]
        arms.append(ArmResult(name, [read_result(run) for run in runs]))
    return arms


def test_each_variant_is_a_line_over_the_depth(tmp_path: Path) -> None:
    lines = find_lines(make_arms(tmp_path))
    assert list(lines) == [KEY]
    assert [[(value, arm.name) for value, arm in line] for line in lines[KEY]] == [
        [(2.0, "none_2"), (6.0, "none_6"), (12.0, "none_12")],
        [(2.0, "before_norm_2"), (6.0, "before_norm_6"), (12.0, "before_norm_12")],
    ]


def test_the_panels_have_mean_and_spread(tmp_path: Path) -> None:
    panels = {name: draw for name, _, draw in trend_panels(make_arms(tmp_path))}
    assert list(panels) == ["trend_enc_layers_ap", "trend_enc_layers_rank_encoder"]
    figure, (ap, rank) = plt.subplots(1, 2)
    assert panels["trend_enc_layers_ap"](ap, {})
    assert panels["trend_enc_layers_rank_encoder"](rank, {})
    np.testing.assert_allclose(ap.lines[0].get_xydata(), [[2, 21], [6, 17], [12, 1]])
    band = ap.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [1 - 2**0.5, 21 + 2**0.5])
    assert [text.get_label() for text in ap.lines] == ["none", "before_norm"]
    np.testing.assert_allclose(rank.lines[1].get_ydata(), [4, 12, 24])  # after the last layer
    plt.close(figure)


def test_two_arms_or_runs_without_config_make_no_line(tmp_path: Path) -> None:
    arms = make_arms(tmp_path)
    two = [arm for arm in arms if not arm.name.endswith("12")]
    assert find_lines(two) == {}
    for arm in arms:
        for run in arm.runs:
            run.config.clear()
    assert find_lines(arms) == {}
