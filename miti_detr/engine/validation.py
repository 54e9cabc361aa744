"""The validation loss, from the forward pass that an evaluation makes in any case."""

import logging
from collections import Counter
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor, nn

from miti_detr.modeling import MitiDetr
from miti_detr.modeling.criterion import Normalizers
from miti_detr.scalars import collected_scalars, stack_scalars

from .parallel import count_objects, unwrapped

logger = logging.getLogger(__name__)

TASK = "validation"  # of the results


class ModelWithLosses(nn.Module):
    """A model in evaluation mode that also adds up the losses of its inputs.

    The sums are those of all images together: each loss is normalised by the objects and the class
    weights of the whole data set, however it is divided into batches and processes.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a ``MitiDetr``, which may be wrapped for several processes.

        Raises:
            ValueError: it is another model.
        """
        super().__init__()
        inner = unwrapped(model)
        if not isinstance(inner, MitiDetr):
            raise ValueError(
                f"TEST.LOSS is True, which needs a MitiDetr; this is a {type(inner).__name__}. Set "
                "TEST.LOSS False."
            )
        self.model = inner
        self.train(inner.training)
        self.reset()

    def reset(self) -> None:
        """Begin a data set."""
        self._losses, self._normalizers = Counter[str](), Counter[str]()

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detect as the model does, and add the losses of a batch; inputs have ``instances``."""
        model = self.model
        images = model.preprocess_image(batched_inputs)
        every = model.criterion.deep_supervision
        prediction = model.predict_set(images, batched_inputs, all_layers=every)
        with collected_scalars():  # the diagnostics of the criterion are those of training
            losses: dict[str, Tensor] = model.losses(prediction, batched_inputs)
        counts = torch.tensor(count_objects(batched_inputs))
        counts = counts.to(prediction.logits.device, non_blocking=True)
        divisors = model.criterion.normalizers(counts, prediction.logits.shape[2])
        sums = [loss * divisors.of(name) for name, loss in losses.items()]
        values = stack_scalars([*sums, *divisors]).tolist()
        self._losses.update(dict(zip(losses, values, strict=False)))
        self._normalizers.update(dict(zip(divisors._fields, values[len(sums) :], strict=True)))
        return model.inference(prediction, batched_inputs, images.image_sizes)

    def means(self) -> dict[str, float]:
        """The losses over all processes; all processes must call this together.

        Returns:
            ``total_loss`` and each loss by its name; empty if the images have no objects.
        """
        losses, normalizers = Counter[str](), Counter[str]()
        for part in comm.all_gather((self._losses, self._normalizers)):
            losses.update(part[0])
            normalizers.update(part[1])
        if not normalizers["num_boxes"]:
            logger.warning("TEST.LOSS is True, but the images of this data set have no objects")
            return {}
        divisors = Normalizers(*(torch.tensor(normalizers[x]) for x in Normalizers._fields))
        means = {name: value / float(divisors.of(name)) for name, value in losses.items()}
        return {"total_loss": sum(means.values()), **means}


class LossEvaluator(DatasetEvaluator):
    """Reports what a :class:`ModelWithLosses` has added up while its detections were evaluated."""

    def __init__(self, model: ModelWithLosses) -> None:
        """Take the model that is evaluated."""
        self._model = model

    def reset(self) -> None:
        """Begin a data set."""
        self._model.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Do nothing: the model has added up the losses of the batch."""

    def evaluate(self) -> dict[str, Any]:
        """Return ``{"validation": losses}`` in the main process, ``{}`` in the others."""
        means = self._model.means()
        return {TASK: means} if means and comm.is_main_process() else {}


def with_losses(model: nn.Module) -> tuple[nn.Module, DatasetEvaluator]:
    """Let a model add up the losses of what it detects in.

    Args:
        model: see :class:`ModelWithLosses`.

    Returns:
        What is called instead of the model, and the evaluator that reports the losses.
    """
    made = ModelWithLosses(model)
    return made, LossEvaluator(made)
