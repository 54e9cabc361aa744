"""Every snippet of README.md and docs/*.md runs, or is checked as far as it can be without data.

``python`` blocks and commands run in processes of their own (``snippets.py``), each block in its
own folder. A ``python`` block runs after the first one of its page, which it may continue. The
files that snippets read exist: the built-in data set (a few images), ``photo.jpg``, ``data/`` and
weights.
``yaml`` blocks are merged into a config whose backbone is built, or they are a study whose runs are
planned. Of ``sh`` blocks, each command is parsed by its own parser. ``miti-detr`` and, for one step
of a small network, ``train_net.py`` also run; commands that would take minutes do not.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from PIL import Image

import train_net
from miti_detr import add_miti_detr_config
from miti_detr.checkpoint import MitiDetrCheckpointer, to_official
from miti_detr.cli.main import _take_overrides, build_parser
from miti_detr.engine import NonFiniteError
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.modeling import MaskedBackbone
from miti_detr.modeling.detr import build_backbone
from miti_detr.study.plan import plan_runs
from miti_detr.study.study_file import read_study
from tests.checkpoint.helpers import r50_config, slim
from tests.checkpoint.test_checkpointer import RESNET18
from tests.helpers import ROOT, training_input
from tests.modeling.deformable.helpers import coco_config
from tests.small_shapes import small_shapes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [ROOT / f"{name}.md" for name in ("EVIDENCE", "CONTRIBUTING", "CHANGELOG")]
SMALL = (  # of the COCO configs, for the commands of the pages
    *RESNET18,
    *("MODEL.DETR.NUM_CLASSES", 3),
    *("SOLVER.MAX_ITER", 1, "SOLVER.EPOCHS", 0, "SOLVER.EPOCH_STEPS", (), "SOLVER.STEPS", ()),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.REFERENCE_BATCH", 2, "SOLVER.ACCUMULATE", 1),
    *("DATALOADER.NUM_WORKERS", 0),
    *("TEST.EVAL_PERIOD", 0),
    *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 96, "INPUT.CROP.ENABLED", False),
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96),
)
METRICS = '{"iteration": 0, "total_loss": 2.0}\n{"iteration": 1, "total_loss": 1.0}\n'
LANGUAGES = {"python", "yaml", "sh", "text", ""}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        line = page.read_text()[: match.start()].count("\n") + 2
        found.append(Block(page.name, line, match[1], match[2]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> Any:
    blocks = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", blocks, ids=lambda b: f"{b.page}:{b.line}")


def test_every_block_has_a_kind_that_is_checked() -> None:
    fences = sum(len(re.findall(r"^```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= LANGUAGES
    pages = {"weights.md", "backbones.md", "pipelines.md", "benchmarks.md"}
    assert pages <= {block.page for block in BLOCKS}


def default_config() -> CfgNode:
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that snippets read."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("miti_detr", "detr", "up_detr_pretrain", "miti_detr_masks"):
        cfg = default_config()
        cfg.merge_from_file(str(ROOT / f"configs/shapes/{name}.yaml"))
        output = folder / "output" / "shapes" / name
        MitiDetrCheckpointer(build_model(cfg), str(output), cfg=cfg).save("model_final")
    _stopped_step(folder / "output/shapes/miti_detr")
    for name in ("mine", "other"):
        shutil.copytree(folder / "output/shapes/miti_detr", folder / "output" / name)
        (folder / "output" / name / "metrics.json").write_text(METRICS)
    torch.save({"model": slim("detr_r50")}, folder / "detr-r50.pth")
    _small_official_files(folder)
    for name in ("detr_256_6_6_torchvision.yaml", "detr_segm_256_6_6_torchvision.yaml"):
        shutil.copy(ROOT / "tests/pipelines/configs" / name, folder)
    (folder / "more_photos").mkdir()
    for path in ("photo.jpg", "more_photos/a.jpg"):
        Image.effect_noise((64, 64), 90).convert("RGB").save(folder / path)
    with small_shapes(folder / "datasets") as shapes:
        shutil.copytree(shapes, folder / "data")
        shutil.copy(folder / "data/train.json", folder / "data/val.json")
        (folder / "data/images").symlink_to(folder / "data/train")
        yield folder


def _stopped_step(output: Path) -> None:
    """What a run leaves that was stopped by a loss which is not finite."""
    cfg = default_config()
    cfg.merge_from_file(str(ROOT / "configs/shapes/miti_detr.yaml"))
    cfg.OUTPUT_DIR = str(output)
    batch = [training_input((64, 48), [[4, 5, 30, 40]], [0])]
    losses, model = {"loss_ce": torch.tensor(torch.nan)}, build_model(cfg)
    with pytest.raises(NonFiniteError):
        NonFiniteGuard(cfg).stop(model, batch, losses, 120, "the loss is not finite")


def _small_official_files(folder: Path) -> None:
    """A DETR that ``SMALL`` fits, under the names of the pages."""
    cfg = r50_config(*RESNET18)
    model = build_model(cfg)
    MitiDetrCheckpointer(model, str(folder / "output/detr"), cfg=cfg).save("model_final")
    official = {"model": to_official(model.state_dict())}
    for name in ("detr-r50-e632da11.pth", "miti.pth"):
        torch.save(official, folder / name)
    torch.save({**official, "criterion": torch.nn.Identity()}, folder / "old.pth")
    deformable = build_model(coco_config("base", *RESNET18)).state_dict()
    torch.save({"model": to_official(deformable)}, folder / "r50_deformable_detr-checkpoint.pth")


def make_place(supplies: Path, folder: Path, *, copy: Any = shutil.copy2) -> Path:
    """A working folder with the supplies."""
    folder.mkdir()
    for item in supplies.iterdir():
        if item.name == "output":
            shutil.copytree(item, folder / "output", copy_function=copy)
        else:
            (folder / item.name).symlink_to(item)
    return folder


def _copy_or_link(source: str, target: str) -> None:
    """Weights are only linked: they are large, and no command writes into those that it reads."""
    if source.endswith(".pth"):
        os.symlink(source, target)
    else:
        shutil.copy2(source, target)


def run_jobs(jobs: list[dict[str, Any]], supplies: Path) -> None:
    """Run jobs of ``snippets.py``, and show the output of all that fail."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/snippets.py"],
        input=json.dumps(jobs),
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "DETECTRON2_DATASETS": str(supplies / "datasets"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    results = json.loads(done.stdout)
    assert len(results) == len(jobs) > 0
    failures = [f"{name}: {output}" for name, output in results.items() if output]
    assert not failures, "\n".join(failures)


def name_of(block: Block) -> str:
    return f"{block.page}_{block.line}"


@pytest.mark.slow
def test_python(supplies: Path, tmp_path: Path) -> None:
    jobs = []
    for block in [b for b in BLOCKS if b.language == "python"]:
        first = next(b for b in BLOCKS if b.page == block.page and b.language == "python")
        parts = [
            {"file": part.page, "line": part.line, "text": part.text}
            for part in dict.fromkeys((first, block))
        ]
        folder = make_place(supplies, tmp_path / name_of(block))
        jobs.append({"name": name_of(block), "folder": str(folder), "steps": [{"parts": parts}]})
    run_jobs(jobs, supplies)


@pytest.mark.slow
@of("yaml")
def test_yaml(block: Block, tmp_path: Path) -> None:
    if "arms:" in block.text:  # a study file, as it would stand beside those of the project
        path = tmp_path / "configs" / "studies" / "study.yaml"
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
        path.write_text(block.text)
        assert plan_runs(read_study(path), tmp_path / "output")
        return
    cfg = default_config()
    cfg.merge_from_file(str(ROOT / "configs/coco/miti_detr_R50.yaml"))
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(block.text)))
    detr = cfg.MODEL.DETR
    strides = MaskedBackbone(build_backbone(cfg), in_features=detr.IN_FEATURES).strides
    assert set(strides.values()) <= {8, 16, 32}


