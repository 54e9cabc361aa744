"""From weights to answers: predictors for images, films and folders.

The modules that exported models need import neither torch nor Detectron2.
"""

from .detections import Detections, Found, Result
from .load import load_predictor
from .predictor import DetectionPredictor

__all__ = ["DetectionPredictor", "Detections", "Found", "Result", "load_predictor"]
