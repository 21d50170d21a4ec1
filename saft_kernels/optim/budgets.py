"""What SparseAdamW trains: its budgets, what they selected, and the selection from gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.dtypes import index_dtype, opmath_dtype
from ..selection.budget import budget, select_indices
from ..selection.gradients import any_nonzero, check_dense, check_finite

ParamGroups = Sequence[dict[str, Any]]

Position = tuple[int, int]
"""Of a parameter: its group, and its place in it. Frameworks swap parameter objects; positions stay."""

NOTHING = torch.empty(0, dtype=torch.int32)


def places(param_groups: ParamGroups) -> list[tuple[Position, str, Tensor]]:
    """Position, name and tensor of all parameters; names by position where they have none."""
    found: list[tuple[Position, str, Tensor]] = []
    for i, group in enumerate(param_groups):
        names = group.get("param_names") or [f"param.{len(found) + j}" for j in range(len(group["params"]))]
        found += [((i, j), name, p) for j, (name, p) in enumerate(zip(names, group["params"], strict=True))]
    return found


@dataclass(frozen=True)
class Pool:
    """Groups that share one budget: a density, or else k."""

    groups: tuple[int, ...]
    density: float | None
    k: int | None
    members: dict[Position, Tensor]

    @property
    def numel(self) -> int:
        """Elements of all members."""
        return sum(parameter.numel() for parameter in self.members.values())

    @property
    def is_dense(self) -> bool:
        """Whether the budget is all elements, whatever their gradients."""
        return self.density == 1.0 if self.k is None else self.k == self.numel


@dataclass
class Selection:
    """The optimizer's budget, the indices that are selected, and gradient sums while `steps` wants more of them.

    A group's "num_candidates" tells of how many elements its budget was taken; None: it is yet to be selected.
    """

    density: float
    k: int | None
    scope: str
    steps: int
    indices: dict[Position, Tensor | None] = field(default_factory=dict)  # None: wholly selected
    sums: dict[Position, Tensor] = field(default_factory=dict)
    num_sums: int = 0

    def pools(self, param_groups: ParamGroups, pending: bool = False) -> list[Pool]:
        """The budgets of all, or of the pending, groups; those without one of their own share the optimizer's."""
        groups_by_budget: dict[int, list[int]] = {}
        for i, group in enumerate(param_groups):
            if not pending or group["num_candidates"] is None:
                shared = group["density"] is None and group["k"] is None
                groups_by_budget.setdefault(-1 if shared else i, []).append(i)
        pools = []
        for owner, groups in groups_by_budget.items():
            density, k = self.density if self.k is None else None, self.k
            if owner >= 0:
                density, k = param_groups[owner]["density"], param_groups[owner]["k"]
            members = {(i, j): p for i in groups for j, p in enumerate(param_groups[i]["params"])}
            pools.append(Pool(tuple(groups), density, k, members))
        return pools

    def dense_groups(self, param_groups: ParamGroups) -> set[int]:
        """Groups under a budget of all elements."""
        return {i for pool in self.pools(param_groups) if pool.is_dense for i in pool.groups}

    def restart(self) -> None:
        """Forgets the gradient sums."""
        self.sums, self.num_sums = {}, 0

    def select(
        self, param_groups: ParamGroups, grad_scale: float, backend: str | None
    ) -> dict[Position, Tensor | None] | None:
        """Picks for the pending pools that have gradients; None while `steps` wants more of them.

        The picks are not yet `indices`, but their groups are no longer pending, and the sums are the caller's to
        restart. When it raises, nothing has changed but the sums, to which another call does not add.
        """
        pools = self.pools(param_groups, pending=True)
        names = {position: name for position, name, _ in places(param_groups)}
        scores: dict[Position, Tensor] = {}
        for position, parameter in (member for pool in pools if not pool.is_dense for member in pool.members.items()):
            if parameter.requires_grad and parameter.grad is not None:
                check_dense(names[position], parameter.grad)
                scores[position] = parameter.grad.resolve_neg()
        accumulating = self.num_sums > 0 or self.steps > 1
        if accumulating and not any_nonzero(scores.values()):
            if self.num_sums:
                return None  # gradients of zeros are no step
            accumulating = False
        if accumulating:
            if self.num_sums < self.steps:
                self._add_to_sums(names, scores, grad_scale)
            if self.num_sums < self.steps:
                return None
            scores = self.sums
        picked: dict[Position, Tensor | None] = {}
        num_candidates: dict[int, int] = {}
        for pool in pools:
            candidates = pool.members
            if pool.is_dense:
                picked.update(dict.fromkeys(candidates))
            else:
                candidates = {position: p for position, p in pool.members.items() if p.requires_grad}
                mine = {position: scores[position] for position in candidates if position in scores}
                if not any_nonzero(mine.values()):
                    continue
                picked.update(dict.fromkeys(pool.members, NOTHING))
                picked.update(self._pick(pool, candidates, mine, names, backend))
            for i in pool.groups:
                num_candidates[i] = sum(p.numel() for position, p in candidates.items() if position[0] == i)
        for i, numel in num_candidates.items():
            param_groups[i]["num_candidates"] = numel
        return picked

    def _add_to_sums(self, names: dict[Position, str], gradients: dict[Position, Tensor], grad_scale: float) -> None:
        check_finite([names[position] for position in gradients], list(gradients.values()))
        for position, gradient in gradients.items():
            if position not in self.sums:
                self.sums[position] = torch.zeros_like(gradient, dtype=opmath_dtype(gradient.dtype))
        for position, gradient in gradients.items():  # once all memory is there
            self.sums[position].add_(gradient, alpha=1 / grad_scale)
        self.num_sums += 1

    def _pick(
        self,
        pool: Pool,
        candidates: dict[Position, Tensor],
        scores: dict[Position, Tensor],
        names: dict[Position, str],
        backend: str | None,
    ) -> dict[Position, Tensor | None]:
        """The elements of one pool with the largest scores. Candidates without a score have none."""
        k = None
        if pool.k is not None or self.scope == "global":
            k = budget(pool.density, pool.k, sum(p.numel() for p in candidates.values()))
            available = sum(score.numel() for score in scores.values())
            if k > available:
                raise ValueError(
                    f"selection of {k} elements: expected at least as many with a gradient, got {available}; run "
                    "backward over the whole model before the first step, or freeze what the loss does not reach"
                )
        indices = select_indices(
            [names[position] for position in scores],
            list(scores.values()),
            pool.density,
            k,
            self.scope if k is None else "global",
            backend,
        )
        return {
            position: or_whole(candidates[position], index.to(index_dtype(candidates[position].numel()), copy=True))
            for position, index in zip(scores, indices, strict=True)
        }


def or_whole(parameter: Tensor, index: Tensor) -> Tensor | None:
    """None for the index of all elements."""
    return None if 0 < index.numel() == parameter.numel() else index
