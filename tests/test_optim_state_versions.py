"""state_dicts of versions before: they load, and training goes on from them in the same bits."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Backend, assert_same_bits

from saft_kernels import SparseMask, ops

_spec = importlib.util.spec_from_file_location("make_state_dicts", Path(__file__).parent / "data/make_state_dicts.py")
assert _spec is not None
assert _spec.loader is not None
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)

SAVED = made.load()
all_cases = pytest.mark.parametrize("case", SAVED)


def resumed(case: str) -> tuple[dict[str, Any], Any]:
    """Parameters and optimizer of this version, with the values and the state_dict of that one."""
    parameters, optimizer = made.build(case)
    values = SAVED[case]["parameters"].split([p.numel() for p in parameters.values()])
    for p, value in zip(parameters.values(), values, strict=True):
        p.data.copy_(value.view(p.shape))
    optimizer.load_state_dict(copy.deepcopy(SAVED[case]["state_dict"]))
    return parameters, optimizer


def test_every_kind_of_state_is_there() -> None:
    """The file is of one version; a new kind of state needs a file of the version that brings it."""
    assert list(SAVED) == list(made.CASES)
    keys = {key for saved in SAVED.values() for state in saved["state_dict"]["state"].values() for key in state}
    moments = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"}
    assert keys == {"step", "indices", *moments, "grad_sum", "num_grads"}


@all_cases
def test_nothing_of_the_state_is_lost(case: str) -> None:
    """What this version saves of it, before a step, is what was loaded: every key, every bit, every layout."""
    optimizer = resumed(case)[1]
    expected, actual = SAVED[case]["state_dict"], optimizer.state_dict()
    assert actual["state"].keys() == expected["state"].keys()
    for at, state in expected["state"].items():
        assert actual["state"][at].keys() == state.keys()
        for key, value in state.items():
            assert_same_bits(actual["state"][at][key], value, f"{at} {key}")
            assert actual["state"][at][key].stride() == value.stride()
    dense = {i for pool in optimizer.pools() if pool.is_dense for i in pool.groups}
    for i, (ours, theirs) in enumerate(zip(actual["param_groups"], expected["param_groups"], strict=True)):
        sizes = {"param_shapes", "num_candidates"} if i in dense else set()  # which the state has there
        assert {key: ours[key] for key in theirs.keys() - sizes} == {key: theirs[key] for key in theirs.keys() - sizes}


@all_cases
def test_training_goes_on_in_the_same_bits(case: str) -> None:
    """On every instruction set: the arithmetic is IEEE's."""
    ran = 0
    for isa in range(-1, 3):
        backend = Backend("cpu", "cpu", isa=isa)
        if backend.why_unavailable("prepare_sparse_adamw") is None:
            ran += 1
            parameters, optimizer = resumed(case)
            with backend.forced():
                made.train(parameters, optimizer, made.STEPS_BEFORE, made.STEPS_AFTER)
            assert_same_bits(made.flat(parameters), SAVED[case]["expected"])
    if not ran:
        pytest.skip(f"cpu: {ops.why_unavailable('cpu', None, 'cpu')}")
    steps = {float(state["step"]) for state in optimizer.state.values() if state["exp_avg"].numel()}
    assert steps == {2.0 if case == "summing" else 6.0}  # selected by its fifth step


def test_the_mask_that_was_selected() -> None:
    _, optimizer = resumed("mask")
    shapes = {name: tuple(p.shape) for name, p in made.build("mask")[0].items()}
    assert optimizer.mask == SparseMask({n: torch.tensor(i, dtype=torch.int64) for n, i in made.MASK.items()}, shapes)
