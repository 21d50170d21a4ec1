"""Loading a state into SparseAdamW: what must fit, and what torch.optim.Optimizer.load_state_dict would ruin.

It casts every state tensor but `step` to the parameter's dtype: with bf16 parameters, index 7001 becomes 7008.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.names import short
from ..ops.dtypes import INDEX_DTYPES, index_dtype, opmath_dtype
from ..selection.budget import budget, budget_of
from ..selection.parts import as_distributed, gather_whole, here, is_distributed, local, part_of
from ..selection.ranks import Ranks
from .budgets import Pool, Selection
from .members import Member, ParamGroups, Position, State, count, has_state
from .state import MOMENTS, new_states

_OUR_GROUP_KEYS = ("density", "k", "num_candidates")
_SUMS = ("grad_sum", "num_grads")


class Uncast:
    """Carries a state tensor past the cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def shield(
    state_dict: dict[str, Any], param_groups: ParamGroups, members: Sequence[Member], selection: Selection
) -> dict[str, Any]:
    """A load_state_dict pre-hook: checks the state against the optimizer, and shields its tensors from the cast."""
    groups = state_dict["param_groups"]
    got, expected = ([len(group["params"]) for group in all_groups] for all_groups in (groups, param_groups))
    if got != expected:
        raise ValueError(
            f"`state_dict`: expected {len(expected)} parameter groups of sizes {expected}, got {len(got)} of sizes "
            f"{got}: the state of another model or grouping; nothing was loaded"
        )
    _check_shapes(members, groups)
    ids = [key for group in groups for key in group["params"]]
    by_id = dict(zip(ids, members, strict=True))
    states: dict[Any, Any] = {}
    loaded: dict[Position, dict[str, Any]] = {}
    has_sums = False
    for key, values in state_dict["state"].items():
        states[key] = values
        if key in by_id and values:
            member = by_id[key]
            _check_whole(member, values)
            shape = tuple(member.parameter.shape)
            if "grad_sum" in values and tuple(values["grad_sum"].shape) != shape:
                raise ValueError(
                    f"`state_dict`: grad_sum of {member.name!r}: expected shape {shape}, got "
                    f"{tuple(values['grad_sum'].shape)}: the state of another model; nothing was loaded"
                )
            has_sums |= "grad_sum" in values
            if not values.keys() <= {*_SUMS}:
                _check_state(member, values, groups[member.position[0]].get("amsgrad", False))
                loaded[member.position] = values
            ours = ("step", *MOMENTS, "indices", *_SUMS)
            states[key] = {k: Uncast(_tensor(v)) if k in ours else v for k, v in values.items()}
    if loaded:
        for pool in selection.pools(param_groups):
            _check_pool(pool, pool.of(members), loaded, groups)
    elif any(
        saved.get("num_candidates") is not None and group["num_candidates"] is None
        for saved, group in zip(groups, param_groups, strict=True)
    ):
        raise ValueError(
            "`state_dict`: expected the indices that its param_groups say were selected, got an empty state: one saved "
            "before the first step, or one of torch.distributed.checkpoint, loaded without knowing its sizes; pass the "
            "mask of that run to SparseAdamW, or save without flattening, or save saft_kernels.OptimizerState. Nothing "
            "was loaded"
        )
    new_groups, dense = [], selection.dense_groups(param_groups)
    for i, (saved, group) in enumerate(zip(groups, param_groups, strict=True)):
        # budgets are the optimizer's own; what has been selected goes with the state
        own = {key: group[key] for key in _OUR_GROUP_KEYS}
        if loaded or has_sums:
            numel = sum(p.numel() for p in group["params"])
            own["num_candidates"] = saved.get("num_candidates", numel)
            if i in dense and own["num_candidates"] is not None:
                own["num_candidates"] = numel  # of other ranks, perhaps
        new_groups.append({**saved, **own, "differentiable": group["differentiable"]})
        new_groups[-1].pop("param_shapes", None)
    return {**state_dict, "state": states, "param_groups": new_groups}


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _check_shapes(members: Sequence[Member], groups: list[dict[str, Any]]) -> None:
    """Indices of a smaller model fit into a larger one, and would train a corner of it."""
    for member in members:
        i, j = member.position
        # torch.optim.AdamW does not save them
        shapes = groups[i].get("param_shapes")
        if shapes is not None and tuple(shapes[j]) != tuple(member.parameter.shape):
            raise ValueError(
                f"`state_dict`: {member.name!r}: expected shape {tuple(member.parameter.shape)}, got "
                f"{tuple(shapes[j])}: the state of another model; nothing was loaded"
            )


