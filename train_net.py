#!/usr/bin/env python
"""Train or evaluate a model, as with Detectron2's own ``train_net.py``.

Examples::

    python train_net.py --config-file configs/shapes/miti_detr.yaml
    python train_net.py --config-file CONFIG --num-gpus 8 SOLVER.BASE_LR 2e-4 OUTPUT_DIR out
    python train_net.py --config-file CONFIG --num-gpus 2 MODEL.DEVICE cpu   # two processes
    torchrun --nproc_per_node 8 train_net.py --config-file CONFIG
    python train_net.py --config-file CONFIG --resume
    python train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS out/model_final.pth
"""

import argparse
import sys

from detectron2.engine import default_argument_parser

from miti_detr.engine import add_run_arguments, run
from miti_detr.engine.program import main


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = default_argument_parser(__doc__)
    add_run_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
