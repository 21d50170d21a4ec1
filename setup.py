"""Builds `saft_kernels._C` with setuptools, pybind11 and a C++17 compiler: no torch in the build.

Environment:
    SAFT_SANITIZE=1     builds with AddressSanitizer and UndefinedBehaviorSanitizer.
    SAFT_REQUIRE_CPP=1  makes a failed build an error (by default the package installs without the module, and the
                        reference backend serves).
    SAFT_BUILD_CUDA     auto (the default): with the CUDA sources where nvcc is found and compiles them; 1: an error
                        when they cannot be built; 0: without them.
    SAFT_CUDA_ARCHS     compute capabilities to compile for, "80;90" by default; newer GPUs compile the last one's PTX.
    SAFT_NVCC           the nvcc to use, instead of the one on PATH or under CUDA_HOME.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CUDA_BINDINGS = "python/bindings_cuda.cpp"
SOURCES = [path for path in sorted(glob("csrc/*/*.cpp") + glob("python/*.cpp")) if path != CUDA_BINDINGS]
CUDA_SOURCES = sorted(glob("csrc/*/*.cu"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
# as -ffp-contract=off below: the step's bits are those of the cpu backend, and fused ones drift from torch's AdamW
UNFUSED_SOURCES = ["csrc/sparse_adamw/cuda.cu"]
# no -march=native and no fast-math: one build serves every processor, and every instruction set gives the same bits
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
SANITIZE_ARGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
]


def compiles(compiler: list[str], flags: list[str]) -> bool:
    """Whether a two-line program compiles and links with `flags`."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, str(source), "-o", str(source.with_suffix(""))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def find_nvcc() -> str | None:
    """SAFT_NVCC, else the one on PATH, else CUDA_HOME's."""
    named = os.environ.get("SAFT_NVCC") or shutil.which("nvcc")
    if named:
        return named
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=str(Path(home, "bin")))


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where this nvcc would link from. It says so itself, wherever the toolkit lies."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cu")
        source.write_text("int main() { return 0; }\n")
        command = [nvcc, "--dryrun", "-o", str(source.with_suffix("")), str(source)]
        steps = subprocess.run(command, capture_output=True, text=True).stderr
    link = next((line for line in steps.splitlines() if "LIBRARIES=" in line), "")
    return [os.path.realpath(path) for path in re.findall(r'"-L([^"]+)"', link) if not path.endswith("stubs")]


def compile_cuda(nvcc: str, directory: Path) -> list[str]:
    """Compiles CUDA_SOURCES; returns the objects. Raises CalledProcessError."""
    archs = [arch.strip() for arch in os.environ.get("SAFT_CUDA_ARCHS", "80;90").split(";") if arch.strip()]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")

    def compile_one(source: str) -> str:
        target = directory / Path(source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++17", "-O3", "-lineinfo", *code, "-Icsrc"]
        if source in UNFUSED_SOURCES:
            command.append("-fmad=false")
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-c", source, "-o", str(target)]
        print(" ".join(command) + "\n", end="")  # in one write: others run beside it
        subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))


class BuildExt(build_ext):
    """Adds the flags the compiler knows; a failed build is a notice, not an error."""

    def add_cuda(self) -> None:
        """Adds the CUDA sources to the module, as SAFT_BUILD_CUDA says."""
        wanted = os.environ.get("SAFT_BUILD_CUDA", "auto")
        if wanted == "0" or os.environ.get("SAFT_SANITIZE") == "1":
            return
        nvcc = find_nvcc()
        try:
            if nvcc is None:
                raise FileNotFoundError("nvcc is neither on PATH nor under CUDA_HOME")
            libraries = cuda_library_dirs(nvcc)
            objects = compile_cuda(nvcc, Path(self.build_temp, "cuda"))
        except (OSError, subprocess.SubprocessError) as error:
            if wanted == "1":
                raise RuntimeError(f"SAFT_BUILD_CUDA=1, but the CUDA sources were not built: {error}") from error
            if nvcc is not None:
                reason = getattr(error, "returncode", error)  # nvcc has said the rest
                print(
                    f"\nsaft_kernels: NOTICE: {nvcc} failed ({reason}), so the module is built without CUDA kernels; "
                    "on a GPU the triton backend serves. SAFT_BUILD_CUDA=1 makes this an error, 0 leaves them out.\n",
                    file=sys.stderr,
                )
            return
        for extension in self.extensions:
            extension.sources.append(CUDA_BINDINGS)
            extension.extra_objects += objects
            extension.define_macros.append(("SAFT_WITH_CUDA", "1"))
            extension.library_dirs += libraries
            # static: the module imports where there is no driver
            extension.libraries += ["cudart_static", "rt", "pthread", "dl"]

    def build_extensions(self) -> None:
        """Called by setuptools once the compiler is known."""
        wanted = os.environ.get("SAFT_BUILD_CUDA", "auto")
        if wanted not in ("0", "1", "auto"):
            raise ValueError(f"SAFT_BUILD_CUDA: expected 0, 1 or auto, got {wanted!r}; leave it unset for auto")
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        if self.compiler.compiler_type == "unix":
            optional = ["-fopenmp", "-Wno-maybe-uninitialized"]
            for extension in self.extensions:
                extension.extra_compile_args += COMPILE_ARGS
                extension.extra_compile_args += [flag for flag in optional if compiles(compiler, [flag])]
                if compiles(compiler, ["-fopenmp"]):
                    extension.extra_link_args.append("-fopenmp")
                if os.environ.get("SAFT_SANITIZE") == "1":
                    extension.extra_compile_args += SANITIZE_ARGS
                    extension.extra_link_args += SANITIZE_ARGS
        try:
            self.add_cuda()
            super().build_extensions()
        except Exception as error:
            if "1" in (os.environ.get("SAFT_REQUIRE_CPP"), os.environ.get("SAFT_BUILD_CUDA")):
                raise
            for extension in self.extensions:
                extension.optional = True  # setuptools then copies only what exists
            print(
                f"\nsaft_kernels: NOTICE: the C++ module was not built ({error}). The package works without it, on the "
                "slower reference backend; install a C++17 compiler (Debian: apt install g++) and reinstall.\n",
                file=sys.stderr,
            )


extension = Pybind11Extension(
    "saft_kernels._C",
    SOURCES,
    include_dirs=["csrc"],
    depends=[*HEADERS, *CUDA_SOURCES, CUDA_BINDINGS],
    cxx_std=17,
)

with ParallelCompile("MAX_JOBS", default=os.cpu_count() or 1):
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
