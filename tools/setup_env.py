"""Prepares the Python environment of ``make``; standard library only.

An active environment that has torch and Detectron2 is used as it is: packages that it lacks are
added, none is replaced. Otherwise the pinned requirements are installed into ``.venv``.

Environment variables: ``PYTHON`` is the interpreter to build ``.venv`` with; ``MIN_DISK_GB`` is the
free space that a new ``.venv`` needs (default 8).
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = ".miti-detr-setup"  # holds the checksum of the last complete set-up
GB = 2**30
PROBE = """
import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 11) or not (find_spec("torch") and find_spec("detectron2")))
"""
CHECK = "import torch, torchvision, detectron2.modeling, miti_detr"


class SetupError(Exception):
    """The environment cannot be prepared. The message says why and what to do."""


def main() -> int:
    """Prepare the environment, or print the path of its Python."""
    parser = argparse.ArgumentParser(description="Prepares the Python environment of make.")
    parser.add_argument("--print-python", action="store_true", help="print the path of its Python")
    args = parser.parse_args()
    os.environ.update(PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    active = active_python()
    python = active or VENV / "bin" / "python"
    if args.print_python:
        print(python)
        return 0
    try:
        set_up(python, own=active is None)
    except SetupError as error:
        say(f"error: {error}", sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        say(f"error: status {error.returncode} of {' '.join(map(str, error.cmd))}", sys.stderr)
        say("See the output above. Run the same command again to continue.", sys.stderr)
        return 1
    return 0


def active_python() -> Path | None:
    """Return the active Python that has torch and Detectron2, if there is one.

    The ``.venv`` of the clone does not count, because it may be incomplete.
    """
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found is None or Path(found).parent == VENV / "bin":
            continue
        if Path(found).parent == Path(sys.executable).parent:  # this process, without a new one
            complete = all(find_spec(package) for package in ("torch", "detectron2"))
        else:
            complete = subprocess.run([found, "-c", PROBE], capture_output=True).returncode == 0
        if complete:
            return Path(found)
    return None


def set_up(python: Path, *, own: bool) -> None:
    """Complete an environment, unless its stamp says that it is complete.

    Args:
        python: interpreter of the environment.
        own: whether it is the ``.venv`` of the clone.
    """
    stamp = python.parent.parent / STAMP
    if os.access(python, os.X_OK) and stamp.is_file() and stamp.read_text() == checksum():
        return
    if own:
        base = base_python()
        check_disk()
        say(f"[1/4] {VENV} with {version_of(base)}")
        make_venv(base, python)
        install_pinned(python)
    else:
        say(f"using the active environment, which has Detectron2: {python}")
        add_missing(python)
    if subprocess.run([python, "-W", "ignore", "-c", CHECK], cwd=ROOT).returncode != 0:
        raise SetupError(
            f"the environment of {python} does not work; see the output above. Repair or remove it "
            "and run the same command again"
        )
    with contextlib.suppress(OSError):  # an active environment may be read-only
        temporary = stamp.with_name(f"{STAMP}.{os.getpid()}")
        temporary.write_text(checksum())
        temporary.replace(stamp)
    say(f"ready: {python}")


def checksum() -> str:
    """Return a checksum of everything that determines the environment."""
    names = ("setup.py", "pyproject.toml", "tools/setup_env.py")
    files = [*sorted(ROOT.glob("requirements*.txt")), *(ROOT / name for name in names)]
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content + str(ROOT).encode()).hexdigest()


def base_python() -> str:
    """Return the interpreter that ``.venv`` is built with: ``$PYTHON``, or this one."""
    base = os.environ.get("PYTHON") or sys.executable
    if shutil.which(base) is None or not is_new_enough(base):
        found = version_of(base) if shutil.which(base) else "no such program"
        raise SetupError(
            f"PYTHON={base} is not Python 3.11 or newer ({found}). Name another one: "
            "make setup PYTHON=python3.11"
        )
    return base


def is_new_enough(python: str | Path) -> bool:
    """Return whether an interpreter runs and is Python 3.11 or newer."""
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def version_of(python: str | Path) -> str:
    """Return the version of an interpreter, such as ``Python 3.11.9``."""
    done = subprocess.run([python, "--version"], capture_output=True, text=True)
    return done.stdout.strip()


def check_disk() -> None:
    """Raise an error if the disk is too full for the packages that ``.venv`` does not have yet."""
    present = sum(f.lstat().st_size for f in VENV.rglob("*")) if VENV.is_dir() else 0
    needed = int(os.environ.get("MIN_DISK_GB", "8")) * GB - present
    free = shutil.disk_usage(ROOT).free
    if free < needed:
        raise SetupError(
            f"the packages need about {needed // GB} GB more in {ROOT}; {free // GB} GB are free. "
            "Free some space, or move the clone to a larger disk, and run the same command again"
        )


def make_venv(base: str, python: Path) -> None:
    """Make ``.venv``, unless it has a pip that works."""
    if python.exists() and not is_new_enough(python):
        raise SetupError(
            f"{VENV} has {version_of(python)}, but Python 3.11 or newer is needed. Remove that "
            "folder and run the same command again"
        )
    if python.exists():
        pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True)
        if pip.returncode == 0:
            return
    if subprocess.run([base, "-m", "venv", "--clear", VENV]).returncode != 0:
        raise SetupError(
            f"{base} could not make {VENV}. On Debian and Ubuntu the module venv is a package of "
            "its own: apt-get install python3-venv"
        )


def install_pinned(python: Path) -> None:
    """Install the pinned requirements, Detectron2 and this package into ``.venv``."""
    say("[2/4] pinned packages (a few GB the first time, most of it torch)")
    install(python, "-r", "requirements.txt", "-r", "requirements-dev.txt")
    say("[3/4] Detectron2 (Python sources, checked by hash)")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([python, "-c", code], text=True).strip()
    # The wheel is tagged for CPython 3.10, but its Python files work with any version.
    wheel = ("--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp")
    options = ("--quiet", "--require-hashes", "--no-deps", "--upgrade", *wheel)
    install(python, *options, "-r", "requirements-detectron2.txt", "--target", packages)
    say("[4/4] miti_detr, editable")
    install(python, "--quiet", "--no-deps", "--no-build-isolation", "-e", ".")


def add_missing(python: Path) -> None:
    """Add packages that an active environment lacks; installed ones are left as they are."""
    code = "from importlib import metadata\nfor d in metadata.distributions(): print(d.name)"
    if python.parent == Path(sys.executable).parent:
        installed = [str(found.name) for found in metadata.distributions()]
    else:
        installed = subprocess.check_output([python, "-c", code], text=True).splitlines()
    names = {normalised(name) for name in installed}
    missing = [need for need in needed_packages() if normalised(need) not in names]
    if missing:
        say(f"adding to {python}: {' '.join(missing)}")
        install(python, *missing)


def needed_packages() -> list[str]:
    """Return the requirements of the package, its tests and its linters, from pyproject.toml.

    The optional packages that the extra ``dev`` includes by name (``miti_detr[...]``) are omitted,
    except the evaluator; tests that need the others are skipped.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = [need for need in extras["dev"] if not need.startswith("miti_detr")]
    return [*project["dependencies"], *extras["fast-eval"], *own]


def normalised(requirement: str) -> str:
    """Return the normalised name of a package or of a requirement such as ``PyYAML>=6``."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def install(python: Path, *words: str) -> None:
    """Run ``pip install`` in the folder of the clone."""
    subprocess.run([python, "-m", "pip", "install", *words], cwd=ROOT, check=True)


def say(text: str, stream: object = None) -> None:
    """Print a line with the name of this program."""
    print(f"setup: {text}", file=stream or sys.stdout, flush=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
