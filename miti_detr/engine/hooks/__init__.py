"""Training hooks beside Detectron2's own, one file per hook."""

from .best_checkpointer import BestCheckpointer
from .early_stop import EarlyStop
from .matching import MATCHES_FILE, MatchingRecorder
from .nonfinite import NonFiniteError, NonFiniteGuard, ReplayReport, replay
from .plan import Plan
from .progress_bar import ProgressBar
from .rank_collapse import RankHook
from .residual_ramp import ResidualRamp
from .step_log import STEP_KEYS, STEPS_FILE, StepLog
from .writers import WRITE_PERIOD, RunWriters, drop_records, read_records

__all__ = [
    "MATCHES_FILE",
    "STEPS_FILE",
    "STEP_KEYS",
    "WRITE_PERIOD",
    "BestCheckpointer",
    "EarlyStop",
    "MatchingRecorder",
    "NonFiniteError",
    "NonFiniteGuard",
    "Plan",
    "ProgressBar",
    "RankHook",
    "ReplayReport",
    "ResidualRamp",
    "RunWriters",
    "StepLog",
    "drop_records",
    "read_records",
    "replay",
]
