"""What SparseAdamW selects, by budget, group and mask. Selections are compared exactly, with a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_message, assert_same_bits
from scripts import assert_only_selected_changed, weights
from torch import nn
from training import (
    FP32_ROUNDINGS,
    backward,
    batches,
    clones,
    dense_masks,
    first_steps,
    largest,
    loss_fn,
    parameters,
    relative_error,
    set_gradients,
    states,
    train,
    two_towers,
)

from saft_kernels import Originals, SparseAdamW, SparseDelta, SparseMask, select
from saft_kernels.optim import budgets
from saft_kernels.optim.state import new_states

# ---- what is selected ----


def test_first_step_selects_the_largest_gradients() -> None:
    params = parameters()
    set_gradients(params, 0)
    optimizer = SparseAdamW(params, k=50)
    assert optimizer.mask is None
    optimizer.step()
    mask = optimizer.mask
    for index, expected in zip(mask.values(), largest([p.grad for p in params], 50), strict=True):
        assert index.tolist() == expected.tolist()
    first_steps(params, optimizer, 3, start=1)
    assert optimizer.mask == mask


def test_scope_tensor() -> None:
    params = parameters()
    set_gradients(params, 0)
    optimizer = SparseAdamW(params, density=0.1, scope="tensor")
    optimizer.step()
    for parameter, index in zip(params, optimizer.mask.values(), strict=True):
        k = max(1, round(0.1 * parameter.numel())) if parameter.numel() else 0
        assert index.tolist() == largest([parameter.grad], k)[0].tolist()


def test_scope_row() -> None:
    params = parameters()
    set_gradients(params, 0)
    optimizer = SparseAdamW(params, density=0.3, scope="row")
    optimizer.step()
    for parameter, index in zip(params, optimizer.mask.values(), strict=True):
        rows = list(parameter.grad) if parameter.dim() > 1 else [parameter.grad]
        expected = []
        for i, row in enumerate(row for row in rows if row.numel()):
            k = max(1, round(0.3 * row.numel()))
            expected += [i * row.numel() + j for j in largest([row], k)[0].tolist()]
        assert index.tolist() == expected


def test_a_group_with_its_own_budget_is_its_own_pool() -> None:
    params = parameters()
    set_gradients(params, 0)
    for parameter in params[:2]:
        parameter.grad *= 1e-3  # the head would get nothing of a shared budget
    groups = [{"params": params[:2], "density": 1.0}, {"params": params[2:5], "k": 7}, {"params": params[5:]}]
    optimizer = SparseAdamW(groups, density=0.25)
    optimizer.step()
    indices = list(optimizer.mask.values())
    assert [index.numel() for index in indices[:2]] == [p.numel() for p in params[:2]]
    expected = largest([p.grad for p in params[2:5]], 7)
    k = round(0.25 * sum(p.numel() for p in params[5:]))
    expected += largest([p.grad for p in params[5:]], k)
    assert [index.tolist() for index in indices[2:]] == [index.tolist() for index in expected]


def test_groups_of_their_own_under_scope_tensor() -> None:
    """A density is of each tensor there; k is of the group."""
    params = parameters()
    set_gradients(params, 0)
    groups = [{"params": params[:2], "k": 9}, {"params": params[2:6], "density": 0.5}, {"params": params[6:]}]
    optimizer = SparseAdamW(groups, density=0.1, scope="tensor")
    optimizer.step()
    expected = largest([p.grad for p in params[:2]], 9)
    for density, some in ((0.5, params[2:6]), (0.1, params[6:])):
        for parameter in some:
            k = max(1, round(density * parameter.numel())) if parameter.numel() else 0
            expected += largest([parameter.grad], k)
    assert [index.tolist() for index in optimizer.mask.values()] == [index.tolist() for index in expected]


def test_dense_head_is_adamw_beside_a_sparse_body() -> None:
    theirs, ours = parameters(), parameters()
    expected = torch.optim.AdamW(theirs[:2], lr=1e-2)
    actual = SparseAdamW([{"params": ours[:2], "density": 1.0}, {"params": ours[2:]}], lr=1e-2, density=0.1)
    first_steps(theirs, expected, 5)
    first_steps(ours, actual, 5)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS
        assert actual.state[a].keys() == expected.state[b].keys()


def test_wholly_selected_tensors_take_the_dense_path() -> None:
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(8))]
    params[0].grad, params[1].grad = torch.full((4, 3), 2.0), torch.full((8,), 1.0)
    optimizer = SparseAdamW(params, k=15)
    optimizer.step()
    assert "indices" not in optimizer.state[params[0]]
    assert optimizer.state[params[0]]["exp_avg"].shape == (4, 3)
    assert optimizer.state[params[1]]["indices"].tolist() == [0, 1, 2]  # ties: the lowest positions
    assert optimizer.mask.k == 15


def test_zero_gradients_never_select_and_never_count() -> None:
    """torch.distributed.checkpoint takes such a step to make an optimizer create its state."""
    for density in (0.1, 1.0):
        params = parameters()
        before = clones(params)
        optimizer = SparseAdamW(params, lr=1.0, density=density)
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(3):
            optimizer.step()
        assert (optimizer.mask is None) == (density < 1)
        assert {float(state["step"]) for state in optimizer.state.values()} == (set() if density < 1 else {0.0})
        for parameter, old in zip(params, before, strict=True):
            assert_same_bits(parameter.detach(), old)
        first_steps(params, optimizer, 1)
        assert {float(state["step"]) for _, state in states(optimizer)} == {1.0}
        # afterwards they are gradients as others: the moments decay and the step counts, as in AdamW
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert {float(state["step"]) for _, state in states(optimizer)} == {2.0}


def test_a_pool_of_zero_gradients_waits() -> None:
    params = parameters()
    optimizer = SparseAdamW([{"params": params[:2], "density": 0.5}, {"params": params[2:]}], density=0.1)
    set_gradients(params, 0)
    for parameter in params[:2]:
        parameter.grad.zero_()
    optimizer.step()
    assert sum(index.numel() for index in list(optimizer.mask.values())[:2]) == 0
    set_gradients(params, 1)
    optimizer.step()
    expected = largest([p.grad for p in params[:2]], round(0.5 * sum(p.numel() for p in params[:2])))
    assert [index.tolist() for index in list(optimizer.mask.values())[:2]] == [i.tolist() for i in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selection_steps(dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    before = clones(params)
    optimizer = SparseAdamW(params, density=0.1, selection_steps=3)
    sums = [torch.zeros(p.shape) for p in params]
    for step in range(3):
        assert optimizer.mask is None
        for parameter, old in zip(params, before, strict=True):
            assert_same_bits(parameter.detach(), old)
        set_gradients(params, step)
        for total, parameter in zip(sums, params, strict=True):
            total += parameter.grad
        optimizer.step()
    k = round(0.1 * sum(p.numel() for p in params))
    assert [i.tolist() for i in optimizer.mask.values()] == [i.tolist() for i in largest(sums, k)]
    assert {float(state["step"]) for _, state in states(optimizer)} == {1.0}
    assert not optimizer._selection.sums  # their memory is given back


def assert_the_next_three_steps_select(params: list[nn.Parameter], optimizer: SparseAdamW) -> None:
    """By their mean gradient, at density 0.1; not before."""
    sums = [torch.zeros(p.shape) for p in params]
    for step in range(2, 5):
        assert optimizer.mask is None
        first_steps(params, optimizer, 1, start=step)
        for total, parameter in zip(sums, params, strict=True):
            total += parameter.grad
    k = round(0.1 * sum(p.numel() for p in params))
    assert [i.tolist() for i in optimizer.mask.values()] == [i.tolist() for i in largest(sums, k)]


def test_reselect_starts_the_mean_anew() -> None:
    params = parameters()
    optimizer = SparseAdamW(params, density=0.1, selection_steps=3)
    first_steps(params, optimizer, 2)
    optimizer.reselect()
    assert_the_next_three_steps_select(params, optimizer)


def test_a_group_amid_selection_steps_starts_the_mean_anew() -> None:
    """Else its sums, of fewer steps, would rank below those of the others."""
    params = parameters()
    optimizer = SparseAdamW(params[:3], density=0.1, selection_steps=3)
    first_steps(params[:3], optimizer, 2)
    optimizer.add_param_group({"params": params[3:]})
    assert_the_next_three_steps_select(params, optimizer)


@pytest.mark.parametrize("where", ["select_indices", "_adopt"])
def test_a_selection_that_failed_is_taken_up_again(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the call that failed counts once, and those before it are not lost."""

    def fail(*args: object) -> None:
        raise RuntimeError("no memory")

    params = parameters()
    optimizer = SparseAdamW(params, density=0.1, selection_steps=2)
    sums = [torch.zeros(p.shape) for p in params]
    for step in range(2):
        set_gradients(params, step)
        for total, parameter in zip(sums, params, strict=True):
            total += parameter.grad
        with monkeypatch.context() as patch:
            if step == 1:
                patch.setattr(*((budgets, where) if where == "select_indices" else (optimizer, where)), fail)
                with pytest.raises(RuntimeError, match="no memory"):
                    optimizer.step()
        assert optimizer.mask is None
        optimizer.step()
    k = round(0.1 * sum(p.numel() for p in params))
    assert [i.tolist() for i in optimizer.mask.values()] == [i.tolist() for i in largest(sums, k)]
    assert not optimizer._selection.sums


