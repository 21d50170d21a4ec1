"""The folders of csrc/: an op stands on what is shared, never on another op. What is built of it runs on any x86-64."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SHARED = {"cpu", "cuda"}
# what x86-64 came with is SSE2: AVX, BMI and SSE3 to SSE4.2 are for functions that the processor was asked for
NEWER = re.compile(
    r" +[0-9a-f]+:\t(v\w+|popcnt|lzcnt|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|crc32|movbe"
    r"|h(add|sub)p[sd]|addsubp[sd]|movs[hl]dup|movddup|lddqu|pshufb|ph\w+|pabs[bwd]|palignr|ptest|round[sp][sd]|blend\w+"
    r"|pblend\w+|pmul(ld|dq)|p(min|max)(s[bd]|u[wd])|pmov[sz]x\w+|pinsr[bdq]|pextr[bdq]|extractps|insertps|pcmp\w*q)\s"
)
OPS = {folder.name for folder in CSRC.iterdir() if folder.is_dir()} - SHARED


def included(file: Path) -> list[str]:
    """What a file includes of csrc/: folder/file, or the file alone where it lies above the folders."""
    return re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)


def test_folders_include_themselves_and_what_is_shared() -> None:
    files = [file for file in CSRC.rglob("*.*") if file.is_file()]
    assert {"topk_magnitude", "sparse_adamw", "gather_scatter", "sddmm"} <= OPS
    for file in files:
        for path in included(file):
            assert (CSRC / path).is_file(), f"{file}: {path} is not relative to csrc/"
            folder = Path(path).parent.name
            if folder in OPS:
                assert folder == file.parent.name, f"{file} includes {path}"


def test_an_op_has_a_contract_and_both_kernels() -> None:
    for op in OPS:
        assert {f"{op}.h", "cpu.cpp", "cuda.cu"} <= {file.name for file in (CSRC / op).iterdir()}, op


def test_instructions_of_newer_processors_stay_in_functions_named_for_them() -> None:
    module = pytest.importorskip("saft_kernels._C", reason="the compiled module is missing")
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs x86-64 and objdump")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", module.__file__]
    function, newer = "", set()
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            function = line
        elif NEWER.match(line):
            newer.add(function)
    assert newer
    assert [function for function in newer if not re.search("avx2|avx512", function)] == []
