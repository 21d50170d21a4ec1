"""Checkpoints of SparseAdamW. Equality is by bits: a resumed run is the run that was never interrupted."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_message, assert_same_bits, sparse_memory
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from training import (
    TwoTowers,
    backward,
    batches,
    clones,
    loss_fn,
    parameters,
    relative_error,
    set_gradients,
    states,
    train,
    two_towers,
)

from saft_kernels import OptimizerState, SparseAdamW, SparseMask, select

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def assert_same_state(actual: Any, expected: Any) -> None:
    """Same masks, same state bits, same hyperparameters."""
    assert actual.mask == expected.mask
    for (i, a), (j, b) in zip(states(actual), states(expected), strict=True):
        assert i == j
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key], key)
            assert a[key].stride() == b[key].stride()
    for a, b in zip(actual.param_groups, expected.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def assert_same_parameters(actual: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach(), name)


# ---- what torch.optim would ruin ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices_and_moments_survive(dtype: torch.dtype) -> None:
    """torch casts all but `step` to the parameter's dtype: in bf16 7001 becomes 7008, 7003 as well."""
    chosen = [3, 257, 7001, 7003, 9999]

    def run() -> tuple[nn.Parameter, SparseAdamW]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 10_000).to(dtype))
        return parameter, SparseAdamW([parameter], lr=1e-2, k=5, amsgrad=True)

    parameter, optimizer = run()
    for step in range(3):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[chosen] = torch.tensor([0.1, -0.2, 0.3, -0.7, 1 / 3]).to(dtype) * (step + 1)
        optimizer.step()
    other, loaded = run()
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    state = loaded.state[other]
    assert state["indices"].tolist() == chosen
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    assert {key: value.dtype for key, value in state.items() if key != "indices"} == {
        "step": torch.float32,
        **dict.fromkeys(["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], opmath),
        **({"master": torch.float32} if dtype.itemsize == 2 else {}),
    }
    assert_same_state(loaded, optimizer)


def test_indices_above_two_to_the_24th() -> None:
    """fp32 cannot hold them: 2^24 + 1 would become 2^24."""
    chosen = [7, 2**24 + 1, 2**24 + 3, 2**24 + 11]

    def run() -> tuple[nn.Parameter, SparseAdamW]:
        parameter = nn.Parameter(sparse_memory(2**24 + 64, torch.float32))
        return parameter, SparseAdamW([parameter], k=4)

    parameter, optimizer = run()
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[chosen] = 1.0
    optimizer.step()
    other, loaded = run()
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert loaded.state[other]["indices"].tolist() == chosen
    assert loaded.state[other]["indices"].dtype == torch.int32


@pytest.mark.slow
def test_int64_indices() -> None:
    """From 2^31 elements on. 4 GB of gradient are read at the first step."""
    chosen = torch.tensor([5, 2**31 + 7])
    numel = 2**31 + 64
    mask = SparseMask({"w": chosen}, {"w": (numel,)})

    def run() -> tuple[nn.Parameter, SparseAdamW]:
        parameter = nn.Parameter(sparse_memory(numel, torch.bfloat16))
        return parameter, SparseAdamW([("w", parameter)], mask=mask, lr=0.5, weight_decay=0.0)

    parameter, optimizer = run()
    parameter.grad = sparse_memory(numel, torch.bfloat16)
    parameter.grad[chosen] = 1.0
    optimizer.step()
    assert parameter.detach()[chosen].tolist() == [-0.5, -0.5]
    other, loaded = run()
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert loaded.state[other]["indices"].dtype == torch.int64
    assert loaded.state[other]["indices"].tolist() == chosen.tolist()


def test_loading_copies() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1)
    train(model, optimizer, batches(2))
    saved = through_a_file(optimizer.state_dict())
    untouched = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(model, optimizer, batches(2))
    for i, state in saved["state"].items():
        for key, value in state.items():
            assert_same_bits(value, untouched["state"][i][key])


def test_layout_of_loaded_state_follows_the_parameter() -> None:
    """A state saved by a contiguous copy of the model goes into a channels_last one."""
    plain = nn.Parameter(torch.randn(4, 3, 5, 2))
    parameter = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizers = [SparseAdamW([p], density=1.0) for p in (plain, parameter)]
    set_gradients([plain], 0)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    with torch.no_grad():
        parameter.copy_(plain)
    assert optimizers[1].state[parameter]["exp_avg"].stride() == parameter.stride()
    for p, optimizer in zip((plain, parameter), optimizers, strict=True):
        set_gradients([p], 1)
        optimizer.step()
    assert_same_bits(parameter.detach(), plain.detach())


# ---- resuming ----


def build(kind: str, model: TwoTowers) -> SparseAdamW:
    named = list(model.named_parameters())
    if kind == "density":
        return SparseAdamW(named, lr=1e-2, density=0.1)
    if kind == "k_amsgrad":
        return SparseAdamW(named, lr=1e-2, k=40, amsgrad=True, maximize=True)
    if kind == "dense":
        return SparseAdamW(named, lr=1e-2, density=1.0)
    if kind in ("tensor", "row"):
        return SparseAdamW(named, lr=1e-2, density=0.1, scope=kind)
    if kind == "groups":
        head = [item for item in named if item[0].startswith("text.")]
        body = [item for item in named if not item[0].startswith("text.")]
        groups = [{"params": body[:3], "lr": 1e-3}, {"params": body[3:]}, {"params": head, "density": 1.0}]
        return SparseAdamW(groups, lr=1e-2, density=0.05)
    assert kind == "mask"
    plain = two_towers()
    mask = select(plain, batches(2, seed=5), loss_fn, density=0.05, progress=False)
    return SparseAdamW(named, lr=1e-2, mask=mask)


KINDS = ["density", "k_amsgrad", "dense", "tensor", "row", "groups", "mask"]


def schedule_for(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        ],
        [3],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_equal(kind: str, dtype: torch.dtype) -> None:
    data = batches(8, dtype=dtype)
    model = two_towers(dtype=dtype)
    optimizer = build(kind, model)
    schedule = schedule_for(optimizer)
    train(model, optimizer, data[:4], schedule)
    saved = through_a_file(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    )
    train(model, optimizer, data[4:], schedule)

    resumed = two_towers(seed=1, dtype=dtype)  # other parameters, other objects
    fresh = build(kind, resumed)
    fresh_schedule = schedule_for(fresh)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    fresh_schedule.load_state_dict(saved["schedule"])
    assert fresh.mask == optimizer.mask
    train(resumed, fresh, data[4:], fresh_schedule)
    assert_same_parameters(resumed, model)
    assert_same_state(fresh, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_rolling_back_the_same_optimizer(kind: str) -> None:
    data = batches(6)
    model = two_towers()
    optimizer = build(kind, model)
    train(model, optimizer, data[:3])
    snapshot = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[3:])
    expected = clones(list(model.parameters()))
    optimizer.reselect()
    train(model, optimizer, batches(1, seed=9))
    model.load_state_dict(snapshot[0])
    optimizer.load_state_dict(snapshot[1])
    train(model, optimizer, data[3:])
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert_same_bits(parameter.detach(), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["first", "reselect"])
def test_resume_amid_selection_steps(again: bool, dtype: torch.dtype) -> None:
    """The sums are in the checkpoint, in fp32, beside the state of what is being selected anew."""
    data = batches(10, dtype=dtype)

    def build_steps(model: TwoTowers) -> SparseAdamW:
        return SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1, selection_steps=4)

    model = two_towers(dtype=dtype)
    optimizer = build_steps(model)
    if again:
        train(model, optimizer, data[:4])
        optimizer.reselect()
    train(model, optimizer, data[:2])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, data[2:])

    resumed = two_towers(seed=1, dtype=dtype)
    fresh = build_steps(resumed)
    train(resumed, fresh, batches(1, seed=7, dtype=dtype))  # forgotten
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(resumed, fresh, data[2:])
    assert fresh.mask == optimizer.mask
    assert_same_parameters(resumed, model)
    assert_same_state(fresh, optimizer)
    assert "grad_sum" not in str(fresh.state_dict())


