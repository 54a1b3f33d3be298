#!/usr/bin/env bash
# Set up a virtual environment and run the tests. Needs only Python 3.11+; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "test"
python -m pytest "$@"
