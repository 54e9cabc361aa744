"""Training and evaluation runs."""

from .cpu import prepare_cpu
from .hooks import NonFiniteError, RankHook, ReplayReport, ResidualRamp, replay
from .launch import add_run_arguments, run
from .optimizer import build_optimizer
from .setup import log_version, resolve_device, setup_config, setup_run_logger, version
from .trainer import Trainer

__all__ = [
    "NonFiniteError",
    "RankHook",
    "ReplayReport",
    "ResidualRamp",
    "Trainer",
    "add_run_arguments",
    "build_optimizer",
    "log_version",
    "prepare_cpu",
    "replay",
    "resolve_device",
    "run",
    "setup_config",
    "setup_run_logger",
    "version",
]
