"""The selected entries of a weight gradient dW = dY^T X: two ways to compute them, and the choice between them.

`ops.sddmm` takes a dot product per entry. The matrix product of those rows and columns of dW that hold an entry
computes more than is asked for, but at the rate of tensor cores. All that a backward pass needs is found when the mask
is known: nothing waits for a GPU afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.dtypes import opmath_dtype

ALIGNMENT = 8
"""Rows and columns of a product are a multiple of this, 16 B of 16-bit values: tensor cores want it."""

BLOCK_NUMEL = 2**24
"""Elements of a product that exist at a time, or `ALIGNMENT` rows of it: 64 MiB."""


@dataclass(frozen=True)
class Product:
    """A matrix product of R rows and C columns of dW, and where the entries are in it.

    Attributes:
        positions: int32 or int64 (k,): flat, within a block of rows.
        rows: int32 (R,), which of dW's; None: all of them.
        columns: int32 (C,), likewise.
        row_bounds: Where blocks of rows begin and end: [0, ..., R].
        entry_bounds: Where their entries do: [0, ..., k].
    """

    positions: Tensor
    rows: Tensor | None
    columns: Tensor | None
    row_bounds: list[int]
    entry_bounds: list[int]

    @classmethod
    def of(cls, indices: Tensor, shape: tuple[int, int], gathered: tuple[bool, bool]) -> Product:
        """Of the entries at `indices`; `gathered`: whether rows, and columns, without one are left out. See `plan`."""
        places, sizes = _places(indices, shape), list(shape)
        kept: list[Tensor | None] = [None, None]  # rows, columns
        for i, place in enumerate(places):
            if gathered[i]:
                used = _used(place, shape[i])
                channels = used.nonzero().flatten()
                sizes[i] = aligned(len(channels))
                kept[i] = torch.cat([channels, channels[-1:].expand(sizes[i] - len(channels))]).int()
                places[i] = (used.cumsum(0) - 1)[place]
        per_block = max(ALIGNMENT, BLOCK_NUMEL // sizes[1] // ALIGNMENT * ALIGNMENT)
        row_bounds = [*range(0, sizes[0], per_block), sizes[0]]
        entry_bounds = torch.searchsorted(places[0], torch.tensor(row_bounds, device=indices.device)).tolist()
        if len(row_bounds) == 2 and not any(gathered):
            positions = indices  # without another copy of them
        else:
            positions = (places[0] % per_block * sizes[1] + places[1]).to(indices.dtype)
        return cls(positions, kept[0], kept[1], row_bounds, entry_bounds)

    def __str__(self) -> str:
        rows, columns = ("all" if channels is None else len(channels) for channels in (self.rows, self.columns))
        return f"matrix product of {rows} rows and {columns} columns"

    def __call__(self, dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The entries of dy^T x, (k,), in fp32 (fp64 for fp64), of factors (T, N_out) and (T, N_in).

        They are written to `out`, where it is given.
        """
        device_type = x.device.type
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):  # backward is called inside of it: it would round
                return self(dy, x, out)
        if self.columns is not None:
            x = x.index_select(1, self.columns)
        if x.dtype.itemsize == 2 and not _has_wide_product(x):
            x = x.float()
        if len(self.row_bounds) == 2:
            return _entries(dy, x, self.rows, self.positions, out)
        if out is None:
            out = x.new_empty(self.positions.shape, dtype=opmath_dtype(x.dtype))
        for (first, end), (low, high) in zip(pairwise(self.row_bounds), pairwise(self.entry_bounds), strict=True):
            if low < high:
                positions = self.positions[low:high]
                if self.rows is None:
                    _entries(dy[:, first:end], x, None, positions, out[low:high])
                else:
                    _entries(dy, x, self.rows[first:end], positions, out[low:high])
        return out


def _entries(dy: Tensor, x: Tensor, rows: Tensor | None, positions: Tensor, out: Tensor | None) -> Tensor:
    """Those of one block."""
    if rows is not None:
        dy = dy.index_select(1, rows)
    if x.dtype.itemsize == 2:
        product = torch.mm(dy.mT, x, out_dtype=torch.float32)
    elif dy.dtype == x.dtype:
        product = torch.mm(dy.mT, x)
    else:
        product = torch.mm(dy.float().mT, x)
    return torch.index_select(product.view(-1), 0, positions, out=out)


