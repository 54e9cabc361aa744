"""Every snippet of README.md and docs/*.md runs, or is checked as far as it can be without data.

``python`` blocks run one by one, each in a namespace and a folder of its own, after the first one
of their page, from which the others may go on. What they read is there: the built-in data set (a
few images), ``photo.jpg``, ``data/``, and weights. ``yaml`` blocks are merged into a config and
their backbone is built, or they are a study whose runs are planned. Of ``sh`` blocks, each command
is parsed by its own parser. ``miti-detr`` and, in one process, ``train_net.py`` also run, for one
step of a small network; what would take minutes does not.
"""

import argparse
import contextlib
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from PIL import Image

import train_net
from miti_detr import add_miti_detr_config
from miti_detr.checkpoint import MitiDetrCheckpointer, to_official
from miti_detr.cli.main import _take_overrides, build_parser, main
from miti_detr.engine import NonFiniteError, run
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.modeling import MaskedBackbone
from miti_detr.modeling.detr import build_backbone
from miti_detr.study.plan import plan_runs
from miti_detr.study.study_file import read_study
from tests.checkpoint.helpers import r50_config, slim
from tests.checkpoint.test_checkpointer import RESNET18
from tests.helpers import ROOT, training_input
from tests.small_shapes import small_shapes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = (  # of the COCO configs, for the commands of the pages
    *RESNET18,
    *("MODEL.DETR.NUM_CLASSES", 3),
    *("SOLVER.MAX_ITER", 1, "SOLVER.EPOCHS", 0, "SOLVER.EPOCH_STEPS", (), "SOLVER.STEPS", ()),
    *("SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0),
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
    for name in ("miti_detr", "detr", "up_detr_pretrain"):
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


@pytest.fixture
def place(
    supplies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A working folder with the supplies; what a snippet registers goes away again."""
    for item in supplies.iterdir():
        (tmp_path / item.name).symlink_to(item)
    (tmp_path / "output").unlink()
    shutil.copytree(supplies / "output", tmp_path / "output")
    monkeypatch.chdir(tmp_path)
    registries: list[Any] = [DatasetCatalog, BACKBONE_REGISTRY._obj_map]
    before = [set(registry) for registry in registries]
    yield tmp_path
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - names:
            registry.pop(name)
            with contextlib.suppress(KeyError):
                MetadataCatalog.remove(name)


@of("python")
def test_python(block: Block, place: Path) -> None:
    first = next(b for b in BLOCKS if b.page == block.page and b.language == "python")
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for part in dict.fromkeys((first, block)):
        lines = "\n" * (part.line - 1)  # so that a traceback names the line of the page
        exec(compile(lines + part.text, part.page, "exec"), namespace)


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
    assert set(strides.values()) <= {16, 32}


def commands_of(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line for line in words if line]


def check_overrides(words: list[str], config: str) -> None:
    cfg = default_config()
    if (ROOT / config).is_file():
        cfg.merge_from_file(str(ROOT / config))
    cfg.merge_from_list(words)


def check_train_net(words: list[str], monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr("sys.argv", words)
    args: argparse.Namespace = train_net.parse_args()
    if args.config_file.startswith("configs/"):
        assert (ROOT / args.config_file).is_file(), args.config_file
    check_overrides(args.opts, args.config_file)
    if args.num_gpus > 1 or args.config_file == "CONFIG":
        return
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if args.config_file.startswith("configs/"):
        args.config_file = str(ROOT / args.config_file)
    small = SMALL if "/coco/" in args.config_file else SMALL[len(RESNET18) :]
    args.opts += [str(word) for word in small]
    if "pretrain" in args.config_file:
        args.opts += ["MODEL.DETR.NUM_CLASSES", "2"]
    if "DATASETS.COCO_FORMAT" not in args.opts:
        names = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
        args.opts += names
    if "MODEL.WEIGHTS" not in args.opts:
        args.opts += ["MODEL.WEIGHTS", ""]
    assert run(train_net.main, args) == 0
    assert (place / "output").is_dir()


def check_miti_detr(words: list[str]) -> None:
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    _take_overrides(parser, args, rest)
    files = [args.config_file] if hasattr(args, "config_file") else [""]
    for file in files[0] if isinstance(files[0], list) else files:
        assert not file or (ROOT / file).is_file(), file
        check_overrides(getattr(args, "overrides", []), file or "")
    if words[0] not in ("bench", "compare"):  # they take minutes
        here = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        assert main(here) == 0


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"miti_detr\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


@of("sh")
def test_sh(block: Block, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    for words in commands_of(block.text):
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
        elif words[:2] == ["python", "train_net.py"]:
            check_train_net(words[1:], monkeypatch, place)
        elif words[0] == "miti-detr":
            check_miti_detr(words[1:])
        elif words[:2] == ["pip", "install"]:
            check_pip(words[2:])
        else:
            assert words[0] in ("cd", "git", "export"), f"nothing here checks {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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
