"""The entries of a weight gradient by a matrix product: equal to the dense one's, of bounded size, without waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sddmm import all_dtypes, check, factors, some
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from saft_kernels.layers import weight_gradient
from saft_kernels.layers.weight_gradient import Product, choose, plan

TOKENS, OUTPUTS, INPUTS = 23, 37, 29
WAYS = {"rows and columns": (True, True), "rows": (True, False), "columns": (False, True), "whole": (False, False)}
MASKS = {
    "uniform": some(OUTPUTS * INPUTS, 60),
    "one row": 5 * INPUTS + torch.arange(INPUTS),
    "one column": torch.arange(OUTPUTS) * INPUTS + 28,
    "one entry": torch.tensor([7]),
    "the last": torch.tensor([OUTPUTS * INPUTS - 1]),
    "two corners": torch.tensor([0, OUTPUTS * INPUTS - 1]),
    "all": torch.arange(OUTPUTS * INPUTS),
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def make(indices: Tensor, way: str, block_rows: int | None = None) -> Any:
        if block_rows is not None:
            monkeypatch.setattr(weight_gradient, "ALIGNMENT", block_rows)
            monkeypatch.setattr(weight_gradient, "BLOCK_NUMEL", 1)
        return Product.of(indices, (OUTPUTS, INPUTS), WAYS[way])

    return make


@ways
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block_rows", [None, 1, 8])
@all_dtypes
def test_values(planned: Callable[..., Any], way: str, mask: str, block_rows: int | None, dtype: torch.dtype) -> None:
    dy, x = factors(TOKENS, OUTPUTS, INPUTS, dtype)
    for index_dtype in (torch.int32, torch.int64):
        compute = planned(MASKS[mask].to(index_dtype), way, block_rows)
        check(compute(dy, x), dy, x, MASKS[mask])
        transposed = dy.t().contiguous().t(), x[:1].expand(x.shape)
        check(compute(*transposed), *transposed, MASKS[mask])
        assert not compute(dy[:0], x[:0]).any()


@ways
@pytest.mark.parametrize("block_rows", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_written_to_out(planned: Callable[..., Any], way: str, block_rows: int | None, dtype: torch.dtype) -> None:
    dy, x = factors(TOKENS, OUTPUTS, INPUTS, dtype)
    compute = planned(MASKS["uniform"], way, block_rows)
    expected = compute(dy, x)
    out = torch.full_like(expected, torch.nan)
    assert compute(dy, x, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    for device_type in ("cpu", "cuda"):  # no autocast rounds the sums, nor that of another device
        with torch.autocast(device_type, torch.bfloat16):
            assert torch.equal(compute(dy, x), expected)


@ways
def test_what_is_not_selected_does_not_matter(planned: Callable[..., Any], way: str) -> None:
    dy, x = factors(TOKENS, OUTPUTS, INPUTS)
    compute = planned(torch.tensor([0, 35, 70]), way)
    expected = compute(dy, x)
    dy[:, 5:], x[:, 20:] = float("nan"), float("inf")
    assert torch.equal(compute(dy, x), expected)


class Sizes(TorchDispatchMode):
    """How many elements the largest matrix product has made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "mm":
            self.largest = max(self.largest, result.numel())
        return result


@ways
def test_the_product_is_made_in_blocks(planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(weight_gradient, "BLOCK_NUMEL", 300)
    compute = planned(MASKS["all"], way)
    dy, x = factors(TOKENS, OUTPUTS, INPUTS)
    with Sizes() as sizes:
        values = compute(dy, x)
    check(values, dy, x, MASKS["all"])
    assert 0 < sizes.largest <= 300


def test_rows_and_columns_are_aligned(planned: Callable[..., Any]) -> None:
    """Tensor cores want addresses of 16 bytes."""
    product = planned(MASKS["uniform"], "rows and columns")
    assert len(product.rows) % 8 == len(product.columns) % 8 == 0


@ways
def test_whole_product_keeps_no_second_copy_of_the_indices(planned: Callable[..., Any], way: str) -> None:
    assert (planned(MASKS["uniform"], way).positions is MASKS["uniform"]) == (way == "whole")


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_rows", [None, 8])
def test_on_a_gpu_nothing_is_waited_for(
    planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype, block_rows: int | None
) -> None:
    """Fake tensors raise at what a CUDA graph could not capture; sums of 16-bit factors come out in fp32."""
    product = planned(MASKS["uniform"], way, block_rows)
    with FakeTensorMode():
        tensors = [
            None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for t in (product.positions, product.rows, product.columns)
        ]
        dy, x = (torch.empty(TOKENS, n, dtype=dtype, device="cuda") for n in (OUTPUTS, INPUTS))
        values = Product(*tensors, product.row_bounds, product.entry_bounds)(dy, x)
        assert (values.dtype, values.shape, values.device.type) == (torch.float32, (60,), "cuda")


# tokens, shape, k, rows and columns used -> us on an H200 in bf16: the whole product, that of rows and columns, sampled
MEASURED = [
    ((4096, 1024), 4194, (748, 373), (346, 203, 703)),
    ((11008, 4096), 4509, (746, 332), (977, 120, 353)),
    ((11008, 4096), 45089, (3423, 1323), (977, 252, 1089)),
    ((11008, 4096), 45089, (10826, 4096), (986, 986, 1163)),
    ((11008, 4096), 450888, (11008, 4096), (993, 993, 7739)),
    ((3072, 768), 236, (72, 66), (92, 43, 121)),
    ((3072, 768), 2359, (379, 163), (92, 70, 202)),
    ((3072, 768), 2359, (1647, 733), (101, 101, 222)),
]


@pytest.mark.parametrize(("shape", "k", "used", "times"), MEASURED)
def test_choice_on_a_gpu(shape: tuple[int, int], k: int, used: tuple[int, int], times: tuple[int, int, int]) -> None:
    whole, gathered, sampled = times
    chosen = choose(k, used, shape, "cuda")
    assert chosen is not None
    assert sampled > min(whole, gathered)
    assert any(chosen) == (gathered < whole)
    assert choose(k, used, shape, "cuda", can_sample=False) == chosen


def test_choice_on_a_cpu() -> None:
    """Sampled, unless the entries fill the product of their rows and columns."""
    assert choose(2_359, (1_647, 733), (3_072, 768), "cpu") is None
    assert choose(45_089, (2_971, 1_511), (11_008, 4_096), "cpu") is None
    assert choose(450_560, (110, 4_096), (11_008, 4_096), "cpu") == (True, False)


def test_plan() -> None:
    rows = torch.arange(0, 64 * 512, dtype=torch.int32) + 5 * 512
    assert str(plan(rows, (4_096, 512))) == "matrix product of 64 rows and all columns"
    uniform = some(4_096 * 512, 2_000)
    assert not isinstance(plan(uniform, (4_096, 512)), Product)
    dy, x = factors(TOKENS, 4_096, 512)
    for indices in (rows, uniform):
        check(plan(indices, (4_096, 512))(dy, x), dy, x, indices)


def test_other_devices_sample() -> None:
    assert choose(100, (10, 10), (4_096, 4_096), "xpu") is None
