import pytest
from detectron2.config import CfgNode, get_cfg

from miti_detr import add_miti_detr_config


def test_keys_of_other_plugins_stay() -> None:
    """Mask2Former and MaskDINO fill ``MODEL.SWIN`` and ``SOLVER`` too; their values win."""
    cfg = get_cfg()
    cfg.MODEL.SWIN = CfgNode({"EMBED_DIM": 128, "PRETRAIN_IMG_SIZE": 224})
    cfg.SOLVER.OPTIMIZER = "SGD"
    add_miti_detr_config(cfg)
    assert (cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.PRETRAIN_IMG_SIZE) == (128, 224)
    assert cfg.MODEL.SWIN.DEPTHS == (2, 2, 6, 2)
    assert cfg.SOLVER.OPTIMIZER == "SGD"


def test_a_second_call_changes_nothing() -> None:
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.MODEL.DETR.NUM_CLASSES = 3
    before = cfg.dump()
    add_miti_detr_config(cfg)
    assert cfg.dump() == before


def test_a_value_in_the_place_of_a_section_is_refused() -> None:
    cfg = get_cfg()
    cfg.MODEL.DETR = "theirs"
    with pytest.raises(ValueError, match=r"MODEL\.DETR is 'theirs'.*another plug-in"):
        add_miti_detr_config(cfg)
