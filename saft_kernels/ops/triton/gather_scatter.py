"""gather and scatter_ on GPUs without a CUDA toolkit: one launch for all tensors."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM102  # the outer condition is a constant that the compiler knows

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import row_dtype
from .coordinates import (
    TILE_FIRST,
    TILE_LAST,
    TILE_SEGMENT,
    TILE_WORDS,
    Layouts,
    align,
    load_index,
    storage_offset,
    tiles,
)
from .launch import INTERPRETED, device_function, launch, to_device

SEGMENT_DATA = tl.constexpr(0)
SEGMENT_VALUES = tl.constexpr(1)
SEGMENT_INDICES = tl.constexpr(2)
SEGMENT_INDEX_BYTES = tl.constexpr(3)
SEGMENT_LOG2_ITEMSIZE = tl.constexpr(4)
SEGMENT_NDIM = tl.constexpr(5)
SEGMENT_LAYOUT = tl.constexpr(6)  # where in the layouts it begins
SEGMENT_NUMEL = tl.constexpr(7)  # of the tensor
SEGMENT_WORDS = tl.constexpr(8)
SEGMENT = row_dtype("SEGMENT", globals())


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work. Reasoned from bytes and instructions; not yet measured on hardware."""

    block: int = 512  # coordinates of a program: 4 misses in flight per thread
    num_warps: int = 4


TUNING = Tuning()
if INTERPRETED:  # few, large numpy operations
    TUNING = Tuning(block=2**16)


@device_function
def _copy(data, values, offset, position, WORD: tl.constexpr, SCATTER: tl.constexpr):
    """Copies one word of each element whose offset is not negative; both ends are addresses."""
    valid = offset >= 0
    data_ptr = data.to(tl.pointer_type(WORD)) + offset
    values_ptr = values.to(tl.pointer_type(WORD)) + position
    if SCATTER:
        tl.store(data_ptr, tl.load(values_ptr, mask=valid), mask=valid)
    else:
        tl.store(values_ptr, tl.load(data_ptr, mask=valid), mask=valid)


@triton.jit
def copy_items_kernel(segments, layouts, tiles, ITEMS: tl.constexpr, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    """gather, scatter: elements of many tensors to and from packed values. ITEMS: sizes there are, a bit for each.

    Traffic    per coordinate: a 32-byte sector read (gather) or read and written (scatter); packed value and index.
    Algorithm  a tile is of one segment, whose item size is a branch that all its threads take.
    Contract   bits are copied as integers: NaN payloads survive. Indices to write are distinct: no atomics. What is out
               of range is left out, so indices that change meanwhile do not lead beside the tensor.
    Launch     one program per tile of BLOCK coordinates.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * TILE_WORDS
    segment = segments + tl.load(tile + TILE_SEGMENT) * SEGMENT_WORDS
    position = tl.load(tile + TILE_FIRST) + tl.arange(0, BLOCK)
    valid = position < tl.load(tile + TILE_LAST)
    index = load_index(tl.load(segment + SEGMENT_INDICES), tl.load(segment + SEGMENT_INDEX_BYTES), position, valid)
    offset = storage_offset(layouts, tl.load(segment + SEGMENT_NDIM), tl.load(segment + SEGMENT_LAYOUT), index)
    in_range = valid & (index >= 0) & (index < tl.load(segment + SEGMENT_NUMEL))
    offset = tl.where(in_range, offset, -1)
    data = tl.load(segment + SEGMENT_DATA)
    values = tl.load(segment + SEGMENT_VALUES)
    item = tl.load(segment + SEGMENT_LOG2_ITEMSIZE)
    if ITEMS & 1:
        if item == 0:
            _copy(data, values, offset, position, tl.int8, SCATTER)
    if ITEMS & 2:
        if item == 1:
            _copy(data, values, offset, position, tl.int16, SCATTER)
    if ITEMS & 4:
        if item == 2:
            _copy(data, values, offset, position, tl.int32, SCATTER)
    if ITEMS & 8:
        if item == 3:
            _copy(data, values, offset, position, tl.int64, SCATTER)
    if ITEMS & 16:
        if item == 4:
            _copy(data, values, 2 * offset, 2 * position, tl.int64, SCATTER)
            _copy(data + 8, values + 8, 2 * offset, 2 * position, tl.int64, SCATTER)


def _copy_items(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], *, scatter: bool
) -> None:
    counts = np.array([index.numel() for index in indices], dtype=np.int64)
    if not counts.any():
        return
    device = tensors[0].device
    layouts = Layouts()
    segments = np.zeros(len(tensors), SEGMENT)
    segments["data"] = [t.data_ptr() for t in tensors]
    segments["values"] = [v.data_ptr() for v in values]
    segments["indices"] = [i.data_ptr() for i in indices]
    segments["index_bytes"] = [i.itemsize for i in indices]
    segments["log2_itemsize"] = [t.itemsize.bit_length() - 1 for t in tensors]
    segments["numel"] = [t.numel() for t in tensors]
    segments["ndim"], segments["layout"] = zip(*map(layouts.add, tensors), strict=True)
    cut = tiles(counts, np.full_like(counts, TUNING.block))
    words, (_, layouts_at, tiles_at) = align([segments, layouts.words(), cut])
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        table = to_device(words, device)
        launch(
            copy_items_kernel,
            len(cut),
            *(table, table[layouts_at:], table[tiles_at:]),
            ITEMS=sum({tensor.itemsize for tensor in tensors}),
            SCATTER=scatter,
            BLOCK=TUNING.block,
            num_warps=TUNING.num_warps,
        )


def gather(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.gather`; `values` are written."""
    _copy_items(tensors, indices, values, scatter=False)


def scatter_(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.scatter_`."""
    _copy_items(tensors, [i.contiguous() for i in indices], [v.contiguous() for v in values], scatter=True)
    torch.autograd.graph.increment_version(tensors)
