#!/usr/bin/env bash
# What is gained by training how much: the demo with its bridge alone, LoRA on attention, LoRA on attention and feed-forward layers, and everything trained.
#   scripts/compare_demo.sh [OUTPUT]     runs go to OUTPUT/NAME (runs/demo-NAME by default), scores to their results/
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
prefix=${1:-runs/demo-}
compare() { python train.py --output "$prefix$1" "${@:2}" && python evaluate.py "$prefix$1" --split val --decode beam; }
compare bridge --lora-targets none
compare attn --lora-targets attn
compare attn-ffn --lora-targets attn,ffn
compare everything --lora-targets none --train-base vision,text --lr 1e-3
