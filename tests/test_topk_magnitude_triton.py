"""topk_magnitude on Triton: small tiles, every path, and each kernel compiled ahead of time for GPUs that are not here.

See triton_tools for the processes in which they run. As a script,
`python tests/test_topk_magnitude_triton.py 90 float32: bfloat16:filter_kernel` prints what became of each kernel for
fp32 and of one for bf16, as JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

pytest.importorskip("triton", reason="triton is not installed")

from conftest import DEFAULTS, other_default
from triton_tools import (
    ARCHS,
    DEVICE,
    Specs,
    archs_to_compile_for,
    compile_facts,
    divide_tests,
    printed_facts,
    recording,
    run_interpreted,
    start_script,
)

from saft_kernels import TopK, ops

triton_topk = importlib.import_module("saft_kernels.ops.triton.topk_magnitude")
pieces = importlib.import_module("saft_kernels.ops.triton.topk_magnitude.pieces")

SIZES = pieces.Sizes(line=4, gathered_tile=512, direct_tile=1024)
SMALL = triton_topk.Tuning(
    SIZES,
    filter_warps=1,
    filter_vectors=16 if DEVICE == "cpu" else 32,
    gathered_block=256,
    words_warps=1,
    sample_lines=64,
    lines_per_program=32,
    small_numel=800,
    list_block=256,
    list_programs=2,
)
if DEVICE == "cuda":  # a block is no larger than a tile
    SMALL = replace(SMALL, sizes=pieces.Sizes(line=4, gathered_tile=1024, direct_tile=4096))
BORDER, TILE = SMALL.sizes.gathered_tile, SMALL.sizes.direct_tile

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_topk, "TUNING", SMALL)


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched."""
    with recording(triton_topk, run=True) as (names, _):
        yield names


def check(tensors: Sequence[Tensor], *ks: int) -> TopK:
    """The reference's answer, exactly. Returns the last."""
    for k in ks:
        expected = ops.topk_magnitude(tensors, k, backend="reference")
        result = ops.topk_magnitude(tensors, k, backend="triton")
        for i, (index, wanted) in enumerate(zip(result.indices, expected.indices, strict=True)):
            assert index.dtype == torch.int64
            assert torch.equal(index, wanted), f"indices[{i}] for {k=}"
        assert result.threshold == expected.threshold or (
            math.isnan(result.threshold) and math.isnan(expected.threshold)
        )
        assert result.num_nonfinite == expected.num_nonfinite
    return result