def test_reselect_keeps_the_moments_of_what_stays() -> None:
    params = parameters(dtype=torch.bfloat16)
    optimizer = SparseAdamW(params, density=0.3, amsgrad=True)
    first_steps(params, optimizer, 5)
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")
    masks = dense_masks(optimizer)
    dense = []
    for i, state in states(optimizer):
        values = {key: torch.zeros(params[i].shape) for key in keys}
        for key in keys:
            values[key][masks[i]] = state[key]
        dense.append(values)

    optimizer.reselect()
    assert dense_masks(optimizer)[0].equal(masks[0])  # holds until the next step
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    set_gradients(params, 99)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    k = round(0.3 * sum(p.numel() for p in params))
    expected = largest([p.grad for p in params], k)
    assert [index.tolist() for index in optimizer.mask.values()] == [index.tolist() for index in expected]
    stayed = 0
    for (i, state), values in zip(states(optimizer), dense, strict=True):
        assert float(state["step"]) == 6.0
        mask = dense_masks(optimizer)[i]
        gradient = params[i].grad[mask].float()
        # one AdamW step on what was carried over; zero, for the newly selected, is a fresh start
        moments = values["exp_avg"][mask].lerp(gradient, 1 - 0.9)
        squares = 0.999 * values["exp_avg_sq"][mask] + (1 - 0.999) * gradient**2
        torch.testing.assert_close(state["exp_avg"], moments, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(state["exp_avg_sq"], squares, rtol=1e-6, atol=1e-12)
        largest_squares = torch.maximum(values["max_exp_avg_sq"][mask], state["exp_avg_sq"])
        assert_same_bits(state["max_exp_avg_sq"], largest_squares)
        stays = masks[i][mask]
        assert_same_bits(state["master"][stays], values["master"][mask][stays])
        assert_same_bits(state["master"][~stays], params[i].detach()[mask][~stays].float())
        stayed += int(stays.sum())
    assert 0 < stayed < k


def test_reselect_to_the_same_is_no_change() -> None:
    runs = []
    for reselect in (False, True):
        params = parameters()
        optimizer = SparseAdamW(params, lr=1e-2, density=0.2)
        for _ in range(4):
            set_gradients(params, 7)
            optimizer.step()
            if reselect:
                optimizer.reselect()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_use_mask_amid_training_is_a_reselect_that_picks_it(dtype: torch.dtype) -> None:
    runs, masks = [], []
    for given in (None, 0, 1):
        params = parameters(dtype=dtype)
        optimizer = SparseAdamW(params, lr=1e-2, density=0.2)
        first_steps(params, optimizer, 3)
        if given is None:
            optimizer.reselect()
        else:
            optimizer.use_mask(masks[0])
            assert optimizer.mask == masks[0]
        for seed in (50, 51):
            set_gradients(params, seed)
            optimizer.step()
        masks.append(optimizer.mask)
        assert optimizer.mask == masks[0]
        runs.append((params, [state for _, state in states(optimizer)]))
    (expected, expected_states), *others = runs
    for params, found in others:
        for a, b in zip(expected, params, strict=True):
            assert_same_bits(a.detach(), b.detach())
        for a, b in zip(expected_states, found, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert_same_bits(a[key], b[key])


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("release_grads", [False, True])
def test_use_mask_freezes_the_rest(density: float, release_grads: bool) -> None:
    model = two_towers()
    data = batches(6)
    mask = select(model, data[:2], loss_fn, density=0.02, progress=False)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=density, release_grads=release_grads)
    originals = Originals(optimizer)
    start = weights(model)
    train(model, optimizer, data[:3])
    before = weights(model)
    optimizer.use_mask(mask)
    assert optimizer.mask == mask
    train(model, optimizer, data[3:])
    assert_only_selected_changed(before, weights(model), mask, mask.density)
    delta = SparseDelta.from_optimizer(optimizer, originals)
    delta.revert_(model)
    for name, index in mask.items():
        found = dict(model.named_parameters())[name].detach().flatten()
        assert_same_bits(found[index.long()], start[name].flatten()[index.long()])


def test_use_mask_of_another_model_changes_nothing() -> None:
    params = parameters()
    optimizer = SparseAdamW(params, lr=1e-2, density=0.2)
    first_steps(params, optimizer, 2)
    before = optimizer.mask
    with pytest.raises(ValueError, match="mask for another"):
        optimizer.use_mask(SparseMask.from_dense({"w": torch.ones(2)}))
    assert optimizer.mask == before
    assert optimizer.defaults["density"] == 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("selection_steps", [1, 3])
def test_nonfinite_gradients_never_select(value: float, selection_steps: int) -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.01, selection_steps=selection_steps)
    backward(model, batches(1)[0])
    model.text.weight.grad[3, 4] = value
    before = clones(list(model.parameters()))
    with pytest.raises(ValueError, match=r"'text\.weight'.*got 1 inf or NaN of 256") as error:
        optimizer.step()
    assert_message(error, ["gradient of 'text.weight' at selection"])
    assert optimizer.mask is None
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.detach(), old)
    # a good gradient afterwards selects as if nothing had been
    model.zero_grad()
    backward(model, batches(1)[0])
    for _ in range(selection_steps):
        optimizer.step()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    k = round(0.01 * sum(p.numel() for p in model.parameters()))
    expected = largest([model.get_parameter(name).grad for name in names], k)
    assert {n: optimizer.mask[n].tolist() for n in names} == {
        n: i.tolist() for n, i in zip(names, expected, strict=True)
    }


