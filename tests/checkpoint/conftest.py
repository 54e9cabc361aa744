import logging

import pytest


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch):
    """Detectron2's ``setup_logger``, called anywhere before, cuts its loggers off from the root."""
    for name in ("miti_detr", "detectron2", "fvcore"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
