"""Several processes: what each of them would select by itself, and what has to be the same on all."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..selection.parts import check_unflattened, describe, is_distributed
from ..selection.ranks import Ranks
from .all_reduce import checksum
from .budgets import Selection
from .members import Member, ParamGroups

_WAIT = timedelta(seconds=60)

# how often each set of parameters has been compared by the same ranks: these compare equally often
_comparisons: Counter[tuple[int, ...]] = Counter()


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


def compare(members: Sequence[Member]) -> None:
    """Raises where ranks have copies of parameters, and another rank has selected other elements of them.

    Copies are those of DistributedDataParallel, and of DTensors, as HSDP makes them. Through the ranks' key-value
    store: a rank that never comes is waited for a minute, then warned of.

    Raises:
        ValueError: On every rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        return
    if all(member.counted is None for member in members):
        return
    whole = [member for member in members if not is_distributed(member.parameter)]
    if whole and (group := _group_of(whole)):
        _compare(whole, distributed.get_process_group_ranks(group), "under DistributedDataParallel")
    copies: dict[tuple[int, ...], list[Member]] = {}
    for member in members:
        copies.setdefault(_ranks_with_copies(member.parameter), []).append(member)
    for ranks, some in copies.items():
        if len(ranks) > 1:
            _compare(some, ranks, "of parameters with copies")


def _ranks_with_copies(parameter: Tensor) -> tuple[int, ...]:
    """The ranks that have the same part of a DTensor as this one, which is among them; none of another tensor."""
    if not is_distributed(parameter):
        return ()
    shared: Any = parameter
    mesh = shared.device_mesh
    where = zip(mesh.get_coordinate() or (), shared.placements, strict=True)
    places = tuple(slice(None) if placement.is_replicate() else at for at, placement in where)
    return tuple(mesh.mesh[places].flatten().tolist())


def _compare(members: Sequence[Member], ranks: Sequence[int], where: str) -> None:
    what = (checksum(members, with_indices=False), *ranks)
    prefix = f"saft_kernels/{hash(what)}/{_comparisons[what]}"
    _comparisons[what] += 1
    store: Any = distributed.distributed_c10d._get_default_store()
    mine = str(checksum(members)).encode()
    store.set(f"{prefix}/{distributed.get_rank()}", mine)
    keys = [f"{prefix}/{rank}" for rank in ranks]
    try:
        store.wait(keys, _WAIT)
    except Exception as error:  # torch.distributed has no type of its own for a timeout
        logging.getLogger("saft_kernels").warning(
            "SparseAdamW: not all ranks have come to compare what they selected (%s); if some train alone, ignore this",
            error,
        )
        return
    if any(store.get(key) != mine for key in keys):
        raise ValueError(
            f"SparseAdamW {where}: expected the same selection on all ranks, got different ones, "
            "with which the replicas would drift apart; select on one rank and send the mask with "
            "torch.distributed.broadcast_object_list, or call saft_kernels.integrations.select_into, which averages"
        )


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


def refuse_split(ranks: Ranks | None, what: str, remedy: str) -> None:
    """Raises NotImplementedError for what does not work yet with parameters that are split over ranks."""
    if ranks is not None:
        raise NotImplementedError(
            f"{what}: expected whole parameters, got DTensors, split over {ranks.size} ranks, with which it does not "
            f"work yet; {remedy}"
        )


def facts_of(members: Sequence[Member], param_groups: ParamGroups, selection: Selection) -> dict[str, object]:
    """What has to be the same on all ranks before they select together."""
    return {
        **describe((member.name, member.parameter) for member in members),
        "mask": selection.mask or "none",
        "density": selection.density if selection.k is None else None,
        "k": selection.k,
        "scope": selection.scope,
        "selection_steps": (selection.num_sums, selection.steps),
        "groups": [(group["density"], group["k"], group["num_candidates"]) for group in param_groups],
    }


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
