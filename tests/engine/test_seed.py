import random

import numpy as np
import torch

from miti_detr.engine.seed import seed_step


def _draws(seed: int, iteration: int, rank: int) -> tuple[float, float, float]:
    seed_step(seed, iteration, rank)
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_draws_are_a_function_of_seed_iteration_and_rank() -> None:
    places = [(s, i, r) for s in (0, 1) for i in (0, 1, 2**20) for r in (0, 1)]
    first = {place: _draws(*place) for place in places}
    assert {place: _draws(*place) for place in reversed(places)} == first
    for k in range(3):
        assert len({draws[k] for draws in first.values()}) == len(places)
