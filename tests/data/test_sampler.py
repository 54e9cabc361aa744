import itertools
import time
from collections import Counter

import numpy as np
import pytest

from miti_detr.data.sampler import SeededBatchSampler, sample_seeds

Batch = list[tuple[int, int]]


def _take(count: int, **arguments: object) -> list[Batch]:
    defaults: dict = {"groups": [0] * 10, "batch_size": 4, "seed": 3}
    return list(itertools.islice(SeededBatchSampler(**{**defaults, **arguments}), count))


def _indices(batches: list[Batch]) -> list[int]:
    return [index for batch in batches for _, index in batch]


# one group; two; two of which one fills a batch over many passes; batches larger than the data
CASES = [
    {"groups": [0] * 10, "batch_size": 4},
    {"groups": [0, 1] * 8 + [1], "batch_size": 4},
    {"groups": [0] * 11 + [1], "batch_size": 6},
    {"groups": [1, 0, 0], "batch_size": 8},
]


@pytest.mark.parametrize("case", CASES)
def test_resume_continues_the_stream(case: dict) -> None:
    batches = _take(60, **case)
    for start in (0, 1, 2, 7, 30, 59):
        assert _take(60 - start, **case, start_iter=start) == batches[start:]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_share_each_batch(case: dict) -> None:
    whole = _take(40, **case)
    parts = [_take(40, **case, rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert all(len(batch) == case["batch_size"] // 2 for batch in parts[0])


@pytest.mark.parametrize("case", CASES)
def test_positions_number_the_samples(case: dict) -> None:
    positions = [position for batch in _take(20, **case, start_iter=5) for position, _ in batch]
    first = 5 * case["batch_size"]
    assert positions == list(range(first, first + 20 * case["batch_size"]))


def test_every_pass_has_every_image_once() -> None:
    """10 images in batches of 4: 5 batches are two passes, each in another order."""
    indices = _indices(_take(50))
    passes = [indices[i : i + 10] for i in range(0, 200, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)


def test_groups_do_not_mix_and_lose_no_image() -> None:
    """17 images of two groups: after 17 * 4 batches of 4 at most one batch of each is missing."""
    groups = np.array([0, 1] * 8 + [1])
    batches = _take(17 * 4, groups=groups)
    for batch in batches:
        assert len({int(groups[index]) for _, index in batch}) == 1
    counts = Counter(_indices(batches))
    assert set(counts) == set(range(17))
    assert max(counts.values()) - min(counts.values()) <= 2


def test_equals_the_grouping_of_detectron2() -> None:
    """The same stream of images through buckets that are emptied when they are full."""
    groups = [0, 1, 1] * 7
    orders = _indices(_take(21 * 3, groups=[0] * 21, batch_size=1))
    buckets: dict[int, list[int]] = {0: [], 1: []}
    expected = []
    for index in orders:
        bucket = buckets[groups[index]]
        bucket.append(index)
        if len(bucket) == 5:
            expected.append(list(bucket))
            bucket.clear()
    batches = _take(len(expected), groups=groups, batch_size=5)
    assert [[index for _, index in batch] for batch in batches] == expected


def test_seed_decides_the_order() -> None:
    assert _take(10) == _take(10)
    assert _take(10) != _take(10, seed=4)


def test_late_start_is_quick() -> None:
    """COCO's size, 300 epochs of batch 64 done: three shuffles, not 35 million steps."""
    groups = np.arange(118_287) % 4 == 0
    begin = time.perf_counter()
    (batch,) = _take(1, groups=groups.astype(int), batch_size=64, start_iter=554_400)
    assert batch[0][0] == 554_400 * 64
    assert time.perf_counter() - begin < 5


def test_seeds_of_samples_differ() -> None:
    seeds = [sample_seeds(seed, position) for seed in (0, 1) for position in range(500)]
    assert len(set(seeds)) == 1000
    assert all(0 <= value < 2**32 for triple in seeds for value in triple)
    assert sample_seeds(1, 2**40) == sample_seeds(1, 2**40)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 5, "world_size": 2}, "SOLVER.IMS_PER_BATCH 5 .* number of processes, 2"),
        ({"batch_size": 0}, "SOLVER.IMS_PER_BATCH 0"),
        ({"seed": -1}, "SEED -1 means a random seed"),
        ({"groups": []}, "no training images"),
    ],
)
def test_bad_values(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _take(1, **arguments)