def test_sums_of_another_model_are_refused() -> None:
    params = parameters()
    set_gradients(params, 0)
    optimizer = SparseAdamW(params, density=0.1, selection_steps=2)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["grad_sum"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"grad_sum of 'param.0': expected shape \(16, 9\), got \(3,\)") as error:
        optimizer.load_state_dict(saved)
    assert_message(error, ["nothing was loaded"])


def test_resume_without_the_mask() -> None:
    """The state holds the indices: the mask file is not needed again."""
    data = batches(6)
    model = two_towers()
    optimizer = build("mask", model)
    train(model, optimizer, data[:3])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, data[3:])
    resumed = two_towers(seed=1)
    fresh = SparseAdamW(resumed.named_parameters(), lr=1e-2, density=0.05)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(resumed, fresh, data[3:])
    assert_same_parameters(resumed, model)


def test_resume_with_parameters_that_had_no_gradient_yet() -> None:
    """A mask selects in parameters that the loss has not reached so far; they are not forgotten."""
    mask = select(two_towers(), batches(1), loss_fn, density=0.1, progress=False)
    dense = mask.to_dense()
    dense["unused"][:] = True
    dense["text.bias"][3] = True
    mask = SparseMask.from_dense(dense)
    runs = []
    for interrupted in (False, True):
        model = two_towers()
        optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, mask=mask)
        train(model, optimizer, batches(2))
        if interrupted:
            saved = through_a_file(optimizer.state_dict())
            optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, k=mask.k)
            optimizer.load_state_dict(saved)
        assert optimizer.mask == mask
        optimizer.zero_grad()
        backward(model, batches(1, seed=3)[0])
        model.unused.grad = torch.ones(3)
        optimizer.step()
        runs.append(model)
        assert float(optimizer.state[model.unused]["step"]) == 1.0
    assert_same_parameters(*runs)


