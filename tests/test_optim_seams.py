"""Where features of SparseAdamW meet: several devices, capturable, scales, releases, casts, and selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import assert_message, assert_same_bits
from torch import Tensor, nn
from training import batches, clones, loss_fn, parameters, set_gradients, states, two_towers

from saft_kernels import SparseAdamW, SparseMask, select, sparse_grad


def mask_of(numel: int, **indices: list[int]) -> SparseMask:
    return SparseMask({n: torch.tensor(i) for n, i in indices.items()}, dict.fromkeys(indices, (numel,)))


def test_several_devices() -> None:
    """A plan per device; "meta" stands in for a second one, where nothing is computed."""
    here, there = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10, device="meta"))
    named = [("a", here), ("b", there)]
    optimizer = SparseAdamW(named, lr=0.1, weight_decay=0.0, mask=mask_of(10, a=[1], b=[3]), backend="reference")
    here.grad, there.grad = torch.ones(10), torch.ones(10, device="meta")
    optimizer.step()
    assert here.tolist() == pytest.approx([1.0, 0.9] + [1.0] * 8)


def test_parts_step_once_when_one_is_stale() -> None:
    """A cast that one of two plans would find out after the other has stepped."""
    p, q = nn.Parameter(torch.ones(4).bfloat16()), nn.Parameter(torch.ones(4))
    groups = [{"params": [p], "capturable": True}, {"params": [q]}]
    optimizer = SparseAdamW(groups, lr=0.1, weight_decay=0.0, density=1.0)
    for _ in range(2):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
    before = q.detach().clone()
    p.data, p.grad = p.data.half(), None
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert float(optimizer.state[q]["step"]) == 3.0
    torch.testing.assert_close(before - q.detach(), torch.full((4,), 0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_cast_parameter_goes_on(capturable: bool) -> None:
    p = nn.Parameter(torch.ones(4).bfloat16())
    optimizer = SparseAdamW([p], density=1.0, capturable=capturable)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16):
        p.data, p.grad = p.data.to(dtype), None
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(optimizer.state[p]["step"]) == 4.0


def test_a_parameter_that_shrank() -> None:
    p = nn.Parameter(torch.arange(16.0).view(4, 4))
    optimizer = SparseAdamW([p], k=2)
    p.grad = p.detach().clone()
    optimizer.step()
    p.data, p.grad = torch.ones(2, 2), None
    p.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="expected indices below 4") as error:
        optimizer.step()
    assert_message(error, ["state of 'param.0'", "got 15", "build another optimizer"])
    assert torch.equal(p.detach(), torch.ones(2, 2))


def test_found_inf_of_several_devices_is_one_step_back() -> None:
    params = parameters()
    optimizer = SparseAdamW(params, density=1.0, capturable=True, fused=True)
    for step, found_inf in enumerate((0.0, 0.0, 2.0, 0.0)):
        set_gradients(params, step)
        before = clones(params)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor([found_inf])
        optimizer.step()
        assert all(map(torch.equal, clones(params), before)) == (found_inf != 0)
    assert {float(state["step"]) for _, state in states(optimizer)} == {3.0}


def test_capturable_keeps_its_step_tensors() -> None:
    """A captured graph counts in them; a step with other gradients must not put new ones in their place."""
    params = parameters()
    optimizer = SparseAdamW(params, density=1.0, capturable=True)
    set_gradients(params, 0)
    optimizer.step()
    counts = {i: state["step"] for i, state in states(optimizer)}
    optimizer.zero_grad()
    optimizer.step()
    set_gradients(params[:2], 1)
    optimizer.step()
    assert all(state["step"] is counts[i] for i, state in states(optimizer))
    assert [float(counts[i]) for i in (0, 1, 4)] == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_lazily_negated_gradients(density: float) -> None:
    """As autograd leaves them behind .conj().imag."""
    results = []
    for lazy in (False, True):
        p = nn.Parameter(torch.ones(4))
        optimizer = SparseAdamW([p], lr=0.1, density=density)
        for _ in range(3):
            gradient = torch.tensor([1.0, -2.0, 3.0, 0.5])
            p.grad = torch._neg_view(gradient) if lazy else -gradient
            optimizer.step()
        results.append(p.detach())
    assert_same_bits(*results)


def test_select_under_sparse_grad() -> None:
    """The layers are plain meanwhile, and what was gathered before is still there afterwards."""
    model, plain = two_towers(), two_towers()
    mask = select(plain, batches(2), loss_fn, density=0.1, progress=False)
    optimizer = SparseAdamW(model.named_parameters(), mask=mask, release_grads=True)
    with sparse_grad(model, optimizer):
        loss_fn(model, batches(1)[0]).backward()
        before = optimizer.selected_grad(model.text.weight).clone()
        modes: tuple[Any, ...] = (False, "host", "blocks")
        for streaming in modes:
            again = select(model, batches(2), loss_fn, density=0.1, streaming=streaming, progress=False)
            assert again == mask
        assert torch.equal(optimizer.selected_grad(model.text.weight), before)


def test_a_released_gradient_in_another_optimizer() -> None:
    p = nn.Parameter(torch.ones(10))
    first = SparseAdamW([("p", p)], mask=mask_of(10, p=[1, 2]))
    p.grad = torch.ones(10)
    first.step()
    p.grad = None
    second = SparseAdamW([("p", p)], mask=mask_of(10, p=[1, 3]), release_grads=True)
    p.sum().backward()
    with pytest.raises(ValueError, match="another selection or optimizer"):
        first.step()
    second.step()


def test_inference_mode() -> None:
    params = parameters()
    set_gradients(params, 0)
    optimizer = SparseAdamW(params, density=0.2)
    with torch.inference_mode():
        optimizer.step()
    set_gradients(params, 1)
    optimizer.step()
    assert {float(state["step"]) for _, state in states(optimizer)} == {2.0}


def test_gradients_of_zeros_are_no_step_of_a_selection_either() -> None:
    params = parameters()
    optimizer = SparseAdamW(params, density=0.2, selection_steps=2)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    optimizer.reselect()
    for step, scale in enumerate((1.0, 0.0, 1.0)):
        set_gradients(params, 7 + step, scale)
        optimizer.step()
        assert (optimizer._selection.num_sums, bool(optimizer._selection.sums)) == [(1, True), (1, True), (0, False)][
            step
        ]


def test_rolling_back_to_before_the_selection() -> None:
    """The sums of a checkpoint bring back that nothing was selected."""
    params = parameters()
    optimizer = SparseAdamW(params, density=0.2, selection_steps=2)
    set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    for step in (1, 2):
        set_gradients(params, step)
        optimizer.step()
    first = optimizer.mask
    optimizer.load_state_dict(saved)
    set_gradients(params, 5)
    optimizer.step()
    assert optimizer.mask is not None
    assert optimizer.mask != first
    assert "grad_sum" not in {key for state in optimizer.state_dict()["state"].values() for key in state}


def test_capturable_switched_on_and_off() -> None:
    results: list[list[Tensor]] = []
    for flags in ((False,) * 4, (False, True, True, False)):
        params = parameters()
        optimizer = SparseAdamW(params, lr=1e-2, density=0.3)
        for step, flag in enumerate(flags):
            optimizer.param_groups[0]["capturable"] = flag
            set_gradients(params, step)
            optimizer.step()
        results.append(clones(params))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
