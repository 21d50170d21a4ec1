"""The kernels of sparse_adamw: the scalars that are on the device, then the step."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM102  # the outer condition is a constant that the compiler knows

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from ...dtypes import DTYPE_CODES
from ..constants import BF16, FP16, FP32, FP64, HAS_BF16, HAS_FP16, HAS_FP32, HAS_FP64, row_dtype
from ..coordinates import TILE_FIRST, TILE_LAST, TILE_SEGMENT, TILE_WORDS, load_index, storage_offset
from ..launch import device_function

# One segment. Addresses of what it may lack are 0; that of its gradient moves from step to step, and is elsewhere
SEGMENT_INDICES = tl.constexpr(0)
SEGMENT_INDEX_BYTES = tl.constexpr(1)
SEGMENT_EXP_AVG = tl.constexpr(2)
SEGMENT_EXP_AVG_SQ = tl.constexpr(3)
SEGMENT_MAX_EXP_AVG_SQ = tl.constexpr(4)
SEGMENT_MASTER = tl.constexpr(5)
SEGMENT_GRAD_IS_COMPACT = tl.constexpr(6)  # one value per coordinate
SEGMENT_HYPER = tl.constexpr(7)  # the row of scalars that applies
SEGMENT_KIND = tl.constexpr(8)  # see below
SEGMENT_STATE_LIKE_PARAM = tl.constexpr(9)  # whether the state has the parameter's strides
SEGMENT_PARAM_NDIM = tl.constexpr(10)
SEGMENT_PARAM_LAYOUT = tl.constexpr(11)  # where in the layouts it begins
SEGMENT_GRAD_NDIM = tl.constexpr(12)
SEGMENT_GRAD_LAYOUT = tl.constexpr(13)
SEGMENT_PARAM = tl.constexpr(14)
SEGMENT_WORDS = tl.constexpr(16)
SEGMENT = row_dtype("SEGMENT", globals())

# The kind of a segment is its parameter's dtype, or that of a 16-bit parameter whose gradient is fp32
BF16_FP32 = tl.constexpr(len(DTYPE_CODES))
FP16_FP32 = tl.constexpr(len(DTYPE_CODES) + 1)
HAS_BF16_FP32 = tl.constexpr(1 << BF16_FP32.value)
HAS_FP16_FP32 = tl.constexpr(1 << FP16_FP32.value)
KINDS = {
    **{(dtype, dtype): code for dtype, code in DTYPE_CODES.items()},
    (torch.bfloat16, torch.float32): BF16_FP32.value,
    (torch.float16, torch.float32): FP16_FP32.value,
}

# What the element math needs of one hyper, fp64
SCALAR_DECAY = tl.constexpr(0)
SCALAR_ONE_MINUS_BETA1 = tl.constexpr(1)
SCALAR_BETA2 = tl.constexpr(2)
SCALAR_ONE_MINUS_BETA2 = tl.constexpr(3)
SCALAR_STEP_SIZE = tl.constexpr(4)
SCALAR_BIAS_CORRECTION2_SQRT = tl.constexpr(5)
SCALAR_EPS = tl.constexpr(6)
SCALAR_INVERSE_GRAD_SCALE = tl.constexpr(7)  # negative to maximize
SCALAR_SKIP = tl.constexpr(8)  # the same in every row
SCALAR_WORDS = tl.constexpr(16)
SCALAR = row_dtype("SCALAR", globals(), of=np.float64)

# What they are computed from where some are on the device
INPUT_LR = tl.constexpr(0)
INPUT_STEP = tl.constexpr(1)
INPUT_GRAD_SCALE = tl.constexpr(2)
INPUT_BETA1 = tl.constexpr(3)
INPUT_BETA2 = tl.constexpr(4)
INPUT_LOG_BETA1 = tl.constexpr(5)
INPUT_LOG_BETA2 = tl.constexpr(6)
INPUT_EPS = tl.constexpr(7)
INPUT_WEIGHT_DECAY = tl.constexpr(8)
INPUT_SIGN = tl.constexpr(9)  # of the gradient: -1 to maximize
# addresses of fp64 values, or of fp32 ones and 1: no address of a value is odd. 0: the number above applies
INPUT_LR_AT = tl.constexpr(10)
INPUT_STEP_AT = tl.constexpr(11)
INPUT_GRAD_SCALE_AT = tl.constexpr(12)
INPUT_FOUND_INF_AT = tl.constexpr(13)
INPUT_WORDS = tl.constexpr(SCALAR_WORDS.value)  # one row of words, one of each
INPUT = row_dtype("INPUT", globals(), of=np.float64)


# ---- scalars ----


@device_function
def _scalar(number, address):
    """The value at an address, if there is one; else the number."""
    single = (address & 1) != 0
    double = (address != 0) & ((address & 1) == 0)
    from_single = tl.load((address - 1).to(tl.pointer_type(tl.float32)), mask=single, other=0.0).to(tl.float64)
    from_double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=double, other=0.0)
    return tl.where(single, from_single, tl.where(double, from_double, number))


@triton.jit
def scalars_kernel(inputs, scalars, HYPERS: tl.constexpr):
    """sparse_adamw / scalars: lr, step, grad_scale and found_inf from where they are on the device.

    Traffic    256 B per hyper, and the tensors.
    Algorithm  beta^step as exp(step * log(beta)); the logarithm comes from the host. All in fp64: done once here, as
               some GPUs have one fp64 unit for 64 fp32 units, and every program of the step would repeat it.
    Contract   what the host computes when it knows the numbers, to some roundings of 2^-53.
    Launch     one program, and only when there are tensors to read.
    """
    hyper = tl.arange(0, HYPERS)
    words = inputs + hyper * INPUT_WORDS
    values = inputs.to(tl.pointer_type(tl.float64)) + hyper * INPUT_WORDS
    lr = _scalar(tl.load(values + INPUT_LR), tl.load(words + INPUT_LR_AT))
    step = _scalar(tl.load(values + INPUT_STEP), tl.load(words + INPUT_STEP_AT))
    grad_scale = _scalar(tl.load(values + INPUT_GRAD_SCALE), tl.load(words + INPUT_GRAD_SCALE_AT))
    found_inf = _scalar(lr * 0.0, tl.load(words + INPUT_FOUND_INF_AT))
    skip = tl.max((found_inf != 0.0).to(tl.int32), axis=0)
    beta1 = tl.load(values + INPUT_BETA1)
    beta2 = tl.load(values + INPUT_BETA2)
    bias_correction1 = 1.0 - tl.exp(step * tl.load(values + INPUT_LOG_BETA1))
    bias_correction2 = 1.0 - tl.exp(step * tl.load(values + INPUT_LOG_BETA2))
    out = scalars.to(tl.pointer_type(tl.float64)) + hyper * SCALAR_WORDS
    tl.store(out + SCALAR_DECAY, 1.0 - lr * tl.load(values + INPUT_WEIGHT_DECAY))
    tl.store(out + SCALAR_ONE_MINUS_BETA1, 1.0 - beta1)
    tl.store(out + SCALAR_BETA2, beta2)
    tl.store(out + SCALAR_ONE_MINUS_BETA2, 1.0 - beta2)
    tl.store(out + SCALAR_STEP_SIZE, lr / bias_correction1)
    tl.store(out + SCALAR_BIAS_CORRECTION2_SQRT, tl.sqrt(bias_correction2))
    tl.store(out + SCALAR_EPS, tl.load(values + INPUT_EPS))
    tl.store(out + SCALAR_INVERSE_GRAD_SCALE, tl.load(values + INPUT_SIGN) / grad_scale)
    tl.store(out + SCALAR_SKIP, tl.full((HYPERS,), 0.0, tl.float64) + skip.to(tl.float64))


# ---- elements ----


@device_function
def _load(address, offset, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The elements as they are stored; bf16 as bits, for the interpreter would not round it as the hardware does."""
    STORED: tl.constexpr = tl.int16 if TYPE == tl.bfloat16 else TYPE
    pointer = address.to(tl.pointer_type(STORED)) + offset
    if ALIGNED:
        # 4 elements of 16 bits as well: with 8, Triton moves the moments between threads through shared memory
        VECTOR: tl.constexpr = 8 if TYPE.primitive_bitwidth == 16 else 16
        pointer = tl.multiple_of(pointer, VECTOR)
    return tl.load(pointer, mask=mask)