def bits(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """Values by their bit patterns."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return patterns.to(integer).view(dtype)


# ---- values ----


def narrow(n: int, dtype: torch.dtype) -> Tensor:
    one = int(bits_of(torch.ones(1, dtype=dtype))[0])
    return bits(one + torch.randint(0, 200 if dtype.itemsize > 2 else 3, (n,)), dtype)


def bits_of(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def denormal(n: int, dtype: torch.dtype) -> Tensor:
    least_normal = int(bits_of(torch.tensor([torch.finfo(dtype).smallest_normal], dtype=dtype))[0])
    return bits(torch.randint(0, least_normal, (n,)), dtype)


def patterns(n: int, dtype: torch.dtype) -> Tensor:
    """Every exponent, NaN payload and sign alike."""
    largest = 2 ** (8 * dtype.itemsize - 1)
    return bits(torch.randint(-largest, largest - 1, (n,)), dtype)


def nonfinite(n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, dtype=dtype)
    x[torch.randperm(n)[: n // 3]] = torch.inf
    x[torch.randperm(n)[: n // 4]] = -torch.nan
    return x


def few_nonzero(n: int, dtype: torch.dtype) -> Tensor:
    x = torch.zeros(n, dtype=dtype)
    x[torch.randperm(n)[:9]] = -3.0
    return x


VALUES: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "normal": lambda n, dtype: torch.randn(n).to(dtype),
    "heavy_tail": lambda n, dtype: (
        torch.randn(n) * torch.exp(3 * torch.randn(-(-n // 50))).repeat_interleave(50)[:n]
    ).to(dtype),
    "equal": lambda n, dtype: torch.full((n,), -1.5, dtype=dtype),
    "zero": lambda n, dtype: torch.zeros(n, dtype=dtype),
    "few_nonzero": few_nonzero,
    "narrow": narrow,
    "denormal": denormal,
    "patterns": patterns,
    "nonfinite": nonfinite,
    "nan": lambda n, dtype: torch.full((n,), torch.nan, dtype=dtype),
    "descending": lambda n, dtype: torch.randn(n).abs().sort(descending=True).values.to(dtype),
    "winners_at_the_end": lambda n, dtype: torch.cat([torch.randn(n - n // 9), 99 * torch.randn(n // 9)]).to(dtype),
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtypes", [[FP32], [BF16, FP16], [FP64, FP32, BF16]], ids=["fp32", "16_bit", "with_fp64"])
def test_values(values: str, dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(len(values))
    sizes = [2 * TILE + BORDER + 5] if dtypes == [FP32] else [2 * BORDER, BORDER + 1, 5][: len(dtypes)]
    tensors = [VALUES[values](n, dtype).to(DEVICE) for n, dtype in zip(sizes, dtypes, strict=True)]
    numel = sum(t.numel() for t in tensors)
    check(tensors, 1 + numel // (100 if len(dtypes) == 1 else 10))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_every_k(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(TILE + BORDER + 7).to(dtype).to(DEVICE)
    check([tensor], 0, 1, TILE, tensor.numel() - 1, tensor.numel())


def test_common_keys_of_every_16_bit_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 and fp16 beside fp32 and fp64 neighbours: the order is exact, denormals included."""
    large = replace(
        SMALL, sizes=pieces.Sizes(16, 2**15, 2**15), filter_vectors=512, list_block=2**16, small_numel=2**18
    )
    monkeypatch.setattr(triton_topk, "TUNING", large)
    every = torch.arange(-(2**15), 2**15)
    tensors = [bits(every, BF16), bits(every, FP16), torch.tensor([1e-40, 1.0, 6e-8])]
    tensors = [t.to(DEVICE) for t in tensors]
    check([*tensors, torch.tensor([1e-310, 2.0**-149, 2.0**-24, 65504.0], dtype=FP64, device=DEVICE)], 70_000)


# ---- tiles, tensors, layouts ----


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("numel", [1, BORDER - 1, BORDER, BORDER + 1, TILE, TILE + BORDER - 1])
def test_sizes_and_alignments(numel: int, offset: int) -> None:
    torch.manual_seed(numel)
    whole = torch.randn(numel + offset, device=DEVICE)
    whole[-1] = 100
    check([whole[offset:]], 1 + numel // 7)


def test_ties_end_at_every_border() -> None:
    tensors = [torch.ones(n, device=DEVICE) for n in (BORDER + 5, 3, TILE, 0, TILE + BORDER)]
    tensors[-1][-1] = 7.0
    for border in (BORDER, BORDER + 5, BORDER + 8, BORDER + 8 + TILE):
        check(tensors, border + 1, border + 2)


def test_many_tiny_tensors_are_few_tiles() -> None:
    torch.manual_seed(1)
    sizes = torch.randint(0, 4, (1500,)).tolist()
    base = torch.randn(sum(sizes), device=DEVICE).to(BF16)
    tensors = base.split(sizes)
    assert pieces.cut(tensors, SIZES).num_tiles == -(-len(base) // SIZES.gathered_tile)
    result = ops.topk_magnitude(tensors, 321, backend="triton")
    first = torch.tensor([0, *sizes]).cumsum(0).tolist()
    whole = torch.cat([index + first[i] for i, index in enumerate(result.indices)])
    assert torch.equal(whole, ops.topk_magnitude([base], 321, backend="reference").indices[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "step": lambda x: x[::3],
    "transposed": lambda x: x[:2400].view(60, 40).t(),
    "expanded": lambda x: x[:300, None].expand(-1, 7),
    "channels_last": lambda x: x[:2400].view(10, 4, 6, 10).contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x[:2400].view(4, 25, 3, 8)[:, 1:, :, 1:].permute(2, 0, 3, 1),
    "overlapping": lambda x: x.as_strided((700, 3), (1, 2)),
    "scalar": lambda x: x[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    torch.manual_seed(2)
    view = LAYOUTS[layout](torch.randn(2500, device=DEVICE))
    beside = torch.randn(BORDER + 9, device=DEVICE)
    check([beside, view, beside.to(BF16)[::2]], 1 + view.numel() // 5)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_defaults_of_torch_do_not_matter(dtype: torch.dtype, default: str) -> None:
    torch.manual_seed(5)
    tensors = [torch.randn(BORDER + 9, device=DEVICE).to(dtype), torch.randn(70, 40, device=DEVICE).t()]
    for k in (0, 99):
        expected = ops.topk_magnitude(tensors, k, backend="reference")
        with other_default(default):
            result = ops.topk_magnitude(tensors, k, backend="triton")
        assert all(map(torch.equal, result.indices, expected.indices))
        assert result[1:] == expected[1:]


def test_empty() -> None:
    empty = torch.empty(0, device=DEVICE)
    check([empty, empty.reshape(3, 0)], 0)
    check([empty, torch.ones(3, device=DEVICE), empty[::2]], 0, 2, 3)


def test_tables_of_tensors_beyond_2_32() -> None:
    """Sizes only: nothing is read."""
    numel = 2**33 + 5
    tensors = [torch.empty(numel, dtype=FP32, device="meta"), torch.zeros(1).expand(2**32)]
    cut = pieces.cut(tensors, pieces.Sizes(16, 4096, 65_536))
    direct, gathered = cut.spans
    assert direct.num_tiles == 2**33 // 65_536
    assert gathered.num_tiles == -(-(5 + 2**32) // 4096)
    assert cut.num_words == 2**28 + gathered.num_tiles * 128
    assert cut.num_lines == 2**29 + 1 + 2**28
    rows = cut.table[: cut.num_pieces * pieces.rows.PIECE_WORDS.value].view(pieces.rows.PIECE)
    assert rows["first"].tolist() == [0, 2**33, 0]
    assert rows["start"].tolist() == [0, 0, 5]  # in the span
    assert rows["numel"].tolist() == [2**33, 5, 2**32]


# ---- guesses that fail ----


def test_a_wrong_guess_is_found_and_mended(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_topk, "TUNING", replace(SMALL, sample_lines=1))
    torch.manual_seed(3)
    tensor = torch.rand(3 * TILE, device=DEVICE) + 1
    tensor[: TILE // 2] = 0.25  # all that the sample of one line may see, and its neighbourhood
    tensor[TILE:] *= 1000
    tensor[5] = torch.nan
    check([tensor[: TILE + 1], tensor[TILE + 1 :].to(BF16)], TILE // 2, 2 * TILE + 77)
    assert "histogram_data_kernel" in launches


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_two_kinds_of_values(dtype: torch.dtype, large: bool) -> None:
    """The bracket ends between them, or next to it."""
    torch.manual_seed(4)
    tensor = (torch.rand(2 * TILE + 9) + 1).to(dtype)
    at = torch.randperm(tensor.numel())[: tensor.numel() // 4]
    tensor[at] *= 64 if large else 1 / 64
    check([tensor.to(DEVICE)], tensor.numel() // 5, tensor.numel() * 4 // 5)


def test_a_band_larger_than_its_buffer(launches: list[str]) -> None:
    """Consecutive bit patterns: one bin of the sample, and everything is in it."""
    torch.manual_seed(6)
    tensor = narrow(3 * TILE + 3, FP32).to(DEVICE)
    tensor[2::900] = -3.0
    check([tensor], tensor.numel() // 4)
    assert "histogram_data_kernel" in launches
    assert launches.count("filter_kernel") == 2


def test_fewer_non_zeros_than_k_is_no_failure(launches: list[str]) -> None:
    tensor = torch.zeros(3 * TILE + 3, device=DEVICE)
    tensor[2::900] = -3.0
    check([tensor], tensor.numel() // 4)
    assert "histogram_data_kernel" not in launches
    tensor[1::7] = 1e-44  # now the guess, that it is zero, is wrong
    check([tensor], tensor.numel() // 8)
    assert "histogram_data_kernel" in launches


def test_a_bracket_of_one_key_needs_no_list(launches: list[str]) -> None:
    """16-bit ties, however many."""
    tensor = torch.full((3 * TILE + 3,), 1.5, dtype=BF16, device=DEVICE)
    tensor[2::900] = -3.0
    check([tensor], tensor.numel() // 4)
    assert "histogram_data_kernel" not in launches


# ---- workspace, synchronisation, compilation ----


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def filled(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(-1 if not tensor.is_floating_point() else torch.nan)

    monkeypatch.setattr(torch, "empty", filled)


def test_dirty_workspace(dirty: None) -> None:
    torch.manual_seed(5)
    tensors = [torch.randn(n, device=DEVICE) for n in (TILE + 40, 3, BORDER)]
    check(tensors, 1, 100, TILE)


def test_one_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = triton_topk._Run.read
    monkeypatch.setattr(triton_topk._Run, "read", lambda run: reads.append(1) or read(run))
    tensor = torch.randn(2 * TILE, device=DEVICE)
    ops.topk_magnitude([tensor], 99, backend="triton")
    assert len(reads) == 1


def test_one_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the filter, the host is what the GPU waits for."""
    fills = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: fills.append(args) or zeros(*args, **options))
    run = triton_topk._Run([torch.randn(SMALL.small_numel + TILE, device=DEVICE)], 99)
    run.guess()
    assert run.num_sampled
    assert len(fills) == 1


def recorded(tensors: Sequence[Tensor], k: int) -> Specs:
    """What would be launched, fallback included."""
    with recording(triton_topk, run=False) as (_, specs):
        run = triton_topk._Run(tensors, k)
        run.guess()
        run.filter()
        run.select_in_data(run.emit()[0])
    return specs


def test_nothing_recompiles_for_another_k_or_size() -> None:
    def tensors(n: int) -> list[Tensor]:
        return [torch.ones(n, device=DEVICE), torch.ones(40, device=DEVICE)[::2]]

    expected = recorded(tensors(4 * TILE + 1), 16).keys()
    for n, k in [(4 * TILE + 1, 1), (4 * TILE + 1, 4 * TILE), (9 * TILE + 77, 2049), (5 * TILE + 16, 3)]:
        assert recorded(tensors(n), k).keys() == expected


# ---- ahead of time ----


def compile_all(arch: int, dtypes: list[str], only: str) -> Iterator[dict[str, Any]]:
    """Each kernel as it is launched for these dtypes, compiled for `arch`."""
    tensors = [torch.zeros(300_017, dtype=getattr(torch, dtype)) for dtype in dtypes]
    for spec in recorded(tensors, 1000).values():
        if spec[0].fn.__name__.startswith(only):
            yield compile_facts(arch, *spec)


KERNELS = {
    *("sample_kernel", "bracket_kernel", "filter_kernel", "filter_gathered_kernel", "collect_kernel"),
    *("histogram_list_kernel", "histogram_data_kernel", "narrow_kernel", "tally_kernel", "emit_kernel"),
}
VECTOR_LOADS = {0: "ld.global.v4.b32", 1: "ld.global.v4.b32", 2: "ld.global.v4.b32", 3: "ld.global.v2.b64"}


@pytest.fixture(scope="module", autouse=True)
def compilers(request: pytest.FixtureRequest) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """They work while the other tests run."""
    filters = [f"{dtype}:filter_kernel" for dtype in ("bfloat16", "float16", "float64")]
    archs = archs_to_compile_for(request.session, __name__)
    processes = {arch: start_script(__file__, arch, "float32:", *filters) for arch in archs}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def check_compiled(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        assert fact["stack"] == fact["local"] == fact["local_accesses"] == 0, fact  # nothing spilled
        assert fact["shared"] <= 16 * 1024, fact
        assert fact["fused"] == 0, fact
        if fact["kernel"] == "filter_kernel":
            # 4 vectors of 16 B in flight per thread, one more in the loop that counts non-finite elements
            assert fact["loads"].count(VECTOR_LOADS[fact["constants"]["KIND"]]) == 5, fact
            assert not any(load.endswith((".b32", ".b16")) and ".v" not in load for load in fact["loads"]), fact
            assert fact["reg"] <= 96, fact  # 5 blocks of 4 warps on a multiprocessor: 40 KB in flight
            assert fact["shared"] <= 1024, fact


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_ahead_of_time(compilers: dict[int, subprocess.Popen[str]], arch: int) -> None:
    facts = printed_facts(compilers[arch])
    assert {fact["kernel"] for fact in facts} == KERNELS
    assert {fact["constants"]["KIND"] for fact in facts if fact["kernel"] == "filter_kernel"} == {0, 1, 2, 3}
    check_compiled(facts)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16", "float64", "float32,bfloat16,float16", "float32,float64"])
def test_compiles_ahead_of_time_for_every_dtype(arch: int, dtypes: str) -> None:
    check_compiled(printed_facts(start_script(__file__, arch, f"{dtypes}:")))


def test_interpreted() -> None:
    run_interpreted(__file__)


divide_tests(
    globals(),
    ("test_interpreted", "test_compiles_ahead_of_time", "test_compiles_ahead_of_time_for_every_dtype"),
)

if __name__ == "__main__":
    for case in sys.argv[2:]:
        dtypes, only = case.split(":")
        for fact in compile_all(int(sys.argv[1]), dtypes.split(","), only):
            print(json.dumps(fact), flush=True)
