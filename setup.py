"""Builds `saft_kernels._C` with setuptools, pybind11 and a C++17 compiler: no torch in the build.

Environment:
    SAFT_SANITIZE=1     builds with AddressSanitizer and UndefinedBehaviorSanitizer.
    SAFT_REQUIRE_CPP=1  makes a failed build an error (by default the package installs without the module, and the
                        reference backend serves).
    SAFT_BUILD_CUDA     auto (the default): with the CUDA part where there is an nvcc and the part builds; 1: an error
                        when it does not; 0: without it.
    SAFT_CUDA_ARCHS     compute capabilities to compile for, "80;90" by default; newer GPUs compile the last one's PTX.
    SAFT_NVCC           the nvcc to use, instead of the one on PATH or under CUDA_HOME.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CUDA_BINDINGS = "python/bindings_cuda.cpp"
SOURCES = [path for path in sorted(glob("csrc/*/*.cpp") + glob("python/*.cpp")) if path != CUDA_BINDINGS]
CUDA_SOURCES = sorted(glob("csrc/*/*.cu"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("python/*.h"))
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


def notice(text: str) -> None:
    """Says why the build does less than it could, and goes on."""
    print(f"\nsaft_kernels: NOTICE: {text}\n", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """The error in a few words: which program failed, where one did, without its hundred arguments."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, subprocess.CalledProcessError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return str(error)
    return f"{cause.cmd[0]} failed with status {cause.returncode}; see its messages above"


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


def check_tools(compiler: list[str]) -> None:
    """Raises RuntimeError, with what to install, when no extension module could be compiled here."""
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"there is no {compiler[0]}; install a C++17 compiler (Debian: apt install g++), or name one in CXX"
        )
    if not compiles(compiler, ["-std=c++17"]):
        raise RuntimeError(f"{compiler[0]} builds no C++17 program, not even an empty one; name another in CXX")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise RuntimeError(f"there is no {header}; install Python's headers (Debian: apt install python3-dev)")


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
    """Compiles CUDA_SOURCES; returns the objects. Raises CalledProcessError, or OSError where nvcc does not start."""
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
    """Adds the flags the compiler knows, and CUDA. What cannot be built is a notice, not an error."""

    def add_compile_args(self, compiler: list[str]) -> None:
        """The flags this compiler knows."""
        optional = [flag for flag in ("-fopenmp", "-Wno-maybe-uninitialized") if compiles(compiler, [flag])]
        for extension in self.extensions:
            extension.extra_compile_args += COMPILE_ARGS + optional
            extension.extra_link_args += [flag for flag in optional if flag == "-fopenmp"]
            if os.environ.get("SAFT_SANITIZE") == "1":
                extension.extra_compile_args += SANITIZE_ARGS
                extension.extra_link_args += SANITIZE_ARGS

    def build_with_cuda(self, nvcc: str) -> None:
        """All sources into one module. When that fails, the extensions are as they were."""
        plain = self.extensions
        try:
            objects = compile_cuda(nvcc, Path(self.build_temp, "cuda"))
            self.extensions = [copy.copy(extension) for extension in plain]
            for extension in self.extensions:
                extension.sources = [*extension.sources, CUDA_BINDINGS]
                extension.extra_objects = [*extension.extra_objects, *objects]
                extension.define_macros = [*extension.define_macros, ("SAFT_WITH_CUDA", "1")]
                extension.library_dirs = [*extension.library_dirs, *cuda_library_dirs(nvcc)]
                # static: the module imports where there is no driver
                extension.libraries = [*extension.libraries, "cudart_static", "rt", "pthread", "dl"]
            self.force = True  # the objects are new
            self.build_plain()
        except Exception:
            self.extensions = plain
            raise

    def build_plain(self) -> None:
        """The extensions as they are. A module that other sources, flags or tools made is not up to date."""
        made_of = repr([(e.sources, e.extra_compile_args, e.define_macros) for e in self.extensions])
        record = Path(self.build_temp, "made_of.txt")
        self.force = self.force or not record.exists() or record.read_text() != made_of
        record.unlink(missing_ok=True)
        super().build_extensions()
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(made_of)

    def build_module(self, cuda: str) -> None:
        """With CUDA, if that is asked for and can be; else without."""
        if self.compiler.compiler_type == "unix":
            compiler = self.compiler.compiler_cxx
            check_tools(compiler)
            self.add_compile_args(compiler)
        nvcc = None if cuda == "0" else find_nvcc()
        if nvcc is not None:
            try:
                return self.build_with_cuda(nvcc)
            except Exception as error:
                if cuda == "1":
                    raise RuntimeError(f"SAFT_BUILD_CUDA=1, but CUDA was not built: {reason(error)}") from error
                notice(
                    f"the CUDA part was not built: {reason(error)}. The module has the CPU kernels alone, and on a GPU "
                    "the triton backend serves. SAFT_BUILD_CUDA=1 makes this an error, 0 leaves CUDA out."
                )
        elif cuda == "1":
            raise RuntimeError("SAFT_BUILD_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
        self.build_plain()

    def build_extensions(self) -> None:
        """Called by setuptools once the compiler is known."""
        cuda = os.environ.get("SAFT_BUILD_CUDA", "auto")
        if cuda not in ("0", "1", "auto"):
            raise ValueError(f"SAFT_BUILD_CUDA: expected 0, 1 or auto, got {cuda!r}; leave it unset for auto")
        if os.environ.get("SAFT_SANITIZE") == "1":
            cuda = "0"  # the CUDA runtime does not start under AddressSanitizer
        try:
            self.build_module(cuda)
        except Exception as error:
            if "1" in (os.environ.get("SAFT_REQUIRE_CPP"), cuda):
                raise
            for extension in self.extensions:
                extension.optional = True  # setuptools then copies only what exists
            notice(
                f"the C++ module was not built: {reason(error)}. The package works without it, on the slower reference "
                "backend. SAFT_REQUIRE_CPP=1 makes this an error."
            )

    def run(self) -> None:
        """The command."""
        super().run()
        for extension in self.extensions:
            if extension.optional:  # not built: a module that an earlier build left would pass for it
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)


class BuildPy(build_py):
    """Takes examples/ along as saft_kernels/examples, out of which `saft-kernels examples` copies."""

    def run(self) -> None:
        """The command."""
        super().run()
        for script, target in self._examples().items():
            self.mkpath(os.path.dirname(target))
            self.copy_file(script, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Files that are installed."""
        return [*super().get_outputs(include_bytecode), *self._examples().values()]

    def _examples(self) -> dict[str, str]:
        """Where each script goes. In an editable installation they stay where they are."""
        scripts = [] if self.editable_mode else glob("examples/*.py")
        return {script: os.path.join(self.build_lib, "saft_kernels", script) for script in scripts}


extension = Pybind11Extension(
    "saft_kernels._C",
    SOURCES,
    include_dirs=["csrc"],
    depends=[*HEADERS, *CUDA_SOURCES, CUDA_BINDINGS],
    cxx_std=17,
)

with ParallelCompile("MAX_JOBS", default=os.cpu_count() or 1):
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
