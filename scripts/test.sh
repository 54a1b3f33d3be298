#!/usr/bin/env bash
# Set up a virtual environment and run the tests. Needs only Python 3.11+; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "test"
# A process for each core, of one thread: two that spin beside another busy process run many times slower than one.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
