"""Coordinates of many tensors: the tables of the host, and the device functions that walk them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import triton.language as tl
from torch import Tensor

from .. import tables
from ..tables import Words
from .launch import device_function

TILE_COLUMNS: tl.constexpr = tl.constexpr(3)  # segment, first coordinate, last coordinate + 1


# ---- host ----


class Layouts:
    """Rows (size, stride) from the innermost dimension out: what `storage_offset` walks."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self._first: dict[tuple[int, ...], int] = {}

    def columns(self, tensor: Tensor) -> tuple[int, int]:
        """Number of dimensions, and where they start; (0, 0) when the tensor is contiguous."""
        merged = tables.layout(tensor)
        ndim = len(merged) // 2
        first = self._first.setdefault(merged, len(self.words)) if ndim else 0
        if first == len(self.words):
            for d in reversed(range(ndim)):
                self.words += (merged[d], merged[ndim + d])
        return ndim, first


def tiles(counts: Words, sizes: Words) -> Words:
    """The tiles of segments of `counts` coordinates, cut every `sizes`: one row of TILE_COLUMNS for each."""
    per_segment = -(-counts // sizes)
    segment = np.repeat(np.arange(len(counts)), per_segment)
    tile = np.arange(len(segment)) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    first = tile * sizes[segment]
    return np.stack([segment, first, np.minimum(first + sizes[segment], counts[segment])], axis=1)


def align(parts: Sequence[Words]) -> tuple[Words, list[int]]:
    """One table of all parts, each at a multiple of 16 B, where every kernel may expect it; and where each starts."""
    flat = [np.pad(part.reshape(-1), (0, -part.size % 2)) for part in parts]
    ends = np.cumsum([len(part) for part in flat])
    return np.concatenate(flat), [0, *ends[:-1].tolist()]


# ---- device ----


@device_function
def load_index(indices, index_bytes, position, valid):
    """Flat indices (int64) at positions of a segment; `indices` is an address, 0 when all are selected."""
    index = position
    if indices != 0:
        if index_bytes == 4:
            index = tl.load(indices.to(tl.pointer_type(tl.int32)) + position, mask=valid, other=0).to(tl.int64)
        else:
            index = tl.load(indices.to(tl.pointer_type(tl.int64)) + position, mask=valid, other=0)
    return index


@device_function
def storage_offset(layouts, ndim, first, index):
    """Where flat indices of a tensor are, in elements from its first; int64."""
    offset = index
    if ndim > 0:
        offset = index * 0
        rest = index
        for d in range(ndim):
            size = tl.load(layouts + first + 2 * d)
            outer = rest // size
            offset += (rest - outer * size) * tl.load(layouts + first + 2 * d + 1)
            rest = outer
    return offset