def _check_whole(member: Member, values: Mapping[str, Any]) -> None:
    """A whole parameter takes whole tensors: to gather others takes all ranks, which need not be here."""
    split = [key for key, value in values.items() if isinstance(value, Tensor) and is_distributed(value)]
    if split and not is_distributed(member.parameter):
        raise ValueError(
            f"`state_dict`: {split[0]} of {member.name!r}: expected a whole tensor, as the parameter is, got a "
            "DTensor; call full_tensor() on all ranks that have a part of it, or save saft_kernels.OptimizerState; "
            "nothing was loaded"
        )


def _check_state(member: Member, values: dict[str, Any], amsgrad: bool) -> None:
    """The state of one parameter is one of ours, or of torch.optim.AdamW, and of the sizes that its indices say."""
    name, parameter = member.name, member.parameter
    needed = ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    if missing := [key for key in needed if key not in values]:
        raise ValueError(
            f"`state_dict`: state of {name!r}: expected {', '.join(needed)}, got {', '.join(map(str, values))} without "
            f"{', '.join(missing)}: the state of another optimizer; nothing was loaded"
        )
    indices = values.get("indices")
    if indices is not None:
        if indices.dtype not in INDEX_DTYPES or indices.dim() != 1:
            raise ValueError(
                f"`state_dict`: indices of {name!r}: expected one-dimensional int32 or int64, got "
                f"{short(indices.dtype)} of shape {tuple(indices.shape)}: a cast has ruined them; nothing was loaded"
            )
        if indices.numel():
            low, high = (int(value) for value in indices.aminmax())
            if low < 0 or high >= parameter.numel() or bool((indices[1:] <= indices[:-1]).any()):
                raise ValueError(
                    f"`state_dict`: indices of {name!r}: expected ascending positions in [0, {parameter.numel()}), got "
                    f"{low} to {high}: the state of another model; nothing was loaded"
                )
    shape = tuple(parameter.shape) if indices is None else tuple(indices.shape)
    for key in MOMENTS:
        if key in values and tuple(values[key].shape) != shape:
            raise ValueError(
                f"`state_dict`: {key} of {name!r}: expected shape {shape}, got {tuple(values[key].shape)}: the state "
                "of another model or density; nothing was loaded"
            )


def _check_pool(
    pool: Pool,
    members: Sequence[Member],
    loaded: dict[Position, dict[str, Any]],
    saved_groups: list[dict[str, Any]],
) -> None:
    """The state has as many elements as the optimizer selects there."""
    found = [member for member in members if member.position in loaded]
    counts = [count(member.parameter, loaded[member.position].get("indices")) for member in found]
    if pool.is_dense or pool.scope != "global":
        for i in () if pool.is_dense else pool.groups:
            covered = sum(member.parameter.numel() for member in found if member.position[0] == i)
            expected = _num_candidates(i, saved_groups[i], members, found)
            if covered < expected:
                raise ValueError(
                    f"`state_dict`: param_groups[{i}]: expected the state of all {expected} elements that were "
                    f"selected from, got that of {covered}: an incomplete state; nothing was loaded"
                )
        for member, got in zip(found, counts, strict=True):
            numel = member.parameter.numel()
            if pool.is_dense:
                _check_count(f"selected elements of {member.name!r}", got, numel, numel)
            elif got:  # else it had no gradient at selection
                expected = budget_of(member.parameter, pool.density, pool.scope)
                _check_count(f"selected elements of {member.name!r}", got, expected, numel)
    elif counts:
        numel = sum(_num_candidates(i, saved_groups[i], members, found) for i in pool.groups)
        # groups added later were rounded apart
        slack = len(pool.groups) - 1 if pool.k is None else 0
        _check_count("selected elements", sum(counts), budget(pool.density, pool.k, numel), numel, slack)


def _num_candidates(i: int, saved_group: dict[str, Any], members: Sequence[Member], found: Sequence[Member]) -> int:
    """Elements that the saved budget of a group was taken of: of what had requires_grad then."""
    if saved_group.get("num_candidates"):  # none where all were selected
        return int(saved_group["num_candidates"])
    if not any(member.position[0] == i for member in found):
        return 0  # was yet to be selected
    return sum(m.parameter.numel() for m in members if m.position[0] == i and m.parameter.requires_grad)


def _check_count(what: str, got: int, expected: int, numel: int, slack: int = 0) -> None:
    if abs(got - expected) > slack:
        raise ValueError(
            f"`state_dict`: {what}: expected {expected} of {numel} ({expected / numel:.4%}), as this optimizer "
            f"selects, got {got} ({got / numel:.4%}); build it with the density, k or mask of the run that saved the "
            "state. Nothing was loaded"
        )


