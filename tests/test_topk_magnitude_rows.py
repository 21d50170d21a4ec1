"""topk_magnitude_rows: of every row what topk_magnitude selects of that row alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import DEFAULTS, Backend, assert_message, flushed_denormals, other_default
from torch import Tensor

from saft_kernels import ops
from saft_kernels.ops import backends, reference
from saft_kernels.selection import budget

OP = "topk_magnitude_rows"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def expected(rows: Tensor, k: int) -> Tensor:
    """Row by row, by the definition of the op that it generalises."""
    found = [ops.topk_magnitude([row], k, backend="reference").indices[0] for row in rows.cpu()]
    return torch.cat([index + i * rows.shape[1] for i, index in enumerate(found)] or [torch.empty(0).long()])


def check(backend: Backend, rows: Tensor, *ks: int) -> None:
    for k in ks:
        index = backend.topk_magnitude_rows(rows, k)
        assert (index.dtype, index.device) == (torch.int64, rows.device)
        assert torch.equal(index.cpu(), expected(rows, k)), k


def heavy(rows: int, numel: int) -> Tensor:
    return torch.randn(rows, numel) * torch.randn(rows, 1).mul(3).exp()


def patterns(rows: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Every exponent, NaN payload and sign alike."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(integer)
    return torch.randint(limits.min, limits.max, (rows, numel), dtype=integer).view(dtype)


VALUES: dict[str, Callable[[int, int, torch.dtype], Tensor]] = {
    "heavy": lambda r, n, dtype: heavy(r, n).to(dtype),
    "ties": lambda r, n, dtype: torch.randint(-2, 3, (r, n)).to(dtype),
    "equal": lambda r, n, dtype: torch.full((r, n), -1.5, dtype=dtype),
    "zero": lambda r, n, dtype: torch.zeros(r, n, dtype=dtype),
    "few_nonzero": lambda r, n, dtype: (torch.rand(r, n) < 0.01).to(dtype),
    "patterns": patterns,
    "nonfinite": lambda r, n, dtype: torch.where(torch.rand(r, n) < 0.3, -torch.nan, torch.inf).to(dtype),
    "winners_at_the_end": lambda r, n, dtype: torch.arange(r * n).view(r, n).to(dtype),
}


@all_dtypes
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("numel", [1, 31, 32, 33, 256, 257, 1_000, 5_000])
def test_values(backend: Backend, numel: int, values: str, dtype: torch.dtype) -> None:
    """Around the sizes of blocks, and of rows that are sorted whole."""
    torch.manual_seed(numel)
    rows = backend.to(VALUES[values](7, numel, dtype))
    check(backend, rows, 0, 1, -(-numel // 10), numel // 2, numel - 1, numel)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "every_third": lambda x: x[:, 1::3],
    "every_other_row": lambda x: x[::2],
    "columns": lambda x: x[:, 5:50],
    "expanded_rows": lambda x: x[:1].expand(6, -1),
    "expanded_columns": lambda x: x[:, :1].expand(-1, 6),
    "one_row": lambda x: x[:1],
    "one_column": lambda x: x[:, :1],
}


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = LAYOUTS[layout](backend.to(heavy(60, 90).to(dtype)))
    check(backend, rows, 1, -(-rows.shape[1] // 3))


def test_nothing_to_select(backend: Backend) -> None:
    for shape, k in (((0, 5), 3), ((3, 0), 0), ((0, 0), 0), ((4, 5), 0)):
        assert backend.topk_magnitude_rows(backend.to(torch.ones(shape)), k).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_denormals_count_under_flush_to_zero(backend: Backend, dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal
    rows = (torch.arange(1.0, 3_001, dtype=torch.float64) / 4_000 * least).to(dtype).view(3, 1_000)
    wanted = expected(rows, 10)
    rows = backend.to(rows)
    with flushed_denormals():
        actual = backend.topk_magnitude_rows(rows, 10)
    assert torch.equal(actual.cpu(), wanted)


@all_dtypes
def test_any_number_of_threads(backend: Backend, num_threads: Callable[[int], None], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows = backend.to(heavy(300, 700).to(dtype))
    wanted = expected(rows, 70)
    for threads in (1, 2, 3, 8):
        num_threads(threads)
        assert torch.equal(backend.topk_magnitude_rows(rows, 70).cpu(), wanted)


def test_the_reference_takes_some_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    rows = torch.randint(-3, 4, (50, 40)).float()
    wanted = expected(rows, 4)
    for at_once in (1, 40, 41, 333, 2_000):
        monkeypatch.setattr(reference, "_ROWS_AT_ONCE", at_once)
        assert torch.equal(ops.topk_magnitude_rows(rows, 4, backend="reference"), wanted)


@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_of_torch_do_not_matter(backend: Backend, default: str) -> None:
    for rows in (heavy(30, 400), heavy(1, 400), heavy(30, 400).t().double()):
        rows = backend.to(rows)
        wanted = expected(rows, 5)
        with other_default(default):
            index = backend.topk_magnitude_rows(rows, 5)
        assert index.device == rows.device
        assert torch.equal(index.cpu(), wanted)


BAD: dict[str, tuple[type[Exception], Callable[[Tensor], object], list[str]]] = {
    "not a tensor": (TypeError, lambda x: ops.topk_magnitude_rows([1.0], 1), ["`[rows][0]`", "list"]),  # type: ignore[arg-type]
    "integers": (TypeError, lambda x: ops.topk_magnitude_rows(x.int(), 1), ["`[rows][0]`", "int32"]),
    "a vector": (ValueError, lambda x: ops.topk_magnitude_rows(x[0], 1), ["`rows`", "(R, N)", "(4,)"]),
    "three dimensions": (ValueError, lambda x: ops.topk_magnitude_rows(x[None], 1), ["`rows`", "(1, 3, 4)"]),
    "too many": (ValueError, lambda x: ops.topk_magnitude_rows(x, 5), ["`k`", "length of a row of `rows`, 4", "5"]),
    "negative": (ValueError, lambda x: ops.topk_magnitude_rows(x, -1), ["`k`", "-1"]),
    "a float": (TypeError, lambda x: ops.topk_magnitude_rows(x, 1.0), ["`k`", "an int", "float"]),  # type: ignore[arg-type]
    "freed": (ValueError, lambda x: ops.topk_magnitude_rows(freed(x), 1), ["`[rows][0]`", "48 bytes", "got 0"]),
}


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    kind, call, parts = BAD[case]
    with pytest.raises(kind) as error:
        call(torch.ones(3, 4))
    assert_message(error, parts)


# ---- the choice of backend, here and in scope="row" ----


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_lacks_it_says_so(name: str) -> None:
    for call in (
        lambda: ops.topk_magnitude_rows(torch.ones(3, 4), 1, backend=name),
        lambda: budget.select_indices(["w"], [torch.ones(3, 4)], 0.5, None, "row", name),
    ):
        with pytest.raises(RuntimeError, match=f"^`backend`: backend '{name}' cannot run topk_magnitude_rows here: "):
            call()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_scope_row_takes_the_backend_that_is_forced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if (reason := ops.why_unavailable(name, OP, "cpu")) is not None:
        pytest.skip(f"{name}: {reason}")
    called = []
    module = backends._module(name)
    original = module.topk_magnitude_rows
    monkeypatch.setattr(module, OP, lambda *args: called.append(1) or original(*args))
    scores = [torch.randn(5, 40), torch.randn(7)]
    indices = budget.select_indices(["w", "b"], scores, 0.1, None, "row", name)
    assert [len(i) for i in indices] == [20, 1]
    assert len(called) == 2


def test_gpus_run_plain_torch_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing faster to install. On a CPU there is."""
    monkeypatch.delenv("SAFT_BACKEND", raising=False)
    backends._warn_slow.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(OP, "cuda", None) is reference
        monkeypatch.delattr(backends._module("cpu"), OP, raising=False)
        with pytest.raises(RuntimeWarning, match=r"reference backend .* for cpu tensors"):
            backends.choose(OP, "cpu", None)
    backends._warn_slow.cache_clear()
