#!/usr/bin/env bash
# Builds the module with ASan and UBSan into a directory of its own and runs the cpu backend's op tests on it.
# Usage: tests/sanitize.sh [python [pytest arguments]]
set -euo pipefail
python=$(command -v "${1:-python3}")
shift $(($# > 0))
root=$(cd "$(dirname "$0")/.." && pwd)
[[ $python == /* ]] || python=$PWD/$python
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
SAFT_SANITIZE=1 SAFT_REQUIRE_CPP=1 "$python" -m pip install --quiet --no-deps --no-build-isolation --target "$target" "$root"
# Python puts the working directory first on its path: away from the checkout, or its module would be tested
cd "$target"
# the interpreter is not instrumented, so the runtime comes first; torch and CPython never free their globals
export LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
export ASAN_OPTIONS=detect_leaks=0:strict_init_order=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$target
"$python" -c "import saft_kernels._C as m; assert m.__file__.startswith('$target'), m.__file__"
"$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" -k "cpu and not reference" "$@" \
  "$root"/tests/test_{topk_magnitude,gather_scatter,sparse_adamw}.py