def unshield(
    param_groups: ParamGroups, states: MutableMapping[Tensor, dict[str, Any]]
) -> tuple[dict[Position, Tensor | None], dict[Position, Tensor], int]:
    """Puts loaded values where and into what they should be.

    Returns:
        What was selected, by position; the sums of `selection_steps`, and of how many steps.
    """
    loaded: dict[Position, Tensor | None] = {}
    sums: dict[Position, Tensor] = {}
    num_sums = 0
    for i, group in enumerate(param_groups):
        found: list[tuple[Position, Tensor, dict[str, Any]]] = []
        for j, parameter in enumerate(group["params"]):
            values = states.get(parameter, {})
            if "grad_sum" in values:
                total, number = (values.pop(key).tensor for key in _SUMS)
                total = here(total, parameter)
                sums[i, j] = total.to(parameter.device, opmath_dtype(parameter.dtype), copy=True)
                num_sums = int(number)
                if not values:
                    del states[parameter]
            if any(isinstance(value, Uncast) for value in values.values()):
                found.append(((i, j), parameter, _local_state(parameter, values)))
        indices = [
            values["indices"].tensor.to(dtype=index_dtype(local(parameter).numel()), copy=True)
            if "indices" in values
            else None
            for _, parameter, values in found
        ]
        # masters start from the parameters: a state of torch.optim.AdamW has none
        fresh = new_states([local(parameter) for _, parameter, _ in found], indices, group)
        for (position, parameter, values), state in zip(found, fresh, strict=True):
            state["step"].fill_(float(values["step"].tensor))
            for key in MOMENTS:
                if key in state and key in values:
                    state[key].copy_(values[key].tensor)
            kept = {key: value for key, value in values.items() if not isinstance(value, Uncast)}
            states[parameter] = {**state, **kept}
            loaded[position] = state.get("indices")
    return loaded, sums, num_sums


# ---- parameters that are split over ranks ----


def whole_states(
    ranks: Ranks, members: Sequence[Member], states: Mapping[Tensor, State], param_groups: ParamGroups
) -> dict[int, State]:
    """By the number of the member, the state of the whole parameter, of those that are split. All ranks call it."""
    parts = [member.part for member in members]
    has_any = ranks.any([has_state(states.get(member.parameter)) for member in members])
    found: dict[int, State] = {}
    for row, member in enumerate(members):
        if parts[row] is not None and has_any[row]:
            mine = states.get(member.parameter)
            if not has_state(mine):  # no gradient here so far
                (mine,) = new_states([member.local], [member.index], param_groups[member.position[0]])
            found[row] = dict(mine)
    for state, step in zip(found.values(), steps_of(ranks, list(found.values())), strict=True):
        state["step"] = torch.full_like(state["step"], step)
    sparse = [row for row, state in found.items() if "indices" in state]
    for row in found.keys() - {*sparse}:
        for key in found[row].keys() & {*MOMENTS}:
            found[row][key] = as_distributed(found[row][key], members[row].parameter)
    some = [parts[row] for row in sparse]
    indices = [found[row]["indices"] for row in sparse]
    keys = [key for key in MOMENTS if any(key in found[row] for row in sparse)]
    columns = [
        [
            found[row][key].flatten() if key in found[row] else torch.zeros_like(index, dtype=torch.uint8)
            for row, index in zip(sparse, indices, strict=True)
        ]
        for key in keys
    ]
    whole, *gathered = gather_whole(some, indices, *columns)
    for at, row in enumerate(sparse):
        found[row]["indices"] = whole[at].to(index_dtype(members[row].parameter.numel()))
        for key, column in zip(keys, gathered, strict=True):
            if key in found[row]:
                found[row][key] = column[at]
    return found


def steps_of(ranks: Ranks, states: Sequence[State | None]) -> list[float]:
    """How many steps each parameter has made. A rank where nothing of it is selected has not counted."""
    steps = [0.0 if state is None or "step" not in state else float(state["step"]) for state in states]
    found: list[float] = ranks.max(torch.tensor(steps, dtype=torch.float32, device="cpu")).tolist()
    return found


def _local_state(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """What this rank has of a loaded state, of tensors in `Uncast`."""
    part = part_of(parameter)
    if part is None and ("indices" in values or not is_distributed(parameter)):
        return values
    values, which = dict(values), None
    if "indices" in values and part is not None:
        index, which = part.to_local(values["indices"].tensor)
        values["indices"] = Uncast(index)
    for key in values.keys() & {*MOMENTS}:
        value = values[key].tensor
        values[key] = Uncast(here(value, parameter) if which is None else value[which])
    return values
