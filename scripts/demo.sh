#!/usr/bin/env bash
# Set up, train bridge and LoRA of the embedded demo on drawn scenes, evaluate it, and rerank samples. Needs only Python 3.11+ and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
python train.py --lora-targets attn,ffn
python evaluate.py --split val --decode beam
python best_of_n.py --split val --n 10
