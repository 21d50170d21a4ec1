"""All that a training script does to an optimizer, and does behind its back."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_message, assert_same_bits
from torch import Tensor, nn
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
    step_masked_adamw,
    train,
    two_towers,
)

from saft_kernels import SparseAdamW

# ---- gradients that are not there ----


def test_none_gradients() -> None:
    theirs, ours = parameters(), parameters()
    expected, actual = torch.optim.AdamW(theirs), SparseAdamW(ours, density=1.0)
    for step in range(6):
        for params, optimizer in ((theirs, expected), (ours, actual)):
            set_gradients(params, step)
            for i, parameter in enumerate(params):
                if (i + step) % 3 == 0:
                    parameter.grad = None
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS
    for (_, state), (_, reference) in zip(states(actual), states(expected), strict=True):
        assert state["step"] == reference["step"]


def test_no_gradients_at_all() -> None:
    params = parameters()
    before = clones(params)
    optimizer = SparseAdamW(params, density=0.1)
    optimizer.step()
    assert optimizer.mask is None
    first_steps(params, optimizer, 1)
    optimizer.zero_grad()
    after = clones(params)
    optimizer.step()
    assert {float(state["step"]) for _, state in states(optimizer)} == {1.0}
    for parameter, old in zip(params, after, strict=True):
        assert_same_bits(parameter.detach(), old)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradients_that_appear_later() -> None:
    """A dense budget takes them in, as AdamW does; a sparse one has been spent."""
    for density in (1.0, 0.2):
        theirs, ours = parameters(), parameters()
        expected, actual = torch.optim.AdamW(theirs, lr=1e-2), SparseAdamW(ours, lr=1e-2, density=density)
        before = clones(ours)
        for step in range(4):
            for params, optimizer in ((theirs, expected), (ours, actual)):
                set_gradients(params, step)
                if step < 2:
                    params[0].grad = None
                if optimizer is actual:
                    optimizer.step()
            step_masked_adamw(expected, dense_masks(actual))
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) <= FP32_ROUNDINGS
        if density == 1.0:
            assert float(actual.state[ours[0]]["step"]) == 2.0
        else:
            assert actual.mask["param.0"].numel() == 0
            assert_same_bits(ours[0].detach(), before[0])


def test_requires_grad_toggled() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = SparseAdamW(params, density=0.5)
    set_gradients(params[1:], 0)
    optimizer.step()
    assert optimizer.mask["param.0"].numel() == 0
    assert optimizer.mask.k == round(0.5 * sum(p.numel() for p in params[1:]))
    params[0].requires_grad_(True)
    params[1].requires_grad_(False)
    before = clones(params)
    params[1].grad = None
    set_gradients([params[0], *params[2:]], 1)
    optimizer.step()
    assert_same_bits(params[0].detach(), before[0])
    assert_same_bits(params[1].detach(), before[1])
    optimizer.reselect()
    optimizer.step()
    assert optimizer.mask["param.0"].numel() > 0
    assert optimizer.mask["param.1"].numel() == 0
    assert optimizer.mask.k == round(0.5 * (sum(p.numel() for p in params) - params[1].numel()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    runs = []
    for build in (torch.optim.AdamW, lambda params, lr: SparseAdamW(params, lr, density=1.0)):
        model = two_towers()
        optimizer = build(model.parameters(), lr=1e-3)
        for batch in batches(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, batch)
            optimizer.step()
        runs.append(list(model.parameters()))
    for a, b in zip(*runs, strict=True):
        # gradients follow the weights; the reference and the kernel round apart
        assert relative_error(a, b) <= 10 * FP32_ROUNDINGS


def test_gradients_change_address_and_layout() -> None:
    """The steps between keep pointers; every kind of change has to be seen."""
    theirs, ours = parameters(), parameters()
    expected, actual = torch.optim.AdamW(theirs, lr=1e-2), SparseAdamW(ours, lr=1e-2, density=0.3)
    kept = []
    for step in range(8):
        set_gradients(theirs, step)
        set_gradients(ours, step)
        if step % 2:
            for parameter in ours:
                if parameter.dim() == 2:
                    parameter.grad = parameter.grad.t().contiguous().t()
        if step % 3 == 0:
            kept += [p.grad for p in ours]  # the next gradients get other memory
        actual.step()
        step_masked_adamw(expected, dense_masks(actual))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS


# ---- what training loops do ----


def test_closure() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1)
    batch = batches(1)[0]
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(10)]
    assert calls == [True] * 10
    assert losses[-1] < losses[0]


def test_accumulation_is_one_large_batch() -> None:
    split, whole = two_towers(), two_towers()
    parts = batches(4)
    optimizers = [SparseAdamW(m.named_parameters(), lr=1e-3, density=0.1) for m in (split, whole)]
    for batch in parts:
        (loss_fn(split, batch) / 4).backward()
    (sum(loss_fn(whole, batch) for batch in parts) / 4).backward()
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(split.parameters(), whole.parameters(), strict=True):
        # the first step is sign-like: lr * g / (|g| + eps), so a rounding of g shows through eps alone
        assert relative_error(a, b) <= FP32_ROUNDINGS


def test_clip_grad_norm() -> None:
    theirs, ours = parameters(), parameters()
    expected, actual = torch.optim.AdamW(theirs, lr=1e-2), SparseAdamW(ours, lr=1e-2, density=0.2)
    for step in range(5):
        norms = []
        for params, optimizer in ((ours, actual), (theirs, expected)):
            set_gradients(params, step, scale=10.0**step)
            norms.append(float(nn.utils.clip_grad_norm_(params, 1.0)))
            if optimizer is actual:
                optimizer.step()
        assert norms[0] == norms[1] > 1
        step_masked_adamw(expected, dense_masks(actual))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(fused: bool | None, unscale: bool, capturable: bool) -> None:
    """Skips steps with inf, also at selection; fused=True gets the scale and the check instead."""
    reference, model = two_towers(), two_towers()
    plain = SparseAdamW(reference.named_parameters(), lr=1e-2, density=0.1)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1, fused=fused, capturable=capturable)
    assert optimizer._step_supports_amp_scaling is bool(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step, batch in enumerate(batches(6)):
        optimizer.zero_grad()
        scaler.scale(loss_fn(model, batch)).backward()
        if step in (0, 3):
            model.text.weight.grad[0, 0] = math.inf
        else:
            plain.zero_grad()
            backward(reference, batch)
            plain.step()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert (optimizer.mask is None) == (step == 0)
    assert set(scales) == {2.0**9, 2.0**10}  # it backed off, and grew
    assert optimizer.mask == plain.mask
    assert {float(state["step"]) for _, state in states(optimizer)} == {4.0}
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        # scales are powers of two: scaled and unscaled gradients differ by what underflows
        assert relative_error(a, b) <= FP32_ROUNDINGS


def test_selection_steps_under_a_changing_grad_scale() -> None:
    """With fused=True gradients come scaled; their mean must not."""
    params = parameters()
    optimizer = SparseAdamW(params, density=0.1, selection_steps=3, fused=True)
    sums = [torch.zeros(p.shape) for p in params]
    for step, scale in enumerate((4.0, 64.0, 2.0)):
        set_gradients(params, step)
        for total, parameter in zip(sums, params, strict=True):
            total += parameter.grad
            parameter.grad *= scale
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
    k = round(0.1 * sum(p.numel() for p in params))
    assert [i.tolist() for i in optimizer.mask.values()] == [i.tolist() for i in largest(sums, k)]


@pytest.mark.parametrize("make", [lambda lr: lr, torch.tensor, lambda lr: torch.tensor([lr])])
def test_tensor_lr(make: Callable[[float], Any]) -> None:
    theirs, ours = parameters(), parameters()
    expected, actual = torch.optim.AdamW(theirs, lr=1e-2), SparseAdamW(ours, lr=make(1e-2), density=0.2)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (expected, actual)]
    for step in range(5):
        set_gradients(theirs, step)
        set_gradients(ours, step)
        actual.step()
        step_masked_adamw(expected, dense_masks(actual))
        for schedule in schedules:
            schedule.step()
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS


def test_hooks() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step_pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step_post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict_post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load_pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load_post"))
    train(model, optimizer, batches(1))
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(1))
    expected = ["step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_pre", "load_post"]
    assert calls == [*expected, "step_pre", "step_post"]


def test_profiler_sees_the_step() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    with torch.profiler.profile() as profile:
        train(model, optimizer, batches(2))
    events = {event.key: event.count for event in profile.key_averages()}
    assert events["Optimizer.step#SparseAdamW.step"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike(way: str, dtype: torch.dtype) -> None:
    model = two_towers(dtype=dtype)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1, scope="tensor")
    data = batches(4, dtype=dtype)
    for batch in data[:2]:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    if way == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        other, copied = torch.load(file, weights_only=False)
    assert copied.mask == optimizer.mask
    assert copied.backend == optimizer.backend
    for m, o in ((model, optimizer), (other, copied)):
        for batch in data[2:]:
            o.zero_grad()
            backward(m, batch)
            o.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a is not b
        assert_same_bits(a.detach(), b.detach(), name)


def test_copy_before_selection() -> None:
    model = two_towers()
    other, copied = copy.deepcopy((model, SparseAdamW(model.named_parameters(), density=0.1)))
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    train(model, optimizer, batches(1))
    train(other, copied, batches(1))
    assert copied.mask == optimizer.mask


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_step() -> None:
    """torch.compile leaves the step alone: the kernels are its own. The rest of the loop stays compiled."""
    expected, model = two_towers(), two_towers()
    reference = SparseAdamW(expected.named_parameters(), lr=1e-2, density=0.1)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1)
    graphs = []

    def count_graphs(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        compiled = torch.compile(optimizer.step, backend=count_graphs)
        forward = torch.compile(lambda batch: loss_fn(model, batch), backend=count_graphs)
        for batch in batches(4):
            optimizer.zero_grad()
            forward(batch).backward()
            compiled()
    train(expected, reference, batches(4))
    assert len(graphs) == 1
    assert optimizer.mask == reference.mask
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS


# ---- what scripts do behind the optimizer's back ----


def test_replaced_storage_is_seen() -> None:
    """`model.to()`, EMA swaps and flatteners assign `p.data`."""
    theirs, ours = parameters(), parameters()
    optimizers = [SparseAdamW(p, lr=1e-2, density=0.3) for p in (theirs, ours)]
    for step in range(4):
        for params, optimizer in zip((theirs, ours), optimizers, strict=True):
            set_gradients(params, step)
            if params is ours and step == 2:
                old = [p.data for p in ours]
                before = clones(old)
                for parameter in ours:
                    parameter.data = parameter.data.clone()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a.detach(), b.detach())
    for a, b in zip(old, before, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("reset", ["new", "clear", "each", "each_in_place"])
def test_reset_state_starts_afresh(reset: str) -> None:
    params = parameters()
    optimizer = SparseAdamW(params, lr=1e-2, density=0.3)
    first_steps(params, optimizer, 3)
    mask = optimizer.mask
    if reset == "new":
        optimizer.state = defaultdict(dict)
    elif reset == "clear":
        optimizer.state.clear()
    else:
        for parameter in params:
            if reset == "each":
                optimizer.state[parameter] = {}
            else:
                optimizer.state[parameter].clear()
    first_steps(params, optimizer, 1, start=3)
    assert optimizer.mask == mask
    assert {float(state["step"]) for _, state in states(optimizer)} == {1.0}
    for i, state in states(optimizer):
        gradient = params[i].grad[dense_masks(optimizer)[i]]
        torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, rtol=1e-6, atol=0)


def test_replaced_and_edited_state_is_used() -> None:
    """Offloaders replace state tensors; some scripts zero moments or step counts in place."""
    params = parameters()
    optimizer = SparseAdamW(params, lr=1e-2, density=0.3)
    first_steps(params, optimizer, 3)
    for _, state in states(optimizer):
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
        state["exp_avg_sq"].zero_()
        state["step"].zero_()
    first_steps(params, optimizer, 1, start=3)
    for i, state in states(optimizer):
        gradient = params[i].grad[dense_masks(optimizer)[i]]
        assert float(state["step"]) == 1.0
        torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, rtol=1e-6, atol=0)
        torch.testing.assert_close(state["exp_avg_sq"], 0.001 * gradient**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("edit", ["replace", "in_place", "one_in_place"])
def test_edited_step_counts_are_used(edit: str) -> None:
    theirs, ours = parameters(), parameters()
    expected, actual = torch.optim.AdamW(theirs, lr=1e-2), SparseAdamW(ours, lr=1e-2, density=1.0)
    for params, optimizer in ((theirs, expected), (ours, actual)):
        first_steps(params, optimizer, 3)
        for parameter in params[:1] if edit == "one_in_place" else params:
            if edit == "replace":
                optimizer.state[parameter]["step"] = torch.tensor(0.0)
            else:
                optimizer.state[parameter]["step"].zero_()
        first_steps(params, optimizer, 2, start=3)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS
        assert actual.state[a]["step"] == expected.state[b]["step"]


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_capturable_is_the_same_step(density: float) -> None:
    """With the step counts on the device; a group may be so and another not."""
    results = []
    for groups in ((False, False), (True, True), (True, False)):
        params = parameters()
        split = [{"params": params[i::2], "capturable": capturable} for i, capturable in enumerate(groups)]
        optimizer = SparseAdamW(split, lr=torch.tensor(1e-2), density=density)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(4):
            set_gradients(params, step)
            optimizer.step()
            schedule.step()
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        assert {float(state["step"]) for _, state in states(optimizer)} == {4.0}
        results.append([*params, *(state["exp_avg_sq"] for _, state in states(optimizer))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_parameters_cast_between_steps(dtype: torch.dtype) -> None:
    """The prepared step is made anew; the state no longer fits, which is an error rather than a wrong step."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.2)
    train(model, optimizer, batches(2))
    optimizer.zero_grad()
    model.to(dtype)
    before = clones(list(model.parameters()))
    with pytest.raises(ValueError, match=r"load_state_dict\(optimizer.state_dict\(\)\)") as error:
        train(model, optimizer, batches(1, dtype=dtype))
    assert_message(error, ["state of 'logit_scale'" if dtype == torch.float64 else "master"])
    for a, b in zip(model.parameters(), before, strict=True):
        assert_same_bits(a.detach(), b)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(1, dtype=dtype))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_state_that_does_not_fit_is_named() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=1.0)
    train(model, optimizer, batches(1))
    optimizer.zero_grad()
    model.double()
    backward(model, batches(1, dtype=torch.float64)[0])
    with pytest.raises(ValueError, match=r"expected exp_avg float64.*got float32") as error:
        optimizer.step()
    assert_message(error, ["state of 'logit_scale'", "optimizer.load_state_dict(optimizer.state_dict())"])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert {state["exp_avg"].dtype for _, state in states(optimizer)} == {torch.float64}


def test_hyperparameters_change_between_steps() -> None:
    theirs, ours = parameters(), parameters()
    expected, actual = torch.optim.AdamW(theirs), SparseAdamW(ours, density=1.0)
    for step, (lr, betas, decay) in enumerate(
        [(1e-2, (0.9, 0.99), 0.1), (1e-1, (0.5, 0.9), 0.0), (0.0, (0.0, 0.0), 1)]
    ):
        for params, optimizer in ((theirs, expected), (ours, actual)):
            optimizer.param_groups[0].update(lr=lr, betas=betas, weight_decay=decay, eps=1e-6, maximize=step == 1)
            set_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS


def test_amsgrad_switched_on_later() -> None:
    params = parameters()
    optimizer = SparseAdamW(params, density=0.3)
    first_steps(params, optimizer, 2)
    optimizer.param_groups[0]["amsgrad"] = True
    first_steps(params, optimizer, 1, start=2)
    for _, state in states(optimizer):
        assert_same_bits(state["max_exp_avg_sq"], state["exp_avg_sq"])
