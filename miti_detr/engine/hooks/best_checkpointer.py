"""The best weights of a run."""

from pathlib import Path

import torch
from detectron2.engine import hooks
from fvcore.common.checkpoint import Checkpointer


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, which also remembers the best score when a run is resumed.

    No run resumes from the best weights, so ``checkpointer`` must neither save the trainer nor mark
    its files as the last checkpoint.
    """

    def __init__(self, eval_period: int, checkpointer: Checkpointer, val_metric: str) -> None:
        """Take the arguments of Detectron2's hook; a higher metric is better."""
        super().__init__(eval_period, checkpointer, val_metric)

    def before_train(self) -> None:
        """Read the score of the best weights of the run that is resumed.

        Raises:
            ValueError: the file is damaged.
        """
        path = Path(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter == 0 or not path.is_file():
            return
        try:
            # mmap: only two numbers are read, not the tensors
            best = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if best.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = float(best["score"]), int(best["iteration"])
        except Exception as error:  # torch.load raises errors of many kinds for damaged files
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}). Delete it: the best weights are then "
                "those of the evaluations that follow."
            ) from error

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            return
        score, iteration = latest
        best = self.best_metric
        if (best is None or self._compare(score, best)) and self._update_best(score, iteration):
            extra = {"metric": self._val_metric, "score": score, "iteration": iteration}
            self._checkpointer.save(self._file_prefix, **extra)
            self._logger.info(f"{self._file_prefix}.pth: {self._val_metric} {score:.3f}")
