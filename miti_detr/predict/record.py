"""What an exported file says about its model, beside the graph."""

import dataclasses
import json
from typing import Any

RECORD_NAME = "miti_detr"  # key of the record in the metadata of a file
OUTPUTS = ("boxes", "scores", "labels")
MASKS = "masks"  # the fourth output of models with masks


@dataclasses.dataclass(frozen=True)
class ExportRecord:
    """All that is needed to use an exported model without its code.

    Attributes:
        version: of this package.
        variant: what decides the function of the weights, see ``MitiDetr.variant``.
        class_names: of the K contiguous classes.
        category_ids: of the classes in their data set.
        input_format: channel order of the images, ``RGB`` or ``BGR``.
        pixel_mean: per channel, in units of 0..255; the graph subtracts it.
        pixel_std: per channel; the graph divides by it.
        min_size: shorter side in pixels to which images are resized; 0: they are not resized.
        max_size: longest side in pixels after that.
        orientation: whether images are turned upright by their EXIF orientation (``apply``), or
            taken as they are (``ignore``).
        precision: ``float32``, ``float16`` or ``int8``.
        image_type: of the images that the graph takes, ``uint8`` or ``float32`` (in 0..255).
        threshold: lowest score of a detection, unless the user gives another.
        static_shape: (N, H, W) of the only batch that the graph takes; None: any.
        outputs: names of what the graph returns, in order.
        size_divisibility: the graph pads a batch so that its height and width are multiples of it.
        square_size: the graph pads a batch to this height and width; 0: it does not.
    """

    version: str
    variant: dict[str, Any]
    class_names: list[str]
    category_ids: list[int]
    input_format: str
    pixel_mean: list[float]
    pixel_std: list[float]
    min_size: int
    max_size: int
    orientation: str = "apply"
    precision: str = "float32"
    image_type: str = "uint8"
    threshold: float = 0.5
    static_shape: tuple[int, int, int] | None = None
    outputs: tuple[str, ...] = OUTPUTS
    size_divisibility: int = 1
    square_size: int = 0

    @property
    def stuff_classes(self) -> list[int]:
        """Classes of a panoptic model that are not objects; the graph gives them the score 0."""
        return list(self.variant.get("stuff_classes", ()))

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Size of a batch with the padding that the graph adds, which is what masks cover."""
        if self.square_size > 0:
            return self.square_size, self.square_size
        divisor = max(self.size_divisibility, 1)
        return height + -height % divisor, width + -width % divisor

    def to_json(self) -> str:
        """Write it as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None, file: str) -> "ExportRecord":
        """Read it.

        Args:
            text: of :meth:`to_json`; None or "" if the file has none.
            file: for the error.

        Raises:
            ValueError: the file was not written by ``miti-detr export``, or it is damaged.
        """
        try:
            values = json.loads(text or "")
            shape = values.pop("static_shape", None)
            outputs = tuple(values.pop("outputs", OUTPUTS))
            shape = None if shape is None else tuple(shape)
            return cls(**values, static_shape=shape, outputs=outputs)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} has no record of its classes and pixels. Write it with `miti-detr export` "
                "of this version."
            ) from error