def commands_of(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line for line in words if line]


def check_overrides(words: list[str], config: str) -> None:
    cfg = default_config()
    if (ROOT / config).is_file():
        cfg.merge_from_file(str(ROOT / config))
    cfg.merge_from_list(words)


def train_net_steps(words: list[str]) -> list[dict[str, Any]]:
    """Check the words of ``train_net.py``. Returns the steps that run it, if it can run here."""
    with mock.patch("sys.argv", ["train_net.py", *words]):
        args = train_net.parse_args()
    if args.config_file.startswith("configs/"):
        assert (ROOT / args.config_file).is_file(), args.config_file
    check_overrides(args.opts, args.config_file)
    if (args.num_gpus or 0) > 1 or args.config_file == "CONFIG":
        return []
    small = SMALL[len(RESNET18) :] if "/shapes/" in args.config_file else SMALL
    words = [*words, *(str(word) for word in small)]
    if "pretrain" in args.config_file:
        words += ["MODEL.DETR.NUM_CLASSES", "2"]
    if "panoptic" in args.config_file:
        words += ["MODEL.DETR.NUM_CLASSES", "6"]
    if "DATASETS.COCO_FORMAT" not in args.opts:
        data = "shapes_panoptic" if "panoptic" in args.config_file else "shapes"
        words += ["DATASETS.TRAIN", f"('{data}_train',)", "DATASETS.TEST", f"('{data}_val',)"]
    if args.resume:  # the folder of the other commands holds weights without a run
        words += ["OUTPUT_DIR", "output/resumed"]
    if "MODEL.WEIGHTS" not in args.opts:
        words += ["MODEL.WEIGHTS", ""]
    program = ROOT / "train_net.py"
    part = {"file": str(program), "line": 1, "text": program.read_text()}
    return [{"argv": [str(program), *absolute(words)], "module": "__main__", "parts": [part]}]


