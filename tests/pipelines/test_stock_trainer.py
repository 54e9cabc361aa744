import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import BestCheckpointer, DefaultTrainer, hooks, launch
from detectron2.evaluation import COCOEvaluator, verify_results
from torch import nn

from miti_detr.checkpoint import CheckpointError


class StockTrainer(DefaultTrainer):
    """As every Detectron2 project has it."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def test_default_trainer_trains_checkpoints_and_evaluates(cfg: CfgNode) -> None:
    """With the stock mapper; the event storage has our losses and diagnostics; all is finite."""
    cfg.TEST.EVAL_PERIOD = 2
    trainer = StockTrainer(cfg)
    assert isinstance(trainer.data_loader.dataset.dataset.dataset._map_func._obj, DatasetMapper)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert 0 <= trainer._last_eval_results["bbox"]["AP"] <= 100
    after = trainer.model.parameters()
    assert any((a - b).abs().max() > 0 for a, b in zip(after, before, strict=True))
    latest = trainer.storage.latest()
    parts = [v for name, (v, _) in latest.items() if name.startswith("loss_")]
    assert len(parts) == 3 * cfg.MODEL.DETR.DEC_LAYERS
    assert latest["total_loss"][0] == pytest.approx(sum(parts), rel=1e-5)
    assert "diag/class_error" in latest


@pytest.mark.slow
def test_default_trainer_resumes(cfg: CfgNode) -> None:
    StockTrainer(cfg).train()
    cfg.SOLVER.MAX_ITER = 3
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    tag = Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text()
    content = torch.load(Path(cfg.OUTPUT_DIR, tag), weights_only=False)
    assert content["iteration"] == 2
    assert content["model"]._metadata[""]["miti_detr"]["layer_residual"] == "before_norm"


def test_what_a_stock_solver_does_not_know(cfg: CfgNode) -> None:
    """``full_model`` clipping is refused; ADAMW, which is our key, is not read: it is SGD."""
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    with pytest.raises(ValueError, match="'full_model' is not a valid GradientClipType"):
        StockTrainer(cfg)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    assert cfg.SOLVER.OPTIMIZER == "ADAMW"
    assert isinstance(StockTrainer(cfg).optimizer, torch.optim.SGD)


def test_stock_training_with_our_optimizer(cfg: CfgNode) -> None:
    """One classmethod brings AdamW, two learning rates and the clipping of the whole model."""
    from miti_detr.engine import build_optimizer

    class OurOptimizer(StockTrainer):
        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
            return build_optimizer(cfg, model)

    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    trainer = OurOptimizer(cfg)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    trainer.train()
    assert trainer.storage.latest()["grad_norm"][0] > 0


def test_weights_of_another_variant(cfg: CfgNode, weights: str) -> None:
    """Training starts from them; evaluating the wrong function is refused."""
    cfg.MODEL.WEIGHTS, cfg.MODEL.DETR.LAYER_RESIDUAL = weights, "none"
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=False)
    with pytest.raises(CheckpointError, match="these are Miti-DETR"):
        StockTrainer.test(cfg, trainer.model)
    trainer.model.train()
    trainer.train()
    assert trainer.iter == cfg.SOLVER.MAX_ITER


@pytest.mark.slow
def test_periodic_and_best_checkpointer(cfg: CfgNode) -> None:
    """Detectron2's own hooks: a file each two steps, the last one kept; the best by AP."""
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 4, 2
    trainer = StockTrainer(cfg)
    trainer.register_hooks(
        [
            hooks.PeriodicCheckpointer(trainer.checkpointer, 2, max_to_keep=1),
            BestCheckpointer(2, trainer.checkpointer, "bbox/AP", mode="max"),
        ]
    )
    trainer.train()
    names = {path.name for path in Path(cfg.OUTPUT_DIR).glob("model_*.pth")}
    assert names == {"model_0000003.pth", "model_final.pth", "model_best.pth"}


def work(cfg: CfgNode, results: list[Any]) -> None:
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    results.append(trainer._last_eval_results)


def test_launch_and_verify_results(cfg: CfgNode) -> None:
    """The end of every ``train_net.py``. A wrong expectation ends the process with 1."""
    results: list[Any] = []
    cfg.TEST.EVAL_PERIOD = 2
    launch(work, 1, args=(cfg, results))
    ap = results[0]["bbox"]["AP"]
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", ap, 1e-6]]
    assert verify_results(cfg, results[0])
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", ap + 5, 1.0]]
    with pytest.raises(SystemExit):
        verify_results(cfg, results[0])
    records = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    assert any("bbox/AP" in json.loads(line) for line in records)
