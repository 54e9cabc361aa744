"""``pip install .`` from a clone puts the package, the configs and the command anywhere."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers import ROOT

CHECK = """
import miti_detr, sys
from miti_detr.config import add_miti_detr_config
from miti_detr.model_zoo import get_config_file
from detectron2.config import get_cfg
print(miti_detr.__file__)
cfg = get_cfg()
add_miti_detr_config(cfg)
path = get_config_file("coco/miti_detr_R50_300ep.yaml")
print(path)
cfg.merge_from_file(path)
print(cfg.MODEL.DETR.LAYER_RESIDUAL)
from miti_detr.cli.main import main
sys.exit(main(["convert", "gone.pth", "out.pth", "--to", "ours"]))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a copy of the clone was installed, without network."""
    folder = tmp_path_factory.mktemp("install")
    clone = folder / "clone"
    for name in ("miti_detr", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pth")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", "."]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(clone)
    return folder / "site"


@pytest.mark.slow
def test_package_configs_and_command_work_from_anywhere(target: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(target)), done.stderr
    assert lines[1].startswith(str(target))
    assert lines[2] == "before_norm"
    assert done.returncode == 1
    assert "gone.pth: no such file or folder" in done.stderr


def test_every_module_every_config_and_the_command_are_installed(target: Path) -> None:
    installed = target / "miti_detr" / "model_zoo" / "configs"
    names = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    assert {p.relative_to(installed) for p in installed.rglob("*.yaml")} == names
    source = {p.relative_to(ROOT) for p in (ROOT / "miti_detr").rglob("*.py")}
    assert {p.relative_to(target) for p in target.rglob("*.py")} == source  # and no benchmarks
    (found,) = metadata.distributions(name="miti_detr", path=[str(target)])
    (command,) = found.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("miti-detr", "miti_detr.cli.main:main")
    assert (target / "miti_detr" / "py.typed").is_file() == (ROOT / "miti_detr/py.typed").is_file()
