"""What a rank has of a model that is split over several: of a DTensor, as of `fully_shard`, a range of one dimension.

An index is local, a flat position in what this rank has, or whole: a flat position in the tensor as one process has it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..common.names import short
from .ranks import Ranks, integers


@dataclass(frozen=True, slots=True)
class Part:
    """Which elements of a whole tensor this rank has: seen as (outer, size, inner), those of [start, stop) of `size`.

    Attributes:
        ranks: Who have the rest.
        dim: The dimension that is split.
    """

    ranks: Ranks
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what this rank has."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Of the whole."""
        return math.prod(self.shape)

    @property
    def _inner(self) -> int:
        return math.prod(self.shape[self.dim + 1 :])

    def to_whole(self, index: Tensor) -> Tensor:
        """int64 whole positions of local ones; ascending, if they are."""
        run = (self.stop - self.start) * self._inner  # what lies together, here
        index = index.long()
        if not run:
            return index
        outer = index.div(run, rounding_mode="floor")
        return index + outer * (self.shape[self.dim] * self._inner - run) + self.start * self._inner

    def to_local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """int64 local positions of those whole ones that lie here, ascending, if they are; and which of them do."""
        whole_run, run = self.shape[self.dim] * self._inner, (self.stop - self.start) * self._inner
        index = index.long()
        outer = index.div(max(1, whole_run), rounding_mode="floor")
        rest = index - outer * whole_run - self.start * self._inner
        is_here = (rest >= 0) & (rest < run)
        return (outer * run + rest)[is_here], is_here


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: of a DTensor its memory, the same object in every call; else itself."""
    return getattr(tensor, "_local_tensor", tensor)


def local_gradient(parameter: Tensor) -> Tensor | None:
    """What this rank has of `parameter.grad`, laid out as `local(parameter)`."""
    gradient = parameter.grad
    return gradient if gradient is None or not is_distributed(gradient) else _laid_out(gradient, parameter)


def _laid_out(tensor: Any, parameter: Any) -> Tensor:
    """What this rank has of a DTensor that is laid out as a parameter."""
    with torch.no_grad():
        if tensor.placements != parameter.placements:  # partial sums, as of a norm under sequence parallelism
            tensor = tensor.redistribute(parameter.device_mesh, parameter.placements)
        found = tensor.to_local()
    return found.wait() if hasattr(found, "wait") else found  # type: ignore[no-any-return]


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "_local_tensor")


def reshard(model: nn.Module) -> None:
    """Splits what fully_shard has gathered for a forward pass without backward, so that its parameters are DTensors."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # else nobody has called it
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def check_unflattened(where: str, parameter: Tensor, remedy: str) -> None:
    """Raises TypeError for a parameter that is a rank's share without saying which."""
    if getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "FlatParameter":
        raise TypeError(
            f"{where}: expected a whole parameter, got a flattened one of FullyShardedDataParallel; each rank would "
            f"select from its shard alone; {remedy}"
        )