def _has_wide_product(factor: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices into fp32 ones on this device."""
    return factor.device.type == "cuda" and torch.version.hip is None


# ---- the choice ----


class _Rates(NamedTuple):
    """What work takes, in ps per token. A channel is a row or a column of dW: a column of dY or X."""

    element: float  # of a matrix product
    copied: float  # a channel that is read, or written, to be a factor of it
    launch: float  # a factor, whatever its size
    entry: float  # of a sampled product
    packed: float  # a channel of it
    copied_together: int  # channels that are read where one of them is used
    packed_together: int


_RATES = {
    # AMD EPYC (Zen 4), one thread, torch 2.14, 2026-11-27, fp32: 64 x 64 to 11008 x 4096, 512 to 6,304 tokens.
    # Of an entry and a packed channel the least that was seen: a matrix product has to be clearly faster
    "cpu": _Rates(25.5, 2000, 0, 80, 400, 1, 1),
    # H200, torch 2.11, CUDA 13.0, 2026-11-26, bf16: ViT-B, ViT-L and 7 B layers of 8,192 to 32,896 tokens. Sectors of
    # 16 values are read, tiles of 32 channels transposed; a launch is 10 us of 10,000 tokens
    "cuda": _Rates(0.00265, 0.74, 1000, 2.0, 3.4, 16, 32),
}


def choose(
    k: int, used: tuple[int, int], shape: tuple[int, int], device_type: str, can_sample: bool = True
) -> tuple[bool, bool] | None:
    """Which of rows and columns a matrix product should leave out where they are not used; None: sample instead.

    Args:
        k: Number of entries.
        used: How many rows and columns hold one.
        shape: How many there are.
        device_type: Of the factors.
        can_sample: Whether the kernel that `_RATES` was measured with is there.
    """
    rates = _RATES.get(device_type)
    if rates is None or (device_type == "cuda" and torch.version.hip is not None):
        return None

    def cost(gathered: tuple[bool, bool]) -> float:
        sizes = [aligned(u) if g else n for g, u, n in zip(gathered, used, shape, strict=True)]
        total = rates.element * sizes[0] * sizes[1]
        for is_gathered, size, n in zip(gathered, sizes, shape, strict=True):
            total += is_gathered * (rates.launch + rates.copied * (min(n, rates.copied_together * size) + size))
        return total

    best = min(((False, False), (False, True), (True, False), (True, True)), key=cost)
    packed = sum(min(n, rates.packed_together * u) for u, n in zip(used, shape, strict=True))
    return None if can_sample and rates.entry * k + rates.packed * packed <= cost(best) else best


def aligned(count: int) -> int:
    """At least `count`."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def plan(indices: Tensor, shape: tuple[int, int]) -> Callable[..., Tensor]:
    """What computes the entries at `indices` of dy^T x: a `Product`, or `ops.sddmm`. A GPU has to be waited for.

    It takes dy, x, and a tensor (k,) to write to, or None for a new one.

    Args:
        indices: int32 or int64 (k,), ascending flat positions in dW, k > 0.
        shape: Of dW, (N_out, N_in).
    """
    counts = torch.stack([_used(place, n).sum() for place, n in zip(_places(indices, shape), shape, strict=True)])
    rows, columns = counts.tolist()
    can_sample = not indices.is_cuda or ops.why_unavailable("cuda", "sddmm", "cuda") is None
    gathered = choose(len(indices), (rows, columns), shape, indices.device.type, can_sample)
    return ops.prepare_sddmm(indices) if gathered is None else Product.of(indices, shape, gathered)


def _places(indices: Tensor, shape: tuple[int, int]) -> list[Tensor]:
    """Row and column of each entry."""
    return [indices.long() // shape[1], indices.long() % shape[1]]


def _used(place: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool, device=place.device).index_fill_(0, place, True)
