"""The kernels of topk_magnitude after the only full read: collect, select, tally, emit."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import device_function
from .keys import bit_number, find_piece, find_span, pop_lowest, popcount, span_keys
from .rows import (
    GATHERED,
    HEADER_CAPACITY,
    HEADER_K,
    HEADER_MAX_NDIM,
    HEADER_NUM_TILES,
    PIECE_FIRST,
    PIECE_START,
    PIECE_TENSOR,
    PIECE_WORDS,
    SPAN_FIRST_PIECE,
    SPAN_FIRST_SLOT,
    SPAN_FIRST_TILE,
    SPAN_FIRST_WORD,
    SPAN_NUM_PIECES,
    SPAN_NUMEL,
    STATE_FAILED,
    STATE_HI,
    STATE_LO,
    STATE_NUM_LISTED,
    STATE_RANK,
    STATE_SELECT_HI,
    STATE_SELECT_LO,
)

DIGIT_BITS = tl.constexpr(11)
NUM_DIGITS = tl.constexpr(2048)


# ---- collect ----


@triton.jit
def collect_kernel(
    header,
    pieces,
    layouts,
    spans,
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
    num_tiles = tl.load(header + HEADER_NUM_TILES)
    num_sure = tl.load(sums + num_tiles - 1)
    num_band = tl.load(sums + 2 * num_tiles - 1)
    rank = tl.load(header + HEADER_K) - num_sure
    lo = tl.load(state + STATE_LO)
    hi = tl.load(state + STATE_HI)
    bracketed = (rank >= 1) & (rank <= num_band)
    num_listed = tl.where((lo < hi) & bracketed, num_band, 0)
    failed = (not bracketed) | (num_listed > tl.load(header + HEADER_CAPACITY))
    num_listed = tl.where(failed, 0, num_listed)
    if tile == 0:  # of every launch: all store the same
        tl.store(state + STATE_SELECT_LO, lo)
        tl.store(state + STATE_SELECT_HI, hi)
        tl.store(state + STATE_RANK, rank)
        tl.store(state + STATE_FAILED, failed.to(tl.int64) + (bracketed & failed).to(tl.int64))
        tl.store(state + STATE_NUM_LISTED, num_listed)
    span = find_span(spans, tile)
    local = tile - tl.load(span + SPAN_FIRST_TILE)
    slot = tl.load(span + SPAN_FIRST_SLOT) + local + num_tiles
    in_tile = tl.load(counts + slot)
    if (in_tile > 0) & (num_listed > 0):
        index = tl.arange(0, TILE // 32)
        inside = index * 32 < tl.load(span + SPAN_NUMEL) - local * TILE
        first_word = tl.load(span + SPAN_FIRST_WORD) + local * (TILE // 32)
        words = tl.load(band_words + first_word + index, mask=inside, other=0)
        words = words.to(tl.uint32, bitcast=True)
        count = popcount(words)
        place = tl.load(sums + slot) - in_tile + (tl.cumsum(count, axis=0) - count)
        max_ndim = tl.load(header + HEADER_MAX_NDIM)
        for _ in range(tl.max(count, axis=0)):
            some = words != 0
            bit, words = pop_lowest(words)
            position = local * TILE + index * 32 + bit_number(bit)
            keys = span_keys(pieces, layouts, max_ndim, span, position, some, KIND, DTYPES)
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
    """topk_magnitude / select, one digit of the band's keys.

    Traffic    reads 4 B (8 B with fp64) per band element, which the L2 holds; one atomic per digit and program at most.
    Algorithm  radix select: histograms of DIGIT_BITS bits inside a program, then added up.
    Contract   counts exact; nothing to do once the bracket is one key.
    Launch     a grid-stride loop of few programs: each of them adds up to 2,048 counts.
    """
    pid = tl.program_id(0).to(tl.int64)
    num_listed = tl.load(state + STATE_NUM_LISTED)
    lo = tl.load(state + STATE_SELECT_LO)
    hi = tl.load(state + STATE_SELECT_HI)
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
    spans,
    state,
    histogram,
    KIND: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """topk_magnitude / select, one digit of all keys: only after a guess that failed.

    Traffic    reads every element: 4 B of fp32; 3 times in all, 6 times with fp64, less where the bracket held.
    Algorithm  as for the list.
    Contract   counts exact.
    Launch     one program per tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    span = find_span(spans, tile)
    first = (tile - tl.load(span + SPAN_FIRST_TILE)) * TILE
    end = tl.minimum(tl.load(span + SPAN_NUMEL), first + TILE)
    lo = tl.load(state + STATE_SELECT_LO)
    hi = tl.load(state + STATE_SELECT_HI)
    if lo < hi:
        shift = _digit_shift(lo, hi)
        max_ndim = tl.load(header + HEADER_MAX_NDIM)
        counted = tl.full((NUM_DIGITS,), 0, tl.int32)
        for start in range(first, end, BLOCK):
            position = start + tl.arange(0, BLOCK)
            valid = position < end
            keys = span_keys(pieces, layouts, max_ndim, span, position, valid, KIND, DTYPES)
            counted += _count_digits(keys, valid, lo, hi, shift)
        index = tl.arange(0, NUM_DIGITS)
        tl.atomic_add(histogram + index, counted.to(tl.int64), mask=counted > 0, sem="relaxed")