@device_function
def _store(address, offset, stored, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    STORED: tl.constexpr = tl.int16 if TYPE == tl.bfloat16 else TYPE
    pointer = address.to(tl.pointer_type(STORED)) + offset
    if ALIGNED:
        VECTOR: tl.constexpr = 8 if TYPE.primitive_bitwidth == 16 else 16
        pointer = tl.multiple_of(pointer, VECTOR)
    tl.store(pointer, stored, mask=mask)


@device_function
def _to_opmath(stored, TYPE: tl.constexpr):
    """The exact value in the compute type."""
    if TYPE == tl.bfloat16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == tl.float16:
        return stored.to(tl.float32)
    else:
        return stored


@device_function
def _from_opmath(value, TYPE: tl.constexpr):
    """The value as it is stored: rounded to nearest, ties to even."""
    if TYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value != value, 0x7FFF, rounded).to(tl.int16)
    elif TYPE == tl.float16:
        return value.to(tl.float16)
    else:
        return value


@device_function
def _element(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, amsgrad, scalars, TYPE: tl.constexpr):
    """The step of an element: csrc/sparse_adamw/sparse_adamw.h's operations in their order, each rounded by itself."""
    decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps, inverse_grad_scale = scalars
    grad = grad * inverse_grad_scale
    param = param * decay
    difference = grad - exp_avg
    exp_avg = tl.where(
        one_minus_beta1 < 0.5, exp_avg + difference * one_minus_beta1, grad - difference * (1.0 - one_minus_beta1)
    )
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad
    # NaN propagates, as in torch.maximum
    kept = (max_exp_avg_sq >= exp_avg_sq) | (max_exp_avg_sq != max_exp_avg_sq)
    max_exp_avg_sq = tl.where(kept, max_exp_avg_sq, exp_avg_sq)
    second_moment = tl.where(amsgrad, max_exp_avg_sq, exp_avg_sq)
    if TYPE == tl.float64:  # whose root and quotient are always the nearest
        denom = tl.sqrt(second_moment) / bias_correction2_sqrt + eps
        param = param - step_size * (exp_avg / denom)
    else:
        denom = tl.div_rn(tl.sqrt_rn(second_moment), bias_correction2_sqrt) + eps
        param = param - step_size * tl.div_rn(exp_avg, denom)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


