"""What the tests of the CUDA kernels share: their build for the CPU, what nvcc makes of them, and the need of a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from saft_kernels import ops

ROOT = Path(__file__).resolve().parents[1]
SANITIZER = os.environ.get("SAFT_CUDA_HOST_SANITIZER", "")
SANITIZED = SANITIZER != ""
SANITIZE_FLAGS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer"],
}


# ---- host: the kernels on the CPU ----


def host_library(name: str) -> ctypes.CDLL:
    """tests/cuda_host/<name>.cpp, built by g++ with cuda_host.h for CUDA, anew only when a source changed."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernels for the CPU")
    flags = [
        "-std=c++17",
        "-O1" if SANITIZED else "-O2",
        "-g1",
        "-fPIC",
        "-shared",
        "-fno-gnu-unique",  # shared memory is of one library, not of all that are loaded
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    flags += SANITIZE_FLAGS[SANITIZER]
    sources = sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/*/*.cu"), *ROOT.glob("tests/cuda_host/*")])
    digest = hashlib.sha256(" ".join([name, *flags]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = Path(tempfile.gettempdir(), f"saft_kernels_cuda_host_{digest.hexdigest()[:16]}.so")
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        source = str(ROOT / f"tests/cuda_host/{name}.cpp")
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_host'}"]
        build = subprocess.run([compiler, *flags, *includes, source, "-o", str(made)], capture_output=True, text=True)
        assert build.returncode == 0, build.stderr
        made.replace(library)
    return ctypes.CDLL(str(library))


def run_sanitized(file: str, keyword: str, sanitizer: str = "address") -> None:
    """Tests of `file` in a process of their own: "address", and undefined behavior with it, or "thread"."""
    runtimes = []
    for name in ({"address": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so"):
        found = (
            subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
            if shutil.which("g++")
            else None
        )
        if found is None or not Path(found.stdout.strip()).is_absolute():
            pytest.skip(f"g++ or its {name} is missing")
        runtimes.append(found.stdout.strip())
    environment = dict(os.environ, SAFT_CUDA_HOST_SANITIZER=sanitizer, LD_PRELOAD=":".join(runtimes))
    # CPython never frees its globals
    environment.update(
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        TSAN_OPTIONS="halt_on_error=1",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", keyword]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert re.search(r"\b[1-9]\d* passed", run.stdout), run.stdout[-4000:]


# ---- nvcc: registers, spills, shared memory ----


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one."""

    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int

    @property
    def local_memory(self) -> bool:
        return (self.stack, self.spill_stores, self.spill_loads) != (0, 0, 0)


def compile_kernels(source: str, arch: int, directory: Path) -> dict[str, Kernel]:
    """The kernels of csrc/<source>, by name, as nvcc compiles them for an architecture; warnings are errors."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-Xptxas=-v", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}"]
    command += ["-c", str(ROOT / "csrc" / source), "-o", str(directory / "kernels.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = subprocess.run(["c++filt"], input=run.stderr, capture_output=True, text=True).stdout
    kernels = {}
    for entry in report.split("Compiling entry function")[1:]:
        name = re.search(r"(\w+(?:<[\w: ]+>)?)\(", entry)
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        assert name is not None, entry
        assert local is not None, entry
        assert registers is not None, entry
        numbers = [*map(int, local.groups()), int(registers[1]), int(shared[1]) if shared else 0]
        kernels[name[1]] = Kernel(*numbers)
    return kernels


def ptx_kernels(source: str, arch: int) -> dict[str, str]:
    """The PTX of the kernels of csrc/<source>, by mangled name."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    command = [nvcc, "-std=c++17", "-O3", f"-arch=compute_{arch}", "-ptx", f"-I{ROOT / 'csrc'}"]
    run = subprocess.run([*command, str(ROOT / "csrc" / source), "-o", "-"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", run.stdout, re.DOTALL))


# ---- gpu ----

WHY_NO_GPU = (
    "no GPU that torch can use" if not torch.cuda.is_available() else ops.why_unavailable("cuda", device_type="cuda")
)
needs_gpu = pytest.mark.skipif(WHY_NO_GPU is not None, reason=f"cuda: {WHY_NO_GPU}")


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"{gigabytes:.0f} GiB of GPU memory are needed, {free:.0f} are free")


def run_under_compute_sanitizer(tool: str, program: str) -> None:
    """A Python program under compute-sanitizer, whose findings are errors."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    run = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), capture_output=True, text=True
    )
    output = run.stdout + run.stderr
    if "not supported" in output and "Device" in output:
        pytest.skip("compute-sanitizer does not support this machine")
    assert run.returncode == 0, output[-4000:]
