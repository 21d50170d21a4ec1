"""Each op in plain PyTorch: the definition, the oracle of the tests, and the fallback on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .adamw import AdamWHyper, AdamWSegment, HostHyper, is_compact
from .dtypes import as_bits, opmath_dtype
from .forms import Forms
from .types import TopK


def why_unavailable(device_type: str | None) -> str | None:
    """None: it runs wherever torch does."""
    return None


# ---- topk_magnitude ----


def magnitude_keys(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers (numel,) that order as |x| in `dtype` (fp32 or fp64); every NaN gets the one largest key."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    largest = torch.iinfo(integer).max
    values = tensor.detach().reshape(-1)
    if dtype == torch.float64 and tensor.dtype != dtype:
        # denormals go through integers: torch.set_flush_denormal(True) makes a conversion of floats drop them
        bits = values.float().view(torch.int32) & torch.iinfo(torch.int32).max
        values = torch.where(bits < 0x0080_0000, bits.to(dtype) * 2.0**-149, values.to(dtype))
    values = values.to(dtype)
    keys = values.view(integer) & largest
    return torch.where(values.isnan(), largest, keys)


def key_to_float(key: int, dtype: torch.dtype) -> float:
    """The magnitude that `magnitude_keys` made this key of."""
    if dtype == torch.float64:
        return float(torch.tensor(key, dtype=torch.int64, device="cpu").view(dtype))
    # fp32 denormals, too, are normal numbers in fp64
    exponent, mantissa = key >> 23, key & 0x007F_FFFF
    if exponent == 0xFF:
        return math.nan if mantissa else math.inf
    return math.ldexp(mantissa, -149) if exponent == 0 else math.ldexp(0x0080_0000 | mantissa, exponent - 150)


def topk_magnitude(tensors: Sequence[Tensor], k: int) -> TopK:
    """See `saft_kernels.ops.topk_magnitude`. Memory: 8 B per element (16 B with fp64) of temporaries."""
    num_nonfinite = sum(int((~t.isfinite()).sum()) for t in tensors)
    empty = [torch.empty(0, dtype=torch.int64, device=t.device) for t in tensors]
    if k == 0:
        return TopK(tuple(empty), float("inf"), num_nonfinite)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    keys = torch.cat([magnitude_keys(t, dtype) for t in tensors])
    threshold = torch.topk(keys, k, sorted=False).values.min()
    selected = keys > threshold
    ties = (keys == threshold).nonzero().flatten()  # ascending: the lowest positions win
    selected[ties[: k - int(selected.sum())]] = True
    parts = selected.split([t.numel() for t in tensors])
    indices = tuple(part.nonzero().flatten() for part in parts)
    return TopK(indices, key_to_float(int(threshold), dtype), num_nonfinite)


# ---- topk_magnitude_rows ----

_ROWS_AT_ONCE = 2**24  # elements


def topk_magnitude_rows(rows: Tensor, k: int) -> Tensor:
    """See `saft_kernels.ops.topk_magnitude_rows`. Memory: 22 B (fp64: 30 B) for each of 2^24 elements, or of a row."""
    numel = rows.shape[1]
    found = [torch.empty(0, dtype=torch.int64, device=rows.device)]
    step = max(1, _ROWS_AT_ONCE // max(1, numel))
    for first in range(0, len(rows) if k else 0, step):
        some = rows[first : first + step]
        keys = magnitude_keys(some, opmath_dtype(some.dtype)).view(some.shape)
        threshold = keys.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        selected = keys > threshold
        ties = keys == threshold  # the first ones win
        selected |= ties & (ties.cumsum(1, dtype=torch.int32) <= k - selected.sum(1, keepdim=True))
        found.append(selected.flatten().nonzero().flatten() + first * numel)
    return torch.cat(found)


# ---- gather, scatter_ ----


def gather(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.gather`; `values` are written."""
    for tensor, index, value in zip(tensors, indices, values, strict=True):
        as_bits(value).copy_(as_bits(tensor).take(index.long()))


def scatter_(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.scatter_`."""
    for tensor, index, value in zip(tensors, indices, values, strict=True):
        _put(as_bits(tensor), index.long(), as_bits(value))


def _put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """`put_` of distinct positions, which torch, unlike this, takes for one that is not deterministic."""
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, index, values)
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = values


# ---- sddmm ----


def sddmm(dy: Tensor, x: Tensor, indices: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `saft_kernels.ops.sddmm`. Memory: the rows of the dense gradient that have a selected entry."""
    rows, row = torch.unique(indices.long() // x.shape[1], return_inverse=True)
    weight_rows = dy[:, rows].to(out.dtype).t() @ x.to(out.dtype)
    values = weight_rows[row, indices.long() % x.shape[1]]
    out.copy_(out + values if accumulate else values)


# ---- sparse_adamw_ ----


class Plan:
    """Keeps the segments; every step spells out the definition."""

    def __init__(self, segments: Sequence[AdamWSegment]) -> None:
        self.segments = list(segments)
        self._forms = Forms(self.segments)

    def step(self, grads: Sequence[Tensor], hypers: Sequence[AdamWHyper]) -> None:
        """One step, segment by segment."""
        on_host = [hyper.on_host() for hyper in hypers]
        if any(hyper.found_inf for hyper in on_host):
            return
        self._forms.check(grads)
        for segment, grad in zip(self.segments, grads, strict=True):
            adamw_segment_(segment, grad, on_host[segment.hyper])


def adamw_segment_(segment: AdamWSegment, grad: Tensor, hyper: HostHyper) -> None:
    """torch.optim.AdamW's single-tensor step on the selected coordinates of one parameter."""
    param = segment.param.detach()
    dtype = opmath_dtype(param.dtype)
    grad = grad.detach()
    if segment.indices is None:
        stored = param
    else:
        index = segment.indices.long()
        if not index.is_meta and bool((index < 0).any()):  # take() would count from the end
            raise IndexError("indices: expected flat positions in the parameter, got a negative one")
        stored = param.take(index)
        if not is_compact(grad, param, segment.count):
            grad = grad.take(index)
    value = stored.to(dtype)
    if segment.master is not None:
        # the parameter wins when someone else wrote it
        master = segment.master.view_as(value)
        value = torch.where(master.to(param.dtype) == stored, master, value)
    grad = grad.to(dtype) * ((-1.0 if hyper.maximize else 1.0) / hyper.grad_scale)

    value = value * (1 - hyper.lr * hyper.weight_decay)
    exp_avg, exp_avg_sq = segment.exp_avg, segment.exp_avg_sq
    exp_avg.lerp_(grad.view_as(exp_avg), 1 - hyper.beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(grad.view_as(exp_avg), grad.view_as(exp_avg), value=1 - hyper.beta2)
    second_moment = exp_avg_sq
    if segment.max_exp_avg_sq is not None:
        torch.maximum(segment.max_exp_avg_sq, exp_avg_sq, out=segment.max_exp_avg_sq)
        second_moment = segment.max_exp_avg_sq
    denom = (second_moment.sqrt() / hyper.bias_correction2_sqrt).add_(hyper.eps)
    value = value.addcdiv(exp_avg.view_as(value), denom.view_as(value), value=-hyper.lr / hyper.bias_correction1)

    if segment.master is not None:
        segment.master.copy_(value.view_as(segment.master))
    if segment.indices is None:
        param.copy_(value)
    else:
        _put(param, index, value.to(param.dtype))


prepare_sparse_adamw = Plan
