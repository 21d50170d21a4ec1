"""Several processes: what each of them would select by itself, and what has to be the same on all."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..common.names import short
from ..selection.parts import check_unflattened, describe, is_distributed, ranks_along
from ..selection.ranks import Ranks
from .budgets import Selection
from .members import Member, ParamGroups, State, has_state

_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")

_REMEDY = (
    "load the same checkpoint on all; select on one rank and send the mask with "
    "torch.distributed.broadcast_object_list, or call saft_kernels.integrations.select_into, which averages"
)


def check_whole(where: str, parameters: Iterable[Tensor], is_dense: bool) -> None:
    """Raises for parameters that are a rank's share unknowingly: below density 1.0 each would spend it on its own.

    Raises:
        TypeError: A flattened shard of FullyShardedDataParallel.
        ValueError: A ZeroRedundancyOptimizer builds this optimizer.
    """
    if is_dense:
        return
    for i, parameter in enumerate(parameters):
        check_unflattened(f"{where}['params'][{i}]", parameter, "use fully_shard, or density=1.0")
    frame: Any = sys._getframe()
    while frame is not None:
        caller = type(frame.f_locals.get("self"))
        if caller.__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                "SparseAdamW in a ZeroRedundancyOptimizer: expected all parameters on every rank, got this rank's "
                "share, from which it would select by itself; use SparseAdamW without it (its state is that of the "
                "selected elements alone), or density=1.0"
            )
        frame = frame.f_back


def compare(members: Sequence[Member], param_groups: ParamGroups, states: Mapping[Tensor, State]) -> None:
    """Raises where ranks have copies of parameters, and another rank would train them otherwise.

    Copies are those of DistributedDataParallel, and of DTensors, as HSDP makes them. What is selected, the number of
    steps and the hyperparameters have to be the same. See `Ranks.compare`.

    Raises:
        ValueError: On every rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        return
    whole = [member for member in members if not is_distributed(member.parameter)]
    copies: dict[tuple[int, ...], list[Member]] = {}
    if whole and (group := _group_of(whole)):
        copies[tuple(distributed.get_process_group_ranks(group))] = whole
    where = "under DistributedDataParallel" if copies else "of parameters with copies"
    for member in members:
        if is_distributed(member.parameter):
            copies.setdefault(_ranks_with_copies(member.parameter), []).append(member)
    groups = [
        f"group {i}: {', '.join(f'{key}={_plain(group[key])}' for key in _HYPERPARAMETERS)}"
        for i, group in enumerate(param_groups)
    ]
    for ranks, some in copies.items():
        if len(ranks) > 1:
            facts = [f"{m.name!r}, {_described(m)}: {_trained(m, states.get(m.parameter))}" for m in some]
            of = "\n".join(f"{m.name!r}, {_described(m)}" for m in some)
            Ranks(ranks).compare(f"SparseAdamW {where}", of, facts + groups, _REMEDY)


def _ranks_with_copies(parameter: Any) -> tuple[int, ...]:
    """The ranks that have the same part of a DTensor as this one, which is among them."""
    copied = tuple(i for i, placement in enumerate(parameter.placements) if placement.is_replicate())
    return ranks_along(parameter.device_mesh, copied)


def _described(member: Member) -> str:
    return f"{short(member.parameter.dtype)} {tuple(member.parameter.shape)}"


def _trained(member: Member, state: State | None) -> str:
    """What is selected of a member here, and how often it was stepped with."""
    if member.is_pending:
        return "nothing selected yet"
    index = member.index
    steps = int(state["step"]) if has_state(state) and "step" in state and (index is None or index.numel()) else 0
    return selection_and_steps(index, steps)


def selection_and_steps(index: Tensor | None, steps: int) -> str:
    """For comparisons: a text that is the same for the same elements."""
    what = "all elements"
    if index is not None:
        digest = hashlib.blake2b(index.cpu().long().numpy().tobytes(), digest_size=8).hexdigest()
        what = f"{index.numel()} elements with digest {digest}"
    return f"{what} selected, {steps} steps made"


