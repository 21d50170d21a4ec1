"""A step of SparseAdamW made ready: everything that stays the same from one step to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import ops
from ..common.memory import check_memory
from ..common.names import short
from ..ops.adamw import (
    AdamWHyper,
    AdamWPlan,
    AdamWSegment,
    Watch,
    have_gradients,
    same_objects,
    shared,
    shared_parameters,
)
from ..ops.adamw import gradients as gradients_of
from ..ops.dtypes import INDEX_DTYPES
from ..selection.gradients import check_dense
from .members import STATE_KEYS, Member, ParamGroups, Position, State, check_range
from .selected_grad import SelectedGrad, step_gradient
from .state import MOMENTS, count_tensors, state_dtype
from .torch_step import TorchPart, torch_rows


class PreparedStep:
    """One plan per device for the selected parameters that have a gradient, and all that they were made for.

    Args:
        members: All of the optimizer's.
        param_groups: The optimizer's.
        states: The optimizer's; the step counts of those that are not capturable come to lie in one array.
        releases: Whether gradients may be `SelectedGrad`s.
        backend: See `saft_kernels.ops`.

    Raises:
        ValueError: A state or gradient that the kernels cannot read as what it should be; it names the parameter.
    """

    def __init__(
        self,
        members: Sequence[Member],
        param_groups: ParamGroups,
        states: Mapping[Tensor, State],
        releases: bool,
        backend: str | None,
    ) -> None:
        self._all_params: list[list[Tensor]] = [list(group["params"]) for group in param_groups]
        self._all_states: list[State] = list(states.values())
        self._flags = _flags(param_groups)
        selected = [member for member in members if member.index is None or member.index.numel()]
        self._members = [member for member in selected if member.parameter.grad is not None]
        self._waiting = [member.parameter for member in selected if member.parameter.grad is None]
        self._params = [member.parameter for member in self._members]
        self._locals = [member.local for member in self._members]
        self._is_split = not same_objects(self._params, self._locals)
        self.positions: frozenset[Position] = frozenset(member.position for member in self._members)
        mine = [states[parameter] for parameter in self._params]
        self._check_gradients()
        for member, state in zip(self._members, mine, strict=True):
            check_state(member, state)
            _lay_out(member.local, state)
        _check_positions(self._members, mine)
        self._parts: list[_Part | TorchPart] = []
        torchs = torch_rows(self._members, param_groups)
        for i in dict.fromkeys(self._members[row].position[0] for row in torchs):
            rows = [row for row in torchs if self._members[row].position[0] == i]
            self._parts.append(TorchPart(i, rows, [(self._members[row], mine[row]) for row in rows]))
        kernels = sorted({*range(len(self._params))}.difference(torchs))
        for device in dict.fromkeys(p.device for p in self._locals):
            rows = [row for row in kernels if self._locals[row].device == device]
            for capturable in (False, True):
                alike = [row for row in rows if _is_capturable(self._members[row], param_groups) == capturable]
                if alike:
                    segments = [(self._members[row], mine[row]) for row in alike]
                    self._parts.append(_Part(device, alike, segments, param_groups, capturable, releases, backend))
        self._watch = Watch(mine, set(STATE_KEYS))
        self._shared = shared_parameters(self._params)
        self._releases = releases
        self._released: list[Tensor] = []  # the last gradients, if all of them were released: of what is selected
        self._values: list[Tensor] = []  # theirs
        self._shared_values: list[object] = []
        # a plan that finds out after another has stepped would come too late
        self._forms = self._forms_now()
        # the step counts are the device's: a step need not wait to know whether it counts
        self.runs_on_device = all(part.capturable for part in self._parts)
        self.is_cuda = any(part.device.type == "cuda" for part in self._parts)

    def gradients(self, param_groups: ParamGroups, states: Mapping[Tensor, State] | None) -> list[Tensor] | None:
        """The gradients to step with, or None when something has changed and it takes another PreparedStep.

        Addresses, strides, shapes and dtypes of parameters and gradients are the plans' to watch.

        Args:
            param_groups: The optimizer's.
            states: The optimizer's, whose every tensor is compared with what it was; None: nobody else has had it.
        """
        if not (
            self._flags == _flags(param_groups)
            and all(map(same_objects, [group["params"] for group in param_groups], self._all_params))
            and (states is None or (same_objects(list(states.values()), self._all_states) and self._watch.holds()))
            and all(part.has_its_steps() for part in self._parts)
            and all(p.grad is None for p in self._waiting)
            and self._forms == self._forms_now()
        ):
            return None
        if self._is_split:
            gradients = self.current_gradients()
            is_same = same_objects([member.local for member in self._members], self._locals)
            return gradients if is_same and len(gradients) == len(self._params) else None
        if not self._releases:
            return gradients_of(self._params)
        if have_gradients(self._params, self._released):
            return self._values
        gradients = self.current_gradients()  # dense ones among them, or an error that names one
        if len(gradients) != len(self._params):
            return None
        released = [g for p in self._params if isinstance(g := p.grad, SelectedGrad)]
        if len(released) == len(gradients):
            self._released, self._values = [*released], gradients
            self._shared_values = shared(gradients)
        return gradients

    def _forms_now(self) -> list[tuple[torch.dtype, int]]:
        """What a plan calls stale, where there are several plans."""
        return [(p.dtype, p.numel()) for p in self._params] if len(self._parts) > 1 else []

    def current_gradients(self) -> list[Tensor]:
        """The gradients as they are, dense or compact; fewer than the parameters where some have none."""
        return [step_gradient(m, gradient) for m in self._members if (gradient := m.gradient) is not None]

    def run(
        self,
        gradients: list[Tensor],
        param_groups: ParamGroups,
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """One step, counted. `found_inf`: only where `runs_on_device`.

        Raises:
            StalePlan: A parameter changed its size or dtype; it takes another PreparedStep. Nothing was written.
        """
        if len(self._parts) > 1:
            self._check_gradients()  # now: a plan that finds out after another has stepped would come too late
        try:
            for part in self._parts:
                part.run(gradients, param_groups, grad_scale, found_inf)
        except (IndexError, RuntimeError, TypeError, ValueError):
            for member in self._members:
                check_range(member)
            self._check_gradients()
            raise

    def _check_gradients(self) -> None:
        """Raises for the first parameter or gradient that cannot be stepped with, and names it."""
        for member in self._members:
            parameter, gradient = member.local, member.gradient
            check_memory(f"parameter {member.name!r}", parameter)
            if gradient is not None:
                check_dense(member.name, gradient)
                check_memory(f"gradient of {member.name!r}", step_gradient(member, gradient))


class _Part:
    """The plan for one device, and for groups that are capturable or for those that are not."""

    def __init__(
        self,
        device: torch.device,
        rows: list[int],
        segments: list[tuple[Member, State]],
        param_groups: ParamGroups,
        capturable: bool,
        releases: bool,
        backend: str | None,
    ) -> None:
        self.rows, self.device, self.capturable = rows, device, capturable
        states = [state for _, state in segments]
        self._steps, self._counts, counts = _step_counts(states, device, capturable)
        # one by one, where they are capturable and on a CPU: the watch tells when their memory moves
        self._scalars = [step.numpy() for step in self._steps] if capturable and device.type == "cpu" else []
        self._seen = self._steps_now()
        hyper_rows: dict[tuple[int, float], int] = {}
        self._hypers: list[tuple[int, int]] = []  # a group, and which of the counts
        table = []
        for at, ((member, state), number) in enumerate(zip(segments, counts, strict=True)):
            i, parameter = member.position[0], member.local
            row = hyper_rows.setdefault((i, number), len(hyper_rows))
            if row == len(self._hypers):
                self._hypers.append((i, at))
            table.append(
                AdamWSegment(
                    parameter,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("indices"),
                    state["max_exp_avg_sq"] if param_groups[i]["amsgrad"] else None,
                    state["master"] if parameter.itemsize == 2 else None,
                    row,
                    member.name,
                    releases,
                )
            )
        self._plan: AdamWPlan = ops.prepare_sparse_adamw(table, backend=backend)

    def has_its_steps(self) -> bool:
        """Whether nobody else wrote the step counts, and no interrupt came between a step and its count."""
        return self._steps_now() == self._seen

    def _steps_now(self) -> object:
        """The counts; where a GPU has them, what torch knows of writes to them."""
        if self._counts is not None:
            return self._counts.tobytes()
        if self._scalars:
            return [scalar.item() for scalar in self._scalars]
        return [step._version for step in self._steps]

    def _count(self, by: float) -> None:
        if self._counts is None:
            torch._foreach_add_(self._steps, by)
        else:
            self._counts += by
        self._seen = self._steps_now()

    def run(
        self,
        gradients: list[Tensor],
        param_groups: ParamGroups,
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
        # first, as torch.optim does: an interrupt finds a step counted that was not made, or one that was
        self._count(1.0)
        try:
            self._plan.step(gradients, self._current_hypers(param_groups, grad_scale, found_inf))
        except Exception:
            self._count(-1.0)
            raise
        if self.capturable and found_inf is not None:
            # GradScaler adds up those of several devices
            torch._foreach_add_(self._steps, (found_inf != 0).reshape(()).float(), alpha=-1.0)
            self._seen = self._steps_now()

    def _current_hypers(
        self, param_groups: ParamGroups, grad_scale: float | Tensor, found_inf: Tensor | None
    ) -> list[AdamWHyper]:
        """The scalars of each group and count, as the groups have them now."""
        hypers = []
        for i, at in self._hypers:
            group = param_groups[i]
            lr, (beta1, beta2) = group["lr"], group["betas"]
            hypers.append(
                AdamWHyper(
                    lr if isinstance(lr, Tensor) and lr.device == self.device else float(lr),
                    float(beta1),
                    float(beta2),
                    float(group["eps"]),
                    float(group["weight_decay"]),
                    self._steps[at] if self._counts is None else float(self._counts[at]),
                    group["maximize"],
                    grad_scale,
                    found_inf,
                )
            )
        return hypers


def _step_counts(
    states: Sequence[State], device: torch.device, capturable: bool
) -> tuple[list[Tensor], npt.NDArray[np.float32] | None, list[float]]:
    """The tensors to count in, their memory as one array, and the counts. Puts the states' own there.

    There is no array for those that are capturable.
    """
    steps = [state["step"] for state in states]
    if len({step.device for step in steps}) == 1:
        counts = torch.stack([step.float() for step in steps]).tolist()
    else:  # capturable was switched on or off
        counts = [float(step) for step in steps]
    if capturable:
        # a captured graph counts in the tensors it found, so they stay
        for state in states:
            state["step"] = state["step"].to(device, torch.float32)
        return [state["step"] for state in states], None, counts
    steps, array = count_tensors(counts)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
    return steps, array, counts


def _is_capturable(member: Member, param_groups: ParamGroups) -> bool:
    return bool(param_groups[member.position[0]]["capturable"])


def _flags(param_groups: ParamGroups) -> list[tuple[bool, bool, bool]]:
    return [(group["amsgrad"], group["capturable"], group["differentiable"]) for group in param_groups]


# ---- what the kernels read as what it should be ----


def _check_positions(members: Iterable[Member], states: Iterable[State]) -> None:
    """Raises ValueError for indices beyond a parameter: of ascending ones the last tells. One wait per device."""
    last: dict[torch.device, list[tuple[Member, Tensor]]] = {}
    for member, state in zip(members, states, strict=True):
        if (indices := state.get("indices")) is not None and indices.numel() and not indices.is_meta:
            last.setdefault(indices.device, []).append((member, indices[-1].long()))
    for found in last.values():
        for (member, _), at in zip(found, torch.stack([at for _, at in found]).tolist(), strict=True):
            numel = member.local.numel()
            if at >= numel:
                raise ValueError(
                    f"state of {member.name!r}: expected indices below {numel}, its number of elements, got {at}; "
                    "the parameter's shape has changed: build another optimizer"
                )


def check_state(member: Member, state: State) -> None:
    """Raises ValueError for a state that code outside has moved, cast, replaced or freed."""
    parameter = member.local
    keys = ["exp_avg", "exp_avg_sq"] + ["master"] * (parameter.itemsize == 2)
    keys += ["max_exp_avg_sq"] * ("max_exp_avg_sq" in state)
    indices = state.get("indices")
    dtype, device = state_dtype(parameter), parameter.device
    shape = parameter.shape if indices is None else indices.shape
    for key in keys:
        value = state.get(key)
        if not isinstance(value, Tensor) or (value.dtype, value.shape, value.device) != (dtype, shape, device):
            raise ValueError(
                f"state of {member.name!r}: expected {key} {short(dtype)} {tuple(shape)} on {parameter.device}, got "
                f"{_described(value)}; after a change of the model's dtype or device, call "
                "optimizer.load_state_dict(optimizer.state_dict())"
            )
        check_memory(f"{key} in the state of {member.name!r}", value)
    step = state.get("step")
    if not isinstance(step, Tensor) or step.numel() != 1 or step.is_meta:
        raise ValueError(
            f"state of {member.name!r}: expected step, a tensor of one element, got {_described(step)}; "
            "load_state_dict() takes numbers, too"
        )
    check_memory(f"step in the state of {member.name!r}", step)
    if indices is None:
        return
    if indices.device != parameter.device or indices.dtype not in INDEX_DTYPES or indices.dim() != 1:
        raise ValueError(
            f"state of {member.name!r}: expected indices, one-dimensional int32 or int64 on {parameter.device}, got "
            f"{_described(indices)}; move the whole state"
        )
    check_memory(f"indices in the state of {member.name!r}", indices)


def _lay_out(parameter: Tensor, state: State) -> None:
    """The kernels walk the moments of a parameter in step: where they are laid out differently, all are anew."""
    moments = {key: state[key] for key in MOMENTS if key in state}
    if len({value.stride() for value in moments.values()}) > 1 or not (
        state["exp_avg"].is_contiguous() or state["exp_avg"].stride() == parameter.stride()
    ):
        for key, value in moments.items():
            state[key] = torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value)
    if (indices := state.get("indices")) is not None:
        state["indices"] = indices.contiguous()


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return "none" if value is None else type(value).__name__
    return f"{short(value.dtype)} {tuple(value.shape)} on {value.device}"