@device_function
def _block(
    addresses,
    param_at,
    grad_at,
    state_at,
    valid,  # None: all of it
    scalars,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Reads, updates and writes elements at offsets from the addresses."""
    STATE: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    param_address, grad_address, exp_avg_address, exp_avg_sq_address, max_exp_avg_sq_address, master_address = addresses
    amsgrad = max_exp_avg_sq_address != 0
    if ALIGNED:
        has_max = amsgrad
        has_master = master_address != 0
    else:
        has_max = valid & amsgrad
        has_master = valid & (master_address != 0)
    exp_avg = _load(exp_avg_address, state_at, valid, STATE, ALIGNED)
    exp_avg_sq = _load(exp_avg_sq_address, state_at, valid, STATE, ALIGNED)
    max_exp_avg_sq = _load(max_exp_avg_sq_address, state_at, has_max, STATE, ALIGNED)
    stored = _load(param_address, param_at, valid, PARAM, ALIGNED)
    grad = _to_opmath(_load(grad_address, grad_at, valid, GRAD, ALIGNED), GRAD)
    param = _to_opmath(stored, PARAM)
    if PARAM.primitive_bitwidth == 16:
        # the parameter wins when someone else wrote it: open_clip clamps logit_scale after each step
        master = _load(master_address, state_at, has_master, tl.float32, ALIGNED)
        rounded = _from_opmath(master, PARAM).to(tl.int16, bitcast=True)
        param = tl.where(has_master & (rounded == stored.to(tl.int16, bitcast=True)), master, param)
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = _element(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, amsgrad, scalars, PARAM
    )
    _store(exp_avg_address, state_at, exp_avg, valid, STATE, ALIGNED)
    _store(exp_avg_sq_address, state_at, exp_avg_sq, valid, STATE, ALIGNED)
    _store(max_exp_avg_sq_address, state_at, max_exp_avg_sq, has_max, STATE, ALIGNED)
    _store(param_address, param_at, _from_opmath(param, PARAM), valid, PARAM, ALIGNED)
    if PARAM.primitive_bitwidth == 16:
        _store(master_address, state_at, param, has_master, tl.float32, ALIGNED)


@device_function
def _tile(
    segment,
    grad_address,
    layouts,
    hyper,
    first,
    last,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DIRECT_BLOCK: tl.constexpr,
):
    """Makes the step of coordinates [first, last) of one segment."""
    OPMATH: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    scalars = (
        tl.load(hyper + SCALAR_DECAY).to(OPMATH),
        tl.load(hyper + SCALAR_ONE_MINUS_BETA1).to(OPMATH),
        tl.load(hyper + SCALAR_BETA2).to(OPMATH),
        tl.load(hyper + SCALAR_ONE_MINUS_BETA2).to(OPMATH),
        tl.load(hyper + SCALAR_STEP_SIZE).to(OPMATH),
        tl.load(hyper + SCALAR_BIAS_CORRECTION2_SQRT).to(OPMATH),
        tl.load(hyper + SCALAR_EPS).to(OPMATH),
        tl.load(hyper + SCALAR_INVERSE_GRAD_SCALE).to(OPMATH),
    )
    param = tl.load(segment + SEGMENT_PARAM)
    grad = tl.load(grad_address)
    exp_avg = tl.load(segment + SEGMENT_EXP_AVG)
    exp_avg_sq = tl.load(segment + SEGMENT_EXP_AVG_SQ)
    max_exp_avg_sq = tl.load(segment + SEGMENT_MAX_EXP_AVG_SQ)
    master = tl.load(segment + SEGMENT_MASTER)
    addresses = (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master)
    indices = tl.load(segment + SEGMENT_INDICES)
    param_ndim = tl.load(segment + SEGMENT_PARAM_NDIM)
    grad_ndim = tl.load(segment + SEGMENT_GRAD_NDIM)

    aligned = ((param | grad | exp_avg | exp_avg_sq | max_exp_avg_sq | master) & 15) == 0
    if (indices == 0) & (param_ndim == 0) & (grad_ndim == 0) & aligned:
        direct_last = last - (last - first) % DIRECT_BLOCK
        for start in range(first, direct_last, DIRECT_BLOCK):
            position = start + tl.arange(0, DIRECT_BLOCK)
            _block(addresses, position, position, position, None, scalars, PARAM, GRAD, True)
        first = direct_last

    index_bytes = tl.load(segment + SEGMENT_INDEX_BYTES)
    compact = tl.load(segment + SEGMENT_GRAD_IS_COMPACT) != 0
    state_like_param = tl.load(segment + SEGMENT_STATE_LIKE_PARAM) != 0
    param_layout = tl.load(segment + SEGMENT_PARAM_LAYOUT)
    grad_layout = tl.load(segment + SEGMENT_GRAD_LAYOUT)
    for start in range(first, last, BLOCK):
        position = start + tl.arange(0, BLOCK)
        valid = position < last
        index = load_index(indices, index_bytes, position, valid)
        param_at = storage_offset(layouts, param_ndim, param_layout, index)
        grad_at = storage_offset(layouts, grad_ndim, grad_layout, tl.where(compact, position, index))
        state_at = tl.where(state_like_param, param_at, position)
        _block(addresses, param_at, grad_at, state_at, valid, scalars, PARAM, GRAD, False)


@triton.jit
def sparse_adamw_kernel(
    scalars,
    grads,  # their addresses, one per segment
    segments,
    layouts,
    tiles,
    KINDS: tl.constexpr,  # which there are, one bit for each
    BLOCK: tl.constexpr,
    DIRECT_BLOCK: tl.constexpr,
):
    """sparse_adamw: one AdamW step on the selected coordinates of every parameter.

    Traffic    per selected coordinate, 116 B: a 32-byte sector of the parameter read and written, one of the gradient
               read, index 4 B, moments 16 B. Wholly selected: 28 B per element of fp32, 30 B of 16 bits with a master.
    Algorithm  a tile is of one segment, whose dtypes are a branch that all its threads take; dtypes that no segment
               has are not compiled. Aligned runs of a wholly selected tensor are read by vectors.
    Cost       SASS of sm_90, wholly selected fp32: 68 instructions per element, 3 of them on the special function
               unit: 430 G elem/s on 132 SMs at 1.75 GHz, 12 TB/s, so memory is the limit. Selected: 190 at most, 1 us
               for 150 k of them; there the chain of loads tile, row, index, element is the limit. Counted, not
               measured.
    Contract   one launch for all; unselected elements keep their bits; indices are distinct, so no atomics.
    Launch     one program per tile.
    """
    # from the first row, so that no load waits for it
    skip = tl.load(scalars.to(tl.pointer_type(tl.float64)) + SCALAR_SKIP)
    tile = tiles + tl.program_id(0).to(tl.int64) * TILE_WORDS
    number = tl.load(tile + TILE_SEGMENT)
    first = tl.load(tile + TILE_FIRST)
    last = tl.load(tile + TILE_LAST)
    segment = segments + number * SEGMENT_WORDS
    grad = grads + number
    hyper = scalars.to(tl.pointer_type(tl.float64)) + tl.load(segment + SEGMENT_HYPER) * SCALAR_WORDS
    kind = tl.load(segment + SEGMENT_KIND)
    if skip == 0:
        if HAS_FP32 & KINDS:
            if kind == FP32:
                _tile(segment, grad, layouts, hyper, first, last, tl.float32, tl.float32, BLOCK, DIRECT_BLOCK)
        if HAS_BF16 & KINDS:
            if kind == BF16:
                _tile(segment, grad, layouts, hyper, first, last, tl.bfloat16, tl.bfloat16, BLOCK, DIRECT_BLOCK)
        if HAS_FP16 & KINDS:
            if kind == FP16:
                _tile(segment, grad, layouts, hyper, first, last, tl.float16, tl.float16, BLOCK, DIRECT_BLOCK)
        if HAS_FP64 & KINDS:
            if kind == FP64:
                _tile(segment, grad, layouts, hyper, first, last, tl.float64, tl.float64, BLOCK, DIRECT_BLOCK)
        if HAS_BF16_FP32 & KINDS:
            if kind == BF16_FP32:
                _tile(segment, grad, layouts, hyper, first, last, tl.bfloat16, tl.float32, BLOCK, DIRECT_BLOCK)
        if HAS_FP16_FP32 & KINDS:
            if kind == FP16_FP32:
                _tile(segment, grad, layouts, hyper, first, last, tl.float16, tl.float32, BLOCK, DIRECT_BLOCK)