def part_of(tensor: Tensor) -> Part | None:
    """Which part of a DTensor this rank has; None: all of it, as of a tensor of one process. See `check_parts`."""
    placements = getattr(tensor, "placements", ())
    found = [i for i, placement in enumerate(placements) if placement.is_shard()]
    if not found:
        return None
    dim = placements[found[0]].dim % tensor.dim()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    ranks = Ranks(ranks_along(mesh, (found[0],)))
    size, rank = tensor.shape[dim], mesh.get_coordinate()[found[0]]
    length = -(-size // ranks.size)
    start, stop = min(rank * length, size), min((rank + 1) * length, size)
    return Part(ranks, tuple(tensor.shape), dim, start, stop)


@lru_cache(maxsize=64)  # each parameter asks, often
def ranks_along(mesh: Any, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Those that differ from this rank in some dimensions of a mesh alone, and it itself."""
    if (place := mesh.get_coordinate()) is None:
        raise ValueError(
            f"DTensor: expected this rank, {distributed.get_rank()}, to be among those that it is split over, got "
            f"{mesh}; leave it out on other ranks"
        )
    return tuple(mesh.mesh[tuple(slice(None) if i in dims else at for i, at in enumerate(place))].flatten().tolist())


def ranks_of(parts: Iterable[Part | None]) -> Ranks | None:
    """Over whom any of the parts are split; None: all are whole."""
    return next((part.ranks for part in parts if part is not None), None)


def whole_counts(counts: Sequence[int], parts: Sequence[Part | None]) -> list[int]:
    """Of each tensor, the sum of the counts of all ranks; what is whole counts once."""
    ranks = ranks_of(parts)
    if ranks is None:
        return list(counts)
    mine = [n if part is not None or ranks.is_first else 0 for n, part in zip(counts, parts, strict=True)]
    found: list[int] = ranks.sum(integers(mine)).tolist()
    return found


def check_parts(named: Iterable[tuple[str, Tensor]], ranks: Ranks | None = None) -> Ranks | None:
    """Over which ranks tensors are split; None: none is.

    Args:
        named: Tensors, DTensors or not, and what errors call them.
        ranks: Over which others are split.

    Raises:
        TypeError: A DTensor that is not split along one dimension as torch.chunk does, or over other ranks than others.
    """
    for name, tensor in named:
        if not is_distributed(tensor):
            continue
        placements = tensor.placements  # type: ignore[attr-defined]
        kinds = [type(placement).__name__ for placement in placements]
        if kinds.count("Shard") > 1 or not {*kinds} <= {"Shard", "Replicate"}:
            raise TypeError(
                f"{name}: expected a DTensor that is split along one mesh dimension (Shard) and copied along others "
                f"(Replicate), got placements {placements}; use fully_shard, with replicas or without, by itself"
            )
        part = part_of(tensor)
        if part is None:
            continue
        if local(tensor).shape != part.local_shape:
            raise TypeError(
                f"{name}: expected the shard of torch.chunk, of shape {part.local_shape}, for placements {placements}, "
                f"got {tuple(local(tensor).shape)}; shard with fully_shard or distribute_tensor"
            )
        ranks = ranks or part.ranks
        if part.ranks.numbers != ranks.numbers:
            raise TypeError(
                f"{name}: expected a DTensor that is split over ranks {[*ranks.numbers]}, as those before, got "
                f"placements {placements} over {[*part.ranks.numbers]}; give it to an optimizer of its own"
            )
    return ranks


def describe(named: Iterable[tuple[str, Tensor]]) -> dict[str, object]:
    """Facts that have to be the same on all ranks, for `Ranks.check_same`."""
    named = list(named)
    return {
        "number of parameters": len(named),
        "names": [name for name, _ in named],
        "shapes": [tuple(tensor.shape) for _, tensor in named],
        "dtypes": [short(tensor.dtype) for _, tensor in named],
        "requires_grad": [tensor.requires_grad for _, tensor in named],
        "placements": [str(getattr(tensor, "placements", "whole")) for _, tensor in named],
    }


def gather_whole(
    parts: Sequence[Part | None], indices: Sequence[Tensor], *columns: Sequence[Tensor]
) -> tuple[list[Tensor], ...]:
    """Whole indices of all ranks together, ascending; and values in their order. What is whole here stays as it is.

    Args:
        parts: Which part of each tensor this rank has.
        indices: Local ones, ascending.
        columns: A value for each index, of one dtype per tensor and column.
    """
    found = [list(indices), *map(list, columns)]
    ranks = ranks_of(parts)
    rows = [row for row, part in enumerate(parts) if part is not None]
    if ranks is None:
        return tuple(found)
    found[0] = [i if part is None else part.to_whole(i) for i, part in zip(indices, parts, strict=True)]
    counts = [c.tolist() for c in ranks.gather(integers(indices[row].numel() for row in rows))]
    orders: dict[int, Tensor] = {}
    for column in found:
        by_dtype: dict[torch.dtype, list[int]] = {}
        for at, row in enumerate(rows):
            by_dtype.setdefault(column[row].dtype, []).append(at)
        for alike in by_dtype.values():
            flat = ranks.gather(torch.cat([column[rows[at]] for at in alike]))
            sizes = [[of_rank[at] for at in alike] for of_rank in counts]
            by_row = zip(*(f.split(s) for f, s in zip(flat, sizes, strict=True)), strict=True)
            for row, some in zip((rows[at] for at in alike), by_row, strict=True):
                column[row] = torch.cat(some)
                if row not in orders:  # the indices come first
                    orders[row] = column[row].argsort()
                column[row] = column[row][orders[row]]
    return tuple(found)


def as_distributed(value: Tensor, parameter: Tensor) -> Tensor:
    """What this rank has of a tensor that is split as a parameter is, as that tensor."""
    from torch.distributed.tensor import DTensor

    wanted: Any = parameter
    spec = wanted._spec
    if value.dtype != parameter.dtype:
        spec = dataclasses.replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=value.dtype))
    return DTensor(value, spec, requires_grad=False)  # from_local() would take a view


def here(value: Tensor, parameter: Tensor) -> Tensor:
    """What this rank has of a tensor of the parameter's shape, split or whole."""
    if is_distributed(value):
        return _laid_out(value, parameter)
    part = part_of(parameter)
    return value if part is None else value.narrow(part.dim, part.start, part.stop - part.start)
