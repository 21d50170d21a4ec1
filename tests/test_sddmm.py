"""sddmm: selected entries of dY^T X, against the dense product in fp64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import CPU_ISAS, DEFAULTS, Backend, assert_message, assert_same_bits, other_default
from torch import Tensor

from saft_kernels import sddmm
from saft_kernels.ops import cpu

OP = "sddmm"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def factors(tokens: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 7 + outputs)
    return (
        torch.randn(tokens, outputs, generator=generator).to(dtype),
        torch.randn(tokens, inputs, generator=generator).to(dtype),
    )


def some(numel: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Distinct positions, ascending."""
    return torch.from_numpy(np.sort(np.random.default_rng(count).permutation(numel)[:count])).to(dtype)


def check(values: Tensor, dy: Tensor, x: Tensor, indices: Tensor, added_to: Tensor | None = None) -> None:
    """Within what any order of summation can be off.

    A sum of T products is within T roundings of sum |dy| |x|, whatever the order (Higham, Accuracy and Stability, 3.1);
    one more for adding to what was there. The factors are exact in the dtype that sums.
    """
    dy, x, indices = dy.cpu().double(), x.cpu().double(), indices.cpu().long()
    opmath = torch.float64 if values.dtype == torch.float64 else torch.float32
    assert values.dtype == opmath
    exact = (dy.t() @ x).flatten()[indices]
    size = (dy.abs().t() @ x.abs()).flatten()[indices]
    if added_to is not None:
        exact, size = exact + added_to.double(), size + added_to.double().abs()
    bound = (len(dy) + 1) * torch.finfo(opmath).eps * size
    assert bool(((values.cpu().double() - exact).abs() <= bound).all())


@all_dtypes
@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 255, 256, 257, 800])
def test_values(backend: Backend, tokens: int, dtype: torch.dtype) -> None:
    """Below, at and above a block of tokens, and not a multiple of a vector."""
    dy, x = (backend.to(t) for t in factors(tokens, 37, 29, dtype))
    for index_dtype in (torch.int32, torch.int64):
        indices = backend.to(some(37 * 29, 300, index_dtype))
        values = backend.sddmm(dy, x, indices)
        assert values.shape == (300,)
        assert values.device == dy.device
        check(values, dy, x, indices)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 90, 1_000, 200 * 150])
def test_from_one_entry_to_all(backend: Backend, count: int) -> None:
    dy, x = (backend.to(t) for t in factors(61, 200, 150))
    indices = backend.to(some(200 * 150, count))
    check(backend.sddmm(dy, x, indices), dy, x, indices)


def test_rows_of_every_length(backend: Backend) -> None:
    """Row i has i entries: entries are taken several at a time, and the rest one by one."""
    dy, x = (backend.to(t) for t in factors(40, 14, 13))
    indices = backend.to(torch.cat([13 * i + torch.randperm(13)[:i].sort().values for i in range(14)]))
    check(backend.sddmm(dy, x, indices), dy, x, indices)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other token": lambda t: t.repeat_interleave(2, 0)[::2],
    "every third channel": lambda t: t.repeat_interleave(3, 1)[:, 1::3],
    "expanded tokens": lambda t: t[:1].expand(t.shape),
    "expanded channels": lambda t: t[:, :1].expand(t.shape),
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    dy, x = (LAYOUTS[layout](backend.to(t)) for t in factors(70, 33, 31, dtype))
    indices = backend.to(some(33 * 31, 111))[::2]
    check(backend.sddmm(dy, x, indices), dy, x, indices)


@all_dtypes
def test_out_and_accumulate(backend: Backend, dtype: torch.dtype) -> None:
    dy, x = (backend.to(t) for t in factors(300, 20, 30, dtype))
    indices = backend.to(some(600, 100))
    alone = backend.sddmm(dy, x, indices)
    whole = torch.full((102,), 3.0, dtype=alone.dtype, device=alone.device)
    out = whole[1:-1]
    assert backend.sddmm(dy, x, indices, out=out) is out
    assert_same_bits(out, alone)
    out.fill_(0.1)
    backend.sddmm(dy, x, indices, out=out, accumulate=True)
    check(out, dy, x, indices, added_to=torch.full((100,), 0.1, dtype=alone.dtype))
    if backend.name != "reference":  # the sum is added once
        assert_same_bits(out, 0.1 + alone)
    assert whole[[0, -1]].tolist() == [3, 3]


def test_indices_may_repeat_and_need_no_order(backend: Backend) -> None:
    dy, x = (backend.to(t) for t in factors(50, 11, 12))
    indices = backend.to(torch.tensor([131, 0, 64, 64, 12, 11, 0, 131]))
    check(backend.sddmm(dy, x, indices), dy, x, indices)


