"""Every implementation of deformable attention that is timed computes the same."""

import pytest
import torch

from benchmarks import deformable

SMALL = {
    "encoder": ([(3, 4), (2, 2)], 2, 0, 2, 2, 4),
    "decoder": ([(3, 4), (2, 2)], 1, 5, 2, 2, 4),
}


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
def test_implementations_agree(sizes) -> None:
    value, levels, locations, weights = deformable.arguments(*sizes)
    assert locations.shape[1] == (sizes[2] or 16)
    results = [run(value, levels, locations, weights) for run in deformable.operators().values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_table_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable, "OPERATORS", SMALL)
    lines = deformable.measure_operators(rounds=1).splitlines()
    assert len(lines) == 2 + 2 * 2
    assert "grid_sample" in lines[0]
    assert all("(1.0x)" in line for line in lines[2:])