@pytest.mark.parametrize("density", [None, 1.0, 0.5])
def test_resume_with_a_group_yet_to_be_selected(density: float | None) -> None:
    """add_param_group after selection, then a checkpoint before the next step."""
    runs = []
    for interrupted in (False, True):
        params = parameters()
        optimizer = SparseAdamW(params[:5], lr=1e-2, density=0.1)
        set_gradients(params[:5], 0)
        optimizer.step()
        optimizer.add_param_group({"params": params[5:], "density": density})
        if interrupted:
            saved = through_a_file(optimizer.state_dict())
            optimizer = SparseAdamW(
                [{"params": params[:5]}, {"params": params[5:], "density": density}], lr=1e-2, density=0.1
            )
            optimizer.load_state_dict(saved)
        for step in (1, 2):
            set_gradients(params, step)
            optimizer.step()
        runs.append((params, optimizer, through_a_file(optimizer.state_dict())))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert_same_bits(a.detach(), b.detach())
    assert runs[0][1].mask == runs[1][1].mask
    assert runs[0][1].mask["param.5"].numel() > 0
    runs[1][1].load_state_dict(runs[0][2])
    assert_same_state(runs[1][1], runs[0][1])


def test_pools_that_were_rounded_apart_are_no_other_density() -> None:
    """At 0.1, 15 elements round to 2; twice that, selected together, to 3."""
    params = [nn.Parameter(torch.zeros(15)) for _ in range(2)]
    optimizer = SparseAdamW(params[:1], density=0.1)
    set_gradients(params[:1], 0)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:]})
    set_gradients(params, 1)
    optimizer.step()
    assert optimizer.mask.k == 4
    fresh = SparseAdamW([{"params": [p]} for p in params], density=0.1)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_state(fresh, optimizer)