def _plain(value: Any) -> object:
    """A number, where it is a tensor of one."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value


# ---- parameters that are split over ranks, as by fully_shard ----


def check_split(where: str, parameters: Sequence[Tensor]) -> None:
    """Raises for parameters that fully_shard has made whole for a while: they never get a gradient.

    Raises:
        ValueError: The optimizer is built after a forward pass without backward.
    """
    places = {id(parameter): i for i, parameter in enumerate(parameters) if not is_distributed(parameter)}
    if not places or "torch.distributed.fsdp" not in sys.modules or not distributed.is_initialized():
        return
    for found in gc.get_objects():
        if type(found).__name__ == "FSDPParam" and (key := id(getattr(found, "_unsharded_param", None))) in places:
            raise ValueError(
                f"{where}['params'][{places[key]}]: expected the DTensor of fully_shard, got the whole parameter that "
                "it has gathered for a forward pass, and that gets no gradient; build the optimizer before the first "
                "one, or call reshard() on each FSDPModule of the model"
            )


def refuse_split(param_groups: ParamGroups, what: str, remedy: str) -> None:
    """Raises NotImplementedError for what does not work yet with parameters that are split over ranks."""
    for i, group in enumerate(param_groups):
        for j, parameter in enumerate(group["params"]):
            if is_distributed(parameter):
                raise NotImplementedError(
                    f"{what}: expected whole parameters, got DTensors, param_groups[{i}]['params'][{j}] among them, "
                    f"with which it does not work yet; {remedy}"
                )


def check_same(
    ranks: Ranks, members: Sequence[Member], param_groups: ParamGroups, selection: Selection, loaded: Sequence[str]
) -> None:
    """Raises ValueError on all ranks for what differs, and has to be the same before they step together.

    Args:
        ranks: All come here.
        members: Of the optimizer.
        param_groups: Of the optimizer.
        selection: Of the optimizer.
        loaded: Of `loaded_facts`, since the ranks last came here.
    """
    facts = {
        **describe((member.name, member.parameter) for member in members),
        "mask": selection.mask or "none",
        "density": selection.density if selection.k is None else None,
        "k": selection.k,
        "scope": selection.scope,
        "selection_steps": (selection.num_sums, selection.steps),
        "groups": [(group["density"], group["k"], group["num_candidates"]) for group in param_groups],
        "hyperparameters": [{key: _plain(group[key]) for key in _HYPERPARAMETERS} for group in param_groups],
        "a state loaded:": bool(loaded),
    }
    ranks.check_same("SparseAdamW", facts)
    if loaded:
        states = {f"state of {m.name!r}:": text for m, text in zip(members, loaded, strict=True)}
        ranks.check_same("SparseAdamW", states)


def loaded_facts(members: Sequence[Member], state_dict: Mapping[str, Any]) -> list[str]:
    """Of each parameter, what is selected of the whole of it in a state that is loaded."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    found = []
    for member, key in zip(members, keys, strict=True):
        state = state_dict["state"].get(key, {})
        text = selection_and_steps(state.get("indices"), int(state["step"])) if has_state(state) else "none"
        found.append(f"{_described(member)} {text}")
    return found


def norm_over(ranks: Ranks, values: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """The norm of the values of all ranks, in fp32, on every rank; as torch.nn.utils.get_total_norm."""
    mine = nn.utils.get_total_norm(values, norm_type).double()  # of one dtype, where a rank has no values, too
    norms = torch.cat(ranks.gather(mine.reshape(1)))
    return nn.utils.get_total_norm([norms], norm_type, error_if_nonfinite).float()


def _group_of(members: Sequence[Member]) -> Any:
    """The process group of a DistributedDataParallel that has any of these parameters; None: there is none."""
    mine = {id(member.parameter) for member in members}
    for found in gc.get_objects():
        is_parallel = issubclass(type(found), DistributedDataParallel)  # isinstance would wake lazy objects
        if is_parallel and any(id(parameter) in mine for parameter in found.parameters()):
            return found.process_group
    return None
