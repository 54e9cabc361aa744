"""Exported models in a process that has neither torch nor Detectron2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from miti_detr import load_predictor
from tests.helpers import ROOT

PROGRAM = """
import json, sys

BLOCKED = ("torch", "torchvision", "detectron2", "fvcore", "matplotlib", "scipy", "pycocotools")


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Block())
from miti_detr import load_predictor

onnx_file, mask_file, image = sys.argv[1:]
predictor = load_predictor(onnx_file, threshold=0.0, tile=64)
result = predictor([image])[0]
picture = result.draw()
assert picture.size == result.image_size[::-1]
assert [one.image_size for one in predictor.stream([image])] == [result.image_size]
import miti_detr

for needs_torch in (lambda: load_predictor("a.pth"), lambda: miti_detr.add_miti_detr_config):
    try:
        needs_torch()
    except ImportError as error:
        assert "needs torch and Detectron2" in str(error) and "blocked" in str(error), error
    else:
        raise AssertionError("no error")
from miti_detr.cli.main import main

assert main(["predict", image, "--weights", onnx_file, "--output", image + ".out"]) == 0
masks = load_predictor(mask_file, threshold=0.0)(image)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & set(BLOCKED), loaded & set(BLOCKED)
print(json.dumps([result.to_coco(), masks.to_coco()]))
"""


@pytest.mark.slow
def test_without_torch(onnx_file: Path, mask_onnx_file: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.effect_noise((90, 70), 80).convert("RGB").save(image)
    command = [sys.executable, "-c", PROGRAM, str(onnx_file), str(mask_onnx_file), str(image)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here = [
        load_predictor(onnx_file, threshold=0.0, tile=64)(image).to_coco(),
        load_predictor(mask_onnx_file, threshold=0.0)(image).to_coco(),
    ]
    assert json.loads(done.stdout.splitlines()[-1]) == here
    assert "segmentation" in here[1][0]
