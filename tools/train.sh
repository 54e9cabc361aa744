#!/usr/bin/env bash
# Trains one config and writes its table and pictures. Run again, it resumes, or reports that the run is complete.
#
#   tools/train.sh PYTHON CONFIG OUTPUT [KEY VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1 config=$2 output=$3
shift 3
table="$output/inference/coco_table.txt"
weights="$output/model_final.pth"

# Every import of torchvision gives a warning about torch itself.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"

say() { printf 'train: %s\n' "$*"; }

if [ ! -f "$config" ]; then
    printf 'train: error: no such config: %s. Use one of:\n' "$config" >&2
    find configs -name '*.yaml' | sort >&2
    exit 1
fi

# Overrides may ask for more training than the finished run had, so the run counts as complete only without them. A
# table that is older than the weights belongs to an earlier evaluation: the run was stopped during its last one.
if [ $# -eq 0 ] && [ -f "$weights" ] && [ "$table" -nt "$weights" ]; then
    say "$output is already trained. To train again, remove that folder or choose another: make train OUTPUT=..."
else
    if [ -f "$output/last_checkpoint" ]; then
        say "$output: resuming from $(cat "$output/last_checkpoint")"
    else
        say "$config -> $output"
    fi
    "$python" train_net.py --config-file "$config" --resume OUTPUT_DIR "$output" "$@"
    rm -f "$output/curves.png" "$output/detections.png"
fi

if [ ! -f "$output/curves.png" ]; then
    "$python" -m miti_detr.cli curves "$output" --output "$output/curves.png"
fi
if [ ! -f "$output/detections.png" ]; then
    "$python" -m miti_detr.cli detections --config-file "$config" --weights "$weights" \
        --output "$output/detections.png" "$@"
fi

cat "$table"
say "done: $output contains $(cd "$output" && ls -d -- *.png config.yaml log.txt metrics.json model_final.pth 2>/dev/null | tr '\n' ' ')"
