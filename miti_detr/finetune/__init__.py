"""From a folder of labelled images to a trained model: what ``miti-detr train`` does."""

from .preset import changed_keys, preset_config
from .results import draw_results, is_evaluated

__all__ = ["changed_keys", "draw_results", "is_evaluated", "preset_config"]
