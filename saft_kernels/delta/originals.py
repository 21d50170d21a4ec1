"""Originals: what the selected elements were before training, k values instead of a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..common.names import listing, plain_names
from ..ops.dtypes import as_bits
from ..optim.members import Member, Position, positions
from ..optim.sparse_adamw import SparseAdamW
from ..selection.parts import gather_whole, local, part_of


class Originals:
    """Remembers the values that an optimizer's selected elements have before they are first updated.

    Make it before the first step, on the base's weights::

        optimizer = SparseAdamW(model.named_parameters(), lr=1e-3, density=1e-3)
        originals = Originals(optimizer)
        ...  # train
        SparseDelta.from_optimizer(optimizer, originals).save("delta.safetensors")

    It reads k values when the optimizer selects, at the first step or now if it has a mask, and those that are new at
    each `reselect()`: elements keep their bits until they are selected. It does not survive a pickle or deepcopy of
    the optimizer, nor the process: a run that goes on from a checkpoint made without a mask needs the base itself.
    Of parameters that are split over ranks, each rank remembers its own.

    Raises:
        ValueError: The optimizer has made steps already.
    """

    def __init__(self, optimizer: SparseAdamW) -> None:
        if any(bool(state["step"] > 0) for state in optimizer.state.values() if "step" in state):
            raise ValueError(
                "`optimizer`: expected one before its first step, got one that has made steps; make Originals first, "
                "or pass the base model to from_optimizer"
            )
        self._known: dict[Position, tuple[Tensor, Tensor]] = {}
        self._record(optimizer.members(split=True))
        optimizer.register_selection_hook(self._record)
        optimizer.register_load_state_dict_post_hook(self._check_loaded)

    @property
    def k(self) -> int:
        """Elements remembered."""
        return sum(index.numel() for index, _ in self._known.values())

    def _record(self, members: Sequence[Member]) -> None:
        """Called when a selection has been made, before anything is updated."""
        for member in members:
            fresh = self._unknown(member)
            if fresh.numel():
                parameter = member.local
                (values,) = ops.gather([parameter], [fresh.to(parameter.device)])
                known = self._known.get(member.position, (fresh[:0], values[:0].cpu()))
                merged, order = torch.cat([known[0], fresh]).sort()
                # as_bits: indexing knows no float8
                both = torch.cat([as_bits(known[1]), as_bits(values.cpu())])
                self._known[member.position] = (merged, both[order].view(parameter.dtype))

    def _unknown(self, member: Member) -> Tensor:
        """Selected elements whose originals are not known: int64, on the CPU."""
        selected = positions(member).cpu().long()
        if member.position in self._known:
            return selected[~torch.isin(selected, self._known[member.position][0], assume_unique=True)]
        return selected

    def _check_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, SparseAdamW)
        unknown = [member.name for member in optimizer.members(split=True) if self._unknown(member).numel()]
        if unknown:
            raise ValueError(
                f"`state_dict`: expected a selection whose originals are known, got other elements of "
                f"{listing(unknown)}; pass the mask of that run to SparseAdamW before the weights are loaded, or use "
                "no Originals and pass the base model to from_optimizer"
            )

    def changes(
        self, optimizer: SparseAdamW, parameters: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Per name: indices of elements that differ now, their originals and their values."""
        self._check_loaded(optimizer)
        indices, originals, values = {}, {}, {}
        for member, (name, parameter) in zip(optimizer.members(split=True), parameters.items(), strict=True):
            if member.position not in self._known:
                continue
            index, before = self._known[member.position]
            (now,) = ops.gather([local(parameter)], [index.to(local(parameter).device)])
            now = now.cpu()
            differs = as_bits(now) != as_bits(before)
            if bool(differs.any()):
                indices[name], originals[name], values[name] = index[differs], before[differs], now[differs]
        return indices, originals, values


def whole_changes(
    parameters: Mapping[str, Tensor],
    indices: Mapping[str, Tensor],
    originals: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What has changed of parameters, from what each rank has found in its part of them; the same on all ranks.

    Args:
        parameters: By name.
        indices: Flat positions in what this rank has, ascending, of those that have any.
        originals: Their values before, on the CPU.
        values: Their values now, on the CPU.
    """
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    columns = [
        [
            some.get(name, nothing if some is indices else nothing.to(parameter.dtype))
            for name, parameter in parameters.items()
        ]
        for some in (indices, originals, values)
    ]
    found = gather_whole([part_of(parameter) for parameter in parameters.values()], *columns)
    some = [{name: v for name, v in zip(parameters, column, strict=True) if v.numel()} for column in found]
    return some[0], some[1], some[2]


def optimizer_parameters(optimizer: SparseAdamW, model: nn.Module | None) -> dict[str, Tensor]:
    """The optimizer's parameters by plain name, in its order."""
    if not isinstance(optimizer, SparseAdamW):
        raise TypeError(
            f"`optimizer`: expected a SparseAdamW, got {type(optimizer).__name__}; for others, SparseDelta.diff("
            "base, model)"
        )
    members = optimizer.members(split=True)
    if model is not None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if strangers := [member.name for member in members if id(member.parameter) not in names]:
            raise ValueError(
                f"`model`: expected the model that the optimizer trains, got one without its {listing(strangers)}; "
                "pass that model"
            )
        named = {names[id(member.parameter)]: member.parameter for member in members}
    else:
        if any("param_names" not in group for group in optimizer.param_groups):
            raise ValueError(
                "`optimizer`: expected parameters with names, got some without; pass `model`, or build it from "
                "model.named_parameters()"
            )
        named = {member.name: member.parameter for member in members}
    return {plain: named[name].detach() for plain, name in plain_names(named).items()}
