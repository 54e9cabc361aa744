import dataclasses

import pytest

from benchmarks import VARIABLES, scaling
from benchmarks.scaling import Point, bench_scaling
from tests.benchmarks.helpers import small_spec


@pytest.fixture(autouse=True)
def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "TOKEN_GRIDS", ((2, 3), (4, 5)))
    for name, values in (("QUERIES", (3, 8)), ("BATCHES", (1, 3)), ("OBJECTS", (0, 9))):
        monkeypatch.setattr(scaling, name, values)


def test_one_variable_changes_and_the_others_stay() -> None:
    spec = small_spec(batch=2)
    base = Point(batch=2, grid=(2, 3), queries=7)
    expected = {
        "tokens": [(6, {"batch": 1}), (20, {"batch": 1, "grid": (4, 5)})],
        "queries": [(3, {"queries": 3}), (8, {"queries": 8})],
        "batch": [(1, {"batch": 1}), (3, {"batch": 3})],
        "objects": [(0, {"objects": 0}), (9, {"objects": 9})],
    }
    assert set(expected) == set(VARIABLES)
    for variable, values in expected.items():
        points = [(value, dataclasses.replace(base, **change)) for value, change in values]
        assert scaling._points(spec, variable) == points
    dilated = small_spec("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES5_DILATION", 2)
    assert scaling._points(dilated, "batch")[0][1].grid == (4, 6)
    with pytest.raises(ValueError, match=r"unknown variable 'depth'\. Use one of tokens, queries"):
        bench_scaling(spec, "depth")


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["tokens", "objects"])
def test_both_peers_are_measured(variable: str, inline: None) -> None:
    points = bench_scaling(small_spec(repeats=2), variable, plain=True)
    assert [point["value"] for point in points] == ([6, 20] if variable == "tokens" else [0, 9])
    for point in points:
        for peer in ("ours", "plain"):
            assert point[peer]["seconds"] > 0
            assert point[peer]["memory"]["added"] >= 0
        ratio = point["times_as_fast"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


@pytest.mark.slow
def test_alone_there_is_no_ratio(inline: None) -> None:
    points = bench_scaling(small_spec(), "queries")
    assert [set(point) for point in points] == [{"value", "point", "ours"}] * 2
