"""Several processes: what each of them would select by itself, and what has to be the same on all."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from .all_reduce import checksum
from .members import Member

_WAIT = timedelta(seconds=60)

# how often each set of parameters has been compared: ranks compare equally often
_comparisons: Counter[int] = Counter()


def check_whole(where: str, parameters: Iterable[Tensor], is_dense: bool) -> None:
    """Raises for parameters that are a rank's share: below density 1.0 each rank would spend it on its own.

    Raises:
        TypeError: A DTensor, or a flattened shard of FullyShardedDataParallel.
        ValueError: A ZeroRedundancyOptimizer builds this optimizer.
    """
    parameters = list(parameters)
    for i, parameter in enumerate(parameters):
        if hasattr(parameter, "full_tensor"):
            raise TypeError(
                f"{where}['params'][{i}]: expected a whole parameter, got a DTensor, as of fully_shard; its local "
                "tensor is this rank's share, from which each would select by itself. Use DistributedDataParallel"
            )
    if is_dense:
        return
    for i, parameter in enumerate(parameters):
        if getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "FlatParameter":
            raise TypeError(
                f"{where}['params'][{i}]: expected a whole parameter, got a flattened one of FullyShardedDataParallel; "
                "each rank would select from its shard alone. Use DistributedDataParallel, or density=1.0"
            )
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
    """Raises where DistributedDataParallel has these parameters and another rank has selected others of them.

    Through the ranks' key-value store: a rank that never comes is waited for a minute, then warned of.

    Raises:
        ValueError: On every rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        return
    if all(member.counted is None for member in members) or not (group := _group_of(members)):
        return
    name = checksum(members, with_indices=False)
    prefix = f"saft_kernels/{name}/{_comparisons[name]}"
    _comparisons[name] += 1
    store: Any = distributed.distributed_c10d._get_default_store()
    mine = str(checksum(members)).encode()
    ranks = distributed.get_process_group_ranks(group)
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
            "SparseAdamW under DistributedDataParallel: expected the same selection on all ranks, got different ones, "
            "with which the replicas would drift apart; select on one rank and send the mask with "
            "torch.distributed.broadcast_object_list, or call saft_kernels.integrations.select_into, which averages"
        )


def _group_of(members: Sequence[Member]) -> Any:
    """The process group of a DistributedDataParallel that has any of these parameters; None: there is none."""
    mine = {id(member.parameter) for member in members}
    for found in gc.get_objects():
        is_parallel = issubclass(type(found), DistributedDataParallel)  # isinstance would wake lazy objects
        if is_parallel and any(id(parameter) in mine for parameter in found.parameters()):
            return found.process_group
    return None
