"""The largest micro-batch whose training step fits into the memory of a GPU.

A micro-batch is one of the parts of ``SOLVER.ACCUMULATE``, which 0 leaves to this module.
"""

import bisect
import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from miti_detr.accelerate import uncompiled
from miti_detr.data.loader import training_records
from miti_detr.data.object_masks import objects_of
from miti_detr.engine.parallel import Batch, unwrapped
from miti_detr.modeling import SetCriterion
from miti_detr.scalars import collected_scalars

from .train_step import TrainStep

logger = logging.getLogger(__name__)

_GIB = 2**30
# Share of the memory that stays free: batches of changing shapes leave gaps, and libraries need
# memory that torch does not count
_MARGIN = 0.1
_STATES = {"ADAMW": 2, "SGD": 1}  # values that the optimizer keeps for each weight


def choose_parts(cfg: CfgNode, step: TrainStep) -> int:
    """Find the number of parts for ``SOLVER.ACCUMULATE 0``; all processes call this together.

    On a GPU, forward and backward passes on the worst batch of the data are tried. They leave
    weights, gradients and random numbers as they were. Parts that are compiled run without that.

    Args:
        cfg: of the run.
        step: its model and its optimizer.

    Returns:
        The smallest number with which the step fits on all GPUs; 1 on other devices.

    Raises:
        ValueError: not even one image fits.
    """
    if step.device.type != "cuda":
        logger.info("SOLVER.ACCUMULATE 0: memory is probed on GPUs only; the batch is one part")
        return 1
    share = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    worst = WorstCase.from_records(cfg, training_records(cfg))
    total = torch.cuda.get_device_properties(step.device).total_memory
    margin = int(_MARGIN * total)
    probe = MemoryProbe(step, worst.batch, margin + _other_bytes(cfg, step, worst, share))
    size = largest_that_fits(share, lambda size: all(comm.all_gather(probe.fits(size))))
    if size == 0:
        raise ValueError(
            f"SOLVER.ACCUMULATE is 0, but the step of one image ({worst}) does not fit into the "
            f"{total / _GIB:.1f} GiB of the GPU. Set SOLVER.AMP.ENABLED or "
            "MODEL.DETR.ACTIVATION_CHECKPOINT True, or lower INPUT.MAX_SIZE_TRAIN."
        )
    logger.info(
        "micro-batch %d, accumulated %d times; peak %.1f of %.1f GiB (%s)",
        *(size, share // size, (probe.peaks[size] - margin) / _GIB, total / _GIB, worst),
    )
    return share // size


def largest_that_fits(share: int, fits: Callable[[int], bool]) -> int:
    """Return the largest divisor of ``share`` that ``fits``; 0 if none does.

    Args:
        share: images of one process.
        fits: whether a number of images fits; if it does, fewer do as well. Called with few of the
            divisors, since a trial takes time.
    """
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    number = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[number - 1] if number else 0


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """What the largest training images need.

    Attributes:
        single: (height, width) of the image with the most pixels, after the resize.
        padded: (height, width) to which several images may be padded together.
        objects: of an image, the most that queries can detect.
        with_masks: the objects have masks.
    """

    single: tuple[int, int]
    padded: tuple[int, int]
    objects: int
    with_masks: bool

    @classmethod
    def from_records(cls, cfg: CfgNode, records: Sequence[dict[str, Any]]) -> "WorstCase":
        """Find the largest images and the largest number of objects.

        Args:
            cfg: reads the sizes of ``INPUT`` and the number of queries.
            records: dataset dicts of the training images. With a random crop, or without the sizes
                of the images, any aspect ratio is possible.
        """
        short, long = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
        files = {(r.get("height", 0), r.get("width", 0)) for r in records}
        if cfg.INPUT.CROP.ENABLED or any(0 in size for size in files):
            groups = [[(min(short, long), long), (long, min(short, long))]]
        else:
            sides = [files]
            if cfg.DATALOADER.ASPECT_RATIO_GROUPING:  # only images of one group share a batch
                wide = {(height, width) for height, width in files if width > height}
                sides = [group for group in (wide, files - wide) if group]
            resize = T.ResizeShortestEdge.get_output_shape
            groups = [[resize(*size, short, long) for size in group] for group in sides]
        padded = [tuple(map(max, zip(*group, strict=True))) for group in groups]
        most = max(sum(not x.get("iscrowd", 0) for x in objects_of(r)) for r in records)
        return cls(
            max((size for group in groups for size in group), key=_area),
            max(padded, key=_area),
            min(most, cfg.MODEL.DETR.NUM_OBJECT_QUERIES),
            cfg.MODEL.MASK_ON,
        )

    def batch(self, number: int) -> Batch:
        """Make images with objects; the last one of several is smaller, so that it is padded."""
        height, width = self.single if number == 1 else self.padded
        images = [self._image(height, width) for _ in range(number - 1)]
        return [*images, self._image(height if number == 1 else max(1, height // 2), width)]

    def _image(self, height: int, width: int) -> dict[str, Any]:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, width, height]] * self.objects))
        instances.gt_classes = torch.zeros(self.objects, dtype=torch.int64)
        if self.with_masks:
            mask = torch.ones(1, height, width, dtype=torch.bool)
            instances.gt_masks = BitMasks(mask.expand(self.objects, -1, -1))
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        return {"image": image, "instances": instances, "height": height, "width": width}

    def __str__(self) -> str:
        """What the log says."""
        height, width = self.padded
        return f"images up to {height} x {width}, {self.objects} objects"