def test_resume_after_reselect() -> None:
    runs = []
    for interrupted in (False, True):
        model = two_towers()
        optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1)
        train(model, optimizer, batches(3))
        optimizer.reselect()
        if interrupted:
            saved = through_a_file(optimizer.state_dict())
            optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1)
            optimizer.load_state_dict(saved)
        train(model, optimizer, batches(2, seed=4))
        runs.append((model, optimizer))
    assert_same_parameters(runs[0][0], runs[1][0])
    assert_same_state(runs[1][1], runs[0][1])


def test_resume_with_requires_grad_toggled() -> None:
    """The budget was taken of what could train then, not of what can now."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    train(model, optimizer, batches(2))
    saved = through_a_file(optimizer.state_dict())
    model.token_embedding.requires_grad_(False)
    fresh = SparseAdamW(model.named_parameters(), density=0.1)
    fresh.load_state_dict(saved)
    assert fresh.mask == optimizer.mask


def test_hyperparameters_come_with_the_state_and_budgets_do_not() -> None:
    """As in torch.optim; but the budgets, which the state has to fit, are the optimizer's."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), lr=0.5, betas=(0.1, 0.2), weight_decay=0.3, k=30)
    train(model, optimizer, batches(1))
    fresh = SparseAdamW([{"params": list(model.named_parameters()), "k": np.int64(30)}])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    fresh.load_state_dict(through_a_file(fresh.state_dict()))
    group = fresh.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["k"]) == (0.5, (0.1, 0.2), 0.3, 30)


# ---- an empty state ----


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_loads_right_after_construction(kind: str) -> None:
    """accelerate.prepare() gives an optimizer its own state_dict back: what is selected, or to be, stays."""
    model, expected = two_towers(), two_towers()
    optimizer, reference = build(kind, model), build(kind, expected)
    before = optimizer.mask
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.mask == before
    train(model, optimizer, batches(3))
    train(expected, reference, batches(3))
    assert_same_parameters(model, expected)
    assert_same_state(optimizer, reference)


def test_empty_state_of_a_plain_adamw() -> None:
    model = two_towers()
    optimizer = build("mask", model)
    mask = optimizer.mask
    optimizer.load_state_dict(torch.optim.AdamW(model.named_parameters(), lr=0.5).state_dict())
    assert optimizer.mask == mask
    assert optimizer.param_groups[0]["lr"] == 0.5
    train(model, optimizer, batches(1))
    assert optimizer.mask == mask


def test_selected_but_empty_state_needs_its_mask() -> None:
    """The state of an optimizer that was given a mask, and has not stepped, does not hold it."""
    model = two_towers()
    saved = build("mask", model).state_dict()
    build("mask", model).load_state_dict(saved)
    optimizer = SparseAdamW(model.named_parameters(), density=0.05)
    with pytest.raises(ValueError, match="got an empty state") as error:
        optimizer.load_state_dict(saved)
    assert_message(error, ["`state_dict`", "pass the mask of that run"])


# ---- torch.optim.AdamW ----


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_of_adamw_goes_on_as_adamw(amsgrad: bool) -> None:
    theirs, ours = parameters(), parameters()
    expected = torch.optim.AdamW(theirs, lr=1e-2, amsgrad=amsgrad)
    for step in range(5):
        set_gradients(theirs, step)
        theirs[1].grad = None  # has no state yet
        expected.step()
    actual = SparseAdamW(ours, density=1.0)
    actual.load_state_dict(through_a_file(expected.state_dict()))
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    for step in range(5, 10):
        for params, optimizer in ((theirs, expected), (ours, actual)):
            set_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        # fp32: two roundings a step, in different places
        assert relative_error(a, b) <= 1e-6
    for (_, state), (_, reference) in zip(states(actual), states(expected), strict=True):
        assert state.keys() == reference.keys()
        assert state["step"] == reference["step"]
    # and back
    expected.load_state_dict(through_a_file(actual.state_dict()))
    set_gradients(theirs, 10)
    expected.step()


