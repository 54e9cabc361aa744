import hypothesis
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator
from hypothesis import strategies as st
from PIL import Image

from miti_detr.modeling.segmentation import confident_queries, merge_panoptic

THING, STUFF, OTHER_STUFF = 0, 1, 2
MERGE = {"stuff": {STUFF, OTHER_STUFF}}


def columns(*widths, height=4):
    """Mask logits: mask i is 1 in its own columns and 0 elsewhere."""
    owner = np.repeat(np.arange(len(widths)), widths)
    masks = np.arange(len(widths))[:, None] == owner
    return torch.from_numpy(masks[:, None].repeat(height, axis=1)).float()


def areas(segments):
    return [(s["category_id"], s["isthing"], s["area"]) for s in segments]


def test_queries_need_a_confident_object():
    """Probabilities: 0.9 of an object, 0.8 of an object, 0.9 of no-object, 0.96 of an object."""
    p = torch.tensor([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.05, 0.05, 0.9], [0.02, 0.96, 0.02]])
    queries, classes = confident_queries(p.log(), 0.85)
    assert queries.tolist() == [0, 3]
    assert classes.tolist() == [0, 1]


def test_things_stay_apart_and_stuff_is_merged():
    classes = torch.tensor([THING, STUFF, THING, STUFF, OTHER_STUFF])
    ids, segments = merge_panoptic(classes, columns(2, 3, 4, 5, 6), output=(4, 20), **MERGE)
    # The second mask of STUFF goes to the first one, so that it has no pixel and is removed.
    # Then all masks are compared again, without it: its pixels go to the first mask of all, since
    # the others are equal there.
    assert areas(segments) == [
        (THING, True, 4 * (2 + 5)),
        (STUFF, False, 4 * 3),
        (THING, True, 4 * 4),
        (OTHER_STUFF, False, 4 * 6),
    ]
    assert [s["id"] for s in segments] == [1, 2, 3, 4]
    assert ids.dtype == torch.int32
    assert ids[0].tolist() == [1] * 2 + [2] * 3 + [3] * 4 + [1] * 5 + [4] * 6


def test_small_segments_are_removed_one_round_after_the_other():
    """Of 4 rows, a column is 4 pixels and is removed; a second round needs none."""
    classes = torch.tensor([THING, THING, STUFF])
    ids, segments = merge_panoptic(classes, columns(1, 5, 6), output=(4, 12), **MERGE)
    assert areas(segments) == [(THING, True, 4 * 6), (STUFF, False, 4 * 6)]
    assert ids[0].tolist() == [1] * 6 + [2] * 6


def test_everything_may_be_too_small():
    ids, segments = merge_panoptic(
        torch.tensor([THING]), torch.ones(1, 2, 2), output=(2, 2), **MERGE
    )
    assert segments == []
    assert not ids.any()


def test_no_segment():
    none = torch.zeros(0, dtype=torch.int64)
    ids, segments = merge_panoptic(none, torch.zeros(0, 3, 4), output=(6, 5), **MERGE)
    assert segments == []
    assert ids.shape == (6, 5)
    assert not ids.any()


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.lists(st.integers(1, 90), min_size=4, max_size=4), st.integers(0, 999))
def test_resize_is_that_of_pil(sides, seed):
    height, width, *output = sides
    masks = torch.from_numpy(np.random.default_rng(seed).random((3, height, width)))
    ids, segments = merge_panoptic(torch.zeros(3), masks, output=tuple(output), stuff=set())
    if len(segments) == 3:  # nothing was removed
        owner = Image.fromarray((masks.argmax(0) + 1).numpy().astype(np.int32))
        expected = owner.resize(output[::-1], Image.Resampling.NEAREST)
        assert (ids.numpy() == np.array(expected)).all()
    assert sum(s["area"] for s in segments) in (0, output[0] * output[1])


def test_detectron2_understands_the_categories(tmp_path):
    metadata = MetadataCatalog.get("coco_2017_val_panoptic")
    evaluator = COCOPanopticEvaluator("coco_2017_val_panoptic", str(tmp_path))
    classes = torch.tensor([0, 132])
    _, segments = merge_panoptic(classes, columns(5, 5), output=(4, 10), stuff=range(80, 133))
    names = [metadata.thing_classes[s["category_id"]] for s in segments]
    converted = [evaluator._convert_category_id(dict(s)) for s in segments]
    assert names == ["person", "rug-merged"]
    assert [s["category_id"] for s in converted] == [1, 200]
