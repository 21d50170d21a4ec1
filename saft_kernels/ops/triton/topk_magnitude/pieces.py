"""Many tensors as the tables that the kernels read: pieces, spans, tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ... import tables
from ...dtypes import DTYPE_CODES, FLOAT_DTYPES
from ...tables import Table, Words
from ..coordinates import align
from . import rows

GATHERED = rows.GATHERED.value
ITEM_SIZES = np.array([dtype.itemsize for dtype in FLOAT_DTYPES], dtype=np.int64)  # by dtype code


@dataclass(frozen=True)
class Sizes:
    """Elements per unit of work. All are powers of two, from the smallest to the largest."""

    line: int  # sampled together
    gathered_tile: int  # of a gathered span; a direct span is a multiple of it
    direct_tile: int  # of a direct span


@dataclass(frozen=True)
class Spans:
    """The spans of one kind."""

    kind: int
    offset: int  # of their rows in the table
    num_tiles: int


@dataclass(frozen=True)
class Pieces:
    """All tensors, in order, cut into pieces; consecutive pieces make a span, and a span is cut into tiles.

    A piece is a range of one tensor. The aligned middle of a contiguous tensor, a multiple of the gathered tile, is
    a direct span: its tiles are read by vectors. Everything else, in runs as long as they come, is gathered:
    the ends of contiguous tensors, small tensors, strided ones. So 10^5 tiny tensors are a few tiles.
    """

    table: Words  # pieces, layouts, spans by kind: one copy to the device
    numel: int
    dtypes: int  # a bit for each, by its code
    num_pieces: int
    layouts_offset: int
    max_ndim: int  # of the layouts; 0 when every tensor is contiguous
    spans: list[Spans]
    num_tiles: int
    num_words: int  # 32 elements each
    num_lines: int


_ALIGNMENT = 64  # bytes; a vector load needs 16
_PADDING = 16  # words: parts of the table start at multiples of it, on cache lines


def cut(tensors: Sequence[Tensor], sizes: Sizes) -> Pieces:
    """The pieces of `tensors`."""
    pointer = np.array([t.data_ptr() for t in tensors], dtype=np.int64)
    numel = np.array([t.numel() for t in tensors], dtype=np.int64)
    code = np.array([DTYPE_CODES[t.dtype] for t in tensors], dtype=np.int64)
    contiguous = np.array([t.is_contiguous() for t in tensors], dtype=bool)
    layouts, layout, max_ndim = _layouts(tensors, contiguous)

    size = ITEM_SIZES[code]
    head = np.minimum(-pointer % _ALIGNMENT // size, numel)
    middle = np.where(contiguous, (numel - head) // sizes.gathered_tile * sizes.gathered_tile, 0)
    head[middle == 0] = 0
    parts = np.stack([head, middle, numel - head - middle], axis=1)
    bases = np.stack([np.zeros_like(head), head, head + middle], axis=1)
    kept = parts > 0
    tensor, part = kept.nonzero()
    parts, bases = parts[kept], bases[kept]
    direct = part == 1
    num_pieces = len(parts)

    new_span = direct.copy()
    new_span[1:] |= direct[:-1]
    new_span[:1] = True
    first_piece = new_span.nonzero()[0]
    ends = np.cumsum(parts)
    starts = ends - parts
    span = np.cumsum(new_span) - 1
    span_numel = np.add.reduceat(parts, first_piece) if num_pieces else parts
    kind = np.where(direct, code[tensor], GATHERED)[first_piece]
    tile = np.where(kind == GATHERED, sizes.gathered_tile, sizes.direct_tile)
    num_tiles = -(-span_numel // tile)
    num_words = -(-span_numel // sizes.gathered_tile) * (sizes.gathered_tile // 32)
    lines = -(-parts // sizes.line)

    pieces = np.zeros(num_pieces, rows.PIECE)
    pieces["data"] = pointer[tensor]
    pieces["first"] = bases
    pieces["start"] = starts - starts[first_piece][span]
    pieces["numel"] = parts
    pieces["dtype"] = code[tensor]
    pieces["layout"] = layout[tensor]
    pieces["tensor"] = tensor
    pieces["first_line"] = np.cumsum(lines) - lines

    every_span = np.zeros(len(first_piece), rows.SPAN)
    every_span["first_slot"] = np.cumsum(num_tiles) - num_tiles
    every_span["first_word"] = np.cumsum(num_words) - num_words
    every_span["numel"] = span_numel
    every_span["first_piece"] = first_piece
    every_span["num_pieces"] = np.diff(np.append(first_piece, num_pieces))

    kinds = np.unique(kind).tolist()
    groups: list[Table] = []
    for value in kinds:
        chosen = kind == value
        spans = every_span[chosen]
        spans["first_tile"] = np.cumsum(num_tiles[chosen]) - num_tiles[chosen]
        spans["num_spans"] = len(spans)
        groups.append(spans)
    table, (_, layouts_offset, *offsets) = align([pieces, layouts, *groups], _PADDING)
    return Pieces(
        table,
        int(numel.sum()),
        sum(1 << value for value in set(code.tolist())),
        num_pieces,
        layouts_offset,
        max_ndim,
        [Spans(value, at, int(num_tiles[kind == value].sum())) for value, at in zip(kinds, offsets, strict=True)],
        int(num_tiles.sum()),
        int(num_words.sum()),
        int(lines.sum()),
    )


def _layouts(
    tensors: Sequence[Tensor], contiguous: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> tuple[Words, Words, int]:
    """Rows (size, stride) from the innermost dimension out, all of max_ndim; the row of each tensor; max_ndim."""
    index: dict[tuple[int, ...], int] = {(2**62, 1): 0}  # every contiguous tensor
    layout = np.zeros(len(tensors), dtype=np.int64)
    for i in (~contiguous).nonzero()[0].tolist():
        merged = tables.layout(tensors[i])
        ndim = len(merged) // 2
        inside_out = tuple(x for d in reversed(range(ndim)) for x in (merged[d], merged[ndim + d]))
        layout[i] = index.setdefault(inside_out, len(index))
    max_ndim = max(len(key) // 2 for key in index)
    words = [key + (1, 0) * (max_ndim - len(key) // 2) for key in index]
    return np.array(words, dtype=np.int64), layout * (2 * max_ndim), max_ndim if len(index) > 1 else 0