@triton.jit
def narrow_kernel(state, histogram):
    """topk_magnitude / select: the bracket becomes the digit that holds the rank.

    Traffic    reads and writes 16 KB, in L2.
    Algorithm  a scan of the digits' counts from the largest digit down.
    Contract   the rank is kept relative to the bracket; the histogram is zero afterwards, for the next digit.
    Launch     one program.
    """
    lo = tl.load(state + STATE_SELECT_LO)
    hi = tl.load(state + STATE_SELECT_HI)
    if (lo < hi) & (tl.load(state + STATE_FAILED) == 0):
        shift = _digit_shift(lo, hi)
        rank = tl.load(state + STATE_RANK)
        index = tl.arange(0, NUM_DIGITS)
        counted = tl.load(histogram + index)
        digit = tl.sum((tl.cumsum(counted, axis=0, reverse=True) >= rank).to(tl.int32), axis=0) - 1
        digit = tl.maximum(digit, 0)
        above = tl.sum(tl.where(index > digit, counted, 0), axis=0)
        lo += digit.to(tl.int64) << shift
        width = tl.full((), 1, tl.int64) << shift
        tl.store(state + STATE_SELECT_LO, lo)
        tl.store(state + STATE_SELECT_HI, tl.minimum(hi - lo, width - 1) + lo)
        tl.store(state + STATE_RANK, rank - above)
        tl.store(histogram + index, tl.full((NUM_DIGITS,), 0, tl.int64))


# ---- tally, emit ----


@triton.jit
def tally_kernel(header, state, counts, sums, listed, tallies, BLOCK: tl.constexpr):
    """topk_magnitude / tally: per tile, the band keys above the threshold and equal to it.

    Traffic    reads 4 B (8 B with fp64) per band element; writes 16 B per tile.
    Algorithm  a tile's keys are consecutive in the list.
    Contract   counts exact; a bracket of one key has no list, and all of it is equal to the threshold.
    Launch     one program of one warp per tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    num_tiles = tl.load(header + HEADER_NUM_TILES)
    in_tile = tl.load(counts + num_tiles + tile)
    end = tl.load(sums + num_tiles + tile)
    greater = tl.full((), 0, tl.int64)
    equal = in_tile  # the bracket is the threshold
    if tl.load(state + STATE_NUM_LISTED) > 0:
        threshold = tl.load(state + STATE_SELECT_LO)
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
    spans,
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
    k = tl.load(header + HEADER_K)
    num_tiles = tl.load(header + HEADER_NUM_TILES)
    span = find_span(spans, tile)
    local = tile - tl.load(span + SPAN_FIRST_TILE)
    slot = tl.load(span + SPAN_FIRST_SLOT) + local
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
    if (tl.load(state + STATE_FAILED) == 0) & (total > 0):
        index = tl.arange(0, TILE // 32)
        inside = index * 32 < tl.load(span + SPAN_NUMEL) - local * TILE
        first_word = tl.load(span + SPAN_FIRST_WORD) + local * (TILE // 32)
        words = tl.load(sure_words + first_word + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
        if greater + ties_here > 0:
            band = tl.load(band_words + first_word + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
            tied = band
            if tl.load(state + STATE_NUM_LISTED) > 0:
                threshold = tl.load(state + STATE_SELECT_LO)
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
        first_piece = tl.load(span + SPAN_FIRST_PIECE)
        num_pieces = tl.load(span + SPAN_NUM_PIECES)
        count = popcount(words)
        place = out + (tl.cumsum(count, axis=0) - count)
        if KIND != GATHERED:
            row = pieces + first_piece * PIECE_WORDS
            base = tl.load(row + PIECE_FIRST) + local * TILE
            tl.atomic_add(selected + tl.load(row + PIECE_TENSOR), total, sem="relaxed")
        for _ in range(tl.max(count, axis=0)):
            some = words != 0
            bit, words = pop_lowest(words)
            position = index * 32 + bit_number(bit)
            if KIND == GATHERED:
                position = tl.where(some, position + local * TILE, 0)
                piece = find_piece(pieces, first_piece, num_pieces, position, PIECE_START)
                row = pieces + piece * PIECE_WORDS
                flat = tl.load(row + PIECE_FIRST) + position - tl.load(row + PIECE_START)
                tl.atomic_add(selected + tl.load(row + PIECE_TENSOR), some.to(tl.int64), mask=some, sem="relaxed")
            else:
                flat = base + position
            tl.store(indices + place, flat, mask=some & (place < k))
            place += 1
