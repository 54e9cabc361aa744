#!/usr/bin/env bash
# Runs every command of docs/benchmarks.md that has an --output folder, in order; what is there already is skipped.
#
#   tools/bench.sh PYTHON
#
# Each folder gets bench.json, charts and table.txt. A command that fails does not stop the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
failed=0

# Lines that end in a backslash go on in the next one.
commands=$(sed -e ':join' -e '/\\$/{N;s/\\\n//;b join' -e '}' docs/benchmarks.md | grep -E '^miti-detr bench .*--output output/bench/[0-9]')

while read -r _ _ words; do
    folder=$(sed -E 's/.*--output ([^ ]+).*/\1/' <<<"$words")
    if [ -f "$folder/bench.json" ]; then
        printf 'bench: %s is there\n' "$folder"
        continue
    fi
    printf 'bench: %s\n' "$folder"
    mkdir -p "$folder"
    # The words hold neither quotes nor patterns.
    # shellcheck disable=SC2086
    if ! "$python" -m miti_detr.cli bench $words </dev/null 2>&1 | tee "$folder/table.txt"; then
        printf 'bench: error: %s failed; its output is in table.txt\n' "$folder" >&2
        failed=1
    fi
done <<<"$commands"
exit $failed
