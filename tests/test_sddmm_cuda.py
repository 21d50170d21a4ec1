"""The CUDA backend of sddmm: its kernels executed on the CPU, compiled by nvcc, and run on a GPU.

- host: the same source, built by g++ with tests/cuda_host in the place of the CUDA runtime. Blocks of tokens are small
  there. Values: as tests/test_sddmm.py has them.
- nvcc: registers, spills and shared memory of every kernel, as ptxas reports them.
- gpu: what needs real hardware, beside tests/test_sddmm.py: streams, repeats, compute-sanitizer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from cuda_kernels import (
    SANITIZED,
    compile_kernels,
    host_library,
    needs_gpu,
    run_sanitized,
    run_under_compute_sanitizer,
)
from test_sddmm import DTYPES, LAYOUTS, all_dtypes, check, factors, some
from torch import Tensor

from saft_kernels import ops
from saft_kernels.ops import cuda, tables

TOKEN_BLOCK = 128  # SAFT_CUDA_SDDMM_TOKEN_BLOCK of tests/cuda_host/sddmm.cpp


# ---- host: the kernels on the CPU ----


class HostKernels:
    """tests/cuda_host/sddmm.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.sddmm_workspace_bytes.restype = ctypes.c_int64

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        indices: Tensor,
        out: Tensor | None = None,
        *,
        max_blocks: int = 0,
        seed: int = 0,
        fill: int = 0xFF,
    ) -> Tensor:
        """What is in the workspace before the call, `fill`, and the schedule by `seed` do not matter."""
        dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
        values = torch.full(indices.shape, torch.nan, dtype=dtype) if out is None else out
        params = tables.sddmm_params(dy, x, indices, values, out is not None)
        row = np.frombuffer(params, tables.SDDMM_PARAMS)
        address = ctypes.c_void_p(row.ctypes.data)
        size = self.library.sddmm_workspace_bytes(address)
        channels = dy.shape[1] + x.shape[1]
        assert size <= channels * (1 + TOKEN_BLOCK * dy.itemsize) + 8 * len(indices) + 3 * 256
        workspace = np.full(size + 256, fill, dtype=np.uint8)
        aligned = workspace.ctypes.data + -workspace.ctypes.data % 256
        self.library.sddmm_run(address, ctypes.c_void_p(aligned), ctypes.c_int(max_blocks), ctypes.c_uint64(seed))
        return values


@pytest.fixture(scope="session")
def host() -> HostKernels:
    return HostKernels(host_library("sddmm"))


