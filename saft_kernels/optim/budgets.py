"""What SparseAdamW may select: its budgets, and the selection from gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dtypes import index_dtype, opmath_dtype
from ..selection.budget import budget
from ..selection.gradients import check_dense
from ..selection.parts import ranks_of, whole_counts
from ..selection.ranks import Ranks
from ..selection.shards import any_nonzero, check_finite, select_indices
from .members import NOTHING, Member, ParamGroups, Position


@dataclass(frozen=True)
class Pool:
    """Groups that share one budget, a density or else k, over the elements of a scope; `numel` of them in all."""

    groups: tuple[int, ...]
    density: float | None
    k: int | None
    scope: str
    numel: int

    @property
    def is_dense(self) -> bool:
        """Whether the budget is all elements, whatever their gradients."""
        return self.density == 1.0 if self.k is None else self.k == self.numel

    def of(self, members: Iterable[Member]) -> list[Member]:
        """Those of the members that share this budget."""
        return [member for member in members if member.position[0] in self.groups]


class Picked(NamedTuple):
    """What a selection chose; not yet what is selected.

    Attributes:
        indices: Of the parameters of every pool that was selected from; None: all elements.
        num_candidates: Per group, of how many elements the budget was taken.
    """

    indices: dict[Position, Tensor | None]
    num_candidates: dict[int, int]

    def add(self, pool: Pool, members: Sequence[Member], candidates: Iterable[Member]) -> None:
        """Takes a pool in: what was picked of its `candidates` is in `indices` already, of other members nothing is."""
        for member in members:
            self.indices.setdefault(member.position, None if pool.is_dense else NOTHING)
        for i in pool.groups:
            self.num_candidates[i] = sum(m.parameter.numel() for m in candidates if m.position[0] == i)


@dataclass
class Selection:
    """The optimizer's budget, and gradient sums while `steps` wants more of them.

    A group's "num_candidates" tells of how many elements its budget was taken; None: it is yet to be selected.
    """

    density: float
    k: int | None
    scope: str
    steps: int
    mask: str = ""  # digest of the mask that is the budget
    sums: dict[Position, Tensor] = field(default_factory=dict)
    num_sums: int = 0
    summed: dict[Position, Tensor] = field(default_factory=dict)  # the parameters

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
            numel = sum(parameter.numel() for i in groups for parameter in param_groups[i]["params"])
            pools.append(Pool(tuple(groups), density, k, self.scope if k is None else "global", numel))
        return pools

    def dense_groups(self, param_groups: ParamGroups) -> set[int]:
        """Groups under a budget of all elements."""
        return {i for pool in self.pools(param_groups) if pool.is_dense for i in pool.groups}

    def restart(self) -> None:
        """Forgets the gradient sums."""
        self.sums, self.summed, self.num_sums = {}, {}, 0

    def select(
        self, param_groups: ParamGroups, members: Sequence[Member], grad_scale: float, backend: str | None
    ) -> Picked | None:
        """Picks for the pending pools that have gradients; None while `steps` wants more of them.

        Changes nothing but the sums, which are the caller's to restart, and to which another call does not add when
        this one raises.
        """
        pools = self.pools(param_groups, pending=True)
        by_position = {member.position: member for member in members}
        mine = [member for pool in pools if not pool.is_dense for member in pool.of(members)]
        ranks = ranks_of(member.part for member in members)
        for member in mine:
            parameter = member.parameter
            if self.summed.get(member.position, parameter) is not parameter:
                raise ValueError(
                    f"gradient of {member.name!r}: expected that of the parameter whose gradients selection_steps is "
                    f"adding up, got another's, of shape {tuple(parameter.shape)}; call optimizer.reselect() after a "
                    "change of parameters: the sums then start anew"
                )
        scores = _gradients(mine, ranks)
        accumulating = self.num_sums > 0 or self.steps > 1
        if accumulating and not any_nonzero(scores.values(), ranks):
            if self.num_sums:
                return None  # gradients of zeros are no step
            accumulating = False
        if accumulating:
            if self.num_sums < self.steps:
                self._add_to_sums(by_position, scores, grad_scale)
                self.summed = {m.position: m.parameter for m in members if m.position in self.sums}
            if self.num_sums < self.steps:
                return None
            scores = self.sums
        picked = Picked({}, {})
        for pool in pools:
            candidates = mine = pool.of(members)
            if not pool.is_dense:
                candidates = [member for member in mine if member.parameter.requires_grad]
                found = {m.position: scores[m.position] for m in candidates if m.position in scores}
                if not any_nonzero(found.values(), ranks):
                    continue
                picked.indices.update(self._pick(pool, candidates, found, backend))
            picked.add(pool, mine, candidates)
        return picked

    def _add_to_sums(
        self, members: Mapping[Position, Member], gradients: dict[Position, Tensor], grad_scale: float
    ) -> None:
        mine = [members[position] for position in gradients]
        check_finite([m.name for m in mine], list(gradients.values()), [m.part for m in mine])
        for position, gradient in gradients.items():
            if position not in self.sums:
                self.sums[position] = torch.zeros_like(gradient, dtype=opmath_dtype(gradient.dtype))
        for position, gradient in gradients.items():  # once all memory is there
            self.sums[position].add_(gradient, alpha=1 / grad_scale)
        self.num_sums += 1

    def _pick(
        self, pool: Pool, candidates: Sequence[Member], scores: dict[Position, Tensor], backend: str | None
    ) -> dict[Position, Tensor | None]:
        """The elements of one pool with the largest scores. Candidates without a score have none."""
        k = None
        if pool.scope == "global":
            k = budget(pool.density, pool.k, sum(m.parameter.numel() for m in candidates))
            available = sum(m.parameter.numel() for m in candidates if m.position in scores)
            if k > available:
                raise ValueError(
                    f"selection of {k} elements: expected at least as many with a gradient, got {available}; run "
                    "backward over the whole model before the first step, or freeze what the loss does not reach"
                )
        scored = [member for member in candidates if member.position in scores]
        parts = [member.part for member in scored]
        indices = select_indices(
            [member.name for member in scored],
            [scores[member.position] for member in scored],
            parts,
            pool.density,
            k,
            pool.scope,
            backend,
        )
        counts = whole_counts([index.numel() for index in indices], parts)
        return {
            m.position: None if 0 < n == m.parameter.numel() else index.to(index_dtype(m.local.numel()), copy=True)
            for m, index, n in zip(scored, indices, counts, strict=True)
        }


def _gradients(members: Sequence[Member], ranks: Ranks | None) -> dict[Position, Tensor]:
    """Of those that are trained and have one; of zeros, where only another rank has it."""
    found: dict[Position, Tensor] = {}
    for member in members:
        if member.parameter.requires_grad and (gradient := member.gradient) is not None:
            check_dense(member.name, gradient)
            found[member.position] = gradient.resolve_neg()
    if ranks is None:
        return found
    has_any = ranks.any([member.position in found for member in members])
    for member, has in zip(members, has_any, strict=True):
        if has and member.position not in found:
            found[member.position] = torch.zeros_like(member.local)
    return {member.position: found[member.position] for member in members if member.position in found}
