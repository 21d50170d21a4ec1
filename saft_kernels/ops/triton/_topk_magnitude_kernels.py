"""The kernels of topk_magnitude, in the order in which they run."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ._keys import (
    FP64,
    GATHERED,
    PIECE_COLUMNS,
    bit_number,
    common_inf,
    common_max,
    find_piece,
    find_segment,
    gather_keys,
    item_size,
    last_native_key,
    native_inf,
    native_key,
    pop_lowest,
    popcount,
    segment_keys,
    typed_pointer,
)
from ._launch import device_function

# Half-width of the bracket in binomial standard deviations. Gradients are correlated along rows and columns:
# structured gradients gave rank errors up to 2.4 sigma with this sample.
SIGMAS: tl.constexpr = tl.constexpr(6.0)
SAMPLE_BITS: tl.constexpr = tl.constexpr(16)
DIGIT_BITS: tl.constexpr = tl.constexpr(11)
NUM_DIGITS: tl.constexpr = tl.constexpr(2048)

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
    num_lines = tl.load(header + NUM_LINES)
    num_sampled = tl.load(header + NUM_SAMPLED_LINES)
    j = pid * LINES + tl.arange(0, LINES).to(tl.int64)
    sampled = j < num_sampled
    jitter = _mix((j + 1).to(tl.uint32)).to(tl.int64) & 0xFFFF
    stride = (num_lines << 16) // num_sampled
    line = tl.minimum((j * stride + ((jitter * stride) >> 16)) >> 16, num_lines - 1)
    piece = find_piece(pieces, tl.full((), 0, tl.int64), tl.load(header + NUM_PIECES), line, 7)
    row = pieces + piece * PIECE_COLUMNS
    element = ((line - tl.load(row + 7)) * LINE)[:, None] + tl.arange(0, LINE)[None, :]
    valid = sampled[:, None] & (element < tl.load(row + 3)[:, None])
    piece = piece[:, None] + tl.full((1, LINE), 0, tl.int64)
    keys = gather_keys(pieces, layouts, tl.load(header + MAX_NDIM), piece, element, valid, DTYPES)
    shift: tl.constexpr = (63 if DTYPES >= 8 else 31) - SAMPLE_BITS
    bins = (keys >> shift).to(tl.int32)
    count = tl.sum(valid.to(tl.int32))
    tl.atomic_add(state + SAMPLED, count.to(tl.int64), sem="relaxed")
    counted = valid & (bins > 0)
    largest = tl.max(tl.where(valid, bins, 0))
    smallest = tl.min(tl.where(valid, bins, largest))
    if largest == smallest:
        tl.atomic_add(histogram + largest, count, mask=largest > 0, sem="relaxed")
    else:
        tl.atomic_add(histogram + bins, tl.full((LINES, LINE), 1, tl.int32), mask=counted, sem="relaxed")


@device_function
def _bin_at_rank(histogram, row_sums, rank, SIDE: tl.constexpr):
    """The bin that holds descending rank `rank` (1 = largest) among SIDE * SIDE; 0 when the bins hold fewer."""
    from_here = tl.cumsum(row_sums, axis=0, reverse=True)
    row = tl.maximum(tl.sum((from_here >= rank).to(tl.int32), axis=0) - 1, 0)
    above = tl.sum(tl.where(tl.arange(0, SIDE) > row, row_sums, 0), axis=0)
    bins = tl.load(histogram + row * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    from_here = tl.cumsum(bins, axis=0, reverse=True) + above
    return row * SIDE + tl.maximum(tl.sum((from_here >= rank).to(tl.int32), axis=0) - 1, 0)


@triton.jit
def bracket_kernel(header, state, histogram, KEY64: tl.constexpr, SIDE: tl.constexpr):
    """topk_magnitude / bracket: from the sample's histogram to [lo, hi]. One program; 256 KB from L2."""
    index = tl.arange(0, SIDE)
    row_sums = tl.sum(tl.load(histogram + index[:, None] * SIDE + index[None, :]), axis=1).to(tl.int64)
    sampled = tl.load(state + SAMPLED)
    k = tl.load(header + K)
    numel = tl.load(header + NUMEL)
    share = k.to(tl.float32) / numel.to(tl.float32)
    rank = share * sampled.to(tl.float32)
    margin = SIGMAS * tl.sqrt(rank * (1.0 - share)) + SIGMAS * SIGMAS / 2
    lower_rank = (rank + margin).to(tl.int64) + 1
    upper_rank = (rank - margin).to(tl.int64)
    shift: tl.constexpr = (63 if KEY64 else 31) - SAMPLE_BITS
    lo = _bin_at_rank(histogram, row_sums, lower_rank, SIDE).to(tl.int64) << shift
    upper_bin = _bin_at_rank(histogram, row_sums, upper_rank, SIDE).to(tl.int64)
    grain = tl.load(header + GRAIN)  # keys are multiples of it: only NaN's is not
    hi = ((upper_bin + 1) << shift) - 1
    hi = tl.where(hi < common_inf(KEY64), hi - (hi & (grain - 1)), hi)
    hi = tl.where(upper_bin == 0, 0, hi)  # fewer non-zeros than k: zero is what fills that bin
    tl.store(state + LO, tl.where(lower_rank >= sampled, 0, lo))
    tl.store(state + HI, tl.where(upper_rank < 1, common_max(KEY64), hi))


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
    segments,
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
    segment = find_segment(segments, tile)
    local = tile - tl.load(segment)
    numel = tl.minimum(tl.load(segment + 3) - local * TILE, TILE)
    row = pieces + tl.load(segment + 4) * PIECE_COLUMNS
    address = tl.load(row) + (tl.load(row + 1) + local * TILE) * item_size(KIND)
    data = typed_pointer(address, KIND)
    first_unit = tl.load(segment + 2) * 2 + local * (TILE // 16)
    above_lo = last_native_key(tl.load(state + LO) - 1, KIND, KEY64)
    above_hi = last_native_key(tl.load(state + HI), KIND, KEY64)
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
    _store_counts(header, segment, local, counts, counted)
    if tl.max(largest) >= native_inf(KIND):  # rare: read the tile again
        nonfinite = tl.full((UNITS, 16), 0, tl.int32)
        for b in range(4 * num_blocks):
            block = tl.multiple_of(data + (b * STEP + positions), (16, 16))
            nonfinite += (native_key(tl.load(block), KIND) >= native_inf(KIND)).to(tl.int32)
        _add_nonfinite(state, nonfinite)


@device_function
def _store_counts(header, segment, local, counts, counted):
    slot = counts + tl.load(segment + 1) + local
    tl.store(slot, tl.sum(counted & 0xFFFF).to(tl.int64))
    band = tl.sum((counted >> 16) & 0xFFFF)
    tl.store(slot + tl.load(header + NUM_TILES), band.to(tl.int64))


@device_function
def _add_nonfinite(state, nonfinite):
    total = tl.sum(nonfinite)
    tl.atomic_add(state + NONFINITE, total.to(tl.int64), sem="relaxed")


@triton.jit
def filter_gathered_kernel(
    header,
    pieces,
    layouts,
    segments,
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
    segment = find_segment(segments, tile)
    local = tile - tl.load(segment)
    first = local * TILE
    numel = tl.load(segment + 3)
    lo = tl.load(state + LO)
    hi = tl.load(state + HI)
    max_ndim = tl.load(header + MAX_NDIM)
    units = tl.arange(0, UNITS)
    columns = tl.arange(0, 16)[None, :]
    positions = units[:, None] * 16 + columns
    counted = tl.full((UNITS, 16), 0, tl.int32)
    nonfinite = tl.full((UNITS, 16), 0, tl.int32)
    for b in range(TILE // (UNITS * 16)):
        position = first + b * (UNITS * 16) + positions
        valid = position < numel
        keys = segment_keys(pieces, layouts, max_ndim, segment, position, valid, GATHERED, DTYPES).to(tl.int64)
        keys = tl.where(valid, keys, -1)
        flags, packed = _classify(keys, lo - 1, hi, 1 << columns)
        unit = tl.load(segment + 2) * 2 + local * (TILE // 16) + b * UNITS + units
        _store_bits(sure_words, band_words, unit, packed)
        counted += flags
        nonfinite += (keys >= common_inf(DTYPES >= 8)).to(tl.int32)
    _store_counts(header, segment, local, counts, counted)
    _add_nonfinite(state, nonfinite)


# ---- collect ----


@triton.jit
def collect_kernel(
    header,
    pieces,
    layouts,
    segments,
    state,
    band_words,
    counts,
    sums,  # inclusive sums of `counts` over tiles
    listed,  # (capacity,) keys
    KIND: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE: tl.constexpr,
):
    """topk_magnitude / collect: the verdict on the bracket; if it holds, the keys of the band in order of position.

    Traffic    reads 1/8 B/elem, and a 32-byte sector per band element; writes 4 B per band element.
    Algorithm  popcounts of words, a scan inside the tile; then the i-th bit of every word at once.
    Contract   the list is complete or the verdict is: failed. A bracket of one key needs no list.
    Launch     one program per tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.load(header + NUM_TILES)
    num_sure = tl.load(sums + num_tiles - 1)
    num_band = tl.load(sums + 2 * num_tiles - 1)
    rank = tl.load(header + K) - num_sure
    lo = tl.load(state + LO)
    hi = tl.load(state + HI)
    bracketed = (rank >= 1) & (rank <= num_band)
    num_listed = tl.where((lo < hi) & bracketed, num_band, 0)
    failed = (not bracketed) | (num_listed > tl.load(header + CAPACITY))
    num_listed = tl.where(failed, 0, num_listed)
    if tile == 0:  # of every launch: all store the same
        tl.store(state + SELECT_LO, lo)
        tl.store(state + SELECT_HI, hi)
        tl.store(state + RANK, rank)
        tl.store(state + FAILED, failed.to(tl.int64) + (bracketed & failed).to(tl.int64))
        tl.store(state + NUM_LISTED, num_listed)
    segment = find_segment(segments, tile)
    local = tile - tl.load(segment)
    slot = tl.load(segment + 1) + local + num_tiles
    in_tile = tl.load(counts + slot)
    if (in_tile > 0) & (num_listed > 0):
        index = tl.arange(0, TILE // 32)
        inside = index * 32 < tl.load(segment + 3) - local * TILE
        words = tl.load(band_words + tl.load(segment + 2) + local * (TILE // 32) + index, mask=inside, other=0)
        words = words.to(tl.uint32, bitcast=True)
        count = popcount(words)
        place = tl.load(sums + slot) - in_tile + (tl.cumsum(count, axis=0) - count)
        max_ndim = tl.load(header + MAX_NDIM)
        for _ in range(tl.max(count, axis=0)):
            some = words != 0
            bit, words = pop_lowest(words)
            position = local * TILE + index * 32 + bit_number(bit)
            keys = segment_keys(pieces, layouts, max_ndim, segment, position, some, KIND, DTYPES)
            tl.store(listed + place, keys, mask=some)
            place += 1


# ---- select ----


@device_function
def _digit_shift(lo, hi):
    return tl.maximum(tl.sum((((hi - lo) >> tl.arange(0, 64)) > 0).to(tl.int32), axis=0) - DIGIT_BITS, 0)


@device_function
def _count_digits(keys, valid, lo, hi, shift):
    """Counts of (key - lo) >> shift for the keys in [lo, hi]."""
    keys = keys.to(tl.int64)
    valid = valid & (keys >= lo) & (keys <= hi)
    digits = tl.where(valid, (keys - lo) >> shift, 0).to(tl.int32)
    counted = tl.histogram(digits, NUM_DIGITS)
    excess = tl.sum((~valid).to(tl.int32), axis=0)
    return counted - tl.where(tl.arange(0, NUM_DIGITS) == 0, excess, 0)


@triton.jit
def histogram_list_kernel(state, listed, histogram, BLOCK: tl.constexpr):
    """topk_magnitude / select, one digit of the band's keys: an L2-resident read of 4 B per band element."""
    pid = tl.program_id(0).to(tl.int64)
    num_listed = tl.load(state + NUM_LISTED)
    lo = tl.load(state + SELECT_LO)
    hi = tl.load(state + SELECT_HI)
    if (lo < hi) & (pid * BLOCK < num_listed):
        shift = _digit_shift(lo, hi)
        counted = tl.full((NUM_DIGITS,), 0, tl.int32)
        for start in range(pid * BLOCK, num_listed, tl.num_programs(0).to(tl.int64) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            valid = index < num_listed
            keys = tl.load(listed + index, mask=valid, other=0)
            counted += _count_digits(keys, valid, lo, hi, shift)
        index = tl.arange(0, NUM_DIGITS)
        tl.atomic_add(histogram + index, counted.to(tl.int64), mask=counted > 0, sem="relaxed")


@triton.jit
def histogram_data_kernel(
    header,
    pieces,
    layouts,
    segments,
    state,
    histogram,
    KIND: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """topk_magnitude / select, one digit of all keys: a full read, only after a guess that failed."""
    tile = tl.program_id(0).to(tl.int64)
    segment = find_segment(segments, tile)
    first = (tile - tl.load(segment)) * TILE
    end = tl.minimum(tl.load(segment + 3), first + TILE)
    lo = tl.load(state + SELECT_LO)
    hi = tl.load(state + SELECT_HI)
    if lo < hi:
        shift = _digit_shift(lo, hi)
        max_ndim = tl.load(header + MAX_NDIM)
        counted = tl.full((NUM_DIGITS,), 0, tl.int32)
        for start in range(first, end, BLOCK):
            position = start + tl.arange(0, BLOCK)
            valid = position < end
            keys = segment_keys(pieces, layouts, max_ndim, segment, position, valid, KIND, DTYPES)
            counted += _count_digits(keys, valid, lo, hi, shift)
        index = tl.arange(0, NUM_DIGITS)
        tl.atomic_add(histogram + index, counted.to(tl.int64), mask=counted > 0, sem="relaxed")


@triton.jit
def narrow_kernel(state, histogram):
    """topk_magnitude / select: the bracket becomes the digit that holds the rank; the histogram becomes zero."""
    lo = tl.load(state + SELECT_LO)
    hi = tl.load(state + SELECT_HI)
    if (lo < hi) & (tl.load(state + FAILED) == 0):
        shift = _digit_shift(lo, hi)
        rank = tl.load(state + RANK)
        index = tl.arange(0, NUM_DIGITS)
        counted = tl.load(histogram + index)
        digit = tl.sum((tl.cumsum(counted, axis=0, reverse=True) >= rank).to(tl.int32), axis=0) - 1
        digit = tl.maximum(digit, 0)
        above = tl.sum(tl.where(index > digit, counted, 0), axis=0)
        lo += digit.to(tl.int64) << shift
        width = tl.full((), 1, tl.int64) << shift
        tl.store(state + SELECT_LO, lo)
        tl.store(state + SELECT_HI, tl.minimum(hi - lo, width - 1) + lo)
        tl.store(state + RANK, rank - above)
        tl.store(histogram + index, tl.full((NUM_DIGITS,), 0, tl.int64))


# ---- tally, emit ----


@triton.jit
def tally_kernel(header, state, counts, sums, listed, tallies, BLOCK: tl.constexpr):
    """topk_magnitude / tally: per tile, the band keys above the threshold and equal to it. 4 B per band element."""
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.load(header + NUM_TILES)
    in_tile = tl.load(counts + num_tiles + tile)
    end = tl.load(sums + num_tiles + tile)
    greater = tl.full((), 0, tl.int64)
    equal = in_tile  # the bracket is the threshold
    if tl.load(state + NUM_LISTED) > 0:
        threshold = tl.load(state + SELECT_LO)
        equal = tl.full((), 0, tl.int64)
        for start in range(end - in_tile, end, BLOCK):
            index = start + tl.arange(0, BLOCK)
            keys = tl.load(listed + index, mask=index < end, other=-1)
            greater += tl.sum((keys > threshold).to(tl.int32), axis=0)
            equal += tl.sum((keys == threshold).to(tl.int32), axis=0)
    tl.store(tallies + tile, greater)
    tl.store(tallies + num_tiles + tile, equal)


@device_function
def _first_bits(words, number):
    """The first `number` set bits of a tile's words."""
    count = popcount(words)
    before = tl.cumsum(count, axis=0) - count
    rest = words
    kept = words ^ words
    for _ in range(tl.max(count, axis=0)):
        bit, rest = pop_lowest(rest)
        kept = kept | tl.where(before < number, bit, 0)
        before += 1
    return kept


@triton.jit
def emit_kernel(
    header,
    pieces,
    segments,
    state,
    sure_words,
    band_words,
    counts,
    sums,
    tallies,
    tally_sums,  # inclusive sums of `tallies` over tiles
    listed,
    indices,  # (k,) int64
    selected,  # (num_tensors,) int64, zero: how many of each tensor
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """topk_magnitude / emit: the selected positions of each tile, ascending.

    Traffic    reads 1/4 B/elem and 4 B per band element; writes 8 B per selected element.
    Algorithm  the band's winners join the sure bits; a scan of popcounts; then the i-th bit of every word at once.
    Contract   of elements equal to the threshold, those at the lowest positions; nothing is written when the verdict
               was: failed.
    Launch     one program per tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    k = tl.load(header + K)
    num_tiles = tl.load(header + NUM_TILES)
    segment = find_segment(segments, tile)
    local = tile - tl.load(segment)
    slot = tl.load(segment + 1) + local
    in_sure = tl.load(counts + slot)
    in_band = tl.load(counts + num_tiles + slot)
    greater = tl.load(tallies + slot)
    equal = tl.load(tallies + num_tiles + slot)
    greater_before = tl.load(tally_sums + slot) - greater
    equal_before = tl.load(tally_sums + num_tiles + slot) - equal
    # ties wanted in all, before this tile, in this tile
    ties = k - tl.load(sums + num_tiles - 1) - tl.load(tally_sums + num_tiles - 1)
    ties_before = tl.minimum(ties, equal_before)
    ties_here = tl.minimum(ties - ties_before, equal)
    out = tl.load(sums + slot) - in_sure + greater_before + ties_before
    total = in_sure + greater + ties_here
    if (tl.load(state + FAILED) == 0) & (total > 0):
        index = tl.arange(0, TILE // 32)
        inside = index * 32 < tl.load(segment + 3) - local * TILE
        first_word = tl.load(segment + 2) + local * (TILE // 32)
        words = tl.load(sure_words + first_word + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
        if greater + ties_here > 0:
            band = tl.load(band_words + first_word + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
            tied = band
            if tl.load(state + NUM_LISTED) > 0:
                threshold = tl.load(state + SELECT_LO)
                count = popcount(band)
                place = tl.load(sums + num_tiles + slot) - in_band + (tl.cumsum(count, axis=0) - count)
                tied = band ^ band
                for _ in range(tl.max(count, axis=0)):
                    some = band != 0
                    bit, band = pop_lowest(band)
                    keys = tl.load(listed + place, mask=some, other=-1)
                    words = words | tl.where(keys > threshold, bit, 0)
                    tied = tied | tl.where(keys == threshold, bit, 0)
                    place += 1
            if ties_here < equal:
                tied = _first_bits(tied, ties_here)
            words = words | tied
        first_piece = tl.load(segment + 4)
        num_pieces = tl.load(segment + 5)
        count = popcount(words)
        place = out + (tl.cumsum(count, axis=0) - count)
        if KIND != GATHERED:
            row = pieces + first_piece * PIECE_COLUMNS
            base = tl.load(row + 1) + local * TILE
            tl.atomic_add(selected + tl.load(row + 6), total, sem="relaxed")
        for _ in range(tl.max(count, axis=0)):
            some = words != 0
            bit, words = pop_lowest(words)
            position = index * 32 + bit_number(bit)
            if KIND == GATHERED:
                position = tl.where(some, position + local * TILE, 0)
                piece = find_piece(pieces, first_piece, num_pieces, position, 2)
                row = pieces + piece * PIECE_COLUMNS
                flat = tl.load(row + 1) + position - tl.load(row + 2)
                tl.atomic_add(selected + tl.load(row + 6), some.to(tl.int64), mask=some, sem="relaxed")
            else:
                flat = base + position
            tl.store(indices + place, flat, mask=some & (place < k))
            place += 1
