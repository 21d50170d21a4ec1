"""Every op, every argument: memory that is not there, or not all of it, is an error and not a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend, assert_message, bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ARGUMENTS = {
    "topk_magnitude": {"tensors": [0, 1]},
    "gather": {"tensors": [0, 1], "indices": [0, 1]},
    "scatter_": {"tensors": [0, 1], "indices": [0, 1], "values": [0, 1]},
    "sddmm": {"dy": [None], "x": [None], "indices": [None], "out": [None]},
    "sparse_adamw_": {
        name: [0, 1] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "indices", "max_exp_avg_sqs", "masters")
    },
}
# as the messages have them
NAMES = {("sddmm", "dy"): "[dy, x][0]", ("sddmm", "x"): "[dy, x][1]", ("sddmm", "indices"): "indices[0]"}


def arguments(op: str, backend: Backend) -> dict[str, Any]:
    """A right call's."""

    def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return backend.to(torch.linspace(1, 2, torch.Size(shape).numel()).view(shape).to(dtype))

    tensors = [values(6, 50), values(40)]
    indices = [backend.to(torch.tensor([3, 299])), backend.to(torch.tensor([0, 39, 7], dtype=torch.int32))]
    if op == "topk_magnitude":
        return {"tensors": tensors, "k": 5}
    if op == "sddmm":
        return {"dy": values(7, 12), "x": values(7, 25), "indices": indices[0], "out": values(2)}
    if op != "sparse_adamw_":
        more = {"values": [values(2), values(3)]} if op == "scatter_" else {}
        return {"tensors": tensors, "indices": indices, **more}
    state = {name: [values(2), values(3)] for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters")}
    return {
        "params": [t.half() for t in tensors],
        "grads": [t.half() for t in tensors],
        "indices": indices,
        **state,
        **{"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1},
    }


def freed(tensor: Tensor) -> Tensor:
    gone = tensor.clone()
    gone.untyped_storage().resize_(0)
    return gone


def view_of_freed(tensor: Tensor) -> Tensor:
    """Its address is its offset, and looks like any other."""
    whole = tensor.new_zeros(2**22 + tensor.numel())
    view = whole[2**22 :].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return view


def strided_and_shrunk(tensor: Tensor) -> Tensor:
    """More bytes are left than it has elements: its strides reach beyond."""
    whole = tensor.new_zeros(*tensor.shape, 4)
    view = whole[..., 0]
    whole.untyped_storage().resize_(2 * tensor.nbytes)
    return view


def shrunk(tensor: Tensor) -> Tensor:
    whole = tensor.clone()
    whole.untyped_storage().resize_(tensor.nbytes - 1)
    return whole


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed,
    "view_of_freed": view_of_freed,
    "shrunk": shrunk,
    "strided_and_shrunk": strided_and_shrunk,
}
CONTIGUOUS = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "out")
CASES = [(op, name, at) for op, names in ARGUMENTS.items() for name, places in names.items() for at in places]
every_argument = pytest.mark.parametrize(("op", "name", "at"), CASES, ids=[f"{o}-{n}-{a}" for o, n, a in CASES])