def test_state_of_bf16_adamw_gets_fp32_moments_and_masters() -> None:
    params = parameters(dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=1e-2)
    set_gradients(params, 0)
    theirs.step()
    ours = SparseAdamW(params, lr=1e-2, density=1.0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for i, state in states(ours):
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "master")} == {torch.float32}
        assert_same_bits(state["master"], params[i].detach().float())
        assert_same_bits(state["exp_avg"], theirs.state[params[i]]["exp_avg"].float())
    set_gradients(params, 1)
    ours.step()


def test_model_converted_during_training() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1)
    train(model, optimizer, batches(2))
    mask = optimizer.mask
    optimizer.zero_grad()
    model.bfloat16()
    with pytest.raises(ValueError, match="expected master float32"):
        train(model, optimizer, batches(1, dtype=torch.bfloat16))
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(1, dtype=torch.bfloat16))
    assert optimizer.mask == mask
    assert {float(state["step"]) for _, state in states(optimizer)} == {3.0}


# ---- states that do not fit ----


def state_of(model: nn.Module, **kwargs: Any) -> dict[str, Any]:
    optimizer = SparseAdamW(model.named_parameters(), **kwargs)
    train(model, optimizer, batches(2))
    return optimizer.state_dict()


TEXT_WEIGHT = [name for name, _ in two_towers().named_parameters()].index("text.weight")


def edited(edit: Callable[[dict[Any, Any]], None]) -> dict[str, Any]:
    """A fitting state of the target, with one thing wrong in that of text.weight."""
    saved = copy.deepcopy(state_of(two_towers(), lr=1e-2, density=0.1))
    edit(saved["state"][TEXT_WEIGHT])
    return saved


def set_indices(change: Callable[[Tensor], Tensor]) -> Callable[[dict[Any, Any]], None]:
    def edit(state: dict[Any, Any]) -> None:
        state["indices"] = change(state["indices"])

    return edit


def put(key: str, position: int, value: int) -> Callable[[dict[Any, Any]], None]:
    def edit(state: dict[Any, Any]) -> None:
        state[key][position] = value

    return edit


def sgd_state() -> dict[str, Any]:
    model = two_towers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    train(model, optimizer, batches(1))
    return optimizer.state_dict()


def adamw_state() -> dict[str, Any]:
    model = two_towers()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1))
    return optimizer.state_dict()


