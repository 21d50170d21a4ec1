"""What is selected of each parameter of an optimizer: one record per parameter, and the one reader of its sources."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..common.log import say
from ..common.memory import has_memory
from ..mask import MaskSummary, SummaryRow
from ..ops.dtypes import index_dtype
from ..selection.parts import Part, local, local_gradient, part_of, whole_counts

State = dict[str, Tensor]

ParamGroups = Sequence[dict[str, Any]]

Position = tuple[int, int]
"""Of a parameter: its group, and its place in it. Frameworks swap parameter objects; positions stay."""

STATE_KEYS = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "indices"})
"""What a parameter's state is made of; code outside may keep more in it."""

NOTHING = torch.empty(0, dtype=torch.int32, device="cpu")


class Stage(enum.Enum):
    """How far a parameter has come.

    - ``PENDING``: its budget is yet to be spent. All of its gradient counts, and no step updates it.
    - ``SUMMING``: `selection_steps` adds up its gradients; the last of them spends the budget. Else as PENDING.
    - ``SELECTED``: what is trained of it is known. No plan has it, because it has had no gradient so far, nothing of it
      is selected, or something has changed since.
    - ``PREPARED``: a plan keeps where it and its state lie, and compares that in every step.

    add_param_group() and reselect() lead to PENDING, a mask, a selection and load_state_dict() to SELECTED, and the
    first step after one to PREPARED.
    """

    PENDING = enum.auto()
    SUMMING = enum.auto()
    SELECTED = enum.auto()
    PREPARED = enum.auto()


