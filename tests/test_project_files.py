"""Set-up and Makefile, as far as they can be checked in a second and without a network."""

import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = "tools/setup_env.sh"


def run(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        # without the arguments of a make that runs these tests
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))} | env,
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
    """The files that the scripts for set-up and training use, without an environment."""
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
    for name in ("sh", "dirname", "cat"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def test_make_shows_its_targets() -> None:
    text = run("make").stdout
    for target in ("setup", "train", "bench", "quick", "test", "coverage", "lint", "site", "help"):
        assert f"make {target} " in text


def test_make_passes_its_variables() -> None:
    plan = run("make", "-n", "train", "CONFIG=configs/coco/x.yaml", "ARGS=SEED 1").stdout
    assert '"configs/coco/x.yaml" "output/coco/x" SEED 1' in plan
    assert "--cov-fail-under=90" in run("make", "-n", "coverage").stdout
    assert "worksteal tests/cli" in run("make", "-n", "test", "ARGS=tests/cli").stdout
    assert "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" in run("make", "-n", "quick").stdout


def test_an_old_python_is_named(clone: Path, bare_path: Path) -> None:
    write_script(bare_path / "python3", 'test "$1" = --version && echo Python 3.8.10')
    done = run("sh", SETUP, cwd=clone, PATH=str(bare_path), PYTHON="")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed; found: Python 3.8.10" in done.stderr
    assert "make setup PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_wrong_python_is_named(clone: Path, bare_path: Path) -> None:
    """PYTHON is not replaced by another interpreter in silence."""
    write_script(bare_path / "python3", f'exec {sys.executable} -S "$@"')
    done = run("sh", SETUP, cwd=clone, PATH=str(bare_path), PYTHON="no-such-python")
    assert done.returncode == 1
    assert "PYTHON=no-such-python is not Python 3.11 or newer (no such program)" in done.stderr


def test_a_full_disk_is_reported_first(clone: Path, bare_path: Path) -> None:
    options = {"PATH": str(bare_path), "PYTHON": sys.executable, "MIN_DISK_GB": "100000000"}
    done = run("sh", SETUP, cwd=clone, **options)
    assert done.returncode == 1
    assert "the packages need about" in done.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.slow
def test_the_second_run_returns_at_once(clone: Path, bare_path: Path) -> None:
    """A complete environment runs nothing; a changed requirement makes its stamp invalid."""
    python = write_script(clone / ".venv/bin/python", "exit 1")
    stamp = f"import runpy; print(runpy.run_path('{clone}/tools/setup_env.py')['checksum']())"
    (clone / ".venv/.miti-detr-setup").write_text(run(sys.executable, "-c", stamp).stdout.strip())
    options = {"PATH": str(bare_path), "PYTHON": sys.executable, "MIN_DISK_GB": "100000000"}
    assert python.exists()
    assert run("sh", SETUP, cwd=clone, **options).returncode == 0
    with (clone / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert run("sh", SETUP, cwd=clone, **options).returncode == 1


@pytest.mark.slow
def test_an_interrupted_set_up_is_repaired(clone: Path, bare_path: Path) -> None:
    """Without a stamp the steps run again; the Python here notes them and makes the last fail."""
    script = (
        'echo "$@" >> calls; case "$*" in *"import torch"*) exit 1;; *sysconfig*) echo site;; esac'
    )
    write_script(clone / ".venv/bin/python", script)
    options = {"PATH": str(bare_path), "PYTHON": sys.executable, "MIN_DISK_GB": "0"}
    done = run("sh", SETUP, cwd=clone, **options)
    assert done.returncode == 1
    assert "does not work" in done.stderr
    calls = (clone / "calls").read_text()
    installs = [line for line in calls.splitlines() if line.startswith("-m pip install")]
    assert installs[0] == "-m pip install -r requirements.txt -r requirements-dev.txt"
    assert "--require-hashes" in installs[1]
    assert installs[1].endswith("-r requirements-detectron2.txt --target site")
    assert installs[2].endswith("-e .")
    assert not (clone / ".venv/.miti-detr-setup").exists()


def test_an_active_detectron2_is_used(clone: Path) -> None:
    """The Python of this test has it; for the copied clone it is a foreign environment."""
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = run("sh", SETUP, "--print-python", cwd=clone, PATH=path)
    found = Path(done.stdout.strip())
    assert found.parent == folder  # python or python3
    assert found.samefile(sys.executable)


def test_an_active_environment_is_completed(clone: Path, tmp_path: Path) -> None:
    """Only what pyproject.toml names and the environment lacks is installed."""
    setup = runpy.run_path(str(clone / "tools/setup_env.py"))
    python = write_script(
        tmp_path / "active/bin/python",
        """case "$*" in *distributions*) echo Torch; echo PyYAML; echo pytest_cov;;
*) echo "$@" >> calls;; esac""",
    )
    setup["add_missing"](python)
    words = (clone / "calls").read_text().split()
    assert words[:3] == ["-m", "pip", "install"]
    assert {"scipy>=1.11", "pytest>=8", "ruff", "faster-coco-eval>=1.6"} <= set(words)
    assert not [word for word in words if re.match(r"(?i)torch\b|pyyaml|pytest-cov|miti", word)]


def test_without_one_it_is_the_clones_own(clone: Path, bare_path: Path) -> None:
    (bare_path / "python3").symlink_to(sys.executable)
    probe = write_script(bare_path / "python", 'exec python3 -S "$@"')  # without site-packages
    done = run("sh", SETUP, "--print-python", cwd=clone, PATH=str(bare_path), PYTHON=str(probe))
    assert done.stdout.strip() == str(clone / ".venv/bin/python"), done.stderr


def test_training_that_is_done_is_not_repeated(clone: Path) -> None:
    """The Python of this test only records how it is called."""
    python = write_script(clone / "python", 'echo "$@" >> calls')
    output = clone / "out"
    (output / "inference").mkdir(parents=True)
    for name in ("model_final.pth", "curves.png", "inference/coco_table.txt"):
        (output / name).write_text(f"content of {name}\n")
    os.utime(output / "model_final.pth", (1, 1))
    command = ("bash", "tools/train.sh", python, "configs/shapes/detr.yaml", "out")
    done = run(*command, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert "is already trained" in done.stdout
    assert "content of inference/coco_table.txt" in done.stdout
    calls = (clone / "calls").read_text().splitlines()
    assert [call.split()[2] for call in calls] == ["detections"]  # the one whose picture is missing

    more = run(*command, "SOLVER.MAX_ITER", "9", cwd=clone)
    assert more.returncode == 0, more.stderr
    call = (clone / "calls").read_text().splitlines()[1]
    assert call.startswith("train_net.py --config-file configs/shapes/detr.yaml --resume")
    assert call.endswith("OUTPUT_DIR out SOLVER.MAX_ITER 9")

    os.utime(output / "inference/coco_table.txt", (0, 0))  # stopped in the last evaluation
    (clone / "calls").unlink()
    assert "is already trained" not in run(*command, cwd=clone).stdout
    assert (clone / "calls").read_text().startswith("train_net.py --config-file")


def test_a_failed_training_fails(clone: Path) -> None:
    python = write_script(clone / "python", "exit 130")
    done = run("bash", "tools/train.sh", python, "configs/shapes/detr.yaml", "out", cwd=clone)
    assert done.returncode == 130
    gone = run("bash", "tools/train.sh", python, "configs/gone.yaml", "out", cwd=clone)
    assert gone.returncode == 1
    assert "configs/shapes/detr.yaml" in gone.stderr


def test_requirements_are_exact_and_detectron2_has_its_hash() -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "tools/docsite/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line), line
    assert re.search(
        r"--hash=sha256:[0-9a-f]{64}\n", (ROOT / "requirements-detectron2.txt").read_text()
    )
