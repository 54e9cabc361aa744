import errno
import logging

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from miti_detr.engine import NonFiniteError
from miti_detr.engine.launch.errors import log_errors_in_one_line, user_message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("SEED is\n  -2"), "SEED is -2"),
        (KeyError("no 'abc' in the registry"), "no 'abc' in the registry"),
        (FileNotFoundError(2, "No such file", "a.json"), "a.json: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ImportError("timm is missing"), "timm is missing"),
        (NonFiniteError("the loss is nan\nImages:"), "the loss is nan\nImages:"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Lower SOLVER.IMS_PER_BATCH"),
        (distributed.DistBackendError("reset"), "another process of the run has failed"),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed"), "another process"),
    ],
)
def test_errors_of_the_user(error: Exception, message: str) -> None:
    found = user_message(error)
    assert found is not None
    assert message in found


@pytest.mark.parametrize(
    "error", [KeyError("abc"), TypeError("abc"), RuntimeError("abc"), AssertionError(), KeyError(7)]
)
def test_errors_of_the_program_need_their_traceback(error: Exception) -> None:
    assert user_message(error) is None


class _Broken(Dataset[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error


def _error_of(error: Exception) -> Exception | None:
    """The error as the loader raises it. Its traceback would keep the worker for 5 seconds."""
    try:
        next(iter(DataLoader(_Broken(error), num_workers=1)))
    except Exception as raised:
        return raised.with_traceback(None)
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("image 3.png is cut off: use another\nor none"), "image 3.png is cut off: use"),
        (TypeError("abc"), None),
    ],
)
def test_errors_in_workers_of_a_data_loader(error: Exception, message: str | None) -> None:
    """Their text is a traceback; the message at its end is what counts."""
    caught = _error_of(error)
    assert type(caught) is type(error)
    found = user_message(caught)
    if message is None:
        assert found is None
    else:
        assert found == "image 3.png is cut off: use another or none"


def test_the_trainer_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log_errors_in_one_line()
    logger = logging.getLogger("detectron2.engine.train_loop")
    for error in (ValueError("a.png is broken"), TypeError("a fault")):
        try:
            raise error
        except Exception:
            logger.exception("Exception during training:")
    first, second = caplog.records
    assert first.getMessage() == "training stopped: a.png is broken"
    assert first.exc_info is None
    assert second.exc_info is not None


def test_disk_full_below_another_error() -> None:
    """``torch.save`` raises a RuntimeError while it handles that of the disk."""
    error = RuntimeError("[enforce fail at inline_container.cc:672]")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert "No space left on device" in str(user_message(error))
