"""Gradients averaged over processes: of each parameter, what is selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from .. import ops
from ..ops.dtypes import opmath_dtype
from ..selection.gradients import check_dense
from .members import Member
from .release import GradientBuffer, selected_values
from .selected_grad import SelectedGrad, of_another_selection

_ENDLESS = 1 << 62
"""Above all counts."""


@dataclass
class Agreement:
    """What the ranks last compared, and whether any of them has seen a gradient that is not zero.

    Without versions, as after a load, they also compare how many steps were made.
    """

    versions: list[int] = field(default_factory=list)
    checksum: int = 0
    saw_nonzero: bool = False


def all_reduce_grads(
    members: Sequence[Member],
    buffer: GradientBuffer | None,
    agreement: Agreement,
    has_nonzero: bool,
    steps: int,
    group: Any,
) -> None:
    """See `SparseAdamW.all_reduce_grads`.

    Args:
        members: All.
        buffer: Of released gradients.
        agreement: Is mutated.
        has_nonzero: This rank has a first gradient.
        steps: It has made.
        group: Of torch.distributed.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "all_reduce_grads(): expected an initialized torch.distributed, got none; call "
            "torch.distributed.init_process_group(), and start the script with torchrun"
        )
    ranks = distributed.get_world_size(group)
    if ranks < 0:  # torch's all_reduce only warns, and returns what it was given
        raise ValueError(
            f"`group`: expected a process group of this rank, got one without rank {distributed.get_rank()}; pass its "
            "own group, or do not call it there"
        )
    for member in members:
        _check(member)
    kinds: dict[tuple[torch.device, torch.dtype], list[Member]] = {}
    for member, has_gradient in zip(members, _agree(members, agreement, has_nonzero, steps, group), strict=True):
        p, index = member.parameter, member.counted
        if index is not None and not index.numel():
            p.grad = None  # as under release_grads: it would count in norms, and each rank has another
        elif has_gradient and index is None:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad.detach()
            average = gradient.resolve_neg().contiguous().div_(ranks)
            distributed.all_reduce(average, group=group)
            # in the parameter's memory order; an expanded gradient has no memory to write to
            p.grad = gradient if average is gradient else torch.empty_like(p).copy_(average)
        elif has_gradient:
            kinds.setdefault((p.device, opmath_dtype(p.dtype)), []).append(member)
    for (device, dtype), alike in kinds.items():
        values = [selected_values(member, buffer).to(device, dtype) for member in alike]
        flat = torch.cat(values).div_(ranks)
        distributed.all_reduce(flat, group=group)
        for member, average in zip(alike, flat.split([v.numel() for v in values]), strict=True):
            _write(member, buffer, average)


def _check(member: Member) -> None:
    """Raises for a gradient that cannot be sent, before anything is."""
    gradient = member.parameter.grad
    if gradient is not None:
        check_dense(member.name, gradient)
    if type(gradient) is SelectedGrad and not (member.counted is not None and gradient.selected.is_of(member)):
        raise of_another_selection(member.name)


def _agree(members: Sequence[Member], agreement: Agreement, has_nonzero: bool, steps: int, group: Any) -> list[bool]:
    """Whether each member has a gradient on any rank."""
    versions = [member.version for member in members]
    mine = agreement.checksum if versions == agreement.versions else _checksum(members)
    # of a rank that has nothing new: no number, the least in any maximum
    most_steps, least_steps = (-1, -_ENDLESS) if agreement.versions else (steps, -steps)
    has_gradient = [member.parameter.grad is not None for member in members]
    # the maximum of x and of -x is one number and its negative where all have the same
    numbers = [*has_gradient, has_nonzero, most_steps, least_steps, mine, -mine]
    shared = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(members[0].parameter.device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX, group)
    *found, any_nonzero_gradient, most_steps, least_steps, most, least = shared.tolist()
    if most_steps > -least_steps:
        raise ValueError(
            f"all_reduce_grads(): expected the same number of steps made on all ranks, got {-least_steps} to "
            f"{most_steps}; load the same checkpoint on all of them"
        )
    if most != -least:
        raise ValueError(
            "all_reduce_grads(): expected the same selection on all ranks, got different ones; select on one, send "
            "the mask with torch.distributed.broadcast_object_list, and pass it to SparseAdamW"
        )
    agreement.versions, agreement.checksum = versions, mine
    agreement.saw_nonzero |= bool(any_nonzero_gradient)
    return [bool(has) for has in found]


def _checksum(members: Sequence[Member]) -> int:
    """A number below 2^62 of names, sizes and dtypes; and of indices."""
    value = 0
    for member in members:
        index = member.counted
        parts = [*f"{member.name} {member.parameter.dtype}".encode(), member.parameter.numel(), index is None]
        if index is not None and index.numel():
            index = index.long()
            weights = torch.arange(1, index.numel() + 1, device=index.device)
            parts += [index.numel(), int((index * weights).sum()), int((index ^ (index * 0x9E3779B1)).sum())]
        for part in parts:
            value = (value * 1_000_003 + part) % ((1 << 61) - 1)
    return value


def _write(member: Member, buffer: GradientBuffer | None, values: Tensor) -> None:
    parameter, index = member.parameter, member.counted
    assert index is not None
    if buffer is not None and parameter in buffer:
        parameter.grad = None  # a dense one, too: rounded to 16 bits it would not be what other ranks have
        buffer.add(parameter, values)
        return
    gradient = parameter.grad
    if gradient is None or 0 in gradient.stride():  # an expanded one has no memory to write to
        gradient = parameter.grad = torch.empty_like(parameter)
    # zero elsewhere, as a SelectedGrad is: norms and inf checks of the whole would differ from rank to rank
    gradient.detach().zero_()
    ops.scatter_([gradient.detach()], [index.to(gradient.device)], [values.to(gradient.dtype)])
