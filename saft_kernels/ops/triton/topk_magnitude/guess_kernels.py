"""The kernels of topk_magnitude up to the only full read: sample, bracket, filter."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..constants import FP64, HAS_FP64
from ..launch import device_function
from .keys import (
    common_inf,
    common_max,
    find_piece,
    find_span,
    gather_keys,
    item_size,
    last_native_key,
    native_inf,
    native_key,
    span_keys,
    typed_pointer,
)
from .rows import (
    GATHERED,
    HEADER_GRAIN,
    HEADER_K,
    HEADER_MAX_NDIM,
    HEADER_NUM_LINES,
    HEADER_NUM_PIECES,
    HEADER_NUM_SAMPLED_LINES,
    HEADER_NUM_TILES,
    HEADER_NUMEL,
    PIECE_DATA,
    PIECE_FIRST,
    PIECE_FIRST_LINE,
    PIECE_NUMEL,
    PIECE_WORDS,
    SPAN_FIRST_PIECE,
    SPAN_FIRST_SLOT,
    SPAN_FIRST_TILE,
    SPAN_FIRST_WORD,
    SPAN_NUMEL,
    STATE_HI,
    STATE_LO,
    STATE_NUM_NONFINITE,
    STATE_NUM_SAMPLED,
)

# Half-width of the bracket in binomial standard deviations. Gradients are correlated along rows and columns:
# structured gradients gave rank errors up to 2.4 sigma with this sample.
SIGMAS = tl.constexpr(6.0)
SAMPLE_BITS = tl.constexpr(16)


# ---- sample ----


@device_function
def _mix(x):
    """The finalizer of MurmurHash3, on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def sample_kernel(
    header,
    pieces,
    layouts,
    state,
    histogram,  # (2^SAMPLE_BITS,) int32, zero
    DTYPES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
):
    """topk_magnitude / sample: a histogram of one line of 16 elements per stride.

    Traffic    64 B per line of fp32, 2^17 lines at most; one atomic per element.
    Algorithm  stratified: line j of the sample is at a pseudo-random place in the j-th stride.
    Contract   it only steers. The lowest bin, where zeros are, is not counted: no crowd on one address.
    Launch     one program per LINES lines.
    """
    pid = tl.program_id(0).to(tl.int64)
    num_lines = tl.load(header + HEADER_NUM_LINES)
    num_sampled = tl.load(header + HEADER_NUM_SAMPLED_LINES)
    j = pid * LINES + tl.arange(0, LINES).to(tl.int64)
    sampled = j < num_sampled
    jitter = _mix((j + 1).to(tl.uint32)).to(tl.int64) & 0xFFFF
    stride = (num_lines << 16) // num_sampled
    line = tl.minimum((j * stride + ((jitter * stride) >> 16)) >> 16, num_lines - 1)
    piece = find_piece(pieces, tl.full((), 0, tl.int64), tl.load(header + HEADER_NUM_PIECES), line, PIECE_FIRST_LINE)
    row = pieces + piece * PIECE_WORDS
    element = ((line - tl.load(row + PIECE_FIRST_LINE)) * LINE)[:, None] + tl.arange(0, LINE)[None, :]
    valid = sampled[:, None] & (element < tl.load(row + PIECE_NUMEL)[:, None])
    piece = piece[:, None] + tl.full((1, LINE), 0, tl.int64)
    keys = gather_keys(pieces, layouts, tl.load(header + HEADER_MAX_NDIM), piece, element, valid, DTYPES)
    shift: tl.constexpr = (63 if (HAS_FP64 & DTYPES) != 0 else 31) - SAMPLE_BITS
    bins = (keys >> shift).to(tl.int32)
    count = tl.sum(valid.to(tl.int32))
    tl.atomic_add(state + STATE_NUM_SAMPLED, count.to(tl.int64), sem="relaxed")
    counted = valid & (bins > 0)
    largest = tl.max(tl.where(valid, bins, 0))
    smallest = tl.min(tl.where(valid, bins, largest))
    if largest == smallest:
        tl.atomic_add(histogram + largest, count, mask=largest > 0, sem="relaxed")
    else:
        tl.atomic_add(histogram + bins, tl.full((LINES, LINE), 1, tl.int32), mask=counted, sem="relaxed")


