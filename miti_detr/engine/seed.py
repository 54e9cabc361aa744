"""Randomness without state: every step draws from a generator seeded by (seed, iteration, rank).

A run that resumes must continue as if it had never stopped. Instead of storing the state of every
random number generator in the checkpoint, each step seeds them afresh, so its randomness is a
function of three numbers that are known anyway. The data stream follows the same idea
(:mod:`miti_detr.data`), and so a step can also be replayed alone.
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


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed torch, numpy and Python's ``random`` for one training step.

    Args:
        seed: seed of the run, at least 0.
        iteration: index of the step, from 0.
        rank: of this process among all.
    """
    words = np.random.SeedSequence((seed, iteration, rank)).generate_state(3, np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))
    random.seed(int(words[2]))
