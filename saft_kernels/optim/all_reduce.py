"""Gradients averaged over processes: of each parameter, what is selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ..ops.dtypes import opmath_dtype
from ..selection.gradients import check_dense
from .budgets import places
from .release import SelectedGrad, of_another_selection, selected_values
from .state import same_index

if TYPE_CHECKING:
    from .sparse_adamw import SparseAdamW


@dataclass(frozen=True)
class _Member:
    name: str
    parameter: Tensor
    index: Tensor | None  # None: the whole gradient counts


def all_reduce_grads(optimizer: SparseAdamW, group: Any) -> None:
    """See `SparseAdamW.all_reduce_grads`."""
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
    members = _members(optimizer)
    kinds: dict[tuple[torch.device, torch.dtype], list[_Member]] = {}
    for member, has_gradient in zip(members, _agree(optimizer, members, group), strict=True):
        p = member.parameter
        if member.index is not None and not member.index.numel():
            p.grad = None  # as under release_grads: it would count in norms, and each rank has another
        elif has_gradient and member.index is None:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad.detach()
            average = gradient.resolve_neg().contiguous().div_(ranks)
            distributed.all_reduce(average, group=group)
            # in the parameter's memory order; an expanded gradient has no memory to write to
            p.grad = gradient if average is gradient else torch.empty_like(p).copy_(average)
        elif has_gradient:
            kinds.setdefault((p.device, opmath_dtype(p.dtype)), []).append(member)
    for (device, dtype), alike in kinds.items():
        values = [selected_values(m.parameter, m.index, optimizer._released).to(device, dtype) for m in alike]
        flat = torch.cat(values).div_(ranks)
        distributed.all_reduce(flat, group=group)
        for member, average in zip(alike, flat.split([v.numel() for v in values]), strict=True):
            _write(optimizer, member, average)


def _members(optimizer: SparseAdamW) -> list[_Member]:
    """In an order that is the same on all ranks. Raises before anything is sent."""
    members = []
    for position, name, parameter in places(optimizer.param_groups):
        index = optimizer._counted(position, parameter)
        gradient = parameter.grad
        if gradient is not None:
            check_dense(name, gradient)
        if type(gradient) is SelectedGrad and (index is None or not same_index(gradient.selected.index, index)):
            raise of_another_selection(name)
        members.append(_Member(name, parameter, index))
    return members


def _agree(optimizer: SparseAdamW, members: Sequence[_Member], group: Any) -> list[bool]:
    """Which members have a gradient on any rank; whether any gradient is not zero goes to the optimizer."""
    indices = [member.index for member in members]
    checked, checksum = optimizer._checked
    if len(indices) != len(checked) or any(a is not b for a, b in zip(indices, checked, strict=True)):
        checksum = _checksum(members)
        optimizer._checked = indices, checksum
    nonzero = not any(optimizer.state.values()) and optimizer._has_gradients()
    has_gradient = [member.parameter.grad is not None for member in members]
    # the maximum of x and of -x is one number and its negative where all have the same
    mine = torch.tensor([*has_gradient, nonzero, checksum, -checksum], dtype=torch.int64)
    shared = mine.to(members[0].parameter.device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX, group)
    *found, any_nonzero_gradient, most, least = shared.tolist()
    if most != -least:
        raise ValueError(
            "all_reduce_grads(): expected the same selection on all ranks, got different ones; select on one, send "
            "the mask with torch.distributed.broadcast_object_list, and pass it to SparseAdamW"
        )
    optimizer._saw_nonzero |= bool(any_nonzero_gradient)
    return [bool(has) for has in found]


def _checksum(members: Sequence[_Member]) -> int:
    """Of names, sizes, dtypes and indices; below 2^62."""
    value = 0
    for member in members:
        parts = [*f"{member.name} {member.parameter.dtype}".encode(), member.parameter.numel(), member.index is None]
        if member.index is not None and member.index.numel():
            index = member.index.long()
            weights = torch.arange(1, index.numel() + 1, device=index.device)
            parts += [index.numel(), int((index * weights).sum()), int((index ^ (index * 0x9E3779B1)).sum())]
        for part in parts:
            value = (value * 1_000_003 + part) % ((1 << 61) - 1)
    return value


def _write(optimizer: SparseAdamW, member: _Member, values: Tensor) -> None:
    parameter, released = member.parameter, optimizer._released
    assert member.index is not None
    if released is not None and parameter in released:
        parameter.grad = None  # a dense one, too: rounded to 16 bits it would not be what other ranks have
        released.add(parameter, values)
        return
    gradient = parameter.grad
    if gradient is None or 0 in gradient.stride():  # an expanded one has no memory to write to
        gradient = parameter.grad = torch.empty_like(parameter)
    # zero elsewhere, as a SelectedGrad is: norms and inf checks of the whole would differ from rank to rank
    index = member.index.to(gradient.device, torch.int64)
    gradient.detach().zero_().put_(index, values.to(gradient.dtype))
