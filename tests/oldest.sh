#!/usr/bin/env bash
# The oldest triton that pyproject.toml allows compiles every kernel, too; the installed one does in the other tests.
# Usage: tests/oldest.sh [python]. The oldest torch is 4.7 GB: .github/workflows/oldest.yml runs the tests with it.
set -euo pipefail
python=$(command -v "${1:-python3}")
[[ $python == /* ]] || python=$PWD/$python
cd "$(dirname "$0")/.."
oldest=$(sed -nE 's/^triton = \["triton>=([0-9.]+).*/\1.0/p' pyproject.toml)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PIP_CONSTRAINT= "$python" -m pip install --quiet --no-deps --target "$work" "triton==$oldest"
export PYTHONPATH=$work:$PWD
"$python" -c "import sys, triton; print('triton', triton.__version__); sys.exit(triton.__version__ != '$oldest')"
"$python" -m pytest -q -p no:cacheprovider -n 2 tests/test_*_triton.py -k ahead_of_time
