"""The predictor: images of any kind in, detections with names out."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .backends import Backend, Item
from .background import in_background
from .detections import Found, Result
from .inputs import Source
from .tiles import Window, join, windows_of

DEFAULT_THRESHOLD = 0.5
_CHUNK = 8  # batches that are read at a time, among which images of one shape are found


class DetectionPredictor:
    """Detects objects in images; made by :func:`~miti_detr.load_predictor`.

    It holds no state and may be used by several threads at once.

    Attributes:
        class_names: of all classes of the model.
        threshold: lowest score of a detection.
        provider: what computes, in words.
        precision: in which the model computes.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        classes: Sequence[str | int] | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        batch_size: int = 4,
    ) -> None:
        """Take a model; the other arguments are those of :func:`~miti_detr.load_predictor`."""
        self._recorded = threshold is None and backend.threshold is not None
        known = backend.threshold if threshold is None else threshold
        self.threshold = DEFAULT_THRESHOLD if known is None else known
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {threshold}. It must be in 0..1.")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap is {overlap}. It must be at least 0 and less than 1.")
        for name, value in (("top_k", top_k), ("tile", tile), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}. It must be 1 or more.")
        if tile is not None and backend.with_masks:
            raise ValueError(
                f"tile is {tile}, but masks are not joined over tiles. Leave it out, or use a "
                "model without masks."
            )
        self.backend = backend
        self.class_names = list(backend.classes.names)
        self.provider, self.precision = backend.provider, backend.precision
        self.top_k, self.tile, self.overlap, self.batch_size = top_k, tile, overlap, batch_size
        self._kept_classes = None if classes is None else self._indices(classes)

    def __repr__(self) -> str:
        return (
            f"DetectionPredictor({self.provider}, {self.precision}, {len(self.class_names)} "
            f"classes, threshold {self.threshold:.4g}{' (recorded)' if self._recorded else ''})"
        )

    def __call__(self, images: Any, *, channels: str | None = None) -> Any:
        """Detect objects.

        Args:
            images: an image, or a list or tuple of images, of any kind and size: path, Pillow
                image, NumPy array (H, W, 3) or (H, W), or tensor (3, H, W). Values are in 0..255.
            channels: ``RGB`` or ``BGR``: order of the channels of arrays and tensors.

        Returns:
            The result of the image, or a list of results: detections in descending order of their
            scores. Models from checkpoints return Detectron2's ``Instances`` with the methods of
            :class:`~miti_detr.predict.detections.Result`; exported models return
            :class:`~miti_detr.predict.detections.Detections`.

        Raises:
            ImageError: a file cannot be read.
            TypeError: an image is of another kind.
            ValueError: an image has another shape or other values, or ``channels`` is missing.
        """
        if not isinstance(images, list | tuple):
            return self.detect([self.read(images, channels)])[0]
        remaining = iter(images)
        chunk = _CHUNK * self.batch_size
        results: list[Result] = []
        while part := [self.read(one, channels) for one in itertools.islice(remaining, chunk)]:
            results += self.detect(part)
        return results

    def stream(
        self,
        images: Any,
        *,
        channels: str | None = None,
        batch_size: int = 1,
        draw: bool = False,
    ) -> Iterator[Any]:
        """Detect objects in a film or a sequence of images without end, such as a camera's.

        Reading, detecting and drawing each run in a thread of their own, a few images ahead.

        Args:
            images: path of a film (needs the package av), or an iterable of images.
            channels: as for :meth:`__call__`.
            batch_size: number of images that are collected before they are detected together.
            draw: draw each result ahead, so that its ``draw()`` returns at once.

        Yields:
            The result of each image, in order.

        Raises:
            ValueError: as for :meth:`__call__`, when the iteration comes to the image.
        """
        if isinstance(images, str | os.PathLike):
            from .films import read_frames

            images, channels = read_frames(images), "RGB"
        read = (self.read(image, channels) for image in images)
        ready = in_background(read, 2 * batch_size)
        found = in_background(self._detect_all(ready, batch_size), 2 * batch_size)
        yield from in_background(_draw_each(found), 2 * batch_size) if draw else found

    def _detect_all(self, ready: Iterator["ReadImage"], batch_size: int) -> Iterator[Result]:
        while part := list(itertools.islice(ready, batch_size)):
            yield from self.detect(part)

    def read(self, image: Any, channels: str | None = None) -> "ReadImage":
        """Read an image, and prepare its windows for the network; as :meth:`__call__` does."""
        source = Source(image, channels, self.backend.orientation)
        array = source.read(self.backend.input_format)
        size = (array.shape[0], array.shape[1])
        windows = windows_of(size, self.tile, self.overlap)
        views = (array[top:bottom, left:right] for left, top, right, bottom in windows)
        items = [self.backend.prepare(np.ascontiguousarray(view)) for view in views]
        return ReadImage(source, size, windows, items)

    def detect(self, images: Sequence["ReadImage"]) -> list[Any]:
        """Detect in images that were read, in batches of one shape; one result for each."""
        items = [item for image in images for item in image.items]
        found: dict[int, Found] = {}
        for batch in batches(items, self.batch_size):
            outputs = self.backend.detect([items[index] for index in batch])
            found.update(zip(batch, map(self._filter, outputs), strict=True))
        results, start = [], 0
        for image in images:
            stop = start + len(image.items)
            joined = join(image.size, image.windows, [found[i] for i in range(start, stop)])
            results.append(self.backend.result(self._best(joined), image.size, image.source))
            start = stop
        return results

    def _filter(self, found: Found) -> Found:
        kept = found.scores >= self.threshold
        if self._kept_classes is not None:
            kept &= np.isin(found.classes, self._kept_classes)
        return found.take(kept)

    def _best(self, found: Found) -> Found:
        return found.take(np.argsort(-found.scores, kind="stable")[: self.top_k])

    def _indices(self, classes: Sequence[str | int]) -> list[int]:
        """Indices of classes that are given by name or index."""
        chosen = []
        for one in [classes] if isinstance(classes, str | int) else classes:
            if isinstance(one, str) and one in self.class_names:
                chosen.append(self.class_names.index(one))
            elif isinstance(one, int) and 0 <= one < len(self.class_names):
                chosen.append(one)
            else:
                names = ", ".join(self.class_names[:20])
                raise ValueError(f"the model has no class {one!r}. Its classes are {names}.")
        return chosen


class ReadImage:
    """An image on its way: where it came from, and its windows as the network takes them."""

    def __init__(
        self, source: Source, size: tuple[int, int], windows: list[Window], items: list[Item]
    ) -> None:
        self.source, self.size, self.windows, self.items = source, size, windows, items


def batches(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Divide items into batches of one shape.

    Without padding, the result of an image does not depend on the others of its batch: the
    features at the border of a padded image see the padding.

    Args:
        items: with ``image`` (3, h, w).
        batch_size: largest number of items in a batch.

    Returns:
        Indices of the items of each batch.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(tuple(item["image"].shape), []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def _draw_each(results: Iterable[Any]) -> Iterator[Any]:
    for result in results:
        yield result.keep_picture()