# ---- groups added later ----


def test_add_param_group_before_selection_shares_the_budget() -> None:
    params = parameters()
    optimizer = SparseAdamW(params[:3], k=50)
    optimizer.add_param_group({"params": params[3:]})
    set_gradients(params, 0)
    optimizer.step()
    expected = largest([p.grad for p in params], 50)
    assert [index.tolist() for index in optimizer.mask.values()] == [index.tolist() for index in expected]


def test_add_param_group_after_selection_is_its_own_pool() -> None:
    params = parameters()
    optimizer = SparseAdamW(params[:3], lr=1e-2, density=0.1)
    first_steps(params[:3], optimizer, 2)
    before = optimizer.mask
    optimizer.add_param_group({"params": params[3:6]})
    optimizer.add_param_group({"params": params[6:], "density": 1.0})
    assert all(optimizer.mask[f"param.{i}"].numel() == 0 for i in range(3, 8))
    set_gradients(params, 5)
    optimizer.step()
    mask = optimizer.mask
    assert all(mask[name].tolist() == before[name].tolist() for name in before)
    k = round(0.1 * sum(p.numel() for p in params[3:6]))
    expected = largest([p.grad for p in params[3:6]], k)
    assert [mask[f"param.{i}"].tolist() for i in range(3, 6)] == [index.tolist() for index in expected]
    assert mask["param.6"].numel() == params[6].numel()
    assert [float(optimizer.state[params[i]]["step"]) for i in (0, 4, 6)] == [3.0, 1.0, 1.0]


