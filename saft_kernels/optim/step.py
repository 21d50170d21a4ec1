"""A step of SparseAdamW made ready: everything that stays the same from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..common.names import short
from ..ops import walk
from ..ops.adamw import AdamWHyper, AdamWPlan, AdamWSegment
from ..ops.dtypes import opmath_dtype
from ..selection.gradients import check_dense
from .release import SelectedGrad, step_gradient
from .state import State

if TYPE_CHECKING:
    from .sparse_adamw import SparseAdamW


class PreparedStep:
    """One plan per device for the selected parameters that have a gradient, and all that they were made for.

    `selected` holds group, name and parameter of those with selected elements.
    """

    def __init__(
        self, optimizer: SparseAdamW, selected: Sequence[tuple[int, str, Tensor]], backend: str | None
    ) -> None:
        groups = optimizer.param_groups
        self.all_params: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self.all_states: list[State] = list(optimizer.state.values())
        self.flags = _flags(groups)
        self.releases = optimizer._released is not None
        trained = [(i, name, p) for i, name, p in selected if p.grad is not None]
        self.names = [name for _, name, _ in trained]
        self.params = [p for _, _, p in trained]
        self.waiting = [p for _, _, p in selected if p.grad is None]
        self.states: list[State] = [optimizer.state[p] for p in self.params]
        self.exp_avgs = [state["exp_avg"] for state in self.states]
        self.indices = [state.get("indices") for state in self.states]
        self._check_gradients()
        for name, parameter, state in zip(self.names, self.params, self.states, strict=True):
            _check_state(name, parameter, state)
        _check_positions(self.names, self.params, self.states)
        self.parts: list[_Part] = []
        for device in dict.fromkeys(p.device for p in self.params):
            rows = [row for row, p in enumerate(self.params) if p.device == device]
            segments = [(trained[row][0], self.params[row], self.states[row]) for row in rows]
            self.parts += [_Part(device, rows, segments, groups, flag, backend) for flag in (False, True)]
        self.parts = [part for part in self.parts if part.rows]
        # a plan that finds out after another has stepped would come too late
        self.forms = self._forms()
        self.steps = [state["step"] for state in self.states]
        # the step counts are the device's: a step need not wait to know whether it counts
        self.runs_on_device = all(part.capturable for part in self.parts)
        self.is_cuda = any(part.device.type == "cuda" for part in self.parts)

    def gradients(self, optimizer: SparseAdamW) -> list[Tensor] | None:
        """What to step with; None when something changed, and it takes another PreparedStep.

        Pointers, strides, shapes and dtypes are the plans' to watch.
        """
        groups = optimizer.param_groups
        if not (
            self.flags == _flags(groups)
            and all(map(walk.same_objects, [group["params"] for group in groups], self.all_params))
            and walk.same_objects(list(optimizer.state.values()), self.all_states)
            and walk.same_items(self.states, "exp_avg", self.exp_avgs)
            and walk.same_items(self.states, "step", self.steps)
            and all(part.has_its_steps() for part in self.parts)
            and all(p.grad is None for p in self.waiting)
            and self.forms == self._forms()
        ):
            return None
        if not self.releases:
            return walk.gradients(self.params)
        selected = [g.selected for p in self.params if isinstance(g := p.grad, SelectedGrad)]
        if walk.same_objects([s.index for s in selected], self.indices):
            return [s.values for s in selected]
        gradients = self.current_gradients()  # dense ones among them, or an error that names one
        return gradients if len(gradients) == len(self.params) else None

    def _forms(self) -> list[tuple[torch.dtype, int]]:
        """What a plan calls stale, where there are several plans."""
        return [(p.dtype, p.numel()) for p in self.params] if len(self.parts) > 1 else []

    def current_gradients(self) -> list[Tensor]:
        """Dense or compact; shorter than `params` where some have none."""
        members = zip(self.names, self.params, self.states, strict=True)
        return [step_gradient(name, gradient, state) for name, p, state in members if (gradient := p.grad) is not None]

    def run(
        self,
        gradients: list[Tensor],
        param_groups: list[dict[str, Any]],
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """One step; the step counts go up once it is done. `found_inf`: only where `runs_on_device`."""
        try:
            for part in self.parts:
                part.run(gradients, param_groups, grad_scale, found_inf)
        except (RuntimeError, TypeError):
            self._check_gradients()
            raise

    def _check_gradients(self) -> None:
        for at, (name, parameter) in enumerate(zip(self.names, self.params, strict=True)):
            if parameter.grad is not None:
                check_dense(name, parameter.grad)
                step_gradient(name, parameter.grad, self.states[at])


class _Part:
    """The plan for one device, and for groups that are capturable or for those that are not."""

    def __init__(
        self,
        device: torch.device,
        rows: list[int],
        segments: list[tuple[int, Tensor, State]],
        groups: list[dict[str, Any]],
        capturable: bool,
        backend: str | None,
    ) -> None:
        mine = [at for at, (i, _, _) in enumerate(segments) if bool(groups[i]["capturable"]) == capturable]
        self.rows = [rows[at] for at in mine]
        self.device, self.capturable = device, capturable
        if not mine:
            return
        states = [segments[at][2] for at in mine]
        steps = [state["step"] for state in states]
        if len({step.device for step in steps}) == 1:
            counts = torch.stack([step.float() for step in steps]).tolist()
        else:  # capturable was switched on or off
            counts = [float(step) for step in steps]
        if capturable:
            # a captured graph counts in the tensors it found, so they stay
            for state in states:
                state["step"] = state["step"].to(device, torch.float32)
            self.steps = [state["step"] for state in states]
        else:
            # one buffer, to be incremented at once; the states hold views of it
            self.steps = [torch.tensor(counts, dtype=torch.float32)]
            for state, step in zip(states, self.steps[0].unbind(), strict=True):
                state["step"] = step
            # the same memory; torch counts no version of it, so one that goes up is somebody else's doing
            self.step_values = self.steps[0].numpy()
        self.versions = self._versions()

        hyper_rows: dict[tuple[int, float], int] = {}
        self.hypers: list[tuple[int, Tensor]] = []  # a group, and its count in `steps`
        self.counts: list[float] = []  # the same in numbers, unless capturable
        table = []
        for at, count in enumerate(counts):
            i, parameter, state = segments[mine[at]]
            row = hyper_rows.setdefault((i, count), len(hyper_rows))
            if row == len(self.hypers):
                self.hypers.append((i, state["step"]))
                self.counts.append(count)
            table.append(
                AdamWSegment(
                    parameter,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("indices"),
                    state["max_exp_avg_sq"] if groups[i]["amsgrad"] else None,
                    state["master"] if parameter.itemsize == 2 else None,
                    row,
                )
            )
        self.plan: AdamWPlan = ops.prepare_sparse_adamw(table, backend=backend)

    def has_its_steps(self) -> bool:
        """Whether nobody else wrote the step counts."""
        return self._versions() == self.versions

    def _versions(self) -> list[int]:
        return [step._version for step in self.steps]

    def run(
        self,
        gradients: list[Tensor],
        groups: list[dict[str, Any]],
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        if len(self.rows) != len(gradients):
            gradients = [gradients[row] for row in self.rows]
        if self.capturable:
            # what the host reads has to be there
            non_blocking = self.device.type != "cpu"
            if found_inf is not None:
                found_inf = found_inf.to(self.device, non_blocking=non_blocking)
            if isinstance(grad_scale, Tensor):
                grad_scale = grad_scale.to(self.device, non_blocking=non_blocking)
        hypers = []
        for (i, step), count in zip(self.hypers, self.counts, strict=True):
            group = groups[i]
            lr, (beta1, beta2) = group["lr"], group["betas"]
            hypers.append(
                AdamWHyper(
                    lr if isinstance(lr, Tensor) and lr.device == self.device else float(lr),
                    float(beta1),
                    float(beta2),
                    float(group["eps"]),
                    float(group["weight_decay"]),
                    step if self.capturable else count + 1,
                    group["maximize"],
                    grad_scale,
                    found_inf,
                )
            )
        if self.capturable:
            torch._foreach_add_(self.steps, 1.0)
        try:
            self.plan.step(gradients, hypers)
        except Exception:
            if self.capturable:
                torch._foreach_add_(self.steps, -1.0)
                self.versions = self._versions()
            raise
        if not self.capturable:
            self.step_values += 1
            self.counts = [count + 1 for count in self.counts]
            return
        if found_inf is not None:
            # GradScaler adds up those of several devices
            torch._foreach_add_(self.steps, (found_inf != 0).reshape(()).float(), alpha=-1.0)
        self.versions = self._versions()


def _flags(groups: list[dict[str, Any]]) -> list[tuple[bool, bool]]:
    return [(group["amsgrad"], group["capturable"]) for group in groups]


def _check_positions(names: list[str], parameters: list[Tensor], states: list[State]) -> None:
    """Of ascending indices the last one tells. One wait per device."""
    last: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    for name, parameter, state in zip(names, parameters, states, strict=True):
        if (indices := state.get("indices")) is not None and indices.numel() and not indices.is_meta:
            last.setdefault(indices.device, []).append((name, parameter, indices[-1].long()))
    for members in last.values():
        for (name, parameter, _), at in zip(members, torch.stack([at for _, _, at in members]).tolist(), strict=True):
            if at >= parameter.numel():
                raise ValueError(
                    f"state of {name!r}: expected indices below {parameter.numel()}, its number of elements, got {at}; "
                    "the parameter's shape has changed: build another optimizer"
                )


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
