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

from .. import tables
from .coordinates import TILE_COLUMNS, Layouts, align, load_index, storage_offset, tiles
from .launch import INTERPRETED, device_function, launch, to_device

ROW_COLUMNS: tl.constexpr = tl.constexpr(8)
DATA: tl.constexpr = tl.constexpr(0)  # addresses
VALUES: tl.constexpr = tl.constexpr(1)
INDICES: tl.constexpr = tl.constexpr(2)
INDEX_BYTES: tl.constexpr = tl.constexpr(3)
ITEM: tl.constexpr = tl.constexpr(4)  # log2 of its bytes
NDIM: tl.constexpr = tl.constexpr(5)
LAYOUT: tl.constexpr = tl.constexpr(6)


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work. Reasoned from bytes and instructions; not yet measured on hardware."""

    block: int = 512  # coordinates of a program: 4 misses in flight per thread
    num_warps: int = 4


TUNING = Tuning()
if INTERPRETED:  # few, large numpy operations
    TUNING = Tuning(block=2**16)


@device_function
def _copy(data, values, offset, position, valid, WORD: tl.constexpr, SCATTER: tl.constexpr):
    """One word of each element; both ends are addresses."""
    data_ptr = data.to(tl.pointer_type(WORD)) + offset
    values_ptr = values.to(tl.pointer_type(WORD)) + position
    if SCATTER:
        tl.store(data_ptr, tl.load(values_ptr, mask=valid), mask=valid)
    else:
        tl.store(values_ptr, tl.load(data_ptr, mask=valid), mask=valid)


@triton.jit
def copy_items_kernel(rows, layouts, tiles, ITEMS: tl.constexpr, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    """gather, scatter: elements of many tensors to and from packed values. ITEMS: sizes there are, a bit for each.

    Traffic    per coordinate: a 32-byte sector read (gather) or read and written (scatter); packed value and index.
    Algorithm  a tile is of one segment, whose item size is a branch that all its threads take.
    Contract   bits are copied as integers: NaN payloads survive. Indices to write are distinct: no atomics.
    Launch     one program per tile of BLOCK coordinates.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * TILE_COLUMNS
    row = rows + tl.load(tile) * ROW_COLUMNS
    position = tl.load(tile + 1) + tl.arange(0, BLOCK)
    valid = position < tl.load(tile + 2)
    index = load_index(tl.load(row + INDICES), tl.load(row + INDEX_BYTES), position, valid)
    offset = storage_offset(layouts, tl.load(row + NDIM), tl.load(row + LAYOUT), index)
    data = tl.load(row + DATA)
    values = tl.load(row + VALUES)
    item = tl.load(row + ITEM)
    if ITEMS & 1:
        if item == 0:
            _copy(data, values, offset, position, valid, tl.int8, SCATTER)
    if ITEMS & 2:
        if item == 1:
            _copy(data, values, offset, position, valid, tl.int16, SCATTER)
    if ITEMS & 4:
        if item == 2:
            _copy(data, values, offset, position, valid, tl.int32, SCATTER)
    if ITEMS & 8:
        if item == 3:
            _copy(data, values, offset, position, valid, tl.int64, SCATTER)
    if ITEMS & 16:
        if item == 4:
            _copy(data, values, 2 * offset, 2 * position, valid, tl.int64, SCATTER)
            _copy(data + 8, values + 8, 2 * offset, 2 * position, valid, tl.int64, SCATTER)


def _copy_items(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], *, scatter: bool
) -> None:
    counts = np.array([index.numel() for index in indices], dtype=np.int64)
    if not counts.any():
        return
    device = tensors[0].device
    layouts = Layouts()
    rows = tables.table(
        (
            (
                tensor.data_ptr(),
                value.data_ptr(),
                index.data_ptr(),
                index.itemsize,
                tensor.itemsize.bit_length() - 1,
                *layouts.columns(tensor),
                0,
            )
            for tensor, index, value in zip(tensors, indices, values, strict=True)
        ),
        ROW_COLUMNS.value,
    )
    cut = tiles(counts, np.full_like(counts, TUNING.block))
    words, (_, layouts_at, tiles_at) = align([rows, np.array(layouts.words or [0], dtype=np.int64), cut])
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


def gather(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """See `saft_kernels.ops.gather`."""
    indices = [i.contiguous() for i in indices]
    values = [torch.empty(i.numel(), dtype=t.dtype, device=t.device) for t, i in zip(tensors, indices, strict=True)]
    _copy_items(tensors, indices, values, scatter=False)
    return values


def scatter_(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.scatter_`."""
    _copy_items(tensors, [i.contiguous() for i in indices], [v.contiguous() for v in values], scatter=True)
    torch.autograd.graph.increment_version(tensors)
