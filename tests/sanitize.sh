#!/usr/bin/env bash
# Builds the module with ASan and UBSan in a copy of the sources and runs the cpu backend's op tests on it.
# Usage: tests/sanitize.sh [python [pytest arguments]]
set -euo pipefail
python=$(command -v "${1:-python3}")
shift $(($# > 0))
[[ $python == /* ]] || python=$PWD/$python
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
# a copy: the module in place stays what it is
cd "$root"
cp -r csrc python saft_kernels setup.py pyproject.toml README.md LICENSE "$copy"
cd "$copy" # Python puts the working directory first on its path
rm -f saft_kernels/*.so
SAFT_SANITIZE=1 SAFT_REQUIRE_CPP=1 "$python" setup.py --quiet build_ext --inplace
# the interpreter is not instrumented, so the runtime comes first; torch and CPython never free their globals
export LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
export ASAN_OPTIONS=detect_leaks=0:strict_init_order=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$copy
"$python" -c "import saft_kernels._C as m; assert m.__file__.startswith('$copy'), m.__file__"
# -s: a report would be lost in the captured output of the test that ends the process
"$python" -m pytest -q -s -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" -k "cpu and not reference" "$@" \
  "$root"/tests/test_{topk_magnitude,topk_magnitude_rows,gather_scatter,sddmm,sparse_adamw}.py
