"""The report of a model on a data set: accuracy, thresholds, calibration and kinds of errors."""

from .report import ReportOptions, report_model
from .truth import read_truth

__all__ = ["ReportOptions", "read_truth", "report_model"]
