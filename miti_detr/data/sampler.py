"""The images of each training batch: a pure function of the seed and the iteration.

A *pass* is one shuffled run through the data set. A *global batch* is what all processes together
train on in one iteration. The *position* of a sample is ``iteration * global batch size + its place
in the global batch``.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

_PASS_STREAM, _SAMPLE_STREAM = 0, 1  # keep the draws of the order and of the augmentation apart


class SeededBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (position, index of the image), the same for any number of processes.

    Each pass shuffles the images of each group (landscape and portrait, or all) and cuts them into
    global batches. A batch is returned when its last image comes up, as in Detectron2's
    aspect-ratio grouping, and may extend over the end of a pass. Every process takes its own
    contiguous slice of each global batch.

    Starting at a late iteration is quick, because the sizes of the groups determine how many
    batches each pass completes.

    Attributes:
        start_iter: the iteration of the first batch; set it before the iteration begins.
    """

    def __init__(
        self,
        *,
        groups: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_iter: int = 0,
    ) -> None:
        """Make a sampler for one process.

        Args:
            groups: (M) the group of each image; a batch has images of one group. All zero: no
                grouping.
            batch_size: images in a global batch.
            seed: not negative.
            rank: of this process.
            world_size: number of processes.
            start_iter: see the attribute.

        Raises:
            ValueError: there are no images, the seed is negative, or the batch cannot be divided
                among the processes.
        """
        if len(groups) == 0:
            raise ValueError("There are no training images")
        if seed < 0:
            raise ValueError(
                f"SEED {seed} means a random seed. Draw it before the data loader is built"
            )
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {batch_size} must be a positive multiple of the number of "
                f"processes, {world_size}"
            )
        self._groups = np.asarray(groups)
        self._sizes = {
            int(g): int(n) for g, n in zip(*np.unique(groups, return_counts=True), strict=True)
        }
        self._batch_size = batch_size
        self._seed = seed
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        iteration = self.start_iter
        number = self._pass_of(iteration)
        skip = iteration - self._batches_before(number)
        while True:
            for batch in self._batches_of_pass(number)[skip:]:
                first = iteration * self._batch_size
                samples = [(first + i, index) for i, index in enumerate(batch.tolist())]
                yield samples[self._slice]
                iteration += 1
            number += 1
            skip = 0

    def _batches_before(self, number: int) -> int:
        """Global batches that are complete when pass ``number`` begins."""
        return sum(number * size // self._batch_size for size in self._sizes.values())

    def _pass_of(self, iteration: int) -> int:
        """The pass that completes the batch of an iteration."""
        low, high = 0, 1
        while self._batches_before(high) <= iteration:
            low, high = high, 2 * high
        while high - low > 1:  # batches_before(low) <= iteration < batches_before(high)
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self._batches_before(middle) <= iteration else (low, middle)
            )
        return low

    def _order(self, number: int) -> np.ndarray:
        """(M) indices in the order of a pass."""
        generator = torch.Generator().manual_seed(_mix(self._seed, _PASS_STREAM, number)[0])
        return torch.randperm(len(self._groups), generator=generator).numpy()

    def _batches_of_pass(self, number: int) -> list[np.ndarray]:
        """The global batches completed in a pass, in their order."""
        order = self._order(number)
        batches: list[tuple[int, np.ndarray]] = []
        for group, size in self._sizes.items():
            places = np.flatnonzero(self._groups[order] == group)
            left_over = self._left_over(group, number * size % self._batch_size, number)
            stream = np.concatenate([left_over, order[places]])
            for end in range(self._batch_size, len(stream) + 1, self._batch_size):
                batch = stream[end - self._batch_size : end]
                batches.append((int(places[end - len(left_over) - 1]), batch))
        return [batch for _, batch in sorted(batches, key=lambda item: item[0])]

    def _left_over(self, group: int, count: int, number: int) -> np.ndarray:
        """The last ``count`` images of a group before a pass (of many passes if it is small)."""
        passes = -(-count // self._sizes[group])
        orders = [self._order(k) for k in range(number - passes, number)]
        streams = [order[self._groups[order] == group] for order in orders]
        return (
            np.concatenate([np.empty(0, dtype=np.int64), *streams])[-count:]
            if count
            else np.empty(0, dtype=np.int64)
        )


def sample_seeds(seed: int, position: int) -> tuple[int, int, int]:
    """Seeds (numpy, random, torch; 32 bits) for the augmentation of the sample at a position."""
    return _mix(seed, _SAMPLE_STREAM, position)


def _mix(seed: int, stream: int, number: int) -> tuple[int, int, int]:
    first, second, third = np.random.SeedSequence((seed, stream, number)).generate_state(3).tolist()
    return first, second, third