# target: SparseAdamW(density=0.1) on two_towers(): 293 of 2932 elements
MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "density": (lambda: state_of(two_towers(), density=0.2), "selected elements: expected 293 of 2932 (9.9932%)"),
    "k": (lambda: state_of(two_towers(), k=294), "got 294 (10.0273%); build it with the density, k or mask"),
    "dense": (lambda: state_of(two_towers(), density=1.0), "expected 293 of 2932"),
    "adamw": (adamw_state, "expected 293 of 2932"),
    "other_optimizer": (sgd_state, "expected step, exp_avg, exp_avg_sq, got momentum_buffer"),
    "wider_model": (
        lambda: state_of(TwoTowers(width=24), density=0.1),
        "'visual.0.weight': expected shape (16, 3, 4, 4), got (24, 3, 4, 4): the state of another model",
    ),
    "narrower_model": (
        lambda: state_of(TwoTowers(width=8), density=0.1),
        "'visual.0.weight': expected shape (16, 3, 4, 4), got (8, 3, 4, 4)",
    ),
    "fewer_parameters": (
        lambda: SparseAdamW(parameters()).state_dict(),
        "expected 1 parameter groups of sizes [11], got 1 of sizes [8]",
    ),
    "more_groups": (
        lambda: SparseAdamW([{"params": [p]} for p in parameters()]).state_dict(),
        "expected 1 parameter groups of sizes [11], got 8 of sizes [1, 1, 1, 1, 1, 1, 1, 1]",
    ),
    "index_above": (lambda: edited(put("indices", -1, 256)), "expected ascending positions in [0, 256)"),
    "index_below": (lambda: edited(put("indices", 0, -1)), "indices of 'text.weight': expected ascending"),
    "indices_repeated": (lambda: edited(put("indices", 0, 255)), "expected ascending positions"),
    "indices_cast": (
        lambda: edited(set_indices(lambda index: index.bfloat16())),
        "indices of 'text.weight': expected one-dimensional int32 or int64, got bfloat16",
    ),
    "indices_fewer": (
        lambda: edited(set_indices(lambda index: index[:-1])),
        "exp_avg of 'text.weight': expected shape",
    ),
    "moment_missing": (lambda: edited(lambda state: state.pop("exp_avg_sq")), "without exp_avg_sq"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_named_and_change_nothing(case: str) -> None:
    make, message = MISFITS[case]
    data = batches(6)
    model, expected = two_towers(), two_towers()
    optimizer, reference = (SparseAdamW(m.named_parameters(), lr=1e-2, density=0.1) for m in (model, expected))
    train(model, optimizer, data[:3])
    train(expected, reference, data[:3])
    saved = make()
    with pytest.raises(ValueError, match="`state_dict`") as error:
        optimizer.load_state_dict(saved)
    assert message in str(error.value)
    assert "expected" in str(error.value)
    assert "got" in str(error.value)
    assert str(error.value).lower().endswith("nothing was loaded")
    assert "\n" not in str(error.value)
    assert_same_state(optimizer, reference)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    train(model, optimizer, data[3:])
    train(expected, reference, data[3:])
    assert_same_parameters(model, expected)


def test_amsgrad_without_its_maximum() -> None:
    model = two_towers()
    saved = copy.deepcopy(state_of(model, density=0.1, amsgrad=True))
    del saved["state"][TEXT_WEIGHT]["max_exp_avg_sq"]
    with pytest.raises(ValueError, match=r"state of 'text\.weight': expected .*max_exp_avg_sq, got"):
        SparseAdamW(model.named_parameters(), density=0.1).load_state_dict(saved)


@pytest.mark.parametrize(
    ("saved", "target", "message"),
    [
        ({"density": 0.1}, {"density": 1.0}, r"selected elements of '.*': expected \d+ of \d+ \(100\.0000%\)"),
        ({"density": 0.1, "scope": "tensor"}, {"density": 0.3, "scope": "tensor"}, r"selected elements of '.*'"),
        ({"density": 0.1}, {"density": 0.1, "scope": "tensor"}, r"selected elements of '.*'"),
        ({"density": 0.1, "scope": "tensor"}, {"density": 0.1, "scope": "row"}, r"selected elements of '.*'"),
    ],
)
def test_other_budgets_are_named(saved: dict[str, Any], target: dict[str, Any], message: str) -> None:
    model = two_towers()
    state = state_of(model, **saved)
    with pytest.raises(ValueError, match=message):
        SparseAdamW(model.named_parameters(), **target).load_state_dict(state)


def test_transposed_parameters_are_another_shape() -> None:
    """Their indices fit, and mean other elements."""
    tall, wide = (nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6)))
    optimizer = SparseAdamW([("weight", tall)], k=5)
    tall.grad = torch.randn(6, 4)
    optimizer.step()
    with pytest.raises(ValueError, match=r"'weight': expected shape \(4, 6\), got \(6, 4\)"):
        SparseAdamW([("weight", wide)], k=5).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_a_tensor_without_its_state_is_not_frozen_in_silence(scope: str) -> None:
    saved = state_of(two_towers(), density=0.1, scope=scope)
    del saved["state"][TEXT_WEIGHT]
    with pytest.raises(ValueError, match=r"expected the state of all 2932 elements .* got that of 2676"):
        SparseAdamW(two_towers().named_parameters(), density=0.1, scope=scope).load_state_dict(saved)


