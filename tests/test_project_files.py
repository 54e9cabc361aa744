"""Set-up, Makefile and packaging, as far as they can be checked in a second and without network."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import miti_detr

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "tools" / "setup_env.sh"


def run(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that set-up and training scripts touch, without an environment."""
    folder = tmp_path / "clone"
    for name in ("Makefile", "setup.py", "pyproject.toml", "tools", "configs", "docs"):
        source = ROOT / name
        folder.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH with the few tools that set-up uses, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "df", "awk", "du", "cut", "dirname", "cksum", "make", "mv", "rm"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def test_make_shows_its_targets() -> None:
    said = run("make").stdout
    for target in ("setup", "train", "bench", "test", "lint", "help"):
        assert f"make {target} " in said


def test_make_passes_its_variables() -> None:
    plan = run("make", "-n", "train", "CONFIG=configs/coco/x.yaml", "ARGS=SEED 1").stdout
    assert '"configs/coco/x.yaml" "output/coco/x" SEED 1' in plan
    assert "--cov-fail-under=90" in run("make", "-n", "test").stdout
    assert "--cov" not in run("make", "-n", "test", "ARGS=tests/cli").stdout


def test_an_old_python_is_named(clone: Path, bare_path: Path) -> None:
    write_script(bare_path / "python3", 'test "$1" = --version && echo Python 3.8.10')
    done = run("bash", "tools/setup_env.sh", cwd=clone, PATH=str(bare_path), PYTHON="")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed; found: Python 3.8.10" in done.stderr
    assert "make setup PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_full_disk_is_said_before_anything(clone: Path, bare_path: Path) -> None:
    options = {"PATH": str(bare_path), "PYTHON": sys.executable, "MIN_DISK_GB": "100000000"}
    done = run("bash", "tools/setup_env.sh", cwd=clone, **options)
    assert done.returncode == 1
    assert "the packages need about" in done.stderr
    assert not (clone / ".venv").exists()