@dataclass(slots=True, eq=False)
class Member:
    """What is selected of one parameter, and where it stands; `Members.follow` keeps it true.

    A parameter may be split over ranks, as by `fully_shard`: `local` and `gradient` are what this rank has of it and of
    its gradient, `index` and `count` are of that, `part` says where it lies in the whole.

    Attributes:
        position: Its group, and its place in it.
        name: From `named_parameters()`, or "param.<number>".
        parameter: The tensor that stands there now.
        index: (k_p,) int32 or int64: flat positions of the selected elements, ascending; None: all are, of the whole.
            Until a first selection, none; while another one is pending, those of the last.
        is_known: Whether there has been a selection.
        stage: See `Stage`.
        version: Rises whenever `index` or whether it counts changes: what was made for an older one is stale.
        is_moved: The parameter has been split otherwise since, or is whole, and `index` is of what was here before.
    """

    position: Position
    name: str
    parameter: Tensor
    index: Tensor | None = field(default_factory=lambda: NOTHING)
    is_known: bool = False
    stage: Stage = Stage.PENDING
    version: int = 0
    _owner: Tensor | None = None  # the tensor whose state was seen last, since the selection
    _is_orphan: bool = False  # that state is gone, and the parameter is another
    _shape: tuple[int, ...] = ()  # of what was selected from
    is_moved: bool = False

    @property
    def is_stranger(self) -> bool:
        """Whether another parameter was selected from here, of which this one is no new object.

        Frameworks swap objects, and leave the state where it is. Who clears the state means another parameter.
        """
        if self.is_pending or self._owner is self.parameter or (self.index is None and not self._is_orphan):
            return False
        return not self.is_known or self._is_orphan or (self.count > 0 and self._shape != self.parameter.shape)

    @property
    def is_pending(self) -> bool:
        """Whether its budget is yet to be spent."""
        return self.stage in (Stage.PENDING, Stage.SUMMING)

    @property
    def counted(self) -> Tensor | None:
        """Which elements of a gradient count: `index`, and all of them, None, while selection is pending."""
        return None if self.is_pending else self.index

    @property
    def count(self) -> int:
        """Selected elements."""
        return count(self.local, self.index)

    @property
    def local(self) -> Tensor:
        """What this rank has of the parameter: all of it, itself, but for a DTensor."""
        return local(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """What this rank has of the gradient, laid out as `local`."""
        return local_gradient(self.parameter)

    @property
    def part(self) -> Part | None:
        """Where `local` lies in the whole; None: it is the whole."""
        return part_of(self.parameter)


class Members:
    """The records of all parameters of one optimizer. A parameter has one as long as it is the optimizer's."""

    def __init__(self) -> None:
        self._records: dict[Position, Member] = {}

    @property
    def is_known(self) -> bool:
        """Whether there has been any selection."""
        return any(record.is_known for record in self._records.values())

    def follow(
        self,
        param_groups: ParamGroups,
        states: Mapping[Tensor, State],
        *,
        dense_groups: Collection[int],
        summed: Collection[Position],
        prepared: Collection[Position],
    ) -> list[Member]:
        """The records as things are now, in order: the only place that reads what says which elements are selected.

        In this order of precedence: a group without "num_candidates" is pending, whatever was selected before; a
        parameter's state holds its "indices", none for all, once there is a state (load_state_dict, other processes
        and other libraries write it); else it is what the last selection said, which the record keeps. A parameter
        that was moved takes its record along; another object in its place inherits the record.

        Args:
            param_groups: The optimizer's.
            states: The optimizer's.
            dense_groups: Groups under a budget of all elements.
            summed: Whose gradients `selection_steps` is adding up.
            prepared: Whom the present plans have.
        """
        places = list(_places(param_groups))
        before, records = self._records, {}
        by_tensor = {id(record.parameter): record for record in before.values()}
        stayed = {id(tensor) for _, _, tensor in places} & by_tensor.keys()
        for position, name, tensor in places:
            record = before.get(position)
            if record is None or record.parameter is not tensor:  # one that stands there twice has two
                record = by_tensor.get(id(tensor)) or record
            if record is None or (record.parameter is not tensor and id(record.parameter) in stayed):
                record = Member(position, name, tensor)
            records[position] = record
            was_pending, index = record.is_pending, record.index
            if index is not None and _is_split_of(tensor, record.parameter):
                record.index = local_index(tensor, index)
            elif tensor is not record.parameter and _split(tensor) != _split(record.parameter):
                record.is_moved = index is not None and record.is_known
            record.position, record.name, record.parameter = position, name, tensor
            if param_groups[position[0]]["num_candidates"] is None:
                record.stage = Stage.SUMMING if position in summed else Stage.PENDING
            else:
                record.stage = Stage.PREPARED if position in prepared else Stage.SELECTED
            state = states.get(tensor)
            if has_state(state):
                record.index, record.is_known, record.is_moved = state.get("indices"), True, False
                record._owner, record._shape = tensor, tuple(tensor.shape)
            elif position[0] in dense_groups and not record.is_pending:
                record.index, record.is_known, record._owner = None, True, None
            owner = record._owner
            record._is_orphan = owner is not None and owner is not tensor and not has_state(states.get(owner))
            if record.is_pending != was_pending or not same_index(record.index, index):
                record.version += 1
        self._records = records  # at once: an interrupt before finds the old ones
        return list(records.values())

    def select(self, picked: Mapping[Position, Tensor | None]) -> None:
        """Makes the indices of some parameters what is selected of them; None: all of them."""
        for position, index in picked.items():
            record = self._records[position]
            record.version += not same_index(record.index, index)
            record.index, record.is_known, record._owner, record.is_moved = index, True, None, False
            record._shape = tuple(record.parameter.shape)

    def forget(self, group: int) -> None:
        """Drops what is known of one group: it is another one now."""
        self._records = {position: record for position, record in self._records.items() if position[0] != group}


def check_members(members: Iterable[Member]) -> None:
    """Raises ValueError for a parameter of which nothing says what to train: another's place, or other shards."""
    for member in members:
        i, j = member.position
        if member.is_moved and not member.is_pending:
            split = _split(member.parameter)
            raise ValueError(
                f"param_groups[{i}]['params'][{j}], {member.name!r}: expected it to be split over ranks as when it was "
                f"selected from, got one that is {'whole' if split is None else f'split as {split[1]}'}; take "
                "optimizer.state_dict() on all ranks before such a change, and load it after"
            )
        if member.is_stranger:
            raise ValueError(
                f"param_groups[{i}]['params'][{j}], {member.name!r}: expected the parameter that was selected from, or "
                f"one that has its state, got another, of shape {tuple(member.parameter.shape)}, without state; call "
                "optimizer.reselect() after a change of parameters: the next step() then selects from them"
            )


def log_selected(members: Sequence[Member]) -> None:
    """Says to the logger "saft_kernels", at INFO, how many elements are selected, and in which tensors most are."""
    counts = whole_counts([0 if m.is_pending else m.count for m in members], [m.part for m in members])
    rows = [
        SummaryRow(m.name, tuple(m.parameter.shape), m.parameter.numel(), n)
        for m, n in zip(members, counts, strict=True)
    ]
    say(f"SparseAdamW: {MaskSummary(tuple(rows)).headline}")


def _places(param_groups: ParamGroups) -> Iterator[tuple[Position, str, Tensor]]:
    """Position, name and tensor of all parameters; names by position where they have none."""
    number = 0
    for i, group in enumerate(param_groups):
        names = group.get("param_names") or [f"param.{number + j}" for j in range(len(group["params"]))]
        for j, (name, parameter) in enumerate(zip(names, group["params"], strict=True)):
            yield (i, j), name, parameter
        number += len(group["params"])


def _split(tensor: Any) -> tuple[Any, Any] | None:
    """Over whom a parameter is split, and how; None: it is whole."""
    return None if part_of(tensor) is None else (tensor.device_mesh, tensor.placements)


def _is_split_of(tensor: Tensor, before: Tensor) -> bool:
    """Whether a parameter has been split over ranks since, as accelerate does with those of an optimizer."""
    is_new = tensor is not before and tensor.shape == before.shape
    return is_new and part_of(tensor) is not None and part_of(before) is None


def has_state(state: State | None) -> TypeGuard[State]:
    """Whether a parameter has a state of AdamW, or part of one."""
    return state is not None and not STATE_KEYS.isdisjoint(state)


# ---- indices ----


def check_range(member: Member) -> None:
    """Raises ValueError for an index that is no position in the parameter. Waits for the device."""
    index, numel = member.index, member.local.numel()
    if index is not None and index.numel() and has_memory(index) and not index.is_meta:
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= numel:
            raise ValueError(
                f"state of {member.name!r}: expected indices below {numel}, its number of elements, got "
                f"{low if low < 0 else high}; if the parameter's shape has changed, build another optimizer; if "
                "something has edited the indices, load the state anew"
            )


def count(parameter: Tensor, index: Tensor | None) -> int:
    """Selected elements; an index of None selects all."""
    return parameter.numel() if index is None else index.numel()


def or_whole(parameter: Tensor, index: Tensor) -> Tensor | None:
    """None for the index of all elements."""
    return None if 0 < index.numel() == parameter.numel() else index


def positions(member: Member) -> Tensor:
    """Flat positions in `local` of what is selected."""
    if member.index is not None:
        return member.index
    numel = member.local.numel()
    return torch.arange(numel, dtype=index_dtype(numel), device=member.local.device)


def local_index(parameter: Tensor, index: Tensor) -> Tensor | None:
    """Of flat positions in the whole parameter, those that this rank has: in `local`; None: all of the whole are."""
    if or_whole(parameter, index) is None or (part := part_of(parameter)) is None:
        return or_whole(parameter, index)
    return part.to_local(index)[0].to(index_dtype(local(parameter).numel()))


def same_index(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both select the same elements, on whatever device that has memory."""
    if a is None or b is None or a is b or a.is_meta or b.is_meta:
        return a is b
    return a.numel() == b.numel() and bool((a.to(b.device) == b).all())
