"""Steps of torch's own AdamW, for wholly selected parameters that the kernels do not take.

Those are complex ones, those of a differentiable group, and those that stand in a group twice: torch updates them twice
in a step, one after the other, and warns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..ops.adamw import StalePlan
from .members import Member, ParamGroups, State


def torch_rows(members: Sequence[Member], param_groups: ParamGroups) -> list[int]:
    """Which of the members torch steps."""
    times = Counter(id(member.parameter) for member in members)
    return [
        row
        for row, member in enumerate(members)
        if member.parameter.is_complex()
        or param_groups[member.position[0]]["differentiable"]
        or times[id(member.parameter)] > 1
    ]


class TorchPart:
    """The parameters of one group that torch steps, one by one.

    Args:
        group: Which of the param_groups.
        rows: Where their gradients are in the list that `run` is given.
        segments: The parameters, with their state.
    """

    # the host reads the step counts
    capturable = False

    def __init__(self, group: int, rows: Sequence[int], segments: Iterable[tuple[Member, State]]) -> None:
        self.rows = list(rows)
        self._group = group
        self._params, self._states = [], []
        for member, state in segments:
            self._params.append(member.local)
            self._states.append(state)
        self._forms = [(p.dtype, p.shape, p.device) for p in self._params]
        self.device = self._params[0].device

    def has_its_steps(self) -> bool:
        """True: torch reads the step counts in every step."""
        return True

    def run(
        self,
        gradients: list[Tensor],
        param_groups: ParamGroups,
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """One step, counted. See `PreparedStep.run`."""
        assert found_inf is None
        if self._forms != [(p.dtype, p.shape, p.device) for p in self._params]:
            raise StalePlan("a parameter changed its shape, dtype or device")
        group = param_groups[self._group]
        is_differentiable, amsgrad = bool(group["differentiable"]), bool(group["amsgrad"])
        beta1, beta2 = group["betas"] if is_differentiable else map(float, group["betas"])
        lr = group["lr"] if is_differentiable else float(group["lr"])
        gradients = [gradients[row].resolve_conj().resolve_neg() for row in self.rows]
        with torch.set_grad_enabled(is_differentiable):
            if grad_scale != 1.0:
                gradients = [gradient / grad_scale for gradient in gradients]
            adamw(
                self._params,
                gradients,
                [state["exp_avg"] for state in self._states],
                [state["exp_avg_sq"] for state in self._states],
                [state["max_exp_avg_sq"] for state in self._states] if amsgrad else [],
                [state["step"] for state in self._states],
                foreach=False,
                fused=False,
                differentiable=is_differentiable,
                has_complex=any(p.is_complex() for p in self._params),
                amsgrad=amsgrad,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
