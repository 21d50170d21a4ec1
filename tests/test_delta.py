"""SparseDelta: bits of every dtype, checks before any write, interpolation, composition, its file."""

from __future__ import annotations

import copy
import json
import os
import re
import struct
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import assert_message, assert_same_bits, bits
from hypothesis import given, settings
from torch import Tensor, nn

from saft_kernels import Originals, SparseAdamW, SparseDelta, SparseMask
from saft_kernels.common import tensor_files
from saft_kernels.delta import difference
from saft_kernels.delta import file as delta_file
from saft_kernels.delta.changes import Changes

State = dict[str, Tensor]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits: NaN with payloads, infinities, denormals and -0 among the floats."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    numel = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(256, (numel,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def changed(state: State, share: float = 0.3, seed: int = 1) -> State:
    """A copy in which about that share of each tensor has other bits."""
    result = {}
    for i, (name, tensor) in enumerate(state.items()):
        generator = torch.Generator().manual_seed(100 * seed + i)
        where = torch.rand(tensor.shape, generator=generator) < share
        other = filled(tuple(tensor.shape), tensor.dtype, 7 * seed + i)
        # by bytes: the oldest torch has no where() of unsigned integers
        mixed = torch.where(where.reshape(-1, 1), *(t.reshape(-1, 1).view(torch.uint8) for t in (other, tensor)))
        result[name] = mixed.view(tensor.dtype).reshape(tensor.shape)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:  # where() may alter no bits
            assert bool((bits(result[name]) == bits(tensor)).any()) or not tensor.numel()
    return result


def every_dtype() -> State:
    state = {str(dtype): filled((5, 7), dtype, i) for i, dtype in enumerate(delta_file.DTYPES)}
    return {**state, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "count": torch.tensor(2**62 + 1)}


