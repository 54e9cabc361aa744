#!/usr/bin/env bash
# Trains one config to the end and leaves its table and pictures beside it; run again it goes on, or says that it is done.
#
#   tools/train.sh PYTHON CONFIG OUTPUT [KEY VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1 config=$2 output=$3
shift 3
table="$output/inference/coco_table.txt"
weights="$output/model_final.pth"

# One of torch about itself, at every import of torchvision.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"

say() { printf 'train: %s\n' "$*"; }

if [ ! -f "$config" ]; then
    printf 'train: error: no config %s; there are:\n' "$config" >&2
    find configs -name '*.yaml' | sort >&2
    exit 1
fi

# Overrides may ask for more training than the finished run had, so only a bare call is taken as done. A table that is
# older than the weights is of an earlier evaluation: the run was stopped in its last one.
if [ $# -eq 0 ] && [ -f "$weights" ] && [ "$table" -nt "$weights" ]; then
    say "$output is trained already; to train anew, remove that folder or name another: make train OUTPUT=..."
else
    if [ -f "$output/last_checkpoint" ]; then
        say "$output: going on from $(cat "$output/last_checkpoint")"
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
say "done: $output holds $(cd "$output" && ls -d -- *.png config.yaml log.txt metrics.json model_final.pth 2>/dev/null | tr '\n' ' ')"