def test_a_group_in_the_place_of_another_starts_with_nothing() -> None:
    """What was selected of the group before it is not for it: here, positions it does not have."""
    params = parameters()
    optimizer = SparseAdamW([{"params": params[1:]}, {"params": params[:1]}], density=1.0)
    first_steps(params, optimizer, 1)
    del optimizer.param_groups[1]
    small = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [small], "density": 0.4})
    small.grad = torch.zeros(3)
    first_steps(params[1:], optimizer, 1, start=1)
    assert small.tolist() == [1.0] * 3
    small.grad = torch.tensor([0.0, 2.0, 1.0])
    first_steps(params[1:], optimizer, 1, start=2)
    assert optimizer.mask[f"param.{len(params) - 1}"].tolist() == [1]


def test_add_param_group_that_fails_leaves_the_optimizer_alone() -> None:
    params = parameters()
    optimizer = SparseAdamW(params[:3], k=5)
    first_steps(params[:3], optimizer, 1)
    with pytest.raises(ValueError, match="expected its own 'density' or 'k', got neither"):
        optimizer.add_param_group({"params": params[3:]})
    with pytest.raises(TypeError, match="got complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))], "k": 1})
    assert len(optimizer.param_groups) == 1
    first_steps(params[:3], optimizer, 1)


# ---- masks ----


def test_mask_from_select_is_what_is_trained() -> None:
    model = two_towers()
    mask = select(model, batches(3), loss_fn, density=0.05, progress=False)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, mask=mask)
    assert optimizer.mask == mask
    before = clones(list(model.parameters()))
    for batch in batches(3, seed=1):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert optimizer.mask == mask
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        chosen = mask.to_dense()[name]
        assert_same_bits(parameter.detach()[~chosen], old[~chosen])
        if chosen.any():
            assert not torch.any(parameter.detach()[chosen] == old[chosen])


