"""What the kernels of topk_magnitude read and write beside elements: two rows of scalars, two tables.

Words: a piece is a range of one tensor. Consecutive pieces make a span: one piece that is read by vectors, or a run of
pieces that are gathered. A span is cut into tiles, one program each; a gathered tile may have many pieces.
"""

from __future__ import annotations

import triton.language as tl

from ...dtypes import DTYPE_CODES
from ..constants import row_dtype

# Scalars from the host: nothing that changes from call to call is a kernel argument, so nothing recompiles
HEADER_K = tl.constexpr(0)
HEADER_NUMEL = tl.constexpr(1)
HEADER_NUM_LINES = tl.constexpr(2)
HEADER_NUM_SAMPLED_LINES = tl.constexpr(3)
HEADER_NUM_PIECES = tl.constexpr(4)
HEADER_NUM_TILES = tl.constexpr(5)
HEADER_GRAIN = tl.constexpr(6)  # keys are multiples of it: only NaN's is not
HEADER_CAPACITY = tl.constexpr(7)  # keys that the list has room for
HEADER_MAX_NDIM = tl.constexpr(8)  # of the layouts; 0 when every tensor is contiguous
HEADER_WORDS = tl.constexpr(16)
HEADER = row_dtype("HEADER", globals())

# Scalars on the device; the host reads them with the result
STATE_LO = tl.constexpr(0)  # the bracket of the filter
STATE_HI = tl.constexpr(1)
STATE_SELECT_LO = tl.constexpr(2)  # the bracket of the select: both are the threshold in the end
STATE_SELECT_HI = tl.constexpr(3)
STATE_RANK = tl.constexpr(4)  # of the threshold among the keys in it
STATE_FAILED = tl.constexpr(5)  # 1: the bracket was wrong; 2: it was right, and the list too short for the band
STATE_NUM_LISTED = tl.constexpr(6)
STATE_NUM_NONFINITE = tl.constexpr(7)
STATE_NUM_SAMPLED = tl.constexpr(8)
STATE_WORDS = tl.constexpr(16)
STATE = row_dtype("STATE", globals())

PIECE_DATA = tl.constexpr(0)  # address of its tensor
PIECE_FIRST = tl.constexpr(1)  # flat index of its first element in the tensor
PIECE_START = tl.constexpr(2)  # position of that element in the span
PIECE_NUMEL = tl.constexpr(3)
PIECE_DTYPE = tl.constexpr(4)
PIECE_LAYOUT = tl.constexpr(5)  # where in the layouts its tensor's begins
PIECE_TENSOR = tl.constexpr(6)
PIECE_FIRST_LINE = tl.constexpr(7)  # lines are numbered through all pieces
PIECE_WORDS = tl.constexpr(8)
PIECE = row_dtype("PIECE", globals())

SPAN_FIRST_TILE = tl.constexpr(0)  # among the tiles of the spans of its kind: one launch each
SPAN_FIRST_SLOT = tl.constexpr(1)  # among all tiles: where its counts are
SPAN_FIRST_WORD = tl.constexpr(2)  # of its bits, 32 elements each
SPAN_NUMEL = tl.constexpr(3)
SPAN_FIRST_PIECE = tl.constexpr(4)
SPAN_NUM_PIECES = tl.constexpr(5)
SPAN_NUM_SPANS = tl.constexpr(6)  # of its kind
SPAN_WORDS = tl.constexpr(8)
SPAN = row_dtype("SPAN", globals())

# The kind of a span is the dtype of its one piece, or that it is gathered
GATHERED = tl.constexpr(len(DTYPE_CODES))
