#!/usr/bin/env bash
# All that needs a CUDA device, on one: the tests, the table of LoRA kernels, the benchmarks. Needs an environment with the extras test and bench.
#   scripts/bench/gpu.sh [OUTPUT]     writes rows to OUTPUT (scripts/bench/results/gpu.json by default) and measured kernels to lora/kernel_table.json
set -uo pipefail
cd "$(dirname "$0")/../.."
output=${1:-scripts/bench/results/gpu.json}
python -m pytest -m gpu
tests=$?
python scripts/bench/tune_lora.py
tuned=$?
python scripts/bench/all.py --json "$output"
benched=$?
exit $((tests || tuned || benched))