def miti_detr_steps(words: list[str]) -> list[dict[str, Any]]:
    """Check the words of ``miti-detr``. Returns the step that runs it, if it can run here."""
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    _take_overrides(parser, args, rest)
    file = getattr(args, "config_file", None) or ""
    for name in [file] if isinstance(file, str) else file:
        assert not name or (ROOT / name).is_file(), name
        check_overrides(getattr(args, "overrides", []), name)
    slow = ("bench", "compare", "export", "train")
    if words[0] in slow or "--theory" in words:  # they take minutes
        return []
    text = f"import sys\nfrom miti_detr.cli.main import main\nsys.exit(main({absolute(words)!r}))"
    return [{"parts": [{"file": "miti-detr", "line": 1, "text": text}]}]


def absolute(words: list[str]) -> list[str]:
    return [str(ROOT / word) if word.startswith("configs/") else word for word in words]


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words if "=" not in word]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"miti_detr\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def steps_of(words: list[str]) -> list[dict[str, Any]]:
    """Check a command. Returns the steps that run it, if it can run here."""
    if words[:2] == ["python", "train_net.py"]:
        return train_net_steps(words[2:])
    if words[0] == "miti-detr":
        return miti_detr_steps(words[1:])
    if words[0] == "make":
        check_make(words[1:])
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    else:
        assert words[0] in ("cd", "git", "export"), f"nothing here checks {words}"
    return []


@pytest.mark.slow
def test_sh(supplies: Path, tmp_path: Path) -> None:
    jobs = []
    for block in [b for b in BLOCKS if b.language == "sh"]:
        steps = [step for words in commands_of(block.text) for step in steps_of(words)]
        if steps:
            folder = make_place(supplies, tmp_path / name_of(block), copy=_copy_or_link)
            jobs.append({"name": name_of(block), "folder": str(folder), "steps": steps})
    run_jobs(jobs, supplies)


@pytest.mark.parametrize("page", [*PAGES, *LINKED], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files that are linked exist, and so do the headings behind a #."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, target
