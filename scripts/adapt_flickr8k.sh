#!/usr/bin/env bash
# Adapt the frozen Flickr8k run to the drawn scenes: the run as it is, the bridge alone, LoRA on attention and feed-forward layers too.
#   scripts/adapt_flickr8k.sh [RUN]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
run=${1:-runs/flickr8k}
evaluate() { python evaluate.py "$@" --data scenes --split val --limit 200 --decode beam --num-beams 5 --max-length 30 --cache-features .cache/features --precision auto; }
train() { python train.py --preset base --base "$run" --data scenes --limit 1000 --epochs 8 --batch-size 32 --lr 3e-3 --eval-images 100 --eval-every 256 --cache-features .cache/features "$@"; }
evaluate "$run" --output results/flickr8k-on-scenes
train --lora-targets none --output "$run-scenes-bridge"
evaluate "$run-scenes-bridge"
train --lora-targets attn,ffn --output "$run-scenes-lora"
evaluate "$run-scenes-lora"
