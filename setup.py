"""Builds `saft_kernels._C` with setuptools, pybind11 and a C++17 compiler: no torch in the build.

Environment: SAFT_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer;
SAFT_REQUIRE_CPP=1 makes a failed build an error (by default the package installs without the module, and
the reference backend serves).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

SOURCES = [
    "python/bindings.cpp",
    "csrc/gather_scatter_cpu.cpp",
    "csrc/sparse_adamw_cpu.cpp",
    "csrc/topk_magnitude_cpu.cpp",
]
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


class BuildExt(build_ext):
    """Adds the flags the compiler knows; a failed build is a notice, not an error."""

    def build_extensions(self) -> None:
        """Called by setuptools once the compiler is known."""
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
            super().build_extensions()
        except Exception as error:
            if os.environ.get("SAFT_REQUIRE_CPP") == "1":
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
    depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
    cxx_std=17,
)

with ParallelCompile("MAX_JOBS", default=os.cpu_count() or 1):
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