def small() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(6, 5, generator=generator),
        "a.bias": torch.randn(6, generator=generator).bfloat16(),
        "b.weight": torch.randn(4, 6, generator=generator),
    }


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same_state(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same_bits(actual[name], expected[name], name)


# ---- apply, revert ----


def test_apply_and_revert_give_every_bit_back_in_every_dtype(tmp_path: Path) -> None:
    base = every_dtype()
    tuned = changed(base)
    delta = SparseDelta.diff(base, tuned)
    delta.save(tmp_path / "d", include_original=True)
    for one in (delta, SparseDelta.load(tmp_path / "d"), copy.deepcopy(delta)):
        model = copied(base)
        one.apply_(model)
        assert_same_state(model, tuned)
        one.revert_(model)
        assert_same_state(model, base)


def test_only_changed_elements_count_and_all_of_them() -> None:
    """NaN by payload, -0 from +0."""
    quiet, other = (
        torch.tensor(pattern, dtype=torch.int32).view(torch.float32) for pattern in (0x7FC00000, 0x7FC00001)
    )
    base = {"w": torch.stack([quiet, quiet, torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(1.0)])}
    tuned = {"w": torch.stack([quiet, other, torch.tensor(-0.0), torch.tensor(-0.0), torch.tensor(1.0)])}
    delta = SparseDelta.diff(base, tuned)
    assert delta.mask["w"].tolist() == [1, 2]
    assert repr(delta) == "SparseDelta(k=2, density=40.000%, tensors=1)"
    model = copied(base)
    delta.apply_(model)
    assert_same_state(model, tuned)


def test_modules_buffers_and_wrapped_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    base.register_buffer("scratch", torch.zeros(2), persistent=False)
    tuned = copy.deepcopy(base)
    tuned.scratch.fill_(1)
    tuned(torch.randn(8, 4))  # moves the statistics of the batch norm, and its int64 count
    with torch.no_grad():
        tuned[0].weight[1, 2] += 1
    wrapped = {f"module.{name}": value for name, value in tuned.state_dict().items()}
    compiled = {f"_orig_mod.{name}": value for name, value in tuned.state_dict().items()}
    delta = SparseDelta.diff(base, wrapped)
    assert set(delta.mask) == {"0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert delta == SparseDelta.diff(base, tuned) == SparseDelta.diff(base.state_dict(), compiled)
    model = nn.DataParallel(copy.deepcopy(base))
    delta.apply_(model)
    assert_same_state(model.module.state_dict(), tuned.state_dict())
    assert model.module[0].weight.requires_grad
    assert model.module.scratch.tolist() == [0, 0]


def test_memory_layouts() -> None:
    """Indices are of the logical tensor, whatever the strides of either side."""
    base = {"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
    tuned = {"w": base["w"].clone().index_fill(1, torch.tensor([1]), 9.0)}
    storage = torch.full((12, 8), 5.0)
    view = storage[::2, 1::2]
    transposed = {"w": base["w"].t().contiguous().t()}
    delta = SparseDelta.diff(transposed, {"w": tuned["w"].t().contiguous().t()})
    assert delta == SparseDelta.diff(base, tuned)
    view.copy_(base["w"])
    delta.apply_({"w": view})
    assert torch.equal(view, tuned["w"])
    assert int((storage == 5.0).sum()) == 12 * 8 - 24
    delta.apply_(transposed)
    assert torch.equal(transposed["w"], tuned["w"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_written_under_every_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.head.weight[2, 1] = 7
    SparseDelta.diff(base, tuned).save(tmp_path / "d", include_original=True)
    delta = SparseDelta.load(tmp_path / "d")
    assert (delta.k, delta.numel, delta.tied) == (1, 15, {"head.weight": "embed.weight"})
    apart = {name: value.clone() for name, value in base.state_dict().items()}
    only_head = {"head.weight": base.head.weight.detach().clone()}  # what safetensors may keep of it
    for model in (copy.deepcopy(base), apart, only_head):
        delta.apply_(model)
        tensors = model.state_dict() if isinstance(model, nn.Module) else model
        assert all(torch.equal(tensor, tuned.head.weight) for tensor in tensors.values())
        delta.revert_(model)
    # tied before, not after: two tensors
    untied = {name: value.clone() for name, value in tuned.state_dict().items()}
    both = SparseDelta.diff(base, untied)
    assert both.tied == {}
    both.apply_(copy.deepcopy(base))  # they have changed alike
    # tied after, not before: what the two were differs
    untied["head.weight"][4, 0] += 1
    mixed = SparseDelta.diff(untied, tuned)
    assert (mixed.tied, mixed.mask["head.weight"].tolist()) == ({}, [12])
    with pytest.raises(ValueError, match=r"without 'embed\.weight'"):
        delta.apply_({"other": torch.zeros(5, 3)})


def test_files_and_compositions_name_their_device(tmp_path: Path) -> None:
    """Another default device: every tensor that is made here says where it is."""
    delta = SparseDelta.diff(small(), changed(small()), whole=True)
    try:
        torch.set_default_device("meta")
        delta.save(tmp_path / "d", include_original=True)
        loaded = SparseDelta.load(tmp_path / "d")
        both = SparseDelta.compose([loaded, loaded], on_conflict="sum").delta
        dense = loaded.mask.to_dense()
        loaded.mask.save(tmp_path / "m")
        masks = [SparseMask.load(tmp_path / "m"), SparseMask.from_dense(dense)]
        assert loaded == delta
        assert both.mask == delta.mask
        assert masks == [delta.mask, delta.mask]
    finally:
        torch.set_default_device(None)


def test_another_default_dtype_changes_nothing(tmp_path: Path) -> None:
    base, tuned = small(), changed(small())
    linear = nn.Sequential(nn.Linear(6, 5, bias=False))
    adapted = copy.deepcopy(linear)
    with torch.no_grad():
        adapted[0].weight[0, 1] += 0.25
    expected = SparseDelta.diff(base, tuned)
    half = copied(base)
    expected.interpolate_(half, 0.5)
    try:
        torch.set_default_dtype(torch.bfloat16)
        delta = SparseDelta.diff(base, tuned)
        delta.interpolate_(base, 0.5)
        assert_same_state(base, half)
        delta.save(tmp_path / "d", include_original=True)
        SparseDelta.load(tmp_path / "d").apply_(base)
        SparseDelta.diff(linear, adapted).to_shira(tmp_path / "adapter", linear)
        shira = SparseDelta.from_shira(tmp_path / "adapter", linear)
    finally:
        torch.set_default_dtype(torch.float32)
    assert delta == expected
    assert_same_state(base, tuned)
    assert shira == SparseDelta.diff(linear, adapted)


def test_a_large_tensor_is_compared_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its strides, in the order of its elements."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(1, 6, 5, 7, generator=generator)
    for view in (tensor, tensor.transpose(1, 3), tensor[:, ::2], tensor[:, :, :1].expand(1, 6, 5, 7), tensor[0, 0, 0]):
        other = torch.where(torch.rand(view.shape, generator=generator) < 0.3, view + 1, view)
        expected = SparseDelta.diff({"w": view}, {"w": other})
        assert expected.mask["w"].tolist() == (view != other).flatten().nonzero().flatten().tolist()
        for block in (1, 3, 10):
            monkeypatch.setattr(difference, "_BLOCK", block)
            assert SparseDelta.diff({"w": view}, {"w": other}) == expected
        monkeypatch.undo()


@pytest.mark.parametrize("whole", [False, True])
def test_views_of_a_single_element(whole: bool, tmp_path: Path) -> None:
    """They have any stride, and torch calls them contiguous."""
    storage = torch.arange(8.0)
    for view in (storage[::2][:1], storage.view(2, 4)[:, 2:3][:1], storage[3:4], storage.as_strided((1, 1), (5, 3))):
        parameter = nn.Parameter(view)
        delta = SparseDelta.diff({"w": parameter}, {"w": parameter.detach() + 1}, whole=whole)
        plain = torch.tensor(view.flatten().tolist()).view(view.shape)
        assert delta == SparseDelta.diff({"w": plain}, {"w": plain + 1}, whole=whole)
        delta.save(tmp_path / "d", include_original=True)
        assert SparseDelta.load(tmp_path / "d") == delta
    with pytest.raises(TypeError, match="negated or conjugated view"):
        SparseDelta.diff(
            {"w": torch.ones(2, dtype=torch.complex64).conj()}, {"w": torch.ones(2, dtype=torch.complex64)}
        )


def test_nothing_changed(tmp_path: Path) -> None:
    base = small()
    SparseDelta.diff(base, base).save(tmp_path / "d", include_original=True)
    delta = SparseDelta.load(tmp_path / "d")
    assert (delta.k, delta.density, len(delta.mask), delta.originals) == (0, 0.0, 0, {})
    model = copied(base)
    for move in (delta.apply_, delta.revert_, lambda m: delta.interpolate_(m, 0.5)):
        move(model)
        assert_same_state(model, base)
    assert SparseDelta.diff({}, {}).density == 0.0
    assert SparseDelta.compose([delta, delta]).delta.k == 0


@given(st.data())
@settings(max_examples=60)
def test_any_difference_round_trips(data: st.DataObject) -> None:
    """Arbitrary bit patterns at arbitrary places, through the bytes of a file's index code."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]))
    numel = data.draw(st.integers(0, 300))
    base = {"w": filled((numel,), dtype, data.draw(st.integers(0, 99)))}
    where = torch.tensor(data.draw(st.lists(st.booleans(), min_size=numel, max_size=numel)), dtype=torch.bool)
    tuned = {"w": base["w"].clone()}
    tuned["w"].view(torch.uint8).view(numel, dtype.itemsize)[where] ^= 1
    delta = SparseDelta.diff(base, tuned)
    assert delta.k == int(where.sum())
    gaps = delta_file.to_gaps([index.long() for index in delta.mask.values()])
    decoded = delta_file.decode_gaps(delta_file.encode_gaps(gaps), len(gaps))
    (index,) = delta_file.from_gaps(decoded, [delta.k])
    assert index.tolist() == where.nonzero().flatten().tolist()
    model = copied(base)
    delta.apply_(model)
    assert_same_state(model, tuned)
    delta.revert_(model)
    assert_same_state(model, base)


# ---- the checks come first ----


def wrong_models() -> dict[str, tuple[Callable[[State], State], str]]:
    def without(state: State) -> State:
        return {name: value for name, value in state.items() if name != "b.weight"}

    def altered(state: State) -> State:
        state["b.weight"].view(-1)[SparseDelta.diff(small(), changed(small())).mask["b.weight"][-1]] += 1
        return state

    return {
        "missing": (without, "got a model without 'b.weight'"),
        "shape": (lambda s: {**s, "b.weight": s["b.weight"].t()}, "expected shape (4, 6) for 'b.weight', got (6, 4)"),
        "dtype": (lambda s: {**s, "b.weight": s["b.weight"].half()}, "expected float32 for 'b.weight', got float16"),
        "values": (altered, "got other values in 'b.weight'"),
        "expanded": (
            lambda s: {**s, "b.weight": s["b.weight"][:1].expand(4, 6)},
            "got an expanded tensor with strides",
        ),
        "meta": (lambda s: {**s, "b.weight": s["b.weight"].to("meta")}, "got one on meta"),
        "no_tensor": (lambda s: {**s, "b.weight": 3}, "expected a tensor, got int"),
    }


@pytest.mark.parametrize("known", [True, False], ids=["originals", "checksums"])
@pytest.mark.parametrize("case", wrong_models())
def test_a_wrong_model_is_left_as_it_was(case: str, known: bool, tmp_path: Path) -> None:
    make, message = wrong_models()[case]
    SparseDelta.diff(small(), changed(small())).save(tmp_path / "d", include_original=known)
    model = make(small())
    before = {name: tensor.clone() for name, tensor in model.items() if isinstance(tensor, Tensor)}
    delta = SparseDelta.load(tmp_path / "d")
    for move in (delta.apply_, delta.revert_, lambda m: delta.interpolate_(m, 0.5)):
        with pytest.raises((ValueError, TypeError)) as error:
            move(model)
        assert_message(error, ["`model`", message])
    for name, tensor in before.items():
        if not tensor.is_meta:
            assert_same_bits(model[name], tensor, name)
    assert (delta.originals is not None) == known


def test_whole_finds_what_the_selected_elements_cannot_tell(tmp_path: Path) -> None:
    base = {**small(), "frozen": torch.ones(3)}
    tuned = {**changed(small()), "frozen": base["frozen"]}
    SparseDelta.diff(base, tuned, whole=True).save(tmp_path / "d", include_original=True)
    delta = SparseDelta.load(tmp_path / "d")
    model = copied(base)
    delta.apply_(model, verify="whole")
    assert_same_state(model, tuned)
    delta.revert_(model, verify="whole")
    for name in ("a.weight", "frozen"):
        model = copied(base)
        unchanged = (tuned[name] == base[name]).flatten().nonzero()[0]
        model[name].view(-1)[unchanged] += 1
        before = copied(model)
        with pytest.raises(ValueError, match="outside the changed elements") as error:
            delta.apply_(model, verify="whole")
        assert_message(error, ["`model`", f"in {name!r}"])
        assert_same_state(model, before)
        delta.apply_(model)
    plain = SparseDelta.diff(base, tuned)
    with pytest.raises(ValueError, match=r"got 'whole', whose checksums it does not have"):
        plain.apply_(base, verify="whole")
    with pytest.raises(ValueError, match="expected one of selected, whole, none"):
        plain.apply_(base, verify="all")


def test_without_verification_it_writes_over_anything() -> None:
    base, tuned = small(), changed(small())
    delta = SparseDelta.diff(base, tuned)
    model = {name: torch.zeros_like(value) for name, value in base.items()}
    delta.apply_(model, verify="none")
    for name, index in delta.mask.items():
        assert torch.equal(model[name].flatten()[index.long()], tuned[name].flatten()[index.long()])


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "'a' only in `base`, 'b' only in `tuned`; leave them out"),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, "expected shape (2,) for 'a', got (3,)"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2).half()}, "expected float32 for 'a', got float16"),
        ({"a": torch.ones(2, dtype=torch.complex128)},) * 2 + ("got complex128 for 'a'; exclude it",),
        ({"a": 1}, {"a": 1}, "`base`['a']: expected a tensor, got int"),
        (7, {}, "`base`: expected a module or a state dict, got int"),
    ],
)
def test_models_that_cannot_be_compared(base: Any, tuned: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        SparseDelta.diff(base, tuned)
    assert_message(error, [message])


def test_exclude() -> None:
    base = {**small(), "old_head": torch.zeros(2)}
    tuned = {**changed(small()), "new_head": torch.zeros(3)}
    delta = SparseDelta.diff(base, tuned, exclude=["*_head", "a.*"], progress=True)
    assert list(delta.mask) == ["b.weight"]
    assert SparseDelta.diff(base, tuned, exclude="*_head").mask.keys() == small().keys()
    with pytest.raises(ValueError, match=r"got 'head\*', which matches none of 5") as error:
        SparseDelta.diff(base, tuned, exclude=["*_head", "head*"])
    assert_message(error, ["`exclude`", "they are called 'a.weight', 'a.bias', 'b.weight' and 2 more"])


# ---- originals ----


def test_originals_are_learned_from_the_base_they_fit(tmp_path: Path) -> None:
    base, tuned = small(), changed(small())
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    delta = SparseDelta.load(tmp_path / "d")
    model = copied(tuned)
    delta.apply_(model)  # it is already there
    for move in (delta.revert_, lambda m: delta.interpolate_(m, 0.5)):
        with pytest.raises(ValueError, match="expected known originals") as error:
            move(model)
        assert_message(error, ["take_originals(base)"])
    with pytest.raises(ValueError, match="expected known originals"):
        delta.save(tmp_path / "e", include_original=True)
    with pytest.raises(ValueError, match="`base`: expected the base of this delta") as error:
        delta.take_originals(tuned)
    assert_message(error, ["'a.weight', 'a.bias', 'b.weight'"])
    delta.take_originals(base)
    delta.revert_(model)
    assert_same_state(model, base)
    another = SparseDelta.load(tmp_path / "d")
    another.apply_(model)  # learns them from the model itself
    another.revert_(model)
    assert_same_state(model, base)


def loss(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 8, dtype=next(model.parameters()).dtype).view(2, 4)).square().sum()


def trained(optimizer: SparseAdamW, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["density", "mask", "dense", "selection_steps", "reselect"])
def test_from_optimizer(how: str, dtype: torch.dtype) -> None:
    """The originals it remembers give the delta that the base itself gives."""
    model = make_model(dtype)
    base = copy.deepcopy(model)
    arguments: dict[str, Any] = {"density": 0.2}
    if how == "mask":
        arguments = {"mask": SparseMask.from_dense({n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters()})}
    elif how == "dense":
        arguments = {"density": 1.0}
    elif how == "selection_steps":
        arguments["selection_steps"] = 2
    optimizer = SparseAdamW(model.named_parameters(), lr=0.1, **arguments)
    originals = Originals(optimizer)
    assert originals.k == (arguments["mask"].k if how == "mask" else 0)
    assert SparseDelta.from_optimizer(optimizer, originals).k == 0
    trained(optimizer, model, 3)
    if how == "reselect":
        optimizer.reselect()
        for _ in range(2):  # another loss, so that other elements are selected
            (model[0](torch.eye(4, dtype=dtype)) ** 2).sum().backward()
            model[2].weight.grad = torch.zeros_like(model[2].weight)
            optimizer.step()
            optimizer.zero_grad()
        assert originals.k > optimizer.mask.k
    delta = SparseDelta.from_optimizer(optimizer, originals)
    assert (
        delta == SparseDelta.from_optimizer(optimizer, base) == SparseDelta.from_optimizer(optimizer, base.state_dict())
    )
    assert delta == SparseDelta.diff(base, model)
    assert 0 < delta.k <= originals.k
    assert delta.numel == sum(p.numel() for p in model.parameters())
    delta.revert_(model)
    assert_same_state(model.state_dict(), base.state_dict())


def test_from_optimizer_names() -> None:
    model = make_model()
    base = copy.deepcopy(model)
    optimizer = SparseAdamW([{"params": [model[2].weight]}, {"params": [model[0].weight]}], lr=0.1, density=0.2)
    trained(optimizer, model, 2)
    with pytest.raises(ValueError, match="expected parameters with names") as error:
        SparseDelta.from_optimizer(optimizer, base)
    assert_message(error, ["pass `model`"])
    delta = SparseDelta.from_optimizer(optimizer, base, model=nn.DataParallel(model))
    assert delta == SparseDelta.from_optimizer(optimizer, base, model=model)
    delta.apply_(base)
    assert_same_state(base.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"got one without its 'param\.0', 'param\.1'"):
        SparseDelta.from_optimizer(optimizer, base, model=base)
    with pytest.raises(ValueError, match=r"got none of '0.weight'"):
        SparseDelta.from_optimizer(optimizer, {"2.weight": base[2].weight}, model=model)
    with pytest.raises(TypeError, match="expected a SparseAdamW, got SGD"):
        SparseDelta.from_optimizer(torch.optim.SGD(model.parameters()), base)


def test_originals_come_before_the_first_step() -> None:
    model = make_model()
    optimizer = SparseAdamW(model.named_parameters(), density=0.2)
    trained(optimizer, model, 1)
    with pytest.raises(ValueError, match="expected one before its first step") as error:
        Originals(optimizer)
    assert_message(error, ["`optimizer`"])
    # a run that goes on: the loaded selection is not one whose originals it has seen
    fresh = SparseAdamW(make_model().named_parameters(), density=0.2)
    originals = Originals(fresh)
    with pytest.raises(ValueError, match="expected a selection whose originals are known") as error:
        fresh.load_state_dict(optimizer.state_dict())
    assert_message(error, ["`state_dict`", "pass the mask of that run"])
    with pytest.raises(ValueError, match="expected a selection whose originals are known"):
        SparseDelta.from_optimizer(fresh, originals)
    # with the mask it is
    again = make_model()
    base = copy.deepcopy(again)
    resumed = SparseAdamW(again.named_parameters(), mask=optimizer.mask)
    originals = Originals(resumed)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    trained(resumed, again, 1)
    assert SparseDelta.from_optimizer(resumed, originals) == SparseDelta.diff(base, again)
    assert not copy.deepcopy(resumed)._selection_hooks


# ---- interpolate ----


def test_a_sweep_starts_from_the_same_endpoints() -> None:
    base, tuned = small(), changed(small())
    tuned = {name: torch.where(value.isfinite(), value, base[name]).clamp(-9, 9) for name, value in tuned.items()}
    delta = SparseDelta.diff(base, tuned)
    model = copied(base)
    seen: dict[float, State] = {}
    for alpha in (0.3, 1, 0.7, 0, 0.3, -0.5, 1.5, 0.7, 0.3, 0.0, 1.0):
        delta.interpolate_(model, alpha)
        assert_same_state(model, seen.setdefault(alpha, copied(model)))
        for name in base:
            wide = base[name].double() + alpha * (tuned[name].double() - base[name].double())
            tolerance = 2.0 ** (-7 if base[name].dtype == torch.bfloat16 else -22) * 16  # a rounding of values up to 16
            assert bool(((model[name].double() - wide).abs() <= tolerance).all())
    assert_same_state(seen[0], base)
    assert_same_state(seen[1], tuned)
    delta.interpolate_(model, 0.3)
    delta.revert_(model)
    assert_same_state(model, base)
    other = copied(base)
    delta.interpolate_(other, np.float32(0.3))  # two models at once
    delta.interpolate_(model, 0.7)
    delta.apply_(other)
    delta.apply_(model)
    assert_same_state(model, tuned)
    assert_same_state(other, tuned)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 1 / 3, 0.0625, 0.9999, 1e-4, -0.5, 1.5, 7 / 64, 12.25, 5 / 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_another_process_finds_the_alpha(dtype: torch.dtype, alpha: float, tmp_path: Path) -> None:
    """A model that was saved between base and tuned, and the delta anew from its file."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(500, generator=generator).to(dtype) for name in ("a", "b")}
    base["n"] = torch.tensor([1, 2, 3])
    tuned = {name: value + (torch.arange(len(value)) % 3 == 0) for name, value in base.items()}
    tuned["a"] = torch.where(tuned["a"] == base["a"], base["a"], tuned["a"] * 3)
    delta = SparseDelta.diff(base, tuned)
    delta.save(tmp_path / "d", include_original=True)
    model = copied(base)
    delta.interpolate_(model, alpha)
    between = copied(model)
    for move, expected in (
        (lambda d, m: d.apply_(m), tuned),
        (lambda d, m: d.revert_(m), base),
        (lambda d, m: d.interpolate_(m, alpha), between),
    ):
        model = copied(between)
        move(SparseDelta.load(tmp_path / "d"), model)
        assert_same_state(model, expected)
    # another alpha in one tensor, or another value in one element, is no state of this delta
    other = copied(base)
    SparseDelta.load(tmp_path / "d").interpolate_(other, alpha + 0.25)
    for wrong in ({**between, "b": other["b"]}, {**between, "a": bumped(between["a"])}):
        before = copied(wrong)
        with pytest.raises(ValueError, match="`model`: expected the base of this delta, or where"):
            SparseDelta.load(tmp_path / "d").apply_(wrong)
        assert_same_state(wrong, before)


def bumped(values: Tensor) -> Tensor:
    """The last bit of the first value flipped: it is a changed one."""
    flipped = values.clone()
    flipped.view(torch.uint8)[0] ^= 1
    return flipped


def test_an_alpha_that_nobody_would_write_is_not_found(tmp_path: Path) -> None:
    """This delta remembers it, another process does not."""
    base, tuned = small(), copied(small())
    for value in tuned.values():
        value.view(-1)[::2] += 1
    delta = SparseDelta.diff(base, tuned)
    delta.interpolate_(base, 0.123456789)
    with pytest.raises(ValueError, match="`model`: expected the base of this delta, or where"):
        SparseDelta.diff(small(), tuned).apply_(base)
    delta.apply_(base)
    assert_same_state(base, tuned)


def test_integers_and_every_dtype_interpolate() -> None:
    base = every_dtype()
    tuned = changed(base)
    delta = SparseDelta.diff(base, tuned)
    model = copied(base)
    for alpha, integers in ((0.25, base), (0.5, tuned)):
        delta.interpolate_(model, alpha)
        for name, tensor in model.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                assert_same_bits(tensor, integers[name], name)
    delta.revert_(model)
    assert_same_state(model, base)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39, -1e300, "half", None])
def test_alpha(alpha: Any) -> None:
    delta = SparseDelta.diff(small(), changed(small()))
    with pytest.raises(ValueError, match="`alpha`: expected a finite number") as error:
        delta.interpolate_(small(), alpha)
    assert_message(error, ["1 the tuned model"])


@pytest.mark.parametrize("also", [False, True])
def test_what_was_untied_does_not_fit_what_is_tied(also: bool, tmp_path: Path) -> None:
    """One tensor by two names, of which the tuned model has two: it cannot be both."""
    weight = torch.zeros(2, 3)
    base = {"embed": weight, "head": weight}
    tuned = {"embed": weight + also, "head": weight + 2}
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    delta = SparseDelta.load(tmp_path / "d")
    with pytest.raises(ValueError, match="`model`: expected 'embed' and 'head' apart") as error:
        delta.apply_(base)
    assert_message(error, ["got one tensor by both names; untie them first"])
    assert not bool(weight.any())
    model = copied(tuned)
    delta.take_originals(base)
    delta.revert_(model)
    assert_same_state(model, base)
    delta.revert_(base)
    delta.apply_(model)
    assert_same_state(model, tuned)


def test_a_pair_is_let_go_before_the_next_is_read() -> None:
    """The peak is one tensor of each model, not two."""
    seen: list[weakref.ref[Tensor]] = []

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name in "abc":
            assert all(tensor() is None for tensor in seen)
            old, new = torch.zeros(3), torch.ones(3)
            seen.extend((weakref.ref(old), weakref.ref(new)))
            pair = name, old, new
            del old, new
            yield pair
            del pair

    changes = difference.difference(pairs(), "abc", tied={}, untied=(), whole=False, numel=9)
    assert changes.mask.k == 9


# ---- compose ----


def from_indices(base: State, changes: dict[str, dict[int, float]]) -> SparseDelta:
    tuned = copied(base)
    for name, values in changes.items():
        for index, value in values.items():
            tuned[name].view(-1)[index] = value
    return SparseDelta.diff(base, tuned)


def test_compose() -> None:
    base = {"v": torch.zeros(6), "w": torch.arange(6.0), "n": torch.tensor([5])}
    a = from_indices(base, {"v": {1: 1.0}, "w": {0: 9.0, 2: 8.0, 3: 7.0}, "n": {0: 6}})
    b = from_indices(base, {"w": {2: 8.0, 3: 1.0, 5: -1.0}, "n": {0: 9}})
    expected = {
        "first": [9.0, 1, 8, 7, 4, -1],
        "last": [9.0, 1, 8, 1, 4, -1],
        "sum": [9.0, 1, 2 + 6 + 6, 3 + 4 - 2, 4, -1],
    }
    for policy, values in expected.items():
        composed, conflicts = SparseDelta.compose([a, b], on_conflict=policy)
        assert [(row.name, row.shared, row.conflicting) for row in conflicts.rows] == [("w", 2, 1), ("n", 1, 1)]
        assert (conflicts.shared, conflicts.conflicting) == (3, 2)
        model = copied(base)
        composed.apply_(model)
        assert model["w"].tolist() == values
        assert model["v"].tolist() == [0, 1, 0, 0, 0, 0]
        assert model["n"].tolist() == [{"first": 6, "last": 9, "sum": 5 + 1 + 4}[policy]]
        composed.revert_(model)
        assert_same_state(model, base)
    lines = [line.split() for line in str(conflicts).splitlines()]
    assert lines == [["tensor", "shared", "conflicting"], ["w", "2", "1"], ["n", "1", "1"], ["total", "3", "2"]]
    with pytest.raises(ValueError, match="`deltas`: expected no element with different new values, got 2") as error:
        SparseDelta.compose([a, b])
    assert_message(error, ["'w', 'n'", "on_conflict='first', 'last' or 'sum'"])
    back = from_indices(base, {"w": {3: -1.0}})  # 3 + 4 - 4: the base again
    assert list(SparseDelta.compose([a, back], on_conflict="sum").delta.mask["w"]) == [0, 2]
    only = from_indices(base, {"w": {5: -1.0}})
    assert SparseDelta.compose([a, only], on_conflict="error").delta.k == 6


def test_compose_needs_one_base(tmp_path: Path) -> None:
    base = small()
    a = from_indices(base, {"a.weight": {0: 1.0}})
    other = {**base, "a.weight": base["a.weight"] + 1}
    with pytest.raises(ValueError, match=r"different originals in 'a\.weight'"):
        SparseDelta.compose([a, from_indices(other, {"a.weight": {0: 1.0}})])
    half = {name: value.half() for name, value in base.items()}
    with pytest.raises(ValueError, match=r"got float16 of shape \(6, 5\) and float32 of shape \(6, 5\) for 'a.weight'"):
        SparseDelta.compose([a, from_indices(half, {"a.weight": {0: 1.0}})])
    with pytest.raises(ValueError, match="`deltas`: expected at least one"):
        SparseDelta.compose([])
    with pytest.raises(ValueError, match="expected one of error, first, last, sum"):
        SparseDelta.compose([a], on_conflict="mean")
    flags = {"w": torch.tensor([True, False])}
    flipped = from_indices(flags, {"w": {1: True}})
    with pytest.raises(ValueError, match="bools do not add"):
        SparseDelta.compose([flipped, flipped], on_conflict="sum")
    a.save(tmp_path / "d")
    loaded = SparseDelta.load(tmp_path / "d")
    with pytest.raises(ValueError, match=r"compose: expected known originals"):
        SparseDelta.compose([loaded])
    with pytest.raises(ValueError, match="`base`: expected the base of this delta"):
        SparseDelta.compose([loaded], base=other)
    assert SparseDelta.compose([loaded], base=base).delta == a


def test_compose_tied_with_untied() -> None:
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.head.weight[0, 0] = 7
    apart = {name: value.clone() for name, value in base.state_dict().items()}
    other = from_indices(apart, {"head.weight": {1: 3.0}})
    composed, conflicts = SparseDelta.compose([SparseDelta.diff(base, tuned), other])
    assert conflicts.shared == 0
    composed.apply_(apart)
    assert apart["embed.weight"].view(-1)[0] == apart["head.weight"].view(-1)[0] == 7
    assert apart["head.weight"].view(-1)[1] == 3


# ---- the file ----


def test_bytes_per_value(tmp_path: Path) -> None:
    """fp32 at density 1e-3, at random places: 4 B value + 1.9 B index, and under 200 B per tensor."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.weight": torch.zeros(1000, 1000) for i in range(4)}
    tuned = copied(base)
    for tensor in tuned.values():
        tensor.view(-1)[torch.randint(10**6, (1000,), generator=generator)] = 1.0
    delta = SparseDelta.diff(base, tuned)
    delta.save(tmp_path / "d")
    size = (tmp_path / "d").stat().st_size
    assert 3900 < delta.k <= 4000
    assert size <= 6 * delta.k + 200 * 4
    assert size <= 8 * delta.k
    delta.save(tmp_path / "d", include_original=True)
    assert (tmp_path / "d").stat().st_size <= 10 * delta.k + 200 * 4


def test_far_apart_indices(tmp_path: Path) -> None:
    """A tensor of 2^62 elements; only its shape is needed."""
    index = torch.tensor([0, 127, 128, 2**14 + 128, 2**31, 2**62 - 1])
    mask = SparseMask({"w": index}, {"w": (2**31, 2**31)})
    delta = SparseDelta(mask, {"w": torch.arange(6.0)}, {"w": torch.zeros(6)})
    delta.save(tmp_path / "d")
    assert SparseDelta.load(tmp_path / "d") == delta
    assert torch.equal(SparseDelta.load(tmp_path / "d").mask["w"], index)


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    """The format as docs/delta.md states it, decoded by hand."""
    base, tuned = small(), changed(small())
    SparseDelta.diff(base, tuned).save(tmp_path / "d", include_original=True)
    tensors = safetensors.torch.load_file(tmp_path / "d")
    assert set(tensors) == {"gaps", "values.float32", "values.bfloat16", "originals.float32", "originals.bfloat16"}
    with safetensors.safe_open(tmp_path / "d", "pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("format", "version", "numel")} == {
        "format": "saft_kernels.SparseDelta",
        "version": "1",
        "numel": "60",
    }
    encoded = iter(tensors["gaps"].tolist())
    taken = dict.fromkeys(tensors, 0)
    for name, (dtype, shape, k, _) in json.loads(metadata["tensors"]).items():
        model, index = base[name].clone().view(-1), -1
        assert list(base[name].shape) == shape
        for j in range(k):
            gap = shift = 0
            while True:
                byte = next(encoded)
                gap, shift = gap | (byte & 0x7F) << shift, shift + 7
                if byte < 0x80:
                    break
            index += gap + 1
            key = taken[f"values.{dtype}"] + j
            assert bits(tensors[f"originals.{dtype}"][key]).tolist() == bits(model[index]).tolist()
            model[index] = tensors[f"values.{dtype}"][key]
        taken[f"values.{dtype}"] += k
        assert_same_bits(model.view(shape), tuned[name])


def saved(tmp_path: Path) -> tuple[SparseDelta, bytes]:
    delta = SparseDelta.diff(small(), changed(small(), 0.1), whole=True)
    delta.save(tmp_path / "d", include_original=True)
    return delta, (tmp_path / "d").read_bytes()


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    _, content = saved(tmp_path)
    path = tmp_path / "altered"
    for i in range(len(content)):
        altered = bytearray(content)
        altered[i] ^= (0x01, 0x20, 0xFF)[i % 3]
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"expected a delta saved by SparseDelta\.save, got") as error:
            SparseDelta.load(path)
        assert "\n" not in str(error.value), i


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    _, content = saved(tmp_path)
    path = tmp_path / "short"
    for size in [*range(0, len(content), 5), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"expected a delta saved by SparseDelta\.save") as error:
            SparseDelta.load(path)
        assert_message(error, [str(path), "get it anew"])
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"expected a delta saved by SparseDelta\.save"):
        SparseDelta.load(path)


@pytest.mark.parametrize("original", [False, True])
def test_equal_deltas_are_equal_files(original: bool, tmp_path: Path) -> None:
    """From run to run: the order of nothing depends on a hash, and loading and saving is no change."""
    base, tuned = every_dtype(), changed(every_dtype())
    for path in ("a", "b", "c", "d"):
        SparseDelta.diff(base, tuned, whole=True).save(tmp_path / path, include_original=original)
    contents = {(tmp_path / path).read_bytes() for path in ("a", "b", "c", "d")}
    assert len(contents) == 1
    SparseDelta.load(tmp_path / "a").save(tmp_path / "a", include_original=original)
    assert contents == {(tmp_path / "a").read_bytes()}


@pytest.mark.parametrize("how", ["overwritten", "truncated"])
def test_a_loaded_delta_does_not_follow_its_file(how: str, tmp_path: Path) -> None:
    base = {"w": torch.zeros(100_000)}
    tuned = {"w": torch.arange(100_000.0)}
    path = tmp_path / "d"
    SparseDelta.diff(base, tuned).save(path, include_original=True)
    delta = SparseDelta.load(path)
    if how == "truncated":
        os.truncate(path, 0)
    else:
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.write(b"\x01" * size)
    model = copied(base)
    delta.apply_(model)
    assert_same_state(model, tuned)
    delta.revert_(model)
    assert_same_state(model, base)


def with_metadata(content: bytes, **changes: str) -> bytes:
    """The file with other metadata and, unless given, a checksum that fits it."""
    tensors = safetensors.torch.load(content)
    (length,) = struct.unpack("<Q", content[:8])
    metadata = {**json.loads(content[8 : 8 + length])["__metadata__"], **changes}
    if "checksum" not in changes:
        metadata["checksum"] = tensor_files.checksum(metadata, tensors)
    return safetensors.torch.save(tensors, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "its version is '2', this package reads '1'"),
        ({"format": "pt"}, "its format is 'pt'"),
        ({"checksum": "0"}, "its checksum is not that of its content"),
        ({"tensors": "[1"}, ""),
        ({"tensors": "{}"}, "its gaps are"),
        ({"tensors": '{"a": ["int3", [2], 1, ""]}'}, "int3"),
        ({"tied": '{"a": "nowhere"}'}, "`tied`: expected tensors of `mask`, got 'nowhere'"),
        ({"numel": "many"}, "many"),
    ],
)
def test_files_that_were_made_wrong(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    _, content = saved(tmp_path)
    path = tmp_path / "other"
    path.write_bytes(with_metadata(content, **changes))
    with pytest.raises(ValueError, match="expected") as error:
        SparseDelta.load(path)
    assert_message(error, [str(path), message])


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "other"
    SparseMask.from_dense({"w": torch.ones(3)}).save(path)
    with pytest.raises(ValueError, match=r"its format is 'saft_kernels\.SparseMask'"):
        SparseDelta.load(path)
    with pytest.raises(FileNotFoundError):
        SparseDelta.load(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta, content = saved(tmp_path)

    def disk_full(file: Any, tensors: Any, metadata: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_files, "write", disk_full)
    with pytest.raises(OSError, match="No space left"):
        delta.save(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["d"]


def test_decoding_rejects_what_no_encoder_writes() -> None:
    for encoded, count, message in [
        ([0x80], 0, "its gaps are 0 numbers"),
        ([1, 2], 1, "its gaps are 2 numbers"),
        ([1, 0x80], 1, "its gaps are 1 numbers"),
        ([0x80] * 9 + [1], 1, "one of its gaps has 10 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            delta_file.decode_gaps(np.array(encoded, dtype=np.uint8), count)


def test_parts_must_fit() -> None:
    mask = SparseMask({"w": torch.tensor([1, 2])}, {"w": (4,)})
    with pytest.raises(ValueError, match=r"values of 'w': expected shape \(2,\)"):
        SparseDelta(mask, {"w": torch.zeros(3)}, {"w": torch.zeros(2)})
    with pytest.raises(TypeError, match="got complex128"):
        SparseDelta(mask, {"w": torch.zeros(2, dtype=torch.complex128)}, None, checksums={"w": ""})
    with pytest.raises(ValueError, match="`checksums`: expected those of the originals of 'w', got 0"):
        SparseDelta(mask, {"w": torch.zeros(2)}, None)
    with pytest.raises(TypeError, match="unhashable"):
        hash(SparseDelta(mask, {"w": torch.zeros(2)}, {"w": torch.ones(2)}))
    assert SparseDelta(mask, {"w": torch.zeros(2)}, {"w": torch.ones(2)}) != "a delta"


def test_the_record_is_what_the_delta_shows() -> None:
    """One place holds the facts: what is learned or composed is what every attribute says."""
    base, tuned = small(), changed(small())
    whole = SparseDelta.diff(base, tuned, whole=True)
    record = Changes(
        whole.mask, whole.values, None, checksums=whole.checksums, rest=whole.rest, tied=whole.tied, numel=whole.numel
    )
    assert record == Changes(whole.mask, whole.values, whole.originals, rest=whole.rest, numel=whole.numel)
    assert record != Changes(whole.mask, whole.originals, whole.originals, rest=whole.rest, numel=whole.numel)
    delta = SparseDelta(
        whole.mask, whole.values, None, checksums=whole.checksums, rest=whole.rest, tied=whole.tied, numel=whole.numel
    )
    assert delta == whole
    assert delta.originals is None
    delta.take_originals(base)
    assert delta.originals is not None
    assert_same_state(delta.originals, whole.originals)
    with pytest.raises(AttributeError):  # device copies of them are kept
        delta.values = {}


def test_imports_of_delta_go_one_way() -> None:
    """sparse_delta -> {compose, file, shira, targets, difference, originals} -> changes."""
    folder = Path(delta_file.__file__).parent
    allowed = {
        "sparse_delta": {"changes", "compose", "difference", "file", "originals", "shira", "targets"},
        **{name: {"changes"} for name in ("compose", "difference", "file", "shira", "targets")},
        **{"changes": set(), "originals": set(), "__init__": {"originals", "sparse_delta"}},
    }
    assert {path.stem for path in folder.glob("*.py")} == set(allowed)
    for path in folder.glob("*.py"):
        text = path.read_text()
        found = set(re.findall(r"^ *from \.(\w+) import", text, re.MULTILINE))
        for names in re.findall(r"^ *from \. import (.+)", text, re.MULTILINE):
            found |= set(names.split(", "))
        assert found <= allowed[path.stem], path.name
        assert "TYPE_CHECKING" not in text