def test_mask_over_parameter_groups_and_a_part_of_the_model() -> None:
    model = two_towers()
    mask = select(model, batches(2), loss_fn, k=40, include="visual.*", progress=False)
    named = dict(model.named_parameters())
    visual = [(name, p) for name, p in named.items() if name.startswith("visual.")]
    optimizer = SparseAdamW([{"params": visual[:1], "lr": 1e-2}, {"params": visual[1:]}], mask=mask)
    backward(model, batches(1)[0])
    optimizer.step()
    assert optimizer.mask.k == 40
    assert list(optimizer.mask) == [name for name, _ in visual]


def test_mask_of_unnamed_parameters() -> None:
    params = parameters()
    set_gradients(params, 0)
    first = SparseAdamW(params, density=0.1)
    first.step()
    assert list(first.mask)[:2] == ["param.0", "param.1"]
    again = SparseAdamW(parameters(), mask=first.mask)
    assert again.mask == first.mask


def test_mask_then_the_model_moves() -> None:
    """accelerate and Lightning convert or move the model after the optimizer was built."""
    model = two_towers()
    mask = select(model, batches(2), loss_fn, density=0.05, progress=False)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, mask=mask)
    model.bfloat16()
    backward(model, batches(1, dtype=torch.bfloat16)[0])
    optimizer.step()
    for _, state in states(optimizer):
        assert state["master"].dtype == torch.float32
    assert optimizer.mask == mask


@pytest.mark.parametrize("steps_before", [0, 2])
def test_frameworks_may_swap_parameter_objects(steps_before: int) -> None:
    """accelerate does. A new object has no state yet, as in torch.optim; what is selected goes by its position."""
    model, other = two_towers(), two_towers()
    mask = select(model, batches(2), loss_fn, density=0.05, progress=False)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, mask=mask)
    train(model, optimizer, batches(steps_before))
    optimizer.param_groups[0]["params"] = list(other.parameters())
    old, before = clones(list(model.parameters())), clones(list(other.parameters()))
    train(other, optimizer, batches(1))
    for (name, parameter), value in zip(other.named_parameters(), before, strict=True):
        assert (parameter.detach() != value).flatten().nonzero().flatten().tolist() == mask[name].tolist()
    for parameter, value in zip(model.parameters(), old, strict=True):
        assert_same_bits(parameter.detach(), value)


@pytest.mark.parametrize("capturable", [False, True])
def test_state_is_made_where_the_parameter_is(capturable: bool) -> None:
    """A mask bound on the CPU, a model moved to its device afterwards; "meta" stands in for the device."""
    parameter = nn.Parameter(torch.empty(4, 4, device="meta", dtype=torch.bfloat16))
    group = {"amsgrad": True, "capturable": capturable}
    (state,) = new_states([parameter], [torch.tensor([1, 5], dtype=torch.int32)], group)
    assert {key: value.device.type for key, value in state.items()} == {
        "step": "meta" if capturable else "cpu",
        **dict.fromkeys(["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "indices"], "meta"),
    }
