"""Code between two steps that puts other state into SparseAdamW, edits its values, loads, resets or carries it over.

What does not fit is an error that names the parameter and changes nothing: put right, the run goes on as if nothing had
been. What fits is stepped with, bit by bit as by an optimizer that was built anew.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_runs import (
    AFTER,
    BEFORE,
    MODES,
    STATE_KEYS,
    Run,
    differences,
    message_of,
    poison,
    same_as_undisturbed,
    snapshot,
)
from processes import isolated
from torch import Tensor, nn
from training import clones

from saft_kernels.selection.budget import DEFAULT_DENSITY

all_modes = pytest.mark.parametrize("mode", MODES)


# ---- what does not fit ----


def another_size(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)


def smaller(tensor: Tensor) -> Tensor:
    """Two numbers fit nothing here: a step count is one."""
    return torch.zeros(2, dtype=tensor.dtype)


def another_dtype(tensor: Tensor) -> Tensor:
    """A step count may have any."""
    return tensor.to(torch.float16 if tensor.is_floating_point() else torch.float32)


def another_device(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


MISFITS = [another_size, smaller, another_dtype, another_device]


def place_misfits(mode: str) -> None:
    wrong = []
    for key, make, way in itertools.product(STATE_KEYS, MISFITS, ("data", "object")):
        run, name = Run(mode), "b"
        run.step(BEFORE)
        if name not in run.with_key(key) or (key == "step" and make is another_dtype):
            continue
        state, there = run.state(name), run.state(name)[key]
        memory, misfit = there.data, make(there)
        if way == "object":
            state[key] = misfit
        elif make is another_device:
            continue  # torch does not let that happen
        else:
            there.data = misfit
        run.optimizer.zero_grad()
        values = clones(list(run.parameters.values()))
        what = f"{key}, {make.__name__} as {way}"
        if message_of(run.backward) is None:  # torch's own errors where gradients are released
            message = message_of(run.optimizer.step)
            if message is None:
                wrong.append(f"{what}: no error")
                continue
            if f"'{name}'" not in message or (key != "indices" and key not in message):
                wrong.append(f"{what}: {message}")
        if not all(map(torch.equal, run.parameters.values(), values)):
            wrong.append(f"{what}: stepped all the same")
            continue
        if way == "data":
            there.data = memory
        state[key] = there
        if not (key == "indices" and MODES[mode].get("release_grads")):  # backward goes by them as well: until a step
            wrong += same_as_undisturbed(run, what)
    assert wrong == [], "\n".join(wrong)


@all_modes
def test_misfits_are_named_and_change_nothing(mode: str) -> None:
    """Put right again, the run goes on as if nothing had been."""
    isolated(place_misfits, mode)


@all_modes
def test_missing_state_is_named(mode: str) -> None:
    """One of several: a parameter without any starts afresh, and so does a maximum, where amsgrad came later."""
    wrong = []
    for key in set(STATE_KEYS) - {"max_exp_avg_sq"}:
        run = Run(mode)
        run.step(BEFORE)
        if "b" not in run.with_key(key):
            continue
        there = run.state("b").pop(key)
        values = clones(list(run.parameters.values()))
        message = message_of(run.step)
        if message is None or "'b'" not in message:
            wrong.append(f"{key}: {message or 'no error'}")
        if all(map(torch.equal, run.parameters.values(), values)):
            run.state("b")[key] = there
            wrong += same_as_undisturbed(run, key)
    assert wrong == []


def point_outside(mode: str) -> None:
    for position in (10**9, -(10**9), -1):
        run = Run(mode)
        run.step(BEFORE)
        run.state("a")["indices"][-1] = position
        values = {name: p.detach().clone() for name, p in run.parameters.items()}
        with pytest.raises((ValueError, IndexError, RuntimeError), match="'a'"):
            run.step()
        assert differences({name: p.detach() for name, p in run.parameters.items()}, values) == []


@pytest.mark.parametrize("mode", ["global", "mask", "capturable", "released", "reference"])
def test_indices_that_point_outside_are_named(mode: str) -> None:
    """Written in place, where no address changes."""
    isolated(point_outside, mode)


# ---- values that were edited ----

EDITS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "exp_avg_zeroed": ("exp_avg", lambda t: t.zero_()),
    "exp_avg_through_data": ("exp_avg", lambda t: t.data.mul_(-2)),
    "exp_avg_sq": ("exp_avg_sq", lambda t: t.mul_(3)),
    "max_exp_avg_sq": ("max_exp_avg_sq", lambda t: t.data.mul_(2)),
    "master": ("master", lambda t: t.mul_(1 + 2.0**-12)),  # below the rounding of the parameter, so it counts
    "step_0": ("step", lambda t: t.fill_(0)),
    "step_through_data": ("step", lambda t: t.data.add_(5)),
    "step_through_numpy": ("step", lambda t: t.numpy().__iadd__(5)),
    "step_through_detach": ("step", lambda t: t.detach().add_(2)),
    "step_copied_to": ("step", lambda t: t.copy_(torch.tensor(41.0))),
}


@all_modes
@pytest.mark.parametrize("edit", EDITS)
def test_edited_values_are_stepped_with(mode: str, edit: str) -> None:
    """Of one parameter, and of all. As in an optimizer that has loaded them and has not stepped yet."""
    key, change = EDITS[edit]
    for only in ("a", None):
        run, fresh = Run(mode), Run(mode)
        run.step(BEFORE)
        with torch.no_grad():
            for name, p in fresh.parameters.items():
                p.copy_(run.parameters[name])
        fresh.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        fresh.steps_done = BEFORE
        if not set(names := [only] if only else run.with_key(key)) <= set(run.with_key(key)):
            continue
        for one in (run, fresh):
            for name in names:
                change(one.state(name)[key])
            one.step(AFTER)
        assert differences(snapshot(run.optimizer), snapshot(fresh.optimizer)) == []
        if key == "step":
            steps = {name: float(run.state(name)["step"]) for name in names}
            start = {"step_0": 0, "step_through_detach": 5, "step_copied_to": 41}.get(edit, 8)
            assert steps == dict.fromkeys(names, float(start + AFTER))


# ---- loads, resets, other parameters ----


@all_modes
@pytest.mark.parametrize("copied", [False, True])
def test_loads_between_steps(mode: str, copied: bool) -> None:
    """Its own state, as it is and as it was: rolled back, a run comes to the same again."""
    run = Run(mode)
    run.step(BEFORE)
    saved = run.optimizer.state_dict()
    saved = copy.deepcopy(saved) if copied else saved
    run.optimizer.load_state_dict(saved)
    if copied:
        values = {name: p.detach().clone() for name, p in run.parameters.items()}
        run.step(2)
        run.optimizer.load_state_dict(saved)
        for name, p in run.parameters.items():
            p.data.copy_(values[name])
        run.steps_done = BEFORE
    assert same_as_undisturbed(run, "loaded") == []


def clear(optimizer: Any) -> None:
    optimizer.state.clear()


def replace(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def clear_each(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state.clear()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "two_plans"])  # no mask covers a budget of its own
@pytest.mark.parametrize("reset", [clear, replace, clear_each], ids=lambda reset: reset.__name__)
def test_a_reset_state_starts_afresh(mode: str, reset: Callable[[Any], None]) -> None:
    """With the mask that it had: as an optimizer built with that mask on the parameters as they are."""
    run = Run(mode)
    run.step(BEFORE)
    mask = run.optimizer.mask
    dense = MODES[mode].get("density") == 1.0
    fresh = Run(mode) if dense else Run(mode, density=DEFAULT_DENSITY, scope="global", mask=mask)
    # but for the indices: they are the optimizer's as well
    old = [tensor.data for state in run.optimizer.state.values() for key, tensor in state.items() if key != "indices"]
    reset(run.optimizer)
    poison(old)
    for name, p in fresh.parameters.items():
        p.data.copy_(run.parameters[name].data)
    fresh.steps_done = BEFORE
    run.step(AFTER)
    fresh.step(AFTER)
    assert run.optimizer.mask == mask
    assert differences(snapshot(run.optimizer), snapshot(fresh.optimizer)) == []


@all_modes
def test_state_carried_over_to_other_parameters(mode: str) -> None:
    """`state[new] = state.pop(old)`: what is selected goes along."""
    run = Run(mode)
    run.step(BEFORE)
    run.optimizer.zero_grad()
    old, run.parameters = run.parameters, {n: nn.Parameter(p.detach().clone()) for n, p in run.parameters.items()}
    new_of = {old[name]: new for name, new in run.parameters.items()}
    for group in run.optimizer.param_groups:
        group["params"] = [new_of[p] for p in group["params"]]
    for p in old.values():
        if p in run.optimizer.state:
            run.optimizer.state[new_of[p]] = run.optimizer.state.pop(p)
    poison([p.data for p in old.values()])
    assert same_as_undisturbed(run, "other parameters") == []