class MemoryProbe:
    """Tries whether the forward and backward pass of a part of a batch fit.

    Attributes:
        peaks: bytes of all tensors on the GPU at most, for each number of images that was tried.
    """

    def __init__(
        self, step: TrainStep, make_batch: Callable[[int], Batch], reserved: int = 0
    ) -> None:
        """Take what is tried.

        Args:
            step: with the model, which may be wrapped.
            make_batch: gives a batch of so many images.
            reserved: bytes that must be free besides.
        """
        self.peaks: dict[int, int] = {}
        self._step = step
        self._model = unwrapped(step.model)
        self._make_batch = make_batch
        self._reserved = reserved

    def fits(self, size: int) -> bool:
        """Try a number of images in this process; releases all memory."""
        on_gpu = self._step.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._step.device)
        found = True
        try:
            with self._unchanged():
                self._run(self._make_batch(size))
        except torch.cuda.OutOfMemoryError:  # ends here, with the tensors of its traceback
            found = False
        if on_gpu:
            self.peaks[size] = torch.cuda.max_memory_allocated(self._step.device)
        gc.collect()
        torch.cuda.empty_cache()
        return found

    def _run(self, batch: Batch) -> None:
        device, dtype = self._step.device, self._step.amp_dtype
        reserved = torch.empty(self._reserved, dtype=torch.uint8, device=device)
        for parameter in self._model.parameters():
            if parameter.requires_grad:  # the gradients of the parts before are there
                parameter.grad = torch.zeros_like(parameter)
        with collected_scalars(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses: dict[str, Tensor] = self._model(batch)
        torch.stack(list(losses.values())).sum().backward()
        del reserved

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Restore gradients, modes and random states at the end.

        Batch norms keep their statistics. Nothing waits for other processes, which may have run out
        of memory.
        """
        device = self._step.device
        gradients = [(parameter, parameter.grad) for parameter in self._model.parameters()]
        modes = [(module, module.training) for module in self._model.modules()]
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            uncompiled(),
        ):
            for module, _ in modes:
                if isinstance(module, _BatchNorm | SetCriterion):
                    module.eval()
            try:
                yield
            finally:
                for module, mode in modes:
                    module.training = mode
                for parameter, gradient in gradients:
                    parameter.grad = gradient


def _other_bytes(cfg: CfgNode, step: TrainStep, worst: WorstCase, share: int) -> int:
    """Bytes of what a step needs besides: the state of the optimizer, this and the next batch."""
    weights = [p for group in step.optimizer.param_groups for p in group["params"]]
    state = sum(p.numel() * p.element_size() for p in weights) * _STATES[cfg.SOLVER.OPTIMIZER]
    return state + 2 * share * 3 * _area(worst.padded)


def _area(size: tuple[int, ...]) -> int:
    return size[0] * size[1]