def test_the_second_run_returns_at_once(clone: Path, bare_path: Path) -> None:
    """With an environment and its stamp, nothing is run; the stamp falls with a requirement."""
    write_script(clone / ".venv/bin/python", "exit 1")
    options = {"PATH": str(bare_path), "PYTHON": "no-such-python"}
    files = [*sorted(clone.glob("requirements*.txt")), "setup.py", "pyproject.toml"]
    script = f'cat "$@" tools/setup_env.sh <(echo "{clone}") | cksum > .venv/.miti-detr-setup'
    run("bash", "-c", script, "-", *files, cwd=clone)
    assert run("bash", "tools/setup_env.sh", cwd=clone, **options).returncode == 0
    with (clone / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert run("bash", "tools/setup_env.sh", cwd=clone, **options).returncode == 1


def test_an_active_detectron2_is_used(clone: Path) -> None:
    """This test's own Python has it; for the copied clone it is a foreign environment."""
    folder = str(Path(sys.executable).parent)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = run("bash", "tools/setup_env.sh", "--print-python", cwd=clone, PATH=path)
    assert Path(done.stdout.strip()) == Path(sys.executable)


def test_without_one_it_is_the_clones_own(clone: Path, bare_path: Path) -> None:
    done = run("bash", "tools/setup_env.sh", "--print-python", cwd=clone, PATH=str(bare_path))
    assert done.stdout.strip() == str(clone / ".venv/bin/python")


def test_training_that_is_done_is_not_repeated(clone: Path) -> None:
    """The Python here only notes how it is called."""
    python = write_script(clone / "python", 'echo "$@" >> calls')
    output = clone / "out"
    (output / "inference").mkdir(parents=True)
    for name in ("model_final.pth", "curves.png", "inference/coco_table.txt"):
        (output / name).write_text(f"content of {name}\n")
    os.utime(output / "model_final.pth", (1, 1))
    command = ("bash", "tools/train.sh", python, "configs/shapes/detr.yaml", "out")
    done = run(*command, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert "is trained already" in done.stdout
    assert "content of inference/coco_table.txt" in done.stdout
    calls = (clone / "calls").read_text().splitlines()
    assert [call.split()[2] for call in calls] == ["detections"]  # the one that is missing

    more = run(*command, "SOLVER.MAX_ITER", "9", cwd=clone)
    assert more.returncode == 0, more.stderr
    call = (clone / "calls").read_text().splitlines()[1]
    assert call.startswith("train_net.py --config-file configs/shapes/detr.yaml --resume")
    assert call.endswith("OUTPUT_DIR out SOLVER.MAX_ITER 9")

    os.utime(output / "inference/coco_table.txt", (0, 0))  # stopped in the last evaluation
    (clone / "calls").unlink()
    assert "is trained already" not in run(*command, cwd=clone).stdout
    assert (clone / "calls").read_text().startswith("train_net.py --config-file")


def test_a_failed_training_fails(clone: Path) -> None:
    python = write_script(clone / "python", "exit 130")
    done = run("bash", "tools/train.sh", python, "configs/shapes/detr.yaml", "out", cwd=clone)
    assert done.returncode == 130
    gone = run("bash", "tools/train.sh", python, "configs/gone.yaml", "out", cwd=clone)
    assert gone.returncode == 1
    assert "configs/shapes/detr.yaml" in gone.stderr


def test_benchmarks_of_the_page_run_once_each(clone: Path) -> None:
    """The Python here notes how it is called; one of the measurements is there, another fails."""
    script = """echo "$@" >> calls
case "$*" in *2_training_float32*) exit 1;; esac
while [ "$1" != --output ]; do shift; done; touch "$2/bench.json"; echo measured"""
    python = write_script(clone / "python", script)
    there = clone / "output/bench/1_inference_float32/bench.json"
    there.parent.mkdir(parents=True)
    there.touch()
    done = run("bash", "tools/bench.sh", python, cwd=clone)
    assert done.returncode == 1
    assert "1_inference_float32 is there" in done.stdout
    assert "error: output/bench/2_training_float32 failed" in done.stderr
    calls = (clone / "calls").read_text().splitlines()
    page = (ROOT / "docs/benchmarks.md").read_text()
    folders = re.findall(r"--output (output/bench/\d\w+)", page)
    assert len(folders) == len(set(folders)) == len(calls) + 1
    assert calls[0] == (
        "-m miti_detr.cli bench --config-file configs/coco/detr_R50.yaml --only inference "
        "--against hf --repeats 9 --precision bfloat16 --output output/bench/1_inference_bfloat16 "
        "MODEL.DEVICE cpu"
    )
    assert (clone / folders[-1] / "table.txt").read_text() == "measured\n"

    again = run("bash", "tools/bench.sh", python, cwd=clone)
    assert again.stdout.count(" is there") == len(folders) - 1
    assert len((clone / "calls").read_text().splitlines()) == len(calls) + 1  # the one that failed


def test_requirements_are_exact_and_detectron2_has_its_hash() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line), line
    assert re.search(
        r"--hash=sha256:[0-9a-f]{64}\n", (ROOT / "requirements-detectron2.txt").read_text()
    )


def test_the_package_holds_every_folder_and_config() -> None:
    """Name and version, each folder with Python files a package, the YAML files below model_zoo."""
    code = (
        "import setuptools, json\n"
        "setuptools.setup = lambda **k: print(json.dumps(k, default=str))\n"
        "exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    options = yaml.safe_load(done.stdout)
    assert options["version"] == miti_detr.__version__
    folders = {file.parent for file in (ROOT / "miti_detr").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(options["packages"]) == names | {"miti_detr.model_zoo.configs"}
    assert options["package_dir"] == {"miti_detr.model_zoo.configs": "configs"}
    assert "detectron2" not in " ".join(options["install_requires"])