@device_function
def _bin_at_rank(histogram, group_sums, rank, SIDE: tl.constexpr):
    """The bin that holds descending rank `rank` (1 = largest) among SIDE * SIDE; 0 when the bins hold fewer."""
    from_here = tl.cumsum(group_sums, axis=0, reverse=True)
    group = tl.maximum(tl.sum((from_here >= rank).to(tl.int32), axis=0) - 1, 0)
    above = tl.sum(tl.where(tl.arange(0, SIDE) > group, group_sums, 0), axis=0)
    bins = tl.load(histogram + group * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    from_here = tl.cumsum(bins, axis=0, reverse=True) + above
    return group * SIDE + tl.maximum(tl.sum((from_here >= rank).to(tl.int32), axis=0) - 1, 0)


@triton.jit
def bracket_kernel(header, state, histogram, KEY64: tl.constexpr, SIDE: tl.constexpr):
    """topk_magnitude / bracket: from the sample's histogram to [lo, hi].

    Traffic    reads 256 KB from L2; writes 16 B.
    Algorithm  the sample's bins at the rank of k in it, SIGMAS standard deviations to either side: sums of groups of
               SIDE bins, then a scan of one group.
    Contract   it only steers: the verdict of collect decides. Where the sample is too small for a bound, there is none.
    Launch     one program.
    """
    index = tl.arange(0, SIDE)
    group_sums = tl.sum(tl.load(histogram + index[:, None] * SIDE + index[None, :]), axis=1).to(tl.int64)
    sampled = tl.load(state + STATE_NUM_SAMPLED)
    k = tl.load(header + HEADER_K)
    numel = tl.load(header + HEADER_NUMEL)
    share = k.to(tl.float32) / numel.to(tl.float32)
    rank = share * sampled.to(tl.float32)
    margin = SIGMAS * tl.sqrt(rank * (1.0 - share)) + SIGMAS * SIGMAS / 2
    lower_rank = (rank + margin).to(tl.int64) + 1
    upper_rank = (rank - margin).to(tl.int64)
    shift: tl.constexpr = (63 if KEY64 else 31) - SAMPLE_BITS
    lo = _bin_at_rank(histogram, group_sums, lower_rank, SIDE).to(tl.int64) << shift
    upper_bin = _bin_at_rank(histogram, group_sums, upper_rank, SIDE).to(tl.int64)
    grain = tl.load(header + HEADER_GRAIN)
    hi = ((upper_bin + 1) << shift) - 1
    hi = tl.where(hi < common_inf(KEY64), hi - (hi & (grain - 1)), hi)
    hi = tl.where(upper_bin == 0, 0, hi)  # fewer non-zeros than k: zero is what fills that bin
    tl.store(state + STATE_LO, tl.where(lower_rank >= sampled, 0, lo))
    tl.store(state + STATE_HI, tl.where(upper_rank < 1, common_max(KEY64), hi))


# ---- filter ----


@device_function
def _classify(keys, above_lo, above_hi, weights):
    """Flags (sure 1, band 2^16) of elements (units, 16); the same packed, 16 elements to an int32."""
    flags = tl.where(keys > above_hi, 1, tl.where(keys > above_lo, 0x10000, 0))
    return flags, tl.sum(flags * weights, axis=1)


@device_function
def _store_bits(sure_words, band_words, unit, packed):
    """Units of 16 elements: the little-endian halves of words."""
    tl.store(sure_words.to(tl.pointer_type(tl.int16)) + unit, (packed & 0xFFFF).to(tl.int16))
    tl.store(band_words.to(tl.pointer_type(tl.int16)) + unit, ((packed >> 16) & 0xFFFF).to(tl.int16))


@triton.jit
def filter_kernel(
    header,
    pieces,
    spans,
    state,
    sure_words,
    band_words,
    counts,  # (2, num_tiles) int64: sure, band
    KIND: tl.constexpr,
    KEY64: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """topk_magnitude / filter: one read of every gradient; two bits per element out.

    Traffic    reads 4 B/elem (fp32), 2 B/elem (bf16, fp16); writes 1/4 B/elem.
    Algorithm  keys as integers against two integers; bits are packed by a multiply-add in the thread and a sum over the
               lanes that share 16 elements (4 for fp32, 2 for 16-bit). No scan, no histogram, no atomic per element.
    Cost       SASS of sm_90: 11.3 instructions per fp32 element, 8.9 of them on the integer pipe (64 a clock and SM):
               1.7 T elem/s on 132 SMs at 1.75 GHz, 6.6 TB/s, so memory is the limit. 16 bits: 10.2 and 9.2,
               3.2 TB/s, so the integer pipe is the limit. Counted, not measured.
    Contract   counts exact; words in order of position.
    Launch     one program per tile; UNITS so that a thread holds one vector of 16 B, and has 4 of them in flight.
               Two-dimensional on purpose: with one more dimension, versions of Triton lay threads out differently.
    """
    tile = tl.program_id(0).to(tl.int64)
    span = find_span(spans, tile)
    local = tile - tl.load(span + SPAN_FIRST_TILE)
    numel = tl.minimum(tl.load(span + SPAN_NUMEL) - local * TILE, TILE)
    row = pieces + tl.load(span + SPAN_FIRST_PIECE) * PIECE_WORDS
    address = tl.load(row + PIECE_DATA) + (tl.load(row + PIECE_FIRST) + local * TILE) * item_size(KIND)
    data = typed_pointer(address, KIND)
    first_unit = tl.load(span + SPAN_FIRST_WORD) * 2 + local * (TILE // 16)
    above_lo = last_native_key(tl.load(state + STATE_LO) - 1, KIND, KEY64)
    above_hi = last_native_key(tl.load(state + STATE_HI), KIND, KEY64)
    if KIND != FP64:
        above_lo = above_lo.to(tl.int32)
        above_hi = above_hi.to(tl.int32)

    STEP: tl.constexpr = UNITS * 16
    units = tl.arange(0, UNITS)
    columns = tl.arange(0, 16)[None, :]
    positions = units[:, None] * 16 + columns
    weights = 1 << columns
    # unit [u, i, j] of a block is in step i + 2 j
    steps = tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
    block_units = units[:, None, None] + steps * UNITS
    num_blocks = (numel // (4 * STEP)).to(tl.int32)
    counted = tl.full((UNITS, 16), 0, tl.int32)
    largest = tl.full((UNITS, 16), 0, tl.int64 if KIND == FP64 else tl.int32)
    for b in range(num_blocks):
        # marked as aligned here: what a table of addresses hides, and a function call loses
        block = tl.multiple_of(data + (b * (4 * STEP) + positions), (16, 16))
        bits0 = tl.load(block)
        bits1 = tl.load(block + STEP)
        bits2 = tl.load(block + 2 * STEP)
        bits3 = tl.load(block + 3 * STEP)
        keys0 = native_key(bits0, KIND)
        keys1 = native_key(bits1, KIND)
        keys2 = native_key(bits2, KIND)
        keys3 = native_key(bits3, KIND)
        flags0, packed0 = _classify(keys0, above_lo, above_hi, weights)
        flags1, packed1 = _classify(keys1, above_lo, above_hi, weights)
        flags2, packed2 = _classify(keys2, above_lo, above_hi, weights)
        flags3, packed3 = _classify(keys3, above_lo, above_hi, weights)
        packed = tl.join(tl.join(packed0, packed1), tl.join(packed2, packed3))
        _store_bits(sure_words, band_words, first_unit + b * (4 * UNITS) + block_units, packed)
        counted += flags0 + flags1 + flags2 + flags3
        largest = tl.maximum(largest, tl.maximum(tl.maximum(keys0, keys1), tl.maximum(keys2, keys3)))
    _store_counts(header, span, local, counts, counted)
    if tl.max(largest) >= native_inf(KIND):  # rare: read the tile again
        nonfinite = tl.full((UNITS, 16), 0, tl.int32)
        for b in range(4 * num_blocks):
            block = tl.multiple_of(data + (b * STEP + positions), (16, 16))
            nonfinite += (native_key(tl.load(block), KIND) >= native_inf(KIND)).to(tl.int32)
        _add_nonfinite(state, nonfinite)


@device_function
def _store_counts(header, span, local, counts, counted):
    slot = counts + tl.load(span + SPAN_FIRST_SLOT) + local
    tl.store(slot, tl.sum(counted & 0xFFFF).to(tl.int64))
    band = tl.sum((counted >> 16) & 0xFFFF)
    tl.store(slot + tl.load(header + HEADER_NUM_TILES), band.to(tl.int64))


@device_function
def _add_nonfinite(state, nonfinite):
    total = tl.sum(nonfinite)
    tl.atomic_add(state + STATE_NUM_NONFINITE, total.to(tl.int64), sem="relaxed")


@triton.jit
def filter_gathered_kernel(
    header,
    pieces,
    layouts,
    spans,
    state,
    sure_words,
    band_words,
    counts,
    DTYPES: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """topk_magnitude / filter, element by element: tensor ends, small tensors, strided ones.

    Traffic    reads an element by its strides: a 32-byte sector at worst; writes 1/4 B/elem.
    Algorithm  each element finds its piece by bisection, then its offset from the layout.
    Contract   as the filter's.
    Launch     one program per tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    span = find_span(spans, tile)
    local = tile - tl.load(span + SPAN_FIRST_TILE)
    first = local * TILE
    numel = tl.load(span + SPAN_NUMEL)
    lo = tl.load(state + STATE_LO)
    hi = tl.load(state + STATE_HI)
    max_ndim = tl.load(header + HEADER_MAX_NDIM)
    units = tl.arange(0, UNITS)
    columns = tl.arange(0, 16)[None, :]
    positions = units[:, None] * 16 + columns
    counted = tl.full((UNITS, 16), 0, tl.int32)
    nonfinite = tl.full((UNITS, 16), 0, tl.int32)
    for b in range(TILE // (UNITS * 16)):
        position = first + b * (UNITS * 16) + positions
        valid = position < numel
        keys = span_keys(pieces, layouts, max_ndim, span, position, valid, GATHERED, DTYPES).to(tl.int64)
        keys = tl.where(valid, keys, -1)
        flags, packed = _classify(keys, lo - 1, hi, 1 << columns)
        unit = tl.load(span + SPAN_FIRST_WORD) * 2 + local * (TILE // 16) + b * UNITS + units
        _store_bits(sure_words, band_words, unit, packed)
        counted += flags
        nonfinite += (keys >= common_inf((HAS_FP64 & DTYPES) != 0)).to(tl.int32)
    _store_counts(header, span, local, counts, counted)
    _add_nonfinite(state, nonfinite)
