#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the module in place, tests it, measures it, in under 6 minutes.
#
#   bash bench/gpu.sh RESULTS_DIR [PYTHON]
#
# Needs an NVIDIA GPU, nvcc, and a Python with torch, triton, numpy, pytest, hypothesis and pybind11; no network. Says
# which of pytest-xdist, open_clip, transformers, peft and matplotlib it misses, and goes on without.
# Writes RESULTS_DIR/{log.txt,*.csv,*.png,*.xml,ncu.txt}. What is worth most comes first. A stage that fails, or takes
# more than its time, does not stop the later ones and keeps the rows it has; the exit status is that of the first failure.
set -uo pipefail
results=$(mkdir -p "${1:?usage: gpu.sh RESULTS_DIR [PYTHON]}" && cd "$1" && pwd)
python=${2:-python3}
deadline=350
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

# has NAME: whether that package imports; says so when it does not
has() {
  "$python" -c "import $1" 2> /dev/null || { echo "=== missing: $1"; return 1; }
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
  stage build 150 bash -c "build $arch" || return $status
  stage report 30 "$python" -m saft_kernels
  local cub=""
  if echo '#include <cub/device/device_topk.cuh>' | nvcc -x cu -E - > /dev/null 2>&1; then
    timeout 100 nvcc -O3 -std=c++17 "-arch=sm_$arch" -shared -Xcompiler -fPIC -o bench/libcub_topk.so bench/cub_topk.cu &
    cub=$!
  else
    echo "=== cub: no cub/device/device_topk.cuh in this toolkit, so CUB DeviceTopK is not among the peers"
  fi

  local tests=("$python" -m pytest -q -p no:cacheprovider --durations=5)
  has xdist && tests+=(-n 8 --dist worksteal)
  stage tests 100 "${tests[@]}" tests/test_*_cuda.py tests/test_release.py -k gpu --junitxml "$results/tests_gpu.xml"
  stage tests-of-the-ops 60 "${tests[@]}" tests/test_topk_magnitude.py tests/test_sparse_adamw.py \
    tests/test_gather_scatter.py tests/test_sddmm.py tests/test_*_triton.py \
    -k "(cuda or triton) and not ahead_of_time" --junitxml "$results/tests_ops.xml"
  if [ -n "$cub" ]; then wait "$cub" || echo "=== cub: does not compile, so CUB DeviceTopK is not among the peers"; fi

  has matplotlib
  local cuda=(--device cuda --output "$results") topk=("$python" bench/bench_topk_magnitude.py)
  stage bench 45 "${topk[@]}" "${cuda[@]}" --numel 1e9 --data structured --dtype float32 bfloat16
  stage bench-step 40 "$python" bench/bench_sparse_adamw.py "${cuda[@]}"
  stage bench-host 15 "$python" bench/bench_host.py "${cuda[@]}"
  local models=()
  has open_clip && models+=(ViT-B-16 ViT-L-14)
  has transformers && models+=(decoder)
  has peft
  if [ ${#models[@]} != 0 ]; then
    stage bench-train-step 120 "$python" bench/bench_train_step.py "${cuda[@]}" --models "${models[@]}"
  fi
  stage bench-sddmm 25 "$python" bench/bench_sddmm.py "${cuda[@]}"
  stage kernels 30 "$python" bench/profile_topk_magnitude.py --output "$results/topk_magnitude_kernels.csv"
  stage bench-data 30 "${topk[@]}" "${cuda[@]}" --numel 1e9 --share 1e-3 --no-peers --data gaussian all_equal one_tile \
    --name topk_magnitude_cuda_data
  stage bench-large 40 "${topk[@]}" "${cuda[@]}" --numel 4e9 8e9 --share 1e-3 1e-2 --dtype bfloat16 float32 --no-peers \
    --data gaussian --name topk_magnitude_cuda_large
  if command -v ncu > /dev/null; then
    # the second call's five kernels
    stage ncu 60 ncu --clock-control none --kernel-name 'regex:(sample|filter|select|emit|emit_large)_kernel' \
      --launch-skip 5 --launch-count 5 --section SpeedOfLight --section MemoryWorkloadAnalysis \
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
