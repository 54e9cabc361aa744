"""Reading films, and writing them with detections drawn; needs the package av."""

import collections
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from miti_detr.pictures import ImageError

from .detections import Found, packed
from .predictor import DetectionPredictor

_CODECS = ("libx264", "mpeg4")  # the first that the installed library has


def read_frames(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Read the frames of a film, upright, as (H, W, 3) uint8 RGB.

    Raises:
        ImageError: the file cannot be read.
        ImportError: the package av is not installed.
    """
    return (array for array, _ in _frames(path))


def predict_film(
    predictor: DetectionPredictor,
    path: Path,
    target: Path | None,
    *,
    batch_size: int = 1,
    advance: Callable[[int], object] = lambda frames: None,
) -> tuple[tuple[int, int], list[Found]]:
    """Detect in all frames of a film.

    Args:
        predictor: the model.
        path: the film.
        target: film to write, with the detections drawn and the sound of the original; None: none.
        batch_size: number of frames in a forward pass.
        advance: called after each frame.

    Returns:
        Height and width in pixels, and the detections of each frame.

    Raises:
        ImageError: the film cannot be read, or has no frames.
    """
    infos: collections.deque[Any] = collections.deque()  # filled by the thread that reads

    def arrays() -> Iterator[np.ndarray]:
        for array, frame in _frames(path):
            infos.append((frame.pts, frame.time_base))
            yield array

    found, size = [], (0, 0)
    stream = predictor.stream(
        arrays(), channels="RGB", batch_size=batch_size, draw=target is not None
    )
    writer: _Writer | None = None
    try:
        for result in stream:
            size = result.image_size
            if target is not None:
                writer = writer or _Writer(path, target, size)
                writer.add(np.asarray(result.draw()), *infos.popleft())
            found.append(packed(result.found()))
            advance(1)
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.close()
    if not found:
        raise ImageError(f"The film {path} has no frames")
    return size, found


def _frames(path: str | os.PathLike[str]) -> Iterator[tuple[np.ndarray, Any]]:
    av = _import_av(path)
    with _errors(av, path), av.open(os.fspath(path)) as film:
        if not film.streams.video:
            raise ImageError(f"The film {path} has no pictures")
        film.streams.video[0].thread_type = "AUTO"
        for frame in film.decode(video=0):
            array = frame.to_ndarray(format="rgb24")
            yield np.ascontiguousarray(np.rot90(array, frame.rotation // 90)), frame


class _Writer:
    """Encodes pictures at the times of the original's frames, and copies its sound."""

    def __init__(self, source: Path, target: Path, size: tuple[int, int]) -> None:
        av = _import_av(source)
        self._av, self._source = av, source
        self._original = av.open(str(source))
        video = self._original.streams.video[0]
        codec = next(name for name in _CODECS if name in av.codecs_available)
        self._film = av.open(str(target), "w", format="mp4")
        self._video = self._film.add_stream(codec, rate=video.average_rate or 25)
        # Encoders need even sides.
        self._video.height, self._video.width = (side - side % 2 for side in size)
        self._video.pix_fmt = "yuv420p"
        self._sound: Iterator[Any] = iter(())
        if self._original.streams.audio:
            original = self._original.streams.audio[0]
            self._track = self._film.add_stream_from_template(original)
            self._sound = (p for p in self._original.demux(original) if p.dts is not None)
        self._packet = next(self._sound, None)

    def add(self, picture: np.ndarray, pts: int | None, time_base: Any) -> None:
        """Encode a picture (H, W, 3) RGB."""
        height, width = self._video.height, self._video.width
        inside = np.ascontiguousarray(picture[:height, :width])
        frame = self._av.VideoFrame.from_ndarray(inside, format="rgb24")
        frame.pts, frame.time_base = pts, time_base
        if pts is not None:
            self._copy_sound(float(pts * time_base))
        self._film.mux(self._video.encode(frame))

    def finish(self) -> None:
        """Write what is still buffered, and the rest of the sound."""
        self._film.mux(self._video.encode(None))
        self._copy_sound(float("inf"))

    def close(self) -> None:
        """Close both files."""
        self._film.close()
        self._original.close()

    def _copy_sound(self, until: float) -> None:
        """Copy the sound up to a time in seconds, so that both tracks stay side by side."""
        while self._packet is not None and float(self._packet.dts * self._packet.time_base) < until:
            self._packet.stream = self._track
            self._film.mux(self._packet)
            self._packet = next(self._sound, None)


def _import_av(path: str | os.PathLike[str]) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"the film {path} needs `pip install 'miti_detr[video]'`") from error
    return av


@contextmanager
def _errors(av: Any, path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise ImageError(f"The film {path} cannot be read: {reason}") from error
