"""The sdist is the whole project and builds as much of the module as the machine allows; what it says of it is true."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="setup.py needs it")
pytest.importorskip("setuptools", reason="setup.py needs it")

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "csrc", "docs", "examples", "python", "saft_kernels", "tests")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py")
MODULE = f"saft_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
OUT = 'for word; do [ "$previous" = -o ] && out=$word; previous=$word; done'


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SAFT_") and name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env={**own, **environment}, capture_output=True, text=True)


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, **environment)


def script(file: Path, *lines: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)
    return file


def path_with(program: Path) -> str:
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy: an sdist leaves its metadata in the sources, and takes what an earlier one has left there."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".*")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in (*FILES, "MANIFEST.in"):
        shutil.copy(ROOT / file, tree)
    return tree


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    made = tmp_path_factory.mktemp("sdist")
    done = run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(made)], tree)
    assert done.returncode == 0, done.stderr
    (archive,) = made.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(made, filter="data")
    return next(folder for folder in made.iterdir() if folder.is_dir())


@pytest.fixture
def project(sdist: Path, tmp_path: Path) -> Path:
    """A copy of the unpacked sdist, to build in."""
    return Path(shutil.copytree(sdist, tmp_path / "project"))


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """In the place of a C++ compiler: notes its arguments, writes empty files, fails where FAILS matches."""
    calls, fails = f'echo "$*" >> {tmp_path}/calls.txt', 'case "$*" in $FAILS) exit 7;; esac'
    return script(tmp_path / "bin" / "fake-c++", calls, OUT, fails, ': > "$out"')


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """In the place of nvcc: writes empty objects."""
    return script(tmp_path / "cuda" / "nvcc", OUT, '[ -n "$out" ] && : > "$out"')


@pytest.fixture
def failing_nvcc(tmp_path: Path) -> Path:
    return script(tmp_path / "cuda" / "nvcc", "echo no licence >&2", "exit 3")


def calls(compiler: Path) -> list[str]:
    """What the fake compiler was asked for since the last look, the probes aside."""
    file = compiler.parents[1] / "calls.txt"
    lines = file.read_text().splitlines()
    file.unlink()
    return [line for line in lines if "probe.cpp" not in line]


def test_the_sdist_is_the_whole_project(tree: Path, sdist: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {
            str(file.relative_to(folder)) for name in FOLDERS for file in (folder / name).rglob("*") if file.is_file()
        }

    assert files(sdist) == files(tree)
    assert {"python/bindings_cuda.cpp", "tests/conftest.py", "csrc/sddmm/cuda.cu"} <= files(sdist)
    for name in FILES:
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_cpu_part_is_built_where_nvcc_fails(project: Path, failing_nvcc: Path) -> None:
    real = shutil.which("g++") or shutil.which("c++")
    if real is None:
        pytest.skip("no C++ compiler")
    fast = script(project / "c++", f'exec {real} "$@" -O0')  # it is to run, not to be fast
    done = build(project, CXX=str(fast), PATH=path_with(failing_nvcc))
    assert done.returncode == 0, done.stderr
    assert f"NOTICE: the CUDA part was not built: {failing_nvcc} failed with status 3" in done.stderr
    assert "install a C++17 compiler" not in done.stderr
    code = (
        "import torch; from saft_kernels import _C, ops; print(_C.__file__, _C.has_cuda,"
        "*ops.topk_magnitude([torch.tensor([1.0, -3.0, 2.0])], 2, backend='cpu').indices[0].tolist())"
    )
    used = run([sys.executable, "-c", code], project)
    assert used.stdout.split() == [str(project / MODULE), "False", "1", "2"], used.stderr


def test_a_cuda_part_that_does_not_link_is_left_out(project: Path, compiler: Path, nvcc: Path) -> None:
    done = build(project, CXX=str(compiler), FAILS="*-shared*cuda/device.o*", PATH=path_with(nvcc))
    assert done.returncode == 0, done.stderr
    assert f"NOTICE: the CUDA part was not built: {compiler} failed with status 7" in done.stderr
    assert (project / MODULE).exists()
    asked = calls(compiler)
    *_, first, second = (line for line in asked if "-shared" in line)
    assert "bindings_cuda.o" in first
    assert "cuda" not in second.replace(str(project), "")
    *_, bindings = (line for line in asked if line.count("python/bindings.cpp"))
    assert "SAFT_WITH_CUDA" not in bindings


@pytest.mark.parametrize("required", [False, True])
def test_without_a_compiler_the_package_installs_and_says_so(project: Path, required: bool) -> None:
    (project / MODULE).write_bytes(b"of an earlier build")
    done = build(project, CXX="/nowhere/c++", SAFT_REQUIRE_CPP=str(int(required)))
    assert (done.returncode == 0) == (not required)
    assert "there is no /nowhere/c++; install a C++17 compiler" in done.stderr
    assert ("NOTICE: the C++ module was not built" in done.stderr) == (not required)
    if not required:
        assert not (project / MODULE).exists()


def test_a_compiler_that_fails_is_not_to_be_installed(project: Path, compiler: Path) -> None:
    done = build(project, CXX=str(compiler), FAILS="*csrc/sddmm/cpu.cpp*", SAFT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert f"NOTICE: the C++ module was not built: {compiler} failed with status 7" in done.stderr
    assert "install a" not in done.stderr
    assert not (project / MODULE).exists()
    done = build(project, CXX=str(compiler), FAILS="*probe.cpp*", SAFT_BUILD_CUDA="0")
    assert f"{compiler} builds no C++17 program, not even an empty one; name another in CXX" in done.stderr


def test_cuda_that_is_asked_for_is_an_error(project: Path, compiler: Path, failing_nvcc: Path) -> None:
    done = build(project, CXX=str(compiler), SAFT_BUILD_CUDA="1", PATH=path_with(failing_nvcc))
    assert done.returncode != 0
    assert f"SAFT_BUILD_CUDA=1, but CUDA was not built: {failing_nvcc} failed with status 3" in done.stderr
    done = build(project, CXX=str(compiler), SAFT_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "SAFT_BUILD_CUDA: expected 0, 1 or auto, got 'yes'" in done.stderr


def test_a_module_of_other_parts_is_built_anew(project: Path, compiler: Path, nvcc: Path) -> None:
    """Times of files do not say that there is an nvcc now."""

    def asked(cuda: str) -> list[str]:
        done = build(project, CXX=str(compiler), SAFT_BUILD_CUDA=cuda, PATH=path_with(nvcc))
        assert done.returncode == 0, done.stderr
        return calls(compiler)

    assert not any("bindings_cuda" in line for line in asked("0"))
    assert asked("0") == []
    assert any("-c python/bindings_cuda.cpp" in line for line in asked("1"))
    assert any("-c python/bindings.cpp" in line for line in asked("0"))
    (project / "csrc/cpu/isa.h").touch()
    assert any("-c csrc/sddmm/cpu.cpp" in line for line in asked("0"))
