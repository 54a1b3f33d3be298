# Sourced by the other scripts from the repository root: a virtual environment in .venv with the project and the extras named in $1.
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/python" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
source .venv/bin/activate
python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
