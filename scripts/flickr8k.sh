#!/usr/bin/env bash
# The main job on real photographs: a frozen EfficientNet-Lite2 (ImageNet) and a small T5 decoder from scratch, on Flickr8k. Under an hour on two CPU cores.
#   scripts/flickr8k.sh DATA [WEIGHTS] [OUTPUT]
# DATA has train/ and val/ with images and metadata.jsonl; WEIGHTS is timm's tf_efficientnet_lite2 as safetensors.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: scripts/flickr8k.sh DATA [WEIGHTS] [OUTPUT]" >&2; exit 2; }
data=$(realpath "$1")
weights=$(realpath "${2:-$data/../weights/tf_efficientnet_lite2.safetensors}")
output=${3:-runs/flickr8k}
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
python train.py --preset base --data "$data" --vision "timm/tf_efficientnet_lite2:$weights" --image-size 288 --resize-mode squash --cache-features .cache/features \
  --text-config t5-mini --vocab-size 4000 --train-base text --lora-targets none --captions-per-image all --max-caption-tokens 24 \
  --no-length-buckets --epochs 14 --eval-every 250 --batch-size 48 --lr 1e-3 --schedule cosine --warmup-ratio 0.1 --weight-decay 0.05 --dropout 0.2 --label-smoothing 0.1 --best-by loss \
  --output "$output"
python evaluate.py "$output" --split val --decode beam --num-beams 10 --max-length 24 --tokenize ptb --cache-features .cache/features --precision auto
