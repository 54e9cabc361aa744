"""What a reader returns for each image."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class LabelledImage:
    """An image and its objects.

    Attributes:
        path: of the image.
        size: width and height in pixels.
        objects: COCO annotations without ids; ``category`` is the name of the class.
    """

    path: Path
    size: tuple[int, int]
    objects: list[dict[str, Any]] = field(default_factory=list)


def annotation(
    category: str, corners: tuple[float, float, float, float], **more: Any
) -> dict[str, Any]:
    """A COCO annotation of a box, ``xyxy`` in pixels, without ids."""
    x0, y0, x1, y1 = corners
    box = [x0, y0, x1 - x0, y1 - y0]
    return {"category": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, **more}