def test_budgets_of_groups_are_compared_apart() -> None:
    model = two_towers()
    optimizer = build("groups", model)
    train(model, optimizer, batches(2))
    named = list(model.named_parameters())
    head = [item for item in named if item[0].startswith("text.")]
    body = [item for item in named if not item[0].startswith("text.")]
    groups: list[dict[str, Any]] = [{"params": body[:3]}, {"params": body[3:]}, {"params": head, "density": 0.5}]
    with pytest.raises(ValueError, match=r"expected 136 of 272 \(50\.0000%\), as this optimizer selects, got 272"):
        SparseAdamW(groups, density=0.05).load_state_dict(optimizer.state_dict())
    groups[2]["density"] = 1.0
    with pytest.raises(ValueError, match=r"expected \d+ of 2660 \(10\.0\d*%\), as this optimizer selects"):
        SparseAdamW(groups, density=0.1).load_state_dict(optimizer.state_dict())
    fitting = SparseAdamW(groups, density=0.05)
    fitting.load_state_dict(optimizer.state_dict())
    assert fitting.mask == optimizer.mask


# ---- hooks and torch.distributed.checkpoint ----


def test_hooks_may_rewrite_the_state() -> None:
    """What is loaded, checked and shielded is what the pre-hooks return; post-hooks see the result."""
    model = two_towers(dtype=torch.bfloat16)
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    train(model, optimizer, batches(2, dtype=torch.bfloat16))
    saved = through_a_file(optimizer.state_dict())
    wrapped = {
        "state": {str(key): value for key, value in saved["state"].items()},
        "param_groups": saved["param_groups"],
    }
    fresh = SparseAdamW(model.named_parameters(), density=0.1)
    seen = []

    def unwrap(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {int(key): value for key, value in state_dict["state"].items()}}

    fresh.register_load_state_dict_pre_hook(unwrap)
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(o.mask))
    fresh.load_state_dict(wrapped)
    assert seen == [optimizer.mask]
    assert_same_state(fresh, optimizer)


