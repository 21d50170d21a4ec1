#!/usr/bin/env bash
# Builds the module with ASan and UBSan into a directory of its own and runs the cpu backend's op tests on it.
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/.."
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
SAFT_SANITIZE=1 SAFT_REQUIRE_CPP=1 "$python" -m pip install --quiet --no-deps --target "$target" .
# the interpreter is not instrumented, so the runtime comes first; torch and CPython never free their globals
export LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
export ASAN_OPTIONS=detect_leaks=0:strict_init_order=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$target SAFT_EXPECT_SANITIZED=1
"$python" -c "import saft_kernels._C as m; assert m.__file__.startswith('$target'), m.__file__"
"$python" -m pytest -q -p no:cacheprovider -k "cpu and not reference" \
  tests/test_topk_magnitude.py tests/test_gather_scatter.py tests/test_sparse_adamw.py
