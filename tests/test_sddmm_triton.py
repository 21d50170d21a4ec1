"""sddmm on Triton: the op's own tests through the interpreter, and the kernel compiled ahead of time.

See triton_tools for the processes in which they run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

pytest.importorskip("triton", reason="triton is not installed")

import test_sddmm as op_tests
import triton
from conftest import Backend
from triton_tools import (
    ARCHS,
    DEVICE,
    INTERPRETED,
    archs_to_compile_for,
    compile_facts,
    divide_tests,
    printed_facts,
    run_interpreted,
    start_script,
)

triton_sddmm = importlib.import_module("saft_kernels.ops.triton.sddmm")

OP = "sddmm"
BACKEND = Backend("triton", "triton", device=DEVICE)
DTYPES = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32", "fp64": "fp64"}  # of the factors, and of their sums


@pytest.fixture
def backend() -> Backend:
    return BACKEND


if INTERPRETED:
    # the op's tests, with this file's `backend`; on a GPU they run where they are
    for name, function in vars(op_tests).items():
        if name.startswith("test_") and "backend" in inspect.signature(function).parameters:
            globals()[name] = function
    del test_same_bits_over_runs_and_thread_counts  # noqa: F821


# ---- ahead of time ----


@pytest.fixture(scope="module", autouse=True)
def compilers(request: pytest.FixtureRequest) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """They work while the other tests run."""
    processes = {arch: start_script(__file__, arch) for arch in archs_to_compile_for(request.session, __name__)}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


# 4 blocks of 4 warps on a multiprocessor
REGISTERS = 128
# Before 3.8, triton sums up the fp64 tokens in another way after the loop, which is the same: 3 blocks
REGISTERS_FP64_BEFORE_3_8 = 144


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_ahead_of_time(compilers: dict[int, subprocess.Popen[str]], arch: int) -> None:
    facts = printed_facts(compilers[arch])
    assert len(facts) == len(DTYPES)
    is_old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    for dtype, fact in zip(DTYPES, facts, strict=True):
        assert fact["stack"] == fact["local"] == fact["local_accesses"] == 0, fact  # nothing spilled
        assert fact["reg"] <= (REGISTERS_FP64_BEFORE_3_8 if dtype == "fp64" and is_old else REGISTERS), fact
        assert fact["shared"] <= 4 * 1024, fact
        # both factors by vectors of 16 B
        assert ("ld.global.v2.b64" if dtype == "fp64" else "ld.global.v4.b32") in fact["loads"], fact


def test_interpreted() -> None:
    run_interpreted(__file__)


divide_tests(globals(), ("test_interpreted", "test_compiles_ahead_of_time"))

if __name__ == "__main__":
    import triton.language as tl

    for factor, opmath in DTYPES.items():
        kernel, tuning = triton_sddmm.dot_kernel, triton_sddmm.TUNING
        constants = {
            "ACCUMULATE": False,
            "OPMATH": tl.float64 if opmath == "fp64" else tl.float32,
            "ENTRIES": tuning.entries,
            "TOKENS": tuning.tokens,
        }
        types = [f"*{factor}", f"*{factor}", "*i32", f"*{opmath}", "i32", "i32", "i32"]
        signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
        facts = compile_facts(
            int(sys.argv[1]), kernel, signature, constants, tuning.num_warps, unaligned=("k", "num_inputs")
        )
        print(json.dumps(facts), flush=True)
