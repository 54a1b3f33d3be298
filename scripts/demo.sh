#!/usr/bin/env bash
# Set up, train the embedded demo on drawn scenes, and evaluate it. Needs only Python 3.11+ and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
python train.py --lora-targets attn,ffn
python evaluate.py --split val --decode beam