@all_dtypes
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, TOKEN_BLOCK, TOKEN_BLOCK + 1, 3 * TOKEN_BLOCK + 70])
def test_host_values(host: HostKernels, tokens: int, dtype: torch.dtype) -> None:
    """Tiles and blocks of tokens that are full, or not; channels of one tile, and of more."""
    for i, (outputs, inputs, count) in enumerate([(37, 29, 300), (3, 70, 40), (1, 1, 1)]):
        dy, x = factors(tokens, outputs, inputs, dtype)
        indices = some(outputs * inputs, count, [torch.int32, torch.int64][i % 2])
        check(host(dy, x, indices, seed=i, max_blocks=(0, 1, 3)[i], fill=(0xFF, 0, 0x7F)[i]), dy, x, indices)
        out = torch.full((count,), 0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        before = out.clone()
        check(host(dy, x, indices, out), dy, x, indices, added_to=before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_host_strides(host: HostKernels, layout: str) -> None:
    for dtype in DTYPES:
        dy, x = (LAYOUTS[layout](t) for t in factors(70, 33, 31, dtype))
        indices = some(33 * 31, 111)
        check(host(dy, x, indices), dy, x, indices)


@all_dtypes
def test_host_does_not_depend_on_schedule_or_old_memory(host: HostKernels, dtype: torch.dtype) -> None:
    dy, x = factors(150, 40, 50, dtype)
    indices = some(2_000, 60)
    expected = host(dy, x, indices)
    for seed in (0, 1, 2, 3):  # ascending, descending and two random orders of threads and blocks
        for max_blocks in (1, 2, 0):
            assert_same_bits(host(dy, x, indices, seed=seed, max_blocks=max_blocks, fill=37 * seed), expected)


def test_host_what_is_not_selected_does_not_matter(host: HostKernels) -> None:
    dy, x = factors(33, 90, 80)
    indices = torch.tensor([0, 161, 4_000, 7_199])
    expected = host(dy, x, indices)
    rows, columns = set((indices // 80).tolist()), set((indices % 80).tolist())
    dy[:, [i for i in range(90) if i not in rows]] = float("nan")
    x[:, [c for c in range(80) if c not in columns]] = float("inf")
    assert_same_bits(host(dy, x, indices), expected)


def test_host_denormals_of_fp16(host: HostKernels) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    dy = every[every.isfinite()][:, None]
    x = torch.ones_like(dy)
    indices = torch.tensor([0])
    for some_dy, some_x in zip(dy.split(9_001), x.split(9_001), strict=True):  # not at once: the sum of all is zero
        check(host(some_dy, some_x, indices), some_dy, some_x, indices)


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_host_under_sanitizers() -> None:
    """The values again, in a process of its own, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    run_sanitized(__file__, "host_strides or (host_values and bfloat16)")


# ---- nvcc: registers, spills, shared memory ----

KERNELS = 1 + 3 + 4  # mark, transpose by element size, dot by dtype


@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_compiles_without_spills(arch: int, tmp_path: Path) -> None:
    kernels = compile_kernels("sddmm/cuda.cu", arch, tmp_path)
    assert len(kernels) == KERNELS, list(kernels)
    for name, kernel in kernels.items():
        assert not kernel.local_memory, name
        assert kernel.registers <= 48, (name, kernel)  # 5 blocks of 256 threads on a multiprocessor
        assert kernel.shared <= 20 << 10, (name, kernel)


# ---- gpu ----


@pytest.fixture
def knobs() -> Iterator[None]:
    """`cuda.MAX_BLOCKS` and `cuda.FILL_WORKSPACE` are what they were afterwards."""
    before = cuda.MAX_BLOCKS, cuda.FILL_WORKSPACE
    yield
    cuda.MAX_BLOCKS, cuda.FILL_WORKSPACE = before


@needs_gpu
@all_dtypes
def test_gpu_repeats_are_bit_equal(dtype: torch.dtype, knobs: None) -> None:
    """More tokens than a block of them; a layer of a real size."""
    dy, x = (t.cuda() for t in factors(9_000, 1_024, 768, dtype))
    indices = some(1_024 * 768, 5_000).cuda()
    expected = ops.sddmm(dy, x, indices, backend="cuda")
    check(expected, dy, x, indices)
    for repeat in range(50):
        cuda.MAX_BLOCKS, cuda.FILL_WORKSPACE = (0, 7, 64)[repeat % 3], repeat
        assert_same_bits(ops.sddmm(dy, x, indices, backend="cuda"), expected)


@needs_gpu
def test_gpu_launch_does_not_wait() -> None:
    """The host is back long before a queue that is already full of work."""
    dy, x = (t.cuda() for t in factors(500, 64, 64))
    indices, out = some(4_096, 100).cuda(), torch.empty(100, device="cuda")
    cuda.sddmm(dy, x, indices, out, False)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    cuda.sddmm(dy, x, indices, out, False)
    assert not torch.cuda.current_stream().query(), "the launch waited for the stream"
    check(out, dy, x, indices)


@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_gpu_under_compute_sanitizer(tool: str) -> None:
    program = """
import torch
from saft_kernels import sddmm
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    dy, x = torch.ones(77, 100, dtype=dtype, device="cuda"), torch.ones(77, 90, dtype=dtype, device="cuda")
    assert sddmm(dy, x, torch.arange(0, 9000, 7, device="cuda"), backend="cuda").eq(77).all()
"""
    run_under_compute_sanitizer(tool, program)