def spoil(given: dict[str, Any], name: str, at: int | None, how: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Spoils one argument; all other tensors."""
    if at is None:
        given[name] = how(given[name])
    else:
        given[name][at] = how(given[name][at])
    spoiled = given[name] if at is None else given[name][at]
    flat = [t for value in given.values() for t in (value if isinstance(value, list) else [value])]
    return [t for t in flat if isinstance(t, Tensor) and t is not spoiled]


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_calls_are_right(backend: Backend, op: str) -> None:
    getattr(backend, op)(**arguments(op, backend))


@pytest.mark.parametrize("how", SPOILED)
@every_argument
def test_memory_that_is_gone(backend: Backend, op: str, name: str, at: int | None, how: str) -> None:
    if how == "strided_and_shrunk" and name in CONTIGUOUS:
        pytest.skip("its strides are an error before that")
    given = arguments(op, backend)
    others = spoil(given, name, at, SPOILED[how])
    before = [bits(t) for t in others]
    what = NAMES.get((op, name), name if at is None else f"{name}[{at}]")
    with pytest.raises(ValueError, match="memory was freed") as caught:
        getattr(backend, op)(**given)
    assert_message(caught, [f"`{what}`", "bytes"])
    assert all(torch.equal(bits(t), b) for t, b in zip(others, before, strict=True))


@every_argument
def test_fake_tensors(backend: Backend, op: str, name: str, at: int | None) -> None:
    """Of the right device, and without memory."""
    given = arguments(op, backend)

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensorMode().from_tensor(tensor)

    others = spoil(given, name, at, fake)
    before = [bits(t) for t in others]
    with pytest.raises(TypeError) as caught:
        getattr(backend, op)(**given)
    assert_message(caught, ["memory", "FakeTensor"])
    assert all(torch.equal(bits(t), b) for t, b in zip(others, before, strict=True))


@pytest.mark.parametrize("op", ["topk_magnitude", "gather"])
def test_expanded_tensors_have_all_their_memory(backend: Backend, op: str) -> None:
    """Reading is right where many elements share a place, and where a view begins late."""
    base = backend.to(torch.arange(1.0, 13))
    tensors = [base[11:].expand(3, 4), base[2:].as_strided((4, 3), (1, 2)), base[:0], base[5:].view(7)[::3]]
    copies = [t.clone() for t in tensors]
    if op == "topk_magnitude":
        actual, expected = (backend.topk_magnitude(t, 9).indices for t in (tensors, copies))
    else:
        indices = [torch.arange(t.numel(), device=t.device) for t in tensors]
        actual, expected = (backend.gather(t, indices) for t in (tensors, copies))
    assert all(map(torch.equal, actual, expected))


OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:1].expand(4),
    "expanded_rows": lambda x: x[:3].expand(5, 3),
    "unfolded": lambda x: x.unfold(0, 3, 1),
    "shifted_rows": lambda x: x.as_strided((3, 4), (3, 1)),
    "crossing": lambda x: x.as_strided((4, 3), (2, 3)),
}
APART: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.view(5, 6).t(),
    "every_other": lambda x: x.view(5, 6)[:, ::2],
    "interleaved": lambda x: x.as_strided((2, 3), (3, 2)),  # 0 2 4 and 3 5 7
    "one_element": lambda x: x[:1].expand(1, 1),
    "empty": lambda x: x[:0].expand(4, 0),
}


@pytest.mark.parametrize("layout", OVERLAPPING)
def test_no_writing_where_elements_share_memory(backend: Backend, layout: str) -> None:
    base = backend.to(torch.arange(30.0))
    tensor, index = OVERLAPPING[layout](base), torch.tensor([1], device=base.device)
    state = [torch.zeros(1, device=base.device) for _ in range(2)]
    scalars = {"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    with pytest.raises(ValueError, match="`tensors\\[0\\]`") as scattered:
        backend.scatter_([tensor], [index], [state[0]])
    with pytest.raises(ValueError, match="`params\\[0\\]`") as stepped:
        backend.sparse_adamw_([tensor], [tensor.clone()], state[:1], state[1:], [index], **scalars)
    for caught in (scattered, stepped):
        assert_message(caught, ["one memory location", "clone"])
    assert torch.equal(base.cpu(), torch.arange(30.0))


@pytest.mark.parametrize("layout", APART)
def test_writing_through_strides(backend: Backend, layout: str) -> None:
    base = backend.to(torch.arange(30.0))
    tensor = APART[layout](base)
    index = torch.arange(tensor.numel(), device=base.device)
    backend.scatter_([tensor], [index], [-1.0 - index])
    assert torch.equal(tensor, (-1.0 - index).view(tensor.shape))
    assert int((base < 0).sum()) == tensor.numel()
