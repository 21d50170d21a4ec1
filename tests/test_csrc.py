"""The folders of csrc/: an op stands on what is shared, never on another op."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SHARED = {"cpu", "cuda"}
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
