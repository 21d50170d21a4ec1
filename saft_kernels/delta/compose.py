"""Several deltas of one base as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..common.names import listing
from ..mask import SparseMask
from ..ops.dtypes import as_bits
from .changes import Changes

Policy = Literal["error", "first", "last", "sum"]
_POLICIES = ("error", "first", "last", "sum")


@dataclass(frozen=True)
class ConflictRow:
    """One tensor that more than one delta changed."""

    name: str
    shared: int
    """Elements that more than one delta changed."""
    conflicting: int
    """Of them, those with different new values."""


@dataclass(frozen=True)
class Conflicts:
    """Where deltas meet; `str()` is a table."""

    rows: tuple[ConflictRow, ...]

    @property
    def shared(self) -> int:
        """Elements that more than one delta changed."""
        return sum(row.shared for row in self.rows)

    @property
    def conflicting(self) -> int:
        """Of them, those with different new values."""
        return sum(row.conflicting for row in self.rows)

    def __str__(self) -> str:
        rows = [*self.rows, ConflictRow("total", self.shared, self.conflicting)]
        width = max(len(row.name) for row in rows)
        lines = [f"{'tensor':{width}}  {'shared':>10}  {'conflicting':>11}"]
        lines += [f"{row.name:{width}}  {row.shared:>10,}  {row.conflicting:>11,}" for row in rows]
        return "\n".join(lines)


def compose(deltas: Sequence[Changes], on_conflict: Policy) -> tuple[Changes, Conflicts]:
    """See `SparseDelta.compose`."""
    if on_conflict not in _POLICIES:
        raise ValueError(f"`on_conflict`: expected one of {', '.join(_POLICIES)}, got {on_conflict!r}")
    if not deltas:
        raise ValueError("`deltas`: expected at least one, got none; pass a list of SparseDelta")
    if any(delta.tied != deltas[0].tied for delta in deltas):
        deltas = [_untied(delta) for delta in deltas]
    rows: list[ConflictRow] = []
    indices: dict[str, Tensor] = {}
    originals: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.mask if delta.mask[name].numel()):
        parts = _parts(name, deltas)
        shapes[name] = parts[0].mask.shapes[name]
        index, order = torch.cat([delta.mask[name].long() for delta in parts]).sort(stable=True)
        before = _reordered([delta.known_originals("compose")[name] for delta in parts], order)
        after = _reordered([delta.values[name] for delta in parts], order)
        # consecutive equal indices are one element, in the order of `deltas`
        again = index[1:] == index[:-1]
        if bool((again & (as_bits(before)[1:] != as_bits(before)[:-1])).any()):
            raise ValueError(
                f"`deltas`: expected deltas of one base, got different originals in {name!r}; make them from the same "
                "model"
            )
        first_row = torch.zeros(min(1, len(index)), dtype=torch.long, device="cpu")
        element = torch.cat([first_row, again.logical_not().long().cumsum(0)])
        counts = torch.bincount(element)
        conflicting = torch.zeros(len(counts), dtype=torch.bool, device="cpu")
        conflicting[element[1:][again & (as_bits(after)[1:] != as_bits(after)[:-1])]] = True
        if bool((counts > 1).any()):
            rows.append(ConflictRow(name, int((counts > 1).sum()), int(conflicting.sum())))
        last = counts.cumsum(0) - 1
        first = last - counts + 1
        chosen = _picked(after, last if on_conflict == "last" else first)
        base = _picked(before, first)
        if on_conflict == "sum":
            chosen = _summed(before, after, element, counts, base, chosen)
        differs = as_bits(chosen) != as_bits(base)
        indices[name], originals[name], values[name] = (
            index[first][differs],
            _picked(base, differs),
            _picked(chosen, differs),
        )
    conflicts = Conflicts(tuple(rows))
    if conflicts.conflicting and on_conflict == "error":
        names = [row.name for row in rows if row.conflicting]
        raise ValueError(
            f"`deltas`: expected no element with different new values, got {conflicts.conflicting:,}, in "
            f"{listing(names)}; choose on_conflict='first', 'last' or 'sum'"
        )
    kept = {name for name in indices if indices[name].numel()}
    mask = SparseMask(
        {name: indices[name] for name in indices if name in kept}, {n: shapes[n] for n in shapes if n in kept}
    )
    tied = {name: owner for name, owner in deltas[0].tied.items() if owner in kept}
    numel = max(delta.numel for delta in deltas)
    return Changes(mask, values, originals, tied=tied, numel=numel), conflicts


def _parts(name: str, deltas: Sequence[Changes]) -> list[Changes]:
    """The deltas that know a tensor, which must agree about it."""
    parts = [delta for delta in deltas if name in delta.mask]
    kinds = {(delta.mask.shapes[name], delta.values[name].dtype) for delta in parts}
    if len(kinds) > 1:
        got = " and ".join(
            f"{str(dtype).removeprefix('torch.')} of shape {shape}" for shape, dtype in sorted(kinds, key=str)
        )
        raise ValueError(
            f"`deltas`: expected deltas of one base, got {got} for {name!r}; make them from the same model"
        )
    return parts


def _untied(delta: Changes) -> Changes:
    """The same changes with an entry for each name of tied tensors."""
    owners = {**{name: name for name in delta.mask}, **delta.tied}
    originals = delta.known_originals("compose")
    return Changes(
        SparseMask(
            {name: delta.mask[owner] for name, owner in owners.items()},
            {name: delta.mask.shapes[owner] for name, owner in owners.items()},
        ),
        {name: delta.values[owner] for name, owner in owners.items()},
        {name: originals[owner] for name, owner in owners.items()},
        numel=delta.numel,
    )


def _picked(values: Tensor, index: Tensor) -> Tensor:
    return as_bits(values)[index].view(values.dtype)


def _reordered(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    return torch.cat([as_bits(part) for part in parts])[order].view(parts[0].dtype)


def _summed(before: Tensor, after: Tensor, element: Tensor, counts: Tensor, base: Tensor, chosen: Tensor) -> Tensor:
    """base + the sum of (after - before) per element; what one delta alone changed stays as it is, bit for bit."""
    dtype = before.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        wide = torch.int64 if dtype != torch.bool else torch.uint8
        if dtype == torch.bool:
            raise ValueError("`on_conflict`: expected 'first' or 'last' for bool tensors, got 'sum'; bools do not add")
    elif dtype.is_complex:
        wide = dtype
    else:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = base.to(wide).index_add(0, element, after.to(wide) - before.to(wide)).to(dtype)
    return torch.where((counts > 1), as_bits(total), as_bits(chosen)).view(dtype)
