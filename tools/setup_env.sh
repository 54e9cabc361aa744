#!/bin/sh
# Prepares the Python environment of `make`: finds a Python 3.11 or newer and runs setup_env.py with it.
#
#   tools/setup_env.sh                 make or repair the environment
#   tools/setup_env.sh --print-python  print the path of its Python
cd "$(dirname "$0")/.." || exit 1

for python in python python3 ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 .venv/bin/python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" tools/setup_env.py "$@"
    fi
done

echo "setup: error: Python 3.11 or newer is needed; found: $("${PYTHON:-python3}" --version 2>&1)" >&2
echo "setup: install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) and name it:" >&2
echo "setup: make setup PYTHON=python3.11" >&2
exit 1
