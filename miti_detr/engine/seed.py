"""Randomness without state: each step seeds the generators with (seed, iteration, rank, part).

A resumed run must continue as if it had never stopped. Checkpoints do not store the state of the
random number generators; each step seeds them, so that its random numbers are a function of four
known numbers. The data stream works in the same way (:mod:`miti_detr.data`). A single step can
therefore be replayed.
"""

import logging
import random

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

logger = logging.getLogger(__name__)


def resolve_seed(cfg: CfgNode) -> None:
    """Replace a negative ``SEED`` by a drawn one, the same in all processes.

    All processes must call this together.

    Args:
        cfg: changed in place; must not be frozen.
    """
    if cfg.SEED < 0:
        cfg.SEED = int(comm.shared_random_seed())
        logger.info("SEED is not set; drew SEED %d", cfg.SEED)


def seed_step(seed: int, iteration: int, rank: int, part: int = 0) -> None:
    """Seed torch, numpy and Python's ``random`` for one training step.

    Args:
        seed: seed of the run, at least 0.
        iteration: index of the step, from 0.
        rank: of this process among all.
        part: index of the part of the batch (``SOLVER.ACCUMULATE``).
    """
    # A part 0 at the end changes nothing: SeedSequence fills up with zeros
    words = np.random.SeedSequence((seed, iteration, rank, part)).generate_state(3, np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))
    random.seed(int(words[2]))
