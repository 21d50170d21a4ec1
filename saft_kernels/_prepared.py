"""A step of SparseAdamW made ready: everything that stays the same from one step to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from ._budget import check_dense
from ._release import step_gradient
from ._state import State
from .ops._adamw import AdamWHyper, AdamWSegment, opmath_dtype
from .ops._checks import short


class PreparedStep:
    """The plan for the selected parameters that have a gradient, and all that it was made for.

    `selected` holds group, name and parameter of those with selected elements.
    """

    def __init__(self, optimizer: Optimizer, selected: Sequence[tuple[int, str, Tensor]], backend: str | None) -> None:
        groups = optimizer.param_groups
        self.all_params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.all_states: list[State] = list(optimizer.state.values())
        self.amsgrad = [group["amsgrad"] for group in groups]
        trained = [(i, p) for i, _, p in selected if p.grad is not None]
        self.names = [name for _, name, p in selected if p.grad is not None]
        self.params = [p for _, p in trained]
        self.waiting = [p for _, _, p in selected if p.grad is None]
        self.dtypes = [p.dtype for p in self.params]
        self.states: list[State] = [optimizer.state[p] for p in self.params]
        self.exp_avgs = [state["exp_avg"] for state in self.states]
        self._check_gradients()
        for name, parameter, state in zip(self.names, self.params, self.states, strict=True):
            _check_state(name, parameter, state)

        # one buffer of step counts, to be incremented at once; the states hold views of it
        counts = [float(state["step"]) for state in self.states]
        self.steps = torch.tensor(counts, dtype=torch.float32)
        self.expected_steps = self.steps.clone()
        self.step_views = list(self.steps.unbind())
        for state, step in zip(self.states, self.step_views, strict=True):
            state["step"] = step

        rows: dict[tuple[int, float], int] = {}
        self.rows: list[tuple[int, int]] = []  # per row of hyperparameters: a group, and a position in `steps`
        segments = []
        for at, ((i, parameter), state) in enumerate(zip(trained, self.states, strict=True)):
            row = rows.setdefault((i, counts[at]), len(rows))
            if row == len(self.rows):
                self.rows.append((i, at))
            segments.append(
                AdamWSegment(
                    parameter,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("indices"),
                    state["max_exp_avg_sq"] if self.amsgrad[i] else None,
                    state.get("master"),
                    row,
                )
            )
        self.plan = ops.prepare_sparse_adamw(segments, backend=backend) if segments else None

    def gradients(self, optimizer: Optimizer) -> list[Tensor] | None:
        """What to step with; None when something changed, and it takes another PreparedStep.

        Pointers, strides and shapes are the plan's to watch.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not (
            _same(params, self.all_params)
            and _same(optimizer.state.values(), self.all_states)
            and _same(map(dict.get, self.states, repeat("exp_avg")), self.exp_avgs)
            and _same(map(dict.get, self.states, repeat("step")), self.step_views)
            and torch.equal(self.steps, self.expected_steps)
            and [p.dtype for p in self.params] == self.dtypes
            and [group["amsgrad"] for group in optimizer.param_groups] == self.amsgrad
            and all(p.grad is None for p in self.waiting)
        ):
            return None
        gradients = self.current_gradients()
        return gradients if len(gradients) == len(self.params) else None

    def current_gradients(self) -> list[Tensor]:
        """Dense or compact; shorter than `params` where some have none."""
        members = zip(self.names, self.params, self.states, strict=True)
        return [step_gradient(name, gradient, state) for name, p, state in members if (gradient := p.grad) is not None]

    def run(self, gradients: list[Tensor], param_groups: list[dict[str, Any]], grad_scale: float) -> None:
        """One step; the step counts go up once it is done."""
        if self.plan is None:
            return
        hypers = [_hyper(param_groups[i], float(self.steps[at]) + 1, grad_scale) for i, at in self.rows]
        try:
            self.plan.step(gradients, hypers)
        except RuntimeError:
            self._check_gradients()
            raise
        self.steps += 1
        self.expected_steps += 1

    def _check_gradients(self) -> None:
        for name, parameter in zip(self.names, self.params, strict=True):
            if parameter.grad is not None:
                check_dense(name, parameter.grad)


def _same(now: Iterable[object], then: Sequence[object]) -> bool:
    """Whether both hold the same objects."""
    now = list(now)
    return len(now) == len(then) and all(map(is_, now, then))


def _check_state(name: str, parameter: Tensor, state: State) -> None:
    """The kernels read the state as what it should be; code outside may have moved, cast or replaced it."""
    keys = ["exp_avg", "exp_avg_sq"] + ["master"] * (parameter.itemsize == 2)
    keys += ["max_exp_avg_sq"] * ("max_exp_avg_sq" in state)
    indices = state.get("indices")
    dtype = opmath_dtype(parameter.dtype)
    shape = parameter.shape if indices is None else indices.shape
    for key in keys:
        value = state.get(key)
        if value is None or (value.dtype, value.shape, value.device) != (dtype, shape, parameter.device):
            got = "none" if value is None else f"{short(value.dtype)} {tuple(value.shape)} on {value.device}"
            raise ValueError(
                f"state of {name!r}: expected {key} {short(dtype)} {tuple(shape)} on {parameter.device}, got {got}; "
                "after a change of the model's dtype or device, call optimizer.load_state_dict(optimizer.state_dict())"
            )
    if indices is not None and indices.device != parameter.device:
        raise ValueError(
            f"state of {name!r}: expected indices on {parameter.device}, got {indices.device}; move the whole state"
        )


def _hyper(group: dict[str, Any], step: float, grad_scale: float) -> AdamWHyper:
    beta1, beta2 = group["betas"]
    return AdamWHyper(
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        step,
        group["maximize"],
        grad_scale,
    )
