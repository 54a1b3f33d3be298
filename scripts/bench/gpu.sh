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
rows=K1,K2,K2b,K3,K3b,K6,K6b,K6c,K6d,K7,K7-fp32,K7-liger,K7-cce,T1,T1-bf16,T2,T3,T3-compiled,T4,T5-first,T5,T6-default,T6-same-bf16,T6-compiled
python scripts/bench/all.py --only "$rows,E1-hf,E1-open-clip,E1-open-clip-compiled,X1" --json "$output"
benched=$?
exit $((tests || tuned || benched))