def test_values_of_others_in_the_state_are_kept() -> None:
    """torch casts them as it would for any optimizer."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    train(model, optimizer, batches(1))
    optimizer.state[model.text.weight]["note"] = torch.tensor(3.0)
    fresh = SparseAdamW(model.named_parameters(), density=0.1)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert float(fresh.state[model.text.weight]["note"]) == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distributed_checkpoint_state_dict(dtype: torch.dtype) -> None:
    """In one process. The fake step it takes on a fresh optimizer selects nothing."""
    model = two_towers(dtype=dtype)
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=0.1)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.mask is None
    data = batches(4, dtype=dtype)
    train(model, optimizer, data[:2])
    saved = get_optimizer_state_dict(model, optimizer)
    resumed = two_towers(dtype=dtype)
    resumed.load_state_dict(model.state_dict())
    fresh = SparseAdamW(resumed.named_parameters(), lr=1e-2, density=0.1)
    set_optimizer_state_dict(resumed, fresh, saved)
    train(model, optimizer, data[2:])
    train(resumed, fresh, data[2:])
    assert_same_parameters(resumed, model)
    assert_same_state(fresh, optimizer)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["mask", "dense"])
def test_distributed_checkpoint_through_files(tmp_path: Path, how: str, dtype: torch.dtype, flatten: bool) -> None:
    """A fresh optimizer has state of the sizes to load, where it knows what is trained."""
    mask = select(two_towers(), batches(1), loss_fn, density=0.1, progress=False)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    data = batches(4, dtype=dtype)

    def build() -> tuple[TwoTowers, SparseAdamW]:
        model = two_towers(dtype=dtype)
        model.unused.requires_grad_(False)  # torch's functions want a state of what requires a gradient
        how_much: dict[str, Any] = {"mask": mask} if how == "mask" else {"density": 1.0}
        return model, SparseAdamW(model.named_parameters(), lr=1e-2, **how_much)

    model, optimizer = build()
    train(model, optimizer, data[:2])
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)
    resumed, fresh = build()
    weights, states = get_state_dict(resumed, fresh, options=options)
    found = {"model": weights, "optimizer": states}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        resumed,
        fresh,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=options,
    )
    train(model, optimizer, data[2:])
    train(resumed, fresh, data[2:])
    assert_same_parameters(resumed, model)
    assert_same_state(fresh, optimizer)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["density", "row", "head", "dense", "mask", "amsgrad"])
def test_optimizer_state(tmp_path: Path, how: str, dtype: torch.dtype, steps: int) -> None:
    """Every optimizer resumes, whatever it knows of its sizes before its first step."""
    options: dict[str, Any] = {
        "density": {"density": 0.1},
        "row": {"density": 0.1, "scope": "row"},
        "head": {"density": 0.1},
        "dense": {"density": 1.0},
        "mask": {"mask": select(two_towers(), batches(1), loss_fn, density=0.1, progress=False)},
        "amsgrad": {"k": 50, "amsgrad": True},
    }[how]
    data = batches(steps + 3, dtype=dtype)

    def build(seed: int) -> tuple[TwoTowers, SparseAdamW]:
        model = two_towers(seed, dtype=dtype)
        named: Any = list(model.named_parameters())
        if how == "head":
            named = [{"params": named[:-2]}, {"params": named[-2:], "density": 1.0, "lr": 0.1}]
        return model, SparseAdamW(named, 0.01, **options)

    model, optimizer = build(0)
    train(model, optimizer, data[:steps])
    optimizer.param_groups[0]["lr"] = 0.02
    dcp.save(
        {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    resumed, fresh = build(1)
    weights = resumed.state_dict()
    dcp.load({"model": weights, "optimizer": OptimizerState(resumed, fresh)}, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(weights)
    assert fresh.mask == optimizer.mask
    train(model, optimizer, data[steps:])
    train(resumed, fresh, data[steps:])
    assert_same_parameters(resumed, model)
    assert_same_state(fresh, optimizer)


def test_optimizer_state_refuses() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1, selection_steps=3)
    with pytest.raises(ValueError, match="got none that is param_groups") as error:
        OptimizerState(model.text, optimizer)
    assert_message(error, ["`model`", "pass the model"])
    train(model, optimizer, batches(1))
    with pytest.raises(ValueError, match="amid selection_steps"):
        OptimizerState(model, optimizer).state_dict()


def test_optimizer_state_of_another_order(tmp_path: Path) -> None:
    """Of equal sizes, one parameter would get the moments of another."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    named = list(model.named_parameters())
    optimizer = SparseAdamW(named, k=5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = OptimizerState(model, optimizer).state_dict()
    OptimizerState(model, SparseAdamW(named, k=5)).load_state_dict(state)
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    for other in (named[::-1], named[:3], groups):
        fresh = OptimizerState(model, SparseAdamW(other, k=5))
        with pytest.raises(ValueError, match="the parameters that were saved, in their order") as error:
            fresh.load_state_dict(state)
        assert_message(error, ["OptimizerState", "in the same groups and order"])


def test_weights_loaded_after_a_step_of_zeros() -> None:
    """torch.distributed.checkpoint's: what fp32 copies it made of 16-bit weights is of the old ones."""
    runs = []
    for fake in (False, True):
        model = two_towers(dtype=torch.bfloat16)
        optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, density=1.0)
        if fake:
            get_optimizer_state_dict(model, optimizer)
        model.load_state_dict(two_towers(1, torch.bfloat16).state_dict())
        train(model, optimizer, batches(2, dtype=torch.bfloat16))
        runs.append(model)
    assert_same_parameters(*runs)


def test_flattened_distributed_checkpoint_is_refused() -> None:
    """It asks a fresh optimizer for the names of its state, and drops the rest."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    train(model, optimizer, batches(1))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    fresh = SparseAdamW(model.named_parameters(), density=0.1)
    with pytest.raises(ValueError, match="or save without flattening"):
        set_optimizer_state_dict(model, fresh, saved, options=options)
