"""Device functions: keys of elements, and bits of words."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton.language as tl

from ..constants import BF16, FP16, FP32, FP64, HAS_BF16, HAS_FP16, HAS_FP32, HAS_FP64
from ..coordinates import storage_offset
from ..launch import device_function
from .rows import (
    GATHERED,
    PIECE_DATA,
    PIECE_DTYPE,
    PIECE_FIRST,
    PIECE_LAYOUT,
    PIECE_START,
    PIECE_WORDS,
    SPAN_FIRST_PIECE,
    SPAN_FIRST_TILE,
    SPAN_NUM_PIECES,
    SPAN_NUM_SPANS,
    SPAN_WORDS,
)

# ---- keys: csrc/topk_magnitude/topk_magnitude.h says what they are ----


@device_function
def item_size(DTYPE: tl.constexpr):
    """Bytes of an element."""
    size: tl.constexpr = 8 if DTYPE == FP64 else (4 if DTYPE == FP32 else 2)
    return size


@device_function
def native_max(DTYPE: tl.constexpr):
    """The largest key of the dtype itself: that of every NaN."""
    value: tl.constexpr = 0x7FFFFFFFFFFFFFFF if DTYPE == FP64 else (0x7FFFFFFF if DTYPE == FP32 else 0x7FFF)
    return value


@device_function
def native_inf(DTYPE: tl.constexpr):
    """The key of infinity in the dtype itself."""
    value: tl.constexpr = (
        0x7FF0000000000000
        if DTYPE == FP64
        else (0x7F800000 if DTYPE == FP32 else (0x7F80 if DTYPE == BF16 else 0x7C00))
    )
    return value


@device_function
def common_max(KEY64: tl.constexpr):
    """The one key of every NaN."""
    value: tl.constexpr = 0x7FFFFFFFFFFFFFFF if KEY64 else 0x7FFFFFFF
    return value


@device_function
def common_inf(KEY64: tl.constexpr):
    """The key of infinity that all dtypes are compared by."""
    value: tl.constexpr = 0x7FF0000000000000 if KEY64 else 0x7F800000
    return value


@device_function
def typed_pointer(address, DTYPE: tl.constexpr):
    """Floats are loaded as integers: nothing can flush a denormal or quiet a NaN."""
    if DTYPE == FP64:
        return address.to(tl.pointer_type(tl.int64))
    elif DTYPE == FP32:
        return address.to(tl.pointer_type(tl.int32))
    else:
        return address.to(tl.pointer_type(tl.int16))


@device_function
def native_key(bits, DTYPE: tl.constexpr):
    """int32, or int64 for fp64."""
    if DTYPE == FP64:
        return bits & 0x7FFFFFFFFFFFFFFF
    else:
        return bits.to(tl.int32) & native_max(DTYPE)


@device_function
def _float_from_half(key):
    """The fp32 magnitude bits of fp16 ones. A conversion of integers is exact whatever the float modes."""
    mantissa = key & 0x3FF
    denormal = tl.where(mantissa == 0, 0, mantissa.to(tl.float32).to(tl.int32, bitcast=True) - (24 << 23))
    normal = (key << 13) + (112 << 23)
    return tl.where(key >= 0x7C00, 0x7F800000 | (mantissa << 13), tl.where(key < 0x400, denormal, normal))


@device_function
def _double_from_float(key):
    """The fp64 magnitude bits of fp32 ones."""
    wide = key.to(tl.int64)
    mantissa = key & 0x7FFFFF
    denormal = tl.where(mantissa == 0, 0, mantissa.to(tl.float64).to(tl.int64, bitcast=True) - (149 << 52))
    normal = (wide << 29) + (896 << 52)
    inf: tl.constexpr = 0x7FF0000000000000
    return tl.where(key >= 0x7F800000, inf | (mantissa.to(tl.int64) << 29), tl.where(key < 0x800000, denormal, normal))


@device_function
def common_key(key, DTYPE: tl.constexpr, KEY64: tl.constexpr):
    """The keys that compare across dtypes, of native ones."""
    if DTYPE == FP64:
        wide = key
    else:
        if DTYPE == FP32:
            single = key
        elif DTYPE == BF16:
            single = key << 16
        else:
            single = _float_from_half(key)
        wide = _double_from_float(single) if KEY64 else single
    return tl.where(wide > common_inf(KEY64), common_max(KEY64), wide)


@device_function
def last_native_key(common, DTYPE: tl.constexpr, KEY64: tl.constexpr):
    """The largest native key, as an int64 scalar, whose common key is <= `common`; -1 when there is none."""
    if DTYPE == FP64 or (DTYPE == FP32 and not KEY64):
        inf = tl.full((), common_inf(KEY64), tl.int64)
        return tl.where(common >= common_max(KEY64), common, tl.minimum(common, inf))
    else:
        low = tl.full((), -1, tl.int64)
        high = tl.full((), native_max(DTYPE), tl.int64)
        while low < high:
            middle = (low + high + 1) >> 1
            below = common_key(middle.to(tl.int32), DTYPE, KEY64) <= common
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle - 1)
        return low


# ---- where elements are ----


@device_function
def find_span(spans, tile):
    """The row of the span that holds a tile of its kind."""
    high = tl.load(spans + SPAN_NUM_SPANS)
    low = high * 0
    while high - low > 1:
        middle = (low + high) >> 1
        below = tl.load(spans + middle * SPAN_WORDS + SPAN_FIRST_TILE) <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return spans + low * SPAN_WORDS


@device_function
def find_piece(pieces, first, count, value, FIELD: tl.constexpr):
    """Per element: the last of `count` pieces from `first` on whose field is <= value."""
    low = value * 0 + first
    high = low + count
    while count > 1:
        middle = (low + high) >> 1
        below = tl.load(pieces + middle * PIECE_WORDS + FIELD) <= value
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
        count = (count + 1) >> 1
    return low


@device_function
def gather_keys(pieces, layouts, max_ndim, piece, element, valid, DTYPES: tl.constexpr):
    """Common keys of elements of any pieces; 0 where not `valid`. DTYPES: which there are, one bit for each code."""
    row = pieces + piece * PIECE_WORDS
    index = tl.load(row + PIECE_FIRST) + element
    offset = index
    if max_ndim > 0:
        offset = storage_offset(layouts, max_ndim, tl.load(row + PIECE_LAYOUT), index)
    code = tl.load(row + PIECE_DTYPE)
    address = tl.load(row + PIECE_DATA) + offset * tl.where(code == FP64, 8, tl.where(code == FP32, 4, 2))
    KEY64: tl.constexpr = (HAS_FP64 & DTYPES) != 0
    key = (index * 0).to(tl.int64 if KEY64 else tl.int32)
    if HAS_FP32 & DTYPES:
        single = tl.load(typed_pointer(address, FP32), mask=valid & (code == FP32), other=0)
        key = common_key(native_key(single, FP32), FP32, KEY64)
    if (HAS_BF16 | HAS_FP16) & DTYPES:
        half = tl.load(typed_pointer(address, BF16), mask=valid & ((code == BF16) | (code == FP16)), other=0)
        half_key = native_key(half, BF16)
    if HAS_BF16 & DTYPES:
        key = tl.where(code == BF16, common_key(half_key, BF16, KEY64), key)
    if HAS_FP16 & DTYPES:
        key = tl.where(code == FP16, common_key(half_key, FP16, KEY64), key)
    if HAS_FP64 & DTYPES:
        double = tl.load(typed_pointer(address, FP64), mask=valid & (code == FP64), other=0)
        key = tl.where(code == FP64, common_key(native_key(double, FP64), FP64, KEY64), key)
    return key


@device_function
def span_keys(pieces, layouts, max_ndim, span, position, valid, KIND: tl.constexpr, DTYPES: tl.constexpr):
    """Common keys at positions of a span; 0 where not `valid`."""
    first_piece = tl.load(span + SPAN_FIRST_PIECE)
    if KIND == GATHERED:
        position = tl.where(valid, position, 0)
        piece = find_piece(pieces, first_piece, tl.load(span + SPAN_NUM_PIECES), position, PIECE_START)
        element = position - tl.load(pieces + piece * PIECE_WORDS + PIECE_START)
        return gather_keys(pieces, layouts, max_ndim, piece, element, valid, DTYPES)
    else:
        row = pieces + first_piece * PIECE_WORDS
        data = typed_pointer(tl.load(row + PIECE_DATA) + tl.load(row + PIECE_FIRST) * item_size(KIND), KIND)
        key = native_key(tl.load(data + position, mask=valid, other=0), KIND)
        return common_key(key, KIND, (HAS_FP64 & DTYPES) != 0)


# ---- words of 32 elements ----


@device_function
def popcount(word):
    """The number of bits that are set in a uint32, as int32."""
    x = word - ((word >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@device_function
def pop_lowest(word):
    """The lowest bit that is set in a uint32, and the word without it."""
    rest = word & (word - 1)
    return word ^ rest, rest


@device_function
def bit_number(bit):
    """The position of the one bit set in a uint32: a power of two is exact in fp32, its exponent the logarithm."""
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
