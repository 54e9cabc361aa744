#!/usr/bin/env bash
# Makes the Python environment that `make train`, `make test` and `make lint` run in.
#
#   tools/setup_env.sh                 make or repair it; nothing to do: returns at once
#   tools/setup_env.sh --print-python  say which Python that is, and do nothing else
#
# An active environment (or a system Python) that has torch and Detectron2 is used as it is; packages that it lacks are
# added, none is replaced. Otherwise everything goes to .venv in this clone, from the pinned requirements*.txt.
# Variables: PYTHON, the Python to build .venv with; MIN_DISK_GB, the free space asked for (default 8).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

VENV="$PWD/.venv"
# What the code and its tests import beside torch and Detectron2, by package name.
NEEDED="scipy pycocotools matplotlib faster-coco-eval pytest pytest-cov pytest-xdist ruff mypy"

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$1" >&2
    printf 'setup: %s\n' "${@:2}" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The active Python with torch and Detectron2, or nothing. The clone's own .venv does not count: it may be half made.
active_python() {
    local candidate
    for candidate in python python3; do
        if is_new_enough "$candidate" && "$candidate" - "$VENV" 2>/dev/null <<'PY'; then
import sys
from importlib.util import find_spec

found = all(find_spec(name) for name in ("torch", "detectron2"))
sys.exit(not found or sys.prefix == sys.argv[1])
PY
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

# The interpreter that .venv is built with: $PYTHON, or the first on the PATH that is new enough.
base_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python python3.11 python3.12 python3.13}; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; found: $(${PYTHON:-python3} --version 2>&1 || true)" \
        "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) and name it: make setup PYTHON=python3.11"
}

# Says early that the disk is too full; what .venv already holds need not come again.
check_disk() {
    local free_kb have_kb need_kb
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    have_kb=$([ -d "$VENV" ] && du -sk "$VENV" | cut -f1 || echo 0)
    need_kb=$((${MIN_DISK_GB:-8} * 1024 * 1024 - have_kb))
    if [ "$free_kb" -lt "$need_kb" ]; then
        fail "the packages need about $((need_kb / 1048576)) GB more in $PWD; free: $((free_kb / 1048576)) GB" \
            "Free some space, or move the clone to a larger disk, and run the same command again."
    fi
}

# Changes with everything that the environment is made from.
checksum() { cat requirements*.txt setup.py pyproject.toml tools/setup_env.sh <(echo "$PWD") | cksum; }

make_venv() {
    local base=$1
    if [ -x "$VENV/bin/python" ] && ! is_new_enough "$VENV/bin/python"; then
        fail "$VENV holds $("$VENV/bin/python" --version 2>&1); Python 3.11 or newer is needed" \
            "Remove that folder and run the same command again."
    fi
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    "$base" -m venv --clear "$VENV" || fail "could not make $VENV with $base" \
        "On Debian and Ubuntu the module venv is a package of its own: apt-get install python3-venv"
}

install_pinned() {
    local python=$1 site_packages
    say "[2/4] pinned packages (torch is large: a few GB the first time)"
    "$python" -m pip install -r requirements.txt -r requirements-dev.txt
    say "[3/4] Detectron2 (Python sources, checked by hash)"
    site_packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # The wheel is tagged for CPython 3.10 although its Python files run on any; pip needs to be told.
    "$python" -m pip install --quiet --require-hashes -r requirements-detectron2.txt --no-deps --upgrade \
        --only-binary=:all: --python-version 3.10 --implementation cp --target "$site_packages"
    say "[4/4] miti_detr itself, editable"
    "$python" -m pip install --quiet --no-deps --no-build-isolation -e .
}

add_missing() {
    local python=$1 missing
    missing=$("$python" - $NEEDED <<'PY'
import sys
from importlib import metadata

installed = {str(d.metadata["Name"]).lower().replace("_", "-") for d in metadata.distributions()}
print(*(name for name in sys.argv[1:] if name not in installed))
PY
    )
    if [ -n "$missing" ]; then
        say "adding to $python: $missing"
        "$python" -m pip install $missing
    fi
}

main() {
    local python own=false stamp
    python=$(active_python)
    if [ -z "$python" ]; then
        python="$VENV/bin/python"
        own=true
    fi
    if [ "${1:-}" = "--print-python" ]; then
        printf '%s\n' "$python"
        return
    fi
    stamp="$(dirname "$(dirname "$python")")/.miti-detr-setup"
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(checksum)" ]; then
        return
    fi
    if $own; then
        local base
        base=$(base_python)
        check_disk
        say "[1/4] $VENV with $("$base" --version)"
        make_venv "$base"
        install_pinned "$python"
    else
        say "using the active environment, which has Detectron2: $python"
        add_missing "$python"
    fi
    "$python" -W ignore -c 'import torch, torchvision, detectron2.modeling, miti_detr' ||
        fail "the environment of $python does not work: see above" "Mend or remove it and run the same command again."
    # An active environment may be read-only: then the check above runs every time.
    { checksum >"$stamp.$$" && mv "$stamp.$$" "$stamp"; } 2>/dev/null || true
    say "ready: $python"
}

main "$@"
