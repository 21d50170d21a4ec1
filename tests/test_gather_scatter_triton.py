"""gather and scatter_ on Triton: the op's own tests on small tiles, and the kernel compiled ahead of time.

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
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

pytest.importorskip("triton", reason="triton is not installed")

import test_gather_scatter as op_tests
from conftest import Backend, assert_same_bits
from triton_tools import (
    ARCHS,
    DEVICE,
    INTERPRETED,
    archs_to_compile_for,
    compile_facts,
    divide_tests,
    printed_facts,
    recording,
    run_interpreted,
    start_script,
)

triton_gather = importlib.import_module("saft_kernels.ops.triton.gather_scatter")

OP = "gather"
BACKEND = Backend("triton", "triton", device=DEVICE)
SMALL = triton_gather.Tuning(block=256)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gather, "TUNING", SMALL)


@pytest.fixture
def backend() -> Backend:
    return BACKEND


if INTERPRETED:
    # the op's tests, with this file's `backend`; on a GPU they run where they are
    for name, function in vars(op_tests).items():
        if name.startswith("test_") and "backend" in inspect.signature(function).parameters:
            globals()[name] = function
    del test_any_number_of_threads  # noqa: F821


def test_tails() -> None:
    """Counts around the size of a tile, of items of every size at once: one launch."""
    counts = [0, 1, *(SMALL.block + d for d in (-1, 0, 1)), 2 * SMALL.block + 7]
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
    tensors = [BACKEND.to(op_tests.random_values(1_000, dtype)) for dtype in dtypes for _ in counts]
    indices = [BACKEND.to(op_tests.random_index(1_000, n, torch.int32, seed=n)) for _ in dtypes for n in counts]
    with recording(triton_gather, run=True) as (names, _):
        values = BACKEND.gather(tensors, indices)
        targets = [torch.zeros_like(t) for t in tensors]
        BACKEND.scatter_(targets, indices, values)
    assert names == ["copy_items_kernel"] * 2
    for tensor, index, value, target in zip(tensors, indices, values, targets, strict=True):
        source, written = op_tests.elements(tensor), op_tests.elements(target)
        assert op_tests.elements(value) == [source[i] for i in index.tolist()]
        chosen = set(index.tolist())
        nothing = bytes(tensor.itemsize)
        assert written == [item if i in chosen else nothing for i, item in enumerate(source)]


def test_indices_out_of_range_are_left_out() -> None:
    op_tests.check_left_out(triton_gather.gather, triton_gather.scatter_, BACKEND)


def test_many_tiny_tensors() -> None:
    torch.manual_seed(0)
    sizes = torch.randint(0, 4, (400,)).tolist()
    base = torch.randn(sum(sizes), device=DEVICE)
    tensors = list(base.split(sizes))
    indices = [torch.randperm(n, device=DEVICE) for n in sizes]
    values = BACKEND.gather(tensors, indices)
    copy = torch.zeros_like(base)
    BACKEND.scatter_(list(copy.split(sizes)), indices, values)
    assert_same_bits(copy, base)
    assert [v.tolist() for v in values] == [t[i].tolist() for t, i in zip(tensors, indices, strict=True)]


def specs(numel: int, count: int, scatter: bool, dtypes: list[torch.dtype]) -> dict[tuple[Any, ...], Any]:
    tensors = [torch.zeros(numel, dtype=dtype, device=DEVICE) for dtype in dtypes]
    indices = [torch.zeros(count, dtype=torch.int64, device=DEVICE) for _ in dtypes]
    with recording(triton_gather, run=False) as (_, found):
        if scatter:
            triton_gather.scatter_(tensors, indices, [t[:count] for t in tensors])
        else:
            triton_gather.gather(tensors, indices, [t[:count] for t in tensors])
    return found


def test_nothing_recompiles_for_another_size() -> None:
    expected = set(specs(100, 16, False, [torch.float32]))
    for numel, count in ((100, 1), (5_000, 4_999), (16, 16)):
        assert set(specs(numel, count, False, [torch.float32] * 3)) == expected
    assert specs(0, 0, False, [torch.float32]) == {}


# ---- ahead of time ----

EVERY_SIZE = [torch.int8, torch.int16, torch.int32, torch.int64, torch.complex128]


@pytest.fixture(scope="module", autouse=True)
def compilers(request: pytest.FixtureRequest) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """They work while the other tests run."""
    processes = {arch: start_script(__file__, arch) for arch in archs_to_compile_for(request.session, __name__)}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_ahead_of_time(compilers: dict[int, subprocess.Popen[str]], arch: int) -> None:
    facts = printed_facts(compilers[arch])
    assert [fact["constants"]["SCATTER"] for fact in facts] == [0, 1]
    for fact in facts:
        assert fact["stack"] == fact["local"] == fact["local_accesses"] == fact["shared"] == 0, fact
        assert fact["reg"] <= 64, fact  # 8 blocks of 4 warps on a multiprocessor


def test_interpreted() -> None:
    run_interpreted(__file__)


divide_tests(globals(), ("test_interpreted", "test_compiles_ahead_of_time"))

if __name__ == "__main__":
    for scatter in (False, True):
        for spec in specs(64, 8, scatter, EVERY_SIZE).values():
            print(json.dumps(compile_facts(int(sys.argv[1]), *spec)), flush=True)
