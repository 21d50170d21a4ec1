#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the module in place, tests it, measures it, in under 8 minutes.
#
#   bash bench/gpu.sh RESULTS_DIR [PYTHON]
#
# Needs an NVIDIA GPU, nvcc, and a Python with torch, triton, numpy, pytest, hypothesis and pybind11; no network.
# Writes RESULTS_DIR/{log.txt,*.csv,*.png,*.xml,ncu.txt}. A stage that fails does not stop the later ones; the exit
# status is that of the first failure.
set -uo pipefail
results=$(mkdir -p "${1:?usage: gpu.sh RESULTS_DIR [PYTHON]}" && cd "$1" && pwd)
python=${2:-python3}
deadline=470
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
status=0

# stage NAME SECONDS COMMAND...: runs it, within a limit; remembers the first failure
stage() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  if ((limit > deadline - SECONDS)); then limit=$((deadline - SECONDS)); fi
  echo "=== $name"
  if ((limit > 0)); then
    timeout --kill-after=10 "$limit" "$@"
    rc=$?
  else
    rc=124 # there is no time left
  fi
  if [ $rc = 0 ]; then
    echo "=== $name: ok after $((SECONDS - start)) s"
  else
    echo "=== $name: FAILED, status $rc, after $((SECONDS - start)) s"
    if [ $status = 0 ]; then status=$rc; fi
  fi
  return $rc
}

# has_packages NAME...: whether they import; says so when they do not
has_packages() {
  "$python" -c "import $(IFS=,; echo "$*")" 2> /dev/null || { echo "=== not measured, for want of: $*"; return 1; }
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory --format=csv
  nvcc --version | tail -2
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git log -1 --format='commit %h %s' 2> /dev/null
}

# What setup.py does, where setuptools is missing or too old for pyproject.toml.
build_by_hand() {
  "$python" - "$1" << 'PYTHON'
import glob, subprocess, sys, sysconfig
import pybind11
includes = ["-Icsrc", "-I" + pybind11.get_include(), "-I" + sysconfig.get_paths()["include"]]
host = "-fPIC,-fvisibility=hidden,-fopenmp,-ffp-contract=off,-fno-math-errno,-fno-trapping-math"
command = ["nvcc", "-O3", "-std=c++17", "-lineinfo", "-fmad=false", f"-arch=sm_{sys.argv[1]}", "-Xcompiler", host, "-DSAFT_WITH_CUDA=1"]
sources = glob.glob("csrc/*/*.cu") + glob.glob("csrc/*/*.cpp") + glob.glob("python/*.cpp")
target = "saft_kernels/_C" + sysconfig.get_config_var("EXT_SUFFIX")
sys.exit(subprocess.run([*command, *includes, "-shared", *sources, "-lgomp", "-o", target]).returncode)
PYTHON
}

build() {
  SAFT_BUILD_CUDA=1 SAFT_CUDA_ARCHS=$1 SAFT_REQUIRE_CPP=1 "$python" setup.py -q build_ext --inplace && return
  echo "setup.py failed; building by hand"
  build_by_hand "$1"
}

run() {
  local arch
  machine
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  export -f build build_by_hand
  export python
  stage build 180 bash -c "build $arch" || return $status
  stage report 60 "$python" -m saft_kernels
  if echo '#include <cub/device/device_topk.cuh>' | nvcc -x cu -E - > /dev/null 2>&1; then
    stage cub 90 nvcc -O3 -std=c++17 "-arch=sm_$arch" -shared -Xcompiler -fPIC -o bench/libcub_topk.so bench/cub_topk.cu
  else
    echo "=== cub: no cub/device/device_topk.cuh in this toolkit, so CUB DeviceTopK is not among the peers"
  fi

  stage tests 170 "$python" -m pytest -q -p no:cacheprovider tests/test_topk_magnitude_cuda.py -k gpu \
    --durations=8 --junitxml "$results/tests_cuda.xml"
  stage tests-step 60 "$python" -m pytest -q -p no:cacheprovider tests/test_sparse_ops_cuda.py -k gpu \
    --durations=8 --junitxml "$results/tests_step_cuda.xml"
  stage tests-of-the-op 60 "$python" -m pytest -q -p no:cacheprovider tests/test_topk_magnitude.py \
    -k "cuda or triton" --junitxml "$results/tests_op.xml"
  stage tests-of-the-step 60 "$python" -m pytest -q -p no:cacheprovider tests/test_sparse_adamw.py \
    tests/test_gather_scatter.py -k "cuda or triton" --junitxml "$results/tests_op_step.xml"

  stage tests-sddmm 40 "$python" -m pytest -q -p no:cacheprovider tests/test_sddmm.py tests/test_sddmm_cuda.py \
    tests/test_sddmm_triton.py -k "gpu or cuda or triton" --junitxml "$results/tests_sddmm.xml"

  stage bench-step 60 "$python" bench/bench_sparse_adamw.py --device cuda --output "$results"
  stage bench-sddmm 20 "$python" bench/bench_sddmm.py --device cuda --output "$results"

  local bench=("$python" bench/bench_topk_magnitude.py --device cuda --output "$results")
  stage kernels 40 "$python" bench/profile_topk_magnitude.py --output "$results/topk_magnitude_kernels.csv"
  stage bench 60 "${bench[@]}" --numel 1e9 --data structured --dtype float32 bfloat16 --name topk_magnitude_cuda
  stage bench-data 40 "${bench[@]}" --numel 1e9 --share 1e-3 --no-peers --data gaussian all_equal one_tile \
    --name topk_magnitude_cuda_data
  stage bench-large 60 "${bench[@]}" --numel 4e9 8e9 --share 1e-3 1e-2 --dtype bfloat16 float32 --no-peers \
    --data gaussian --name topk_magnitude_cuda_large
  if has_packages transformers; then
    stage bench-memory 60 "$python" bench/bench_memory.py --device cuda --models decoder \
      --methods 'torch AdamW|SparseAdamW|LoRA' --output "$results"
  fi
  if has_packages open_clip; then
    stage bench-train-step 60 "$python" bench/bench_train_step.py --device cuda --output "$results"
  fi
  if command -v ncu > /dev/null; then
    # the second call's ten kernels
    stage ncu 60 ncu --clock-control none --kernel-name 'regex:(filter|sample|refine|select|count|emit)_kernel' \
      --launch-skip 10 --launch-count 10 --section SpeedOfLight --section MemoryWorkloadAnalysis \
      --section Occupancy --section WarpStateStats --section InstructionStats --log-file "$results/ncu.txt" \
      "$python" bench/profile_topk_magnitude.py --once --numel 5e8 --dtype bfloat16 --share 1e-2
  else
    echo "=== ncu: not installed"
  fi
  if [ $status = 0 ]; then
    echo "=== all ok after $SECONDS s; results in $results"
  else
    echo "=== FAILED, status $status, after $SECONDS s; what was measured is in $results"
  fi
  return $status
}

run 2>&1 | tee "$results/log.txt"
exit "${PIPESTATUS[0]}"
