"""The scalars of topk_magnitude that the kernels share: where each is."""

from __future__ import annotations

import triton.language as tl

# int64 scalars from the host: nothing that changes from call to call is a kernel argument, so nothing recompiles
HEADER = ("K", "NUMEL", "NUM_LINES", "NUM_SAMPLED_LINES", "NUM_PIECES", "NUM_TILES", "GRAIN", "CAPACITY", "MAX_NDIM")
HEADER_SIZE = 16
K: tl.constexpr = tl.constexpr(0)
NUMEL: tl.constexpr = tl.constexpr(1)
NUM_LINES: tl.constexpr = tl.constexpr(2)
NUM_SAMPLED_LINES: tl.constexpr = tl.constexpr(3)
NUM_PIECES: tl.constexpr = tl.constexpr(4)
NUM_TILES: tl.constexpr = tl.constexpr(5)
GRAIN: tl.constexpr = tl.constexpr(6)
CAPACITY: tl.constexpr = tl.constexpr(7)
MAX_NDIM: tl.constexpr = tl.constexpr(8)

# int64 scalars on the device; the host reads them with the result
STATE_SIZE = 16
LO: tl.constexpr = tl.constexpr(0)  # the bracket of the filter
HI: tl.constexpr = tl.constexpr(1)
SELECT_LO: tl.constexpr = tl.constexpr(2)  # the bracket of the select: both are the threshold in the end
SELECT_HI: tl.constexpr = tl.constexpr(3)
RANK: tl.constexpr = tl.constexpr(4)  # of the threshold among the keys in it
FAILED: tl.constexpr = tl.constexpr(5)
NUM_LISTED: tl.constexpr = tl.constexpr(6)
NONFINITE: tl.constexpr = tl.constexpr(7)
SAMPLED: tl.constexpr = tl.constexpr(8)
