from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage

from miti_detr.engine.resume import check_resumable, restore_history, results_beside, save_history


def test_checkpoints_without_a_tag_are_refused(tmp_path: Path) -> None:
    check_resumable(str(tmp_path))
    (tmp_path / "model_best.pth").touch()
    check_resumable(str(tmp_path))
    (tmp_path / "model_0000009.pth").touch()
    with pytest.raises(ValueError, match=r"last_checkpoint does not exist.*model_0000009\.pth"):
        check_resumable(str(tmp_path))
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth\n")
    check_resumable(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"/etc/passwd", b"../a.pth", b"a\nb"])
def test_damaged_tag(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match=r"last_checkpoint is damaged.*Write the name"):
        check_resumable(str(tmp_path))


def test_history_is_what_writers_would_write() -> None:
    """Medians of the last 20 iterations, and scalars that are not smoothed, at their iteration."""
    storages = EventStorage(), EventStorage(30)
    with storages[0] as storage:
        for storage.iter in range(30):
            storage.put_scalar("loss", 1 / (1 + storage.iter))
            if storage.iter % 7 == 0:
                storage.put_scalar("rank", storage.iter, smoothing_hint=False)
    history = save_history(storages[0])
    assert len(history["loss"][1]) == 20
    restore_history(storages[1], history)
    first, second = (s.latest_with_smoothing_hint(20) for s in storages)
    assert first == second
    assert second["rank"] == (28, 28)


def test_results_are_what_a_checkpoint_does_not_have() -> None:
    history = {"loss": (True, [(0.5, 8), (0.4, 9)]), "bbox/AP": (False, [(20.0, 4)])}
    record = {"iteration": 9, "loss": 0.45, "bbox/AP": 30.0}
    assert results_beside(history, record, 9) == {"bbox/AP": 30.0}
