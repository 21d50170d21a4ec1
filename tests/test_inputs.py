"""The lists of tensors that a step walks: compiled and interpreted do the same, on whatever may be in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saft_kernels.ops import checks, tables, walk


class Subclass(Tensor):
    """Its pointer may be anything: the compiled walk leaves it to the caller's slow path."""


@pytest.fixture(params=["compiled", "interpreted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "interpreted":
        monkeypatch.setattr(walk, "_C", None)
        for module in (walk, checks, tables):
            monkeypatch.setattr(module, "_reader", None)
    elif walk._C is None:
        pytest.skip("the compiled module is missing")
    return request.param


def tensors() -> list[Tensor]:
    return [
        torch.zeros(3, 4),
        nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)),
        torch.zeros(2, 3).half()[1],  # a byte offset
        torch.tensor(1.0, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.zeros(4, 1, 2).as_strided((4, 1, 2), (2, 77, 1)),  # strides of size-1 dimensions mean nothing
    ]


def test_this_torch_exports_what_the_compiled_walk_reads() -> None:
    """Else every step would silently take the interpreted one."""
    assert walk._C is None or walk._reader is not None


def test_pointers(way: str) -> None:
    table = np.zeros((6, 3), dtype=np.int64)
    column = walk.PointerColumn(table[:, 1])
    first, moved = tensors(), tensors()
    assert not column.move(first)
    assert column.move(first)
    assert column.move(moved)
    assert table[:, 1].tolist() == [t.data_ptr() for t in moved]
    assert not table[:, [0, 2]].any()


CHANGES = {
    "transposed": lambda t: torch.zeros(4, 3).t(),
    "every_other": lambda t: torch.zeros(3, 8)[:, ::2],
    "expanded": lambda t: torch.zeros(1, 4).expand(3, 4),
    "reshaped": lambda t: torch.zeros(4, 3),
    "flat": lambda t: torch.zeros(12),
    "smaller": lambda t: torch.zeros(3, 3),
    "dtype": lambda t: torch.zeros(3, 4).int(),
    "another_float": lambda t: torch.zeros(3, 4).half(),
    "as_wide": lambda t: torch.zeros(3, 4).bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_change_is_told(way: str, change: str) -> None:
    before = tensors()
    column = walk.PointerColumn(np.zeros(6, dtype=np.int64))
    column.move(before)
    assert not column.move([CHANGES[change](before[0]), *before[1:]])
    assert not column.move(before)
    assert column.move(before)


def test_fixed_pointers(way: str) -> None:
    before = tensors()
    column = walk.PointerColumn(np.zeros(6, dtype=np.int64), is_fixed=True)
    column.move(before)
    assert column.move(before)
    assert not column.move([before[0].clone(), *before[1:]])


def test_subclasses_take_the_interpreted_way(way: str) -> None:
    """Their pointer is theirs to tell."""
    table = np.zeros((6, 1), dtype=np.int64)
    column = walk.PointerColumn(table[:, 0])
    before = tensors()
    column.move(before)
    odd = [before[0].as_subclass(Subclass), *before[1:]]
    column.move(odd)
    assert column.move(odd)
    assert table[0, 0] == before[0].data_ptr()


def test_gradients(way: str) -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert walk.gradients(params) is None
    assert walk.gradients([]) == []
    for p in params:
        p.grad = torch.ones(2)
    grads = walk.gradients(params)
    assert all(a is p.grad for a, p in zip(grads, params, strict=True))
    params[1].grad = None
    assert walk.gradients(params) is None


def test_same_objects(way: str) -> None:
    """By identity: two equal tensors differ."""
    a, b = torch.zeros(2), torch.zeros(2)
    assert walk.same_objects([a, b], [a, b])
    assert not walk.same_objects([a, b], [b, a])
    assert not walk.same_objects([a], [a, b])


def shrunk(num_bytes: int, view: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
    x = view(torch.zeros(4, 6)[1:])
    x.untyped_storage().resize_(num_bytes)
    return x


# what has no values in memory, or is somewhere else, and the error that says so
ODD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no_tensor": (lambda: 1.0, TypeError, "expected a tensor, got float"),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, "expected a strided tensor"),
    "elsewhere": (lambda: torch.zeros(3, device="meta"), ValueError, "expected device cpu"),
    "negative": (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, TypeError, "lazy conjugate or negative"),
    "conjugate": (lambda: torch.zeros(2, dtype=torch.complex64).conj(), TypeError, "lazy conjugate or negative"),
    "freed": (lambda: shrunk(0), ValueError, "expected a storage of 96 bytes or more, got 0"),
    "shrunk": (lambda: shrunk(95), ValueError, "expected a storage of 96 bytes or more, got 95"),
    "shrunk_strided": (lambda: shrunk(95, Tensor.t), ValueError, "got 95"),
}


@pytest.mark.parametrize("odd", ODD)
def test_lists_are_refused_alike(way: str, odd: str) -> None:
    make, error, message = ODD[odd]
    with pytest.raises(error, match=rf"`x\[6\]`.*{message}"):
        checks.tensor_list("x", [*tensors(), make()])


def test_lists_are_taken_alike(way: str) -> None:
    given = [*tensors(), torch.zeros(3).as_subclass(Subclass), torch.zeros(3, 8).t()[1:, ::2], torch.zeros(2).int()]
    given += [shrunk(96), shrunk(96, Tensor.t), torch.zeros(1, 5).expand(1000, 5), shrunk(0, lambda x: x[:0])]
    assert all(a is b for a, b in zip(checks.tensor_list("x", tuple(given)), given, strict=True))


def test_tables_are_alike(way: str) -> None:
    strided = torch.zeros(3, 8)[:, ::2]
    for given in (tensors(), [*tensors(), strided], [strided, *tensors()], [torch.zeros(3).as_subclass(Subclass)], []):
        rows = tables.tensor_table(tables.Layouts(), given)
        assert rows["data"].tolist() == [t.data_ptr() for t in given]
        assert rows["numel"].tolist() == [t.numel() for t in given]
        assert rows["dtype"].tolist() == [tables.DTYPE_CODES[t.dtype] for t in given]
        assert rows["ndim"].tolist() == [len(tables.layout(t)) // 2 for t in given]
        assert (rows["layout"] != 0).tolist() == [t is strided for t in given]


def test_plain_lists_take_the_compiled_way() -> None:
    if checks._reader is None:
        pytest.skip("the compiled module is missing")
    assert checks._reader.are_plain(tensors())
    assert checks._reader.describe(tensors(), np.zeros(6, tables.TENSOR_DESC).ctypes.data)
