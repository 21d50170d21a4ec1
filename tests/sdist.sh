#!/usr/bin/env bash
# What a user gets of a release: sdist, wheel, a new environment (torch is borrowed from this one), one step.
# Usage: tests/sdist.sh [python]; what is set of CXX, PATH, SAFT_NVCC and SAFT_BUILD_CUDA holds for the build.
set -euo pipefail
python=$(command -v "${1:-python3}")
[[ $python == /* ]] || python=$PWD/$python
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
quietly() { "$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }
# a copy: an sdist leaves its metadata in the sources, and takes what an earlier one has left there
mkdir "$work/tree"
cd "$root"
tar --exclude='*.so' --exclude='__pycache__' --exclude='.git' --exclude='.venv' --exclude='./build' --exclude='*.egg-info' -cf - . \
  | tar -xf - -C "$work/tree"
cd "$work/tree"
quietly "$python" setup.py -q sdist --dist-dir "$work"
cd "$work"
quietly "$python" -m pip wheel -v --no-cache-dir --no-deps --no-build-isolation --wheel-dir . saft_kernels-*.tar.gz
grep NOTICE log || true
"$python" -m venv --without-pip env
"$python" -m pip --python env/bin/python install --quiet --no-deps --no-index saft_kernels-*.whl
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > borrowed.pth
mv borrowed.pth "$(env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
mkdir empty
cd empty
unset PYTHONPATH
../env/bin/python - << 'PYTHON'
import torch

import saft_kernels
from saft_kernels import SparseAdamW, ops

assert "/env/" in saft_kernels.__file__, saft_kernels.__file__
parameter = torch.nn.Parameter(torch.ones(1000))
before = parameter.detach().clone()
optimizer = SparseAdamW([parameter], density=0.01)
parameter.grad = torch.arange(1000.0)
optimizer.step()
changed = (parameter != before).nonzero().flatten().tolist()
assert changed == list(range(990, 1000)), changed
for backend in ops.BACKENDS:
    print(f"{backend}: {ops.why_unavailable(backend) or 'runs'}")
PYTHON
