"""Coordinates of many tensors: the tables of the host, and the device functions that walk them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import triton.language as tl
from torch import Tensor

from .. import tables
from ..tables import Table, Words
from .constants import row_dtype
from .launch import device_function

TILE_SEGMENT = tl.constexpr(0)
TILE_FIRST = tl.constexpr(1)  # coordinate
TILE_LAST = tl.constexpr(2)  # coordinate, and 1
TILE_WORDS = tl.constexpr(3)
TILE = row_dtype("TILE", globals())

LAYOUT_SIZE = tl.constexpr(0)
LAYOUT_STRIDE = tl.constexpr(1)
LAYOUT_WORDS = tl.constexpr(2)  # per dimension


# ---- host ----


class Layouts:
    """Size and stride of each dimension, from the innermost out: what `storage_offset` walks."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._first: dict[tuple[int, ...], int] = {}

    def add(self, tensor: Tensor) -> tuple[int, int]:
        """Number of dimensions, and where they start; (0, 0) when the tensor is contiguous."""
        merged = tables.layout(tensor)
        ndim = len(merged) // 2
        first = self._first.setdefault(merged, len(self._words)) if ndim else 0
        if first == len(self._words):
            for d in reversed(range(ndim)):
                self._words += (merged[d], merged[ndim + d])
        return ndim, first

    def words(self) -> Words:
        """All of them; never empty, for kernels take its address."""
        return np.array(self._words or [0], dtype=np.int64)


def tiles(counts: Words, sizes: Words) -> Table:
    """TILE rows of segments of `counts` coordinates, cut every `sizes`."""
    per_segment = -(-counts // sizes)
    segment = np.repeat(np.arange(len(counts)), per_segment)
    tile = np.arange(len(segment)) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    first = tile * sizes[segment]
    table = np.zeros(len(segment), TILE)
    table["segment"], table["first"] = segment, first
    table["last"] = np.minimum(first + sizes[segment], counts[segment])
    return table


def align(parts: Sequence[Table | Words], multiple: int = 2) -> tuple[Words, list[int]]:
    """All parts as words, each at a multiple of so many (16 B: every kernel may expect it), and where each starts."""
    words = [part.view(np.int64).reshape(-1) for part in parts]
    starts = [0]
    for part in words:
        starts.append(starts[-1] + -(-len(part) // multiple) * multiple)
    flat = np.zeros(starts.pop(), dtype=np.int64)  # np.pad and np.concatenate take three times as long
    for start, part in zip(starts, words, strict=True):
        flat[start : start + len(part)] = part
    return flat, starts


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
            dimension = layouts + first + d * LAYOUT_WORDS
            size = tl.load(dimension + LAYOUT_SIZE)
            outer = rest // size
            offset += (rest - outer * size) * tl.load(dimension + LAYOUT_STRIDE)
            rest = outer
    return offset