def test_what_is_not_selected_does_not_matter(backend: Backend) -> None:
    """NaN and inf in other channels, and a NaN that is selected."""
    dy, x = factors(33, 9, 8)
    indices = torch.tensor([0, 9, 10, 70])
    expected = backend.sddmm(backend.to(dy), backend.to(x), backend.to(indices))
    dy[:, [2, 7]], x[:, [3, 5]] = float("nan"), float("inf")
    assert_same_bits(backend.sddmm(backend.to(dy), backend.to(x), backend.to(indices)), expected)
    dy[5, 0] = float("nan")
    values = backend.sddmm(backend.to(dy), backend.to(x), backend.to(indices))
    assert values.isnan().tolist() == [True, False, False, False]


@all_dtypes
def test_same_bits_over_runs_and_thread_counts(
    backend: Backend, num_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    if backend.name == "reference":
        pytest.skip("reference: the order of summation is torch's")
    dy, x = (backend.to(t) for t in factors(530, 120, 110, dtype))
    indices = backend.to(some(120 * 110, 3_000))
    expected = backend.sddmm(dy, x, indices)
    for threads in (1, 2, 3, 8):
        num_threads(threads)
        assert_same_bits(backend.sddmm(dy, x, indices), expected)


@all_dtypes
def test_same_bits_on_every_instruction_set(dtype: torch.dtype) -> None:
    if cpu.why_unavailable("cpu") is not None:
        pytest.skip(f"cpu: {cpu.why_unavailable('cpu')}")
    dy, x = factors(530, 40, 50, dtype)
    indices = some(2_000, 700)
    results = []
    for isa in range(len(cpu._C.isas())):
        backend = Backend(CPU_ISAS[isa], "cpu", isa=isa)
        results.append(backend.sddmm(dy, x, indices))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_a_value_depends_on_its_two_channels_alone(backend: Backend) -> None:
    """Whatever else is selected: so a layer's gradient does not change with the rest of the mask."""
    if backend.name == "reference":
        pytest.skip("reference: the order of summation is torch's")
    dy, x = (backend.to(t) for t in factors(300, 50, 60))
    indices = some(3_000, 400)
    values = backend.sddmm(dy, x, backend.to(indices))
    for part in (slice(0, 1), slice(7, 8), slice(100, 203), slice(1, 400, 3)):
        assert_same_bits(backend.sddmm(dy, x, backend.to(indices[part])), values[part])


def test_nothing_to_do(backend: Backend) -> None:
    dy, x = (backend.to(t) for t in factors(5, 3, 4))
    none = backend.to(torch.empty(0, dtype=torch.int64))
    assert backend.sddmm(dy, x, none).shape == (0,)
    assert backend.sddmm(dy[:0], x[:0], backend.to(torch.tensor([0, 11]))).tolist() == [0, 0]


def test_no_graph(backend: Backend) -> None:
    dy, x = (backend.to(t).requires_grad_() for t in factors(5, 3, 4))
    assert not backend.sddmm(dy, x, backend.to(torch.tensor([3]))).requires_grad


@pytest.mark.parametrize("bad", [-1, -7, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_negative_indices_of_a_wide_weight(backend: Backend, dtype: torch.dtype, bad: int) -> None:
    """Of 2^32 elements: every negative int32 would be a position, were it unsigned."""
    dy, x = (backend.to(torch.ones(1, 2**16)) for _ in range(2))
    indices, out = backend.to(torch.tensor([4, bad], dtype=dtype)), backend.to(torch.zeros(2))
    with pytest.raises(IndexError) as error:
        backend.sddmm(dy, x, indices, out=out)
    assert_message(error, ["`indices[0]`", f"[0, {2**32})", f"{bad} to 4"])
    assert not out.any()


@pytest.mark.parametrize("default", DEFAULTS)
@all_dtypes
def test_defaults_of_torch_do_not_matter(backend: Backend, default: str, dtype: torch.dtype) -> None:
    dy, x = (backend.to(t) for t in factors(300, 20, 30, dtype))
    indices = backend.to(some(600, 100))
    expected = backend.sddmm(dy, x, indices)
    with other_default(default):
        actual = backend.sddmm(dy, x, indices)
        again = backend.sddmm(dy, x, indices, out=torch.zeros_like(actual), accumulate=True)
    assert actual.device == dy.device
    assert_same_bits(actual, expected)
    assert torch.equal(again, expected)


Bad = tuple[type[Exception], Callable[[Tensor, Tensor, Tensor], object], list[str]]
BAD: dict[str, Bad] = {
    "not a tensor": (TypeError, lambda dy, x, i: sddmm(dy.numpy(), x, i), ["`[dy, x][0]`", "ndarray"]),
    "integer factors": (TypeError, lambda dy, x, i: sddmm(dy.int(), x.int(), i), ["`[dy, x][0]`", "int32"]),
    "three dimensions": (ValueError, lambda dy, x, i: sddmm(dy[None], x, i), ["`dy`, `x`", "(1, 5, 3)"]),
    "other tokens": (ValueError, lambda dy, x, i: sddmm(dy, x[1:], i), ["(5, 3) and (4, 4)"]),
    "other dtype": (ValueError, lambda dy, x, i: sddmm(dy, x.double(), i), ["`x`", "float32", "float64"]),
    "indices of floats": (TypeError, lambda dy, x, i: sddmm(dy, x, i.float()), ["`indices[0]`", "float32"]),
    "two-dimensional indices": (TypeError, lambda dy, x, i: sddmm(dy, x, i[None]), ["`indices[0]`", "(1, 2)"]),
    "index too large": (IndexError, lambda dy, x, i: sddmm(dy, x, i + 11), ["[0, 12)", "12"]),
    "negative index": (IndexError, lambda dy, x, i: sddmm(dy, x, i - 1), ["[0, 12)", "-1"]),
    "out of another shape": (ValueError, lambda dy, x, i: sddmm(dy, x, i, out=torch.zeros(3)), ["`out`", "(3,)"]),
    "out of another dtype": (
        ValueError,
        lambda dy, x, i: sddmm(dy.bfloat16(), x.bfloat16(), i, out=torch.zeros(2, dtype=torch.bfloat16)),
        ["`out`", "float32", "bfloat16"],
    ),
    "out with gaps": (ValueError, lambda dy, x, i: sddmm(dy, x, i, out=torch.zeros(4)[::2]), ["`out`", "contiguous"]),
    "accumulate into nothing": (ValueError, lambda dy, x, i: sddmm(dy, x, i, accumulate=True), ["`out`", "None"]),
    "no tensor for out": (TypeError, lambda dy, x, i: sddmm(dy, x, i, out=[0.0, 0.0]), ["`out`", "list"]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    kind, call, parts = BAD[case]
    with pytest.raises(kind) as error:
        call(*factors(5, 3, 4), torch.tensor([0, 11]))
    assert_message(error, parts)


def test_sizes_beyond_32_bits_are_refused() -> None:
    dy, x = torch.zeros(1, 1).expand(1, 2**31), torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"below 2\^31") as error:
        sddmm(dy, x, torch.tensor([0]))
    assert_message(error, ["`dy`, `x`"])


def test_weights_beyond_2_31_elements(backend: Backend) -> None:
    """Few channels are used of a weight of 2^32 elements, whose indices are int64."""
    dy, x = (backend.to(t) for t in factors(3, 8, 8))
    wide_dy = backend.to(torch.zeros(3, 2**17))
    wide_x = backend.to(torch.zeros(3, 2**15))
    wide_dy[:, -8:], wide_x[:, -8:] = dy, x
    indices = (torch.arange(2**17 - 8, 2**17) * 2**15).repeat_interleave(8) + torch.arange(2**15 - 8, 2**15).repeat(8)
    values = backend.sddmm(wide_dy, wide_x, backend.to(indices))
    check(values, dy, x, torch.arange(64))


@pytest.mark.parametrize("at", ["outputs", "inputs"])
def test_memory_is_that_of_the_entries(at: str) -> None:
    """Two billion channels take no table of them."""
    resource = pytest.importorskip("resource")
    many = torch.ones(3, 1).expand(3, 2**31 - 1)
    dy, x = (many, torch.ones(3, 2)) if at == "outputs" else (torch.ones(3, 2), many)
    width = x.shape[1]
    indices = torch.tensor([0, width - 1, width, dy.shape[1] * width - 1]).unique()
    sddmm(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0]), backend="cpu")  # what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sddmm(dy, x, indices, backend="cpu").tolist() == [3.0] * len(indices)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 64 * 1024


def test_sorted_and_tabled_channels_agree() -> None:
    """Few entries of many channels, and the same beside so many others that all channels have a table."""
    dy, x = factors(50, 3_000, 2_000)
    all_of_them = some(3_000 * 2_000, 4_000)
    few = all_of_them[::200].flip(0)  # in any order
    assert_same_bits(sddmm(dy, x, few, backend="cpu"), sddmm(dy, x, all_of_them, backend="cpu")[::200].flip(0))
