"""What a rank has of a model that is split over several: of a DTensor, as of `fully_shard`, a range of one dimension.

An index is local, a flat position in what this rank has, or whole: a flat position in the tensor as one process has it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from ..common.names import short


class Ranks:
    """The ranks that a model is split over. All of them have to call each method, in the same order."""

    def __init__(self, group: Any, device_type: str) -> None:
        self._group = group
        self.numbers: tuple[int, ...] = tuple(distributed.get_process_group_ranks(group))
        self._device = torch.device(device_type)
        if device_type != "cpu":
            self._device = torch.device(device_type, torch.accelerator.current_device_index())

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.numbers)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all in what all of them have."""
        return distributed.get_rank() == self.numbers[0]

    def sum(self, numbers: Tensor) -> Tensor:
        """Of each number, the sum over all ranks, where the numbers are. They may be overwritten."""
        return self._reduce(numbers, distributed.ReduceOp.SUM)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether any rank has it."""
        found = torch.tensor([*flags], dtype=torch.uint8, device="cpu")
        return [bool(flag) for flag in self._reduce(found, distributed.ReduceOp.MAX).tolist()]

    def _reduce(self, numbers: Tensor, op: Any) -> Tensor:
        shared = numbers.contiguous().to(self._device)
        distributed.all_reduce(shared, op, self._group)
        return shared.to(numbers.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The one-dimensional values of each rank, of any length, in the order of ranks."""
        counts = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in self.numbers]
        distributed.all_gather(counts, torch.full_like(counts[0], values.numel()), self._group)
        lengths = torch.cat(counts).tolist()
        mine = torch.zeros(max(lengths), dtype=values.dtype, device=self._device)
        mine[: values.numel()] = values
        found = [torch.empty_like(mine) for _ in self.numbers]
        distributed.all_gather(found, mine, self._group)
        return [some[:length].to(values.device) for some, length in zip(found, lengths, strict=True)]

    def check_all(self, error: Exception | None) -> None:
        """Raises this rank's error, and an error on all others where a rank has one: none is left waiting."""
        failed = torch.cat(self.gather(_numbers([error is not None]))).tolist()
        if error is not None:
            raise error
        if any(failed):
            numbers = [number for number, has_failed in zip(self.numbers, failed, strict=True) if has_failed]
            raise RuntimeError(f"ranks {numbers} failed, and nothing was changed here; see their errors")

    def check_same(self, what: str, facts: Mapping[str, object]) -> None:
        """Raises ValueError on every rank where a fact is not the same on all. Its keys have to be.

        Digests are compared first: they have one length, whatever the ranks disagree on.
        """
        texts = [f"{name} {fact}" for name, fact in facts.items()]
        digests = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=7).digest(), "big") for t in texts]
        found_digests = self.gather(_numbers(digests))
        if len({each.numel() for each in found_digests}) > 1:
            raise ValueError(f"{what}: expected the same call on all ranks, got others; call it on all, in order")
        by_rank = torch.stack(found_digests)
        for at in (by_rank != by_rank[0]).any(0).nonzero().flatten().tolist():
            found: list[Any] = [None for _ in self.numbers]
            distributed.all_gather_object(found, _shortened(texts[at]), self._group)
            other = next(i for i, row in enumerate(by_rank) if row[at] != by_rank[0, at])
            raise ValueError(
                f"{what}: expected the same on all ranks, got {found[0]} on rank {self.numbers[0]}, and {found[other]} "
                f"on rank {self.numbers[other]}; build the same model and optimizer on every rank"
            )


def _numbers(numbers: Iterable[int]) -> Tensor:
    return torch.tensor([*numbers], dtype=torch.int64, device="cpu")


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


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
    gradient: Any = parameter.grad
    if gradient is None or not is_distributed(gradient):
        return gradient  # type: ignore[no-any-return]
    wanted: Any = parameter
    with torch.no_grad():
        if gradient.placements != wanted.placements:  # partial sums, as of a norm under sequence parallelism
            gradient = gradient.redistribute(wanted.device_mesh, wanted.placements)
        found = gradient.to_local()
    return found.wait() if hasattr(found, "wait") else found  # type: ignore[no-any-return]


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "_local_tensor")


def part_of(tensor: Tensor) -> Part | None:
    """Which part of a DTensor this rank has; None: all of it, as of a tensor of one process. See `check_parts`."""
    placements = getattr(tensor, "placements", ())
    found = [i for i, placement in enumerate(placements) if placement.is_shard()]
    if not found:
        return None
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    dim = placements[found[0]].dim % tensor.dim()
    size, rank = tensor.shape[dim], mesh.get_local_rank(found[0])
    length = -(-size // mesh.size(found[0]))
    start, stop = min(rank * length, size), min((rank + 1) * length, size)
    return Part(Ranks(mesh.get_group(found[0]), mesh.device_type), tuple(tensor.shape), dim, start, stop)


def ranks_of(parts: Iterable[Part | None]) -> Ranks | None:
    """Over whom any of the parts are split; None: all are whole."""
    return next((part.ranks for part in parts if part is not None), None)


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
    parts: Sequence[Part | None], indices: Sequence[Tensor], values: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Whole indices of all ranks together, ascending; and values in their order. What is whole here stays as it is.

    Args:
        parts: Which part of each tensor this rank has.
        indices: Local ones, ascending.
        values: One for each index, of one dtype per tensor; None: none.
    """
    indices, values = list(indices), list(values or ())
    ranks = ranks_of(parts)
    rows = [row for row, part in enumerate(parts) if part is not None]
    if ranks is None:
        return indices, values
    whole = [part.to_whole(indices[row]) for row in rows if (part := parts[row]) is not None]
    counts = [c.tolist() for c in ranks.gather(_numbers(i.numel() for i in whole))]
    flat = ranks.gather(torch.cat(whole))
    by_row = zip(*(f.split(c) for f, c in zip(flat, counts, strict=True)), strict=True)  # what each rank has
    orders = []
    for row, some in zip(rows, by_row, strict=True):
        indices[row], order = torch.cat(some).sort()
        orders.append(order)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for at, row in enumerate(rows if values else ()):
        by_dtype.setdefault(values[row].dtype, []).append(at)
    for alike in by_dtype.values():
        flat = ranks.gather(torch.cat([values[rows[at]] for at in alike]))
        sizes = [[c[at] for at in alike] for c in counts]
        by_row = zip(*(f.split(s) for f, s in zip(flat, sizes, strict=True)), strict=True)
        for at, some in zip(alike, by_row, strict=True):
            values[rows[at]] = torch.cat(some)[orders[at]]
    return indices, values
