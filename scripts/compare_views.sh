#!/usr/bin/env bash
# One view of 112 pixels, six of them, and one of 224, on Flickr8k: the table of views in the README. An hour and a quarter on one thread without bf16 units.
#   scripts/compare_views.sh DATA [WEIGHTS]
# DATA and WEIGHTS are those of scripts/flickr8k.sh.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: scripts/compare_views.sh DATA [WEIGHTS]" >&2; exit 2; }
data=$(realpath "$1")
weights=$(realpath "${2:-$data/../weights/tf_efficientnet_lite2.safetensors}")
cd "$(dirname "$0")/.."
source scripts/setup.sh ""

train() {  # NAME FLAGS…
  local output=runs/views-$1
  shift
  python train.py --preset base --data "$data" --vision "timm/tf_efficientnet_lite2:$weights" --resize-mode squash --cache-features .cache/features \
    --text-config t5-mini --vocab-size 4000 --train-base text --lora-targets none --captions-per-image all --max-caption-tokens 24 \
    --epochs 4 --eval-every 500 --batch-size 48 --lr 1e-3 --schedule cosine --warmup-ratio 0.1 --weight-decay 0.05 --dropout 0.2 --label-smoothing 0.1 --best-by loss \
    --precision fp32 --threads 1 --output "$output" "$@"
  python evaluate.py "$output" --split val --decode beam --num-beams 10 --max-length 24 --tokenize ptb --cache-features .cache/features
}

train one --image-size 112
train six --image-size 112 --views 6
train large --image-size 224
for pair in "one six" "six large"; do
  set -- $pair
  python evaluate.py --compare "runs/views-$1/results/val-beam/captions.jsonl" "runs/views-$2/results/val-beam/captions.jsonl"
done
