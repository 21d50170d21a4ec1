"""The CUDA backend of topk_magnitude: its kernels executed on the CPU, compiled by nvcc, and run on a GPU.

- host: the same sources, built by g++ with tests/cuda_host in the place of the CUDA runtime. Tiles, sample and band
  cache are small there, so that little data has many tiles and outgrows every cache.
- nvcc: registers, spills and shared memory of every kernel, as ptxas reports them.
- gpu: what needs real hardware: sizes above 2^32, streams, repeats, compute-sanitizer.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_kernels import (
    SANITIZED,
    compile_kernels,
    host_library,
    needs_gpu,
    needs_memory,
    ptx_kernels,
    run_sanitized,
    run_under_compute_sanitizer,
)
from torch import Tensor

from saft_kernels import ops
from saft_kernels.ops import TopK, cuda, reference, tables

TILE = 2048  # SAFT_CUDA_TILE_NUMEL of tests/cuda_host/topk_magnitude.cpp
SAMPLE = 4096  # elements: its 2^9 runs of 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- the inputs that break selectors ----


def heavy_tailed(numel: int, seed: int = 0) -> Tensor:
    """Row- and column-correlated magnitudes over many orders, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(1, math.isqrt(numel))
    rows = -(-numel // columns)
    scale = torch.randn(rows, 1, generator=generator).exp() * torch.randn(1, columns, generator=generator).exp()
    return (torch.randn(rows, columns, generator=generator) * scale * 1e-3).flatten()[:numel].clone()


def bit_pattern(first: int, count: int) -> Tensor:
    """fp32 numbers with consecutive bits."""
    return torch.arange(first, first + count, dtype=torch.int32).view(torch.float32)


def scattered(numel: int, share: float, value: float, background: Tensor, seed: int = 1) -> Tensor:
    """`value` at random places of `background`."""
    chosen = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(chosen, value, background)


def one_hot_tile(numel: int, at: int) -> Tensor:
    """All large values in one tile."""
    x = heavy_tailed(numel) * 1e-6
    x[at * TILE : (at + 1) * TILE] += 5.0
    return x


def periodic(numel: int, period: int) -> Tensor:
    x = torch.full((numel,), 1e-3)
    x[::period] = 1.0
    return x


def hidden_from_the_sample(numel: int) -> Tensor:
    """Runs of 8 that are large, fewer of them than strata have a chance to catch."""
    x = heavy_tailed(numel) * 1e-9
    for start in range(1000, numel - 8, numel // 6):
        x[start : start + 8] = 1.0 + torch.arange(8)
    return x


def strided() -> list[Tensor]:
    x = heavy_tailed(4 * 60 * 70).view(4, 60, 70)
    return [
        x.transpose(1, 2),
        x[:, ::2, 3:],
        x[1].t()[5:],
        torch.randn(1, 50).expand(70, 50),
        heavy_tailed(9000)[::3],
        x.flip(0)[:, 1:].contiguous()[:, :, 1:],
    ]


def unaligned(dtype: torch.dtype) -> list[Tensor]:
    x = heavy_tailed(40000).to(dtype)
    return [
        x[offset : offset + numel] for offset, numel in ((1, 7), (3, 2047), (5, 2048), (7, 4096), (2, 20001), (0, 9))
    ]


N = 60_001 if SANITIZED else 150_001
CASES: dict[str, Callable[[], list[Tensor]]] = {
    "heavy-tailed": lambda: [heavy_tailed(N)],
    "gaussian-bf16": lambda: [torch.randn(N, generator=torch.Generator().manual_seed(3)).bfloat16()],
    "gaussian-fp16": lambda: [torch.randn(N, generator=torch.Generator().manual_seed(4)).half()],
    "heavy-tailed-fp64": lambda: [heavy_tailed(N).double() * math.pi],
    "many-tensors": lambda: [
        heavy_tailed(n, n) for n in (1, 0, 3, TILE - 1, TILE, TILE + 1, 0, 0, 50_000, 5, 70_000, 0)
    ],
    "mixed-dtypes": lambda: [heavy_tailed(n, n).to(d) for n, d in zip((9_000, 20_000, 30_000), DTYPES, strict=False)],
    "mixed-with-fp64": lambda: [
        heavy_tailed(n, n).to(d) for n, d in zip((9_000, 9_001, 30_000, 7_000), DTYPES, strict=True)
    ],
    "all-equal": lambda: [torch.full((N,), -0.75)],
    "all-equal-bf16": lambda: [torch.full((N,), -0.75).bfloat16(), torch.full((N // 3,), 0.75)],
    "all-zero": lambda: [torch.zeros(N), -torch.zeros(N // 7)],
    "all-zero-fp64": lambda: [torch.zeros(N, dtype=torch.float64)],
    "few-nonzeros": lambda: [scattered(N, 1e-3, 2.0, torch.zeros(N))],
    "half-zeros": lambda: [heavy_tailed(N).relu(), heavy_tailed(N // 2).relu().bfloat16()],
    "narrow": lambda: [1 + 3e-5 * torch.rand(N, generator=torch.Generator().manual_seed(5))],
    "consecutive-bits": lambda: [bit_pattern(0x3F80_0000, N).flip(0).contiguous()],
    "denormals": lambda: [bit_pattern(1, N), bit_pattern(0, 3000)],
    "denormals-fp16": lambda: [(torch.arange(N) % 1023).to(torch.int16).view(torch.float16)],
    "nonfinite-few": lambda: [scattered(N, 1e-4, math.inf, scattered(N, 1e-4, math.nan, heavy_tailed(N), 8))],
    "nonfinite-many": lambda: [
        scattered(N, 0.4, -math.inf, scattered(N, 0.5, math.nan, heavy_tailed(N), 9)).bfloat16()
    ],
    "all-nan": lambda: [torch.arange(0x7F80_0001, 0x7F80_0001 + N, dtype=torch.int32).view(torch.float32)],
    "all-inf-fp16": lambda: [torch.full((N,), math.inf).half()],
    "one-tile": lambda: [one_hot_tile(N, 3), heavy_tailed(3000) * 1e-6],
    "one-tensor": lambda: [heavy_tailed(N) * 1e-8, heavy_tailed(2 * TILE), heavy_tailed(N) * 1e-8],
    "tie-run-across-tiles": lambda: [
        torch.cat([heavy_tailed(9000), torch.full((3 * TILE,), 0.01)]),
        torch.full((9000,), 0.01),
    ],
    "few-values-bf16": lambda: [torch.randint(1, 9, (N,), generator=torch.Generator().manual_seed(6)).bfloat16()],
    "period-of-the-sample": lambda: [periodic(SAMPLE * 32, 8 * 32)],
    "period-of-a-row": lambda: [periodic(N, 1024), periodic(N, TILE).bfloat16()],
    "hidden-from-the-sample": lambda: [hidden_from_the_sample(N)],
    "tiny-tensors": lambda: [heavy_tailed(1 + i % 5, i) for i in range(1000)],
    "strided": strided,
    "strided-bf16": lambda: [x.bfloat16().transpose(0, -1) for x in strided()],
    "unaligned": lambda: unaligned(torch.float32),
    "unaligned-bf16": lambda: unaligned(torch.bfloat16),
    "unaligned-fp64": lambda: unaligned(torch.float64),
    "0-d": lambda: [torch.tensor(2.0), torch.tensor(-3.0, dtype=torch.bfloat16), torch.empty(0)],
    "sorted": lambda: [heavy_tailed(N).abs().sort().values, heavy_tailed(N).abs().sort(descending=True).values],
}


def ks(numel: int) -> list[int]:
    chosen = (
        {0, numel // 100, numel}
        if SANITIZED
        else {0, 1, numel // 1000, numel // 100, numel // 7, numel // 2, numel - 1, numel}
    )
    return sorted(chosen)


@functools.cache
def inputs(case: str) -> tuple[Tensor, ...]:
    return tuple(CASES[case]())


@functools.cache
def expected(case: str, k: int) -> TopK:
    return reference.topk_magnitude(inputs(case), k)


def assert_equal(actual: TopK, wanted: TopK) -> None:
    for i, (got, want) in enumerate(zip(actual.indices, wanted.indices, strict=True)):
        assert torch.equal(got.cpu(), want.cpu()), f"indices[{i}]"
    np.testing.assert_equal(actual.threshold, wanted.threshold)
    assert actual.num_nonfinite == wanted.num_nonfinite


# ---- host: the kernels on the CPU ----


class Plan(ctypes.Structure):
    """saft::TopKCudaPlan."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("num_tensors", "k", "numel", "any_double", "num_tiles", "num_runs", "num_sampled_runs"),
            *("slab_bytes", "band_capacity", "table_bytes", "workspace_bytes", "result_words"),
        )
    ]


class HostKernels:
    """tests/cuda_host/topk_magnitude.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.topk_threshold.restype = ctypes.c_double

    def __call__(
        self,
        tensors: tuple[Tensor, ...] | list[Tensor],
        k: int,
        *,
        max_blocks: int = 0,
        seed: int = 0,
        num_resident: int = 1,
        fill: int = 0xFF,
    ) -> tuple[TopK, int]:
        """The result, and how often the data was read.

        `num_resident`: blocks that run at a time, in turns. `fill`: a byte of the workspace, or -1 for random ones.
        """
        layouts = tables.Layouts()
        rows = tables.tensor_table(layouts, tensors)
        plan = Plan()
        self.library.topk_plan(
            ctypes.c_void_p(rows.ctypes.data), ctypes.c_int64(len(tensors)), ctypes.c_int64(k), ctypes.byref(plan)
        )
        bound = (0.3 if plan.any_double else 0.23) * plan.numel + 300 * plan.num_tensors + 40e6
        assert plan.workspace_bytes <= bound
        workspace = np.full(plan.workspace_bytes + 256, max(fill, 0), dtype=np.uint8)
        if fill < 0:
            workspace[:] = np.random.default_rng(seed).integers(0, 256, workspace.size, dtype=np.uint8)
        indices = torch.full((k,), -1, dtype=torch.int64)
        result = np.full(plan.result_words, -1, dtype=np.int64)
        self.library.topk_run(
            ctypes.byref(plan),
            ctypes.c_void_p(rows.ctypes.data),
            ctypes.c_void_p(workspace.ctypes.data + -workspace.ctypes.data % 256),
            ctypes.c_void_p(indices.data_ptr()),
            ctypes.c_void_p(result.ctypes.data),
            ctypes.c_int(max_blocks),
            ctypes.c_uint64(seed),
            ctypes.c_uint(num_resident),
        )
        assert result[cuda._STATUS] == 0
        occupied = np.array([t.numel() > 0 for t in tensors])
        counts = np.zeros(len(tensors), dtype=np.int64)
        counts[occupied] = np.diff(np.append(result[cuda._OFFSETS :][occupied], k))
        threshold = self.library.topk_threshold(ctypes.byref(plan), ctypes.c_int64(int(result[cuda._THRESHOLD])))
        found = TopK(indices.split(counts.tolist()), threshold, int(result[cuda._NONFINITE]))
        return found, int(result[cuda._READS])


@pytest.fixture(scope="session")
def host() -> HostKernels:
    return HostKernels(host_library("topk_magnitude"))


@pytest.mark.parametrize("case", CASES)
def test_host_matches_reference(host: HostKernels, case: str) -> None:
    tensors = inputs(case)
    for i, k in enumerate(ks(sum(t.numel() for t in tensors))):
        found, reads = host(
            tensors, k, seed=i, max_blocks=(0, 1, 3)[i % 3], num_resident=1 + i % 2, fill=(0xFF, 0, -1)[i % 3]
        )
        assert_equal(found, expected(case, k))
        # the guess, three or six digits of the key, and the filter with the exact key
        assert 1 <= reads <= (8 if any(t.dtype == torch.float64 for t in tensors) else 5)


def test_host_does_not_depend_on_schedule_or_old_memory(host: HostKernels) -> None:
    for case in ("mixed-dtypes", "few-values-bf16", "hidden-from-the-sample"):
        tensors = inputs(case)
        k = sum(t.numel() for t in tensors) // 50
        for seed in (0, 1, 2, 3):  # ascending, descending and two random orders of threads and blocks
            for max_blocks, num_resident in ((1, 1), (2, 2), (0, 1), (0, 3)):
                found, _ = host(tensors, k, max_blocks=max_blocks, seed=seed, num_resident=num_resident, fill=-1)
                assert_equal(found, expected(case, k))


@pytest.mark.parametrize("case", ["heavy-tailed", "gaussian-bf16", "all-zero", "mixed-dtypes", "unaligned"])
def test_host_reads_the_data_once(host: HostKernels, case: str) -> None:
    tensors = inputs(case)
    assert host(tensors, sum(t.numel() for t in tensors) // 100)[1] == 1


@pytest.mark.parametrize(
    ("case", "k"),
    [("period-of-the-sample", 500), ("few-nonzeros", N // 100), ("all-zero-fp64", N // 3)],  # the cache overflows
)
def test_host_fallback_is_taken_and_right(host: HostKernels, case: str, k: int) -> None:
    found, reads = host(inputs(case), k)
    assert_equal(found, expected(case, k))
    assert reads > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "ties"])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize(("library", "tile"), [("topk_magnitude", TILE), ("topk_magnitude_full_tiles", 8192)])
def test_host_tiles_of_any_count(library: str, tile: int, offset: int, distinct: bool, dtype: torch.dtype) -> None:
    """Tiles of few and of many selected elements, full and partial ones, in any company; ties that end inside a tile.

    Four tiles share a warp, 32 a chunk, two chunks a group; the list of a tile's sure elements holds a 16th of it, and
    1,022 positions are written together.
    """
    host = HostKernels(host_library(library))
    generator = torch.Generator().manual_seed(offset)
    counts = [0, 1, 31, 32, 33, tile // 16, tile // 16 + 1, 1023, tile] * 9 + [0, 0, 0, 0, 5, 33, 40, 0]
    x = torch.zeros(len(counts) * tile + 100, dtype=dtype)
    for i, count in enumerate(counts):
        x[i * tile + torch.randperm(tile, generator=generator)[:count]] = 1.0
    x[-70:] = 1.0
    if distinct:
        x *= torch.rand(len(x), generator=generator).to(dtype) + 1
    tensors = [x[offset : 60 * tile], x[60 * tile + offset : 60 * tile + 999], x[61 * tile + offset :]]
    selected = sum(int(t.count_nonzero()) for t in tensors)
    for i, k in enumerate((selected, selected - 1, selected // 2, 33)):
        assert_equal(host(tensors, k, seed=i)[0], reference.topk_magnitude(tensors, k))


def sampled(numel: int, runs_log2: int) -> Tensor:
    """Which elements of one tensor the sample reads: what an adversary needs to know."""
    word, run_numel = 2**64 - 1, 8
    num_runs = -(-numel // run_numel)
    assert num_runs > 2**runs_log2
    mask = torch.zeros(num_runs, run_numel, dtype=torch.bool)
    for stratum in range(2**runs_log2):
        z = (stratum + 0x9E3779B97F4A7C15) & word
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ z >> 27) * 0x94D049BB133111EB & word
        mask[(stratum * num_runs + ((z ^ z >> 31) * num_runs >> 64)) >> runs_log2] = True
    return mask.flatten()[:numel]


def misleading(numel: int, runs_log2: int, sampled_are: str) -> Tensor:
    x = heavy_tailed(numel).clamp(-1, 1)
    seen = sampled(numel, runs_log2)
    return torch.where(seen, x * (1e6 if sampled_are == "large" else 1e-6), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampled_are", ["large", "small"])
def test_host_misleading_sample(host: HostKernels, sampled_are: str, dtype: torch.dtype) -> None:
    """The bracket misses the threshold on either side: the data says so, and is read again."""
    x = misleading(N, 9, sampled_are).to(dtype if dtype != torch.float16 else torch.bfloat16)
    x = x if dtype != torch.float16 else (x * 1e-2).to(dtype)
    missed = 0
    for k in (1, 40, N // 100, N // 10, N // 2, N - 1):
        found, reads = host([x], k)
        assert_equal(found, reference.topk_magnitude([x], k))
        missed += reads > 1
    assert missed >= 2


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_host_under_sanitizers() -> None:
    """The cases again, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    run_sanitized(__file__, "host_matches or tiles_of_any")


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("k", [300, 20_000])
@pytest.mark.parametrize("data", ["once", "again"])
def test_host_blocks_at_the_same_time(host: HostKernels, data: str, k: int, seed: int) -> None:
    """Three blocks in turns; in one order and another, of which some lag behind."""
    tensors = [heavy_tailed(40_000), heavy_tailed(9000).bfloat16()]
    if data == "again":  # the cache overflows
        tensors = [scattered(40_000, 5e-3, 2.0, torch.zeros(40_000)), scattered(9000, 0.5, 1.0, torch.zeros(9000))]
        k //= 5
    found, _ = host(tensors, k, seed=seed, num_resident=3, fill=-1)
    assert_equal(found, reference.topk_magnitude(tensors, k))


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_host_has_no_races() -> None:
    """ThreadSanitizer, which takes fibers for threads, and orders them by what orders threads on a GPU."""
    run_sanitized(__file__, "same_time", "thread")


# ---- nvcc: registers, spills, shared memory ----

# The hot kernels must fit this many registers for the occupancy that their launch bounds promise.
REGISTERS = {
    **{"filter_kernel<unsigned int>": 64, "filter_kernel<unsigned long>": 85},
    **{"sample_kernel<unsigned int>": 64, "sample_kernel<unsigned long>": 85},
    **{f"select_kernel<unsigned {key}>": 85 for key in ("int", "long")},
    **{f"emit_kernel<unsigned {key}>": 40 for key in ("int", "long")},
    **{f"emit_large_kernel<unsigned {key}>": 64 for key in ("int", "long")},
}
KERNELS = 11  # five, for 31-bit and for 63-bit keys, and the upload of the table


@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_compiles_without_spills(
    arch: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kernels = compile_kernels("topk_magnitude/cuda.cu", arch, tmp_path)
    assert len(kernels) == KERNELS, kernels
    for name, kernel in kernels.items():
        record_property(f"sm_{arch} {name}", f"{kernel.registers} registers, {kernel.shared} B shared")
        print(f"sm_{arch} {name}: {kernel.registers} registers, {kernel.shared} B shared")
        assert not kernel.local_memory, f"{name} uses local memory"
        assert kernel.registers <= REGISTERS.get(name, 255), f"{name} needs {kernel.registers} registers"
        assert kernel.shared <= 48 << 10


def test_nvcc_kernels_wait_before_they_read() -> None:
    """A kernel that is launched early touches no memory before the ones before it have ended."""
    kernels = ptx_kernels("topk_magnitude/cuda.cu", 90)
    early = {name: body for name, body in kernels.items() if "upload" not in name}
    assert len(early) == KERNELS - 1
    for name, body in early.items():
        before, wait, _ = body.partition("griddepcontrol.wait")
        assert wait, f"{name} does not wait"
        assert not re.search(r"^\s*(@%p\d+ )?(bra|ret|exit|(ld|st|atom|red)\.(?!param))", before, re.MULTILINE), name
    assert not any("griddepcontrol" in body for body in ptx_kernels("topk_magnitude/cuda.cu", 80).values())


# ---- gpu ----


@pytest.fixture
def knobs() -> Iterator[None]:
    """`cuda.MAX_BLOCKS` and `cuda.FILL_WORKSPACE` are what they were afterwards."""
    before = cuda.MAX_BLOCKS, cuda.FILL_WORKSPACE
    yield
    cuda.MAX_BLOCKS, cuda.FILL_WORKSPACE = before


def on_gpu(case: str) -> list[Tensor]:
    """The case's tensors with the same strides and alignment."""
    moved = []
    for x in inputs(case):
        base = x._base if x._base is not None else x
        storage = torch.empty(0, dtype=x.dtype).set_(base.untyped_storage()).cuda()
        moved.append(storage.as_strided(x.shape, x.stride(), x.storage_offset()))
    return moved


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_matches_reference(case: str, knobs: None) -> None:
    tensors = on_gpu(case)
    for i, k in enumerate(ks(sum(t.numel() for t in tensors))):
        cuda.MAX_BLOCKS, cuda.FILL_WORKSPACE = (0, 1, 3)[i % 3], (0xFF, 0, 0xB5)[i % 3]
        assert_equal(ops.topk_magnitude(tensors, k, backend="cuda"), expected(case, k))


@needs_gpu
def test_gpu_matches_reference_at_full_tiles() -> None:
    """Large enough that the bracket, the bitmaps and the band cache work as they do in earnest."""
    generator = torch.Generator("cuda").manual_seed(0)
    for dtype in DTYPES:
        sizes = (30_000_000, 1_234_567, 8192, 77)
        tensors = [torch.randn(n + 3, device="cuda", generator=generator).to(dtype)[3:] for n in sizes]
        for share in (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5):
            k = int(share * sum(sizes))
            pending = cuda.launch_topk_magnitude(tensors, k)
            assert_equal(pending.result(), ops.topk_magnitude(tensors, k, backend="reference"))
            assert pending.reads == 1 or share > 0.1, (dtype, share)


@needs_gpu
@pytest.mark.parametrize("sampled_are", ["large", "small"])
def test_gpu_misleading_sample(sampled_are: str) -> None:
    x = misleading(5_000_000, 17, sampled_are).cuda()
    missed = 0
    for k in (1, 40, 50_000, 500_000, 2_500_000):
        pending = cuda.launch_topk_magnitude([x], k)
        assert_equal(pending.result(), ops.topk_magnitude([x], k, backend="reference"))
        missed += pending.reads > 1
    assert missed >= 2


@needs_gpu
@pytest.mark.parametrize("exponent", [31, 32])
def test_gpu_beyond_32_bits(exponent: int) -> None:
    """bf16, N just above 2^31 and 2^32: values at known places, on zeros and on noise too small to count."""
    numel = 2**exponent + 12_345
    needs_memory(2.6 * numel / 2**30 + 1)
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([0, 1, 8191, 8192, 2**31 - 1, 2**31, 2**31 + 1, numel - 8193, numel - 1], device="cuda")
    x[places] = 3.0
    for k in (5, 9):
        found = ops.topk_magnitude([x], k, backend="cuda")
        assert torch.equal(found.indices[0], places[:k])
        assert found.threshold == 3.0
    found = ops.topk_magnitude([x], 12, backend="cuda")  # fewer non-zeros than k: zeros fill up from the front
    assert torch.equal(found.indices[0], torch.cat([places, torch.tensor([2, 3, 4], device="cuda")]).sort().values)
    for start in range(0, numel, 2**28):
        x[start : start + 2**28].uniform_(-1, 1)
    x[places] = 3.0
    found = ops.topk_magnitude([x[: numel // 2], x[numel // 2 :]], 9, backend="cuda")
    first = found.indices[0].numel()
    assert torch.equal(torch.cat([found.indices[0], found.indices[1] + numel // 2]), places)
    assert first == int((places < numel // 2).sum())
    # counts of everything above the threshold, and none left out below it
    k = numel // 100
    found = ops.topk_magnitude([x], k, backend="cuda")
    above = sum(int((x[s : s + 2**28].abs() > found.threshold).sum()) for s in range(0, numel, 2**28))
    at_least = sum(int((x[s : s + 2**28].abs() >= found.threshold).sum()) for s in range(0, numel, 2**28))
    assert above < k <= at_least
    assert found.indices[0].numel() == k
    assert bool((found.indices[0].diff() > 0).all())
    assert bool((x[found.indices[0]].abs() >= found.threshold).all())


@needs_gpu
def test_gpu_repeats_are_bit_equal(knobs: None) -> None:
    tensors = [torch.randn(5_000_011, device="cuda").bfloat16(), torch.randn(3_000_001, device="cuda")]
    k = 80_000
    first = ops.topk_magnitude(tensors, k, backend="cuda")
    for repeat in range(100):
        cuda.FILL_WORKSPACE = repeat % 256
        cuda.MAX_BLOCKS = (0, 7, 64)[repeat % 3]
        again = ops.topk_magnitude(tensors, k, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(first.indices, again.indices, strict=True))
        assert again[1:] == first[1:]


@needs_gpu
def test_gpu_two_streams_do_not_disturb_each_other() -> None:
    inputs_ = [[torch.randn(20_000_000, device="cuda")], [torch.randn(30_000_000, device="cuda").bfloat16()]]
    ks_ = (20_000, 300_000)
    wanted = [ops.topk_magnitude(x, k, backend="cuda") for x, k in zip(inputs_, ks_, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs_]
    pending = []
    for _ in range(10):
        for stream, x, k in zip(streams, inputs_, ks_, strict=True):
            with torch.cuda.stream(stream):
                pending.append(cuda.launch_topk_magnitude(x, k))
    for i, one in enumerate(pending):
        with torch.cuda.stream(streams[i % 2]):
            assert_equal(one.result(), wanted[i % 2])


@needs_gpu
def test_gpu_launch_does_not_wait() -> None:
    """The host is back long before a queue that is already full of work."""
    x = torch.randn(50_000_000, device="cuda")
    cuda.launch_topk_magnitude([x], 1000).result()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    pending = cuda.launch_topk_magnitude([x], 1000)
    assert not torch.cuda.current_stream().query(), "the launch waited for the stream"
    assert sum(i.numel() for i in pending.result().indices) == 1000


@needs_gpu
def test_gpu_in_a_graph() -> None:
    x = torch.randn(3_000_001, device="cuda")
    cuda.launch_topk_magnitude([x], 3000).result()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pending = cuda.launch_topk_magnitude([x], 3000)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert_equal(pending.result(), ops.topk_magnitude([x], 3000, backend="reference"))


@needs_gpu
def test_gpu_workspace_is_as_stated() -> None:
    x = torch.randn(100_000_000, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.topk_magnitude([x], 100_000, backend="cuda")
    assert torch.cuda.max_memory_allocated() - before <= 0.23 * x.numel() + 40e6 + 8 * 100_000


@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_gpu_under_compute_sanitizer(tool: str) -> None:
    program = """
import torch
from saft_kernels.ops import cuda
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    tensors = [torch.randn(n + 1, device="cuda").to(dtype)[1:] for n in (300_000, 1, 8192)]
    tensors.append(torch.zeros(70, 90, device="cuda").t())
    for k in (0, 300, 30_000, 308_193 + 6_300):
        assert sum(i.numel() for i in cuda.topk_magnitude(tensors, k).indices) == k
"""
    run_under_compute_sanitizer(tool, program)
