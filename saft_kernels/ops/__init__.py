"""The ops: contract, argument checks and choice of backend. `reference` holds their definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.names import short
from . import backends, checks
from .adamw import AdamWHyper, AdamWPlan, AdamWSegment
from .backends import BACKENDS, describe, why_unavailable
from .dtypes import opmath_dtype
from .reference import magnitude_keys
from .types import TopK

__all__ = [
    "BACKENDS",
    "TopK",
    "check_backend",
    "describe",
    "gather",
    "magnitude_keys",
    "scatter_",
    "sddmm",
    "sparse_adamw_",
    "topk_magnitude",
    "why_unavailable",
]


def check_backend(backend: str | None, op: str | None = None, device_type: str | None = None) -> None:
    """Raises ValueError for a backend that does not exist, RuntimeError for one that cannot run `op` on the device.

    None stands for the one that SAFT_BACKEND names, or any.
    """
    if op is None or device_type is None:
        backends.forced(backend)
    else:
        backends.choose(op, device_type, backend)


def topk_magnitude(tensors: Sequence[Tensor], k: int, *, backend: str | None = None) -> TopK:
    """The k elements of largest magnitude over all tensors together.

    Exactly the k positions that a stable sort by (descending |x|, ascending tensor, ascending flat index) puts
    first. NaN ranks above inf whatever its payload; +0 equals -0; denormals count.

    Args:
        tensors: float32, bfloat16, float16 or float64 in any mix, any shape and strides, on one device; may be
            empty. 16-bit tensors compare by their exact fp32 values; with a float64 tensor, all by fp64.
        k: Number of elements, 0 to the total numel.
        backend: One of `BACKENDS`; None chooses by device.

    Returns:
        TopK(indices, threshold, num_nonfinite); see `TopK`. Nothing is mutated.

    Raises:
        TypeError: An argument has another type, layout or dtype.
        ValueError: k is negative or more than the total numel, or devices differ.
        RuntimeError: `backend` cannot run here.

    Determinism: the same bits on every backend, run and thread count.

    Source: guess-and-verify selection, Floyd & Rivest 1975, https://doi.org/10.1145/360680.360691.
    """
    tensors = checks.tensor_list("tensors", tensors)
    checks.floating("tensors", tensors)
    k = _whole_number(k, sum(map(Tensor.numel, tensors)), "the total numel of `tensors`")
    if not tensors:
        return TopK((), float("inf"), 0)
    module = backends.choose("topk_magnitude", tensors[0].device.type, backend)
    with torch.no_grad():
        result: TopK = module.topk_magnitude(tensors, k)
    return result


def topk_magnitude_rows(rows: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """The k elements of largest magnitude of every row of a matrix: of each what `topk_magnitude([row], k)` selects.

    Args:
        rows: (R, N), float32, bfloat16, float16 or float64, any strides.
        k: Number of elements of a row, 0 to N.
        backend: One of `BACKENDS`; None chooses by device. There are no kernels for GPUs: plain torch, once per
            selection.

    Returns:
        int64 (R * k,): flat positions in `rows`, ascending. Nothing is mutated.

    Raises:
        TypeError, ValueError: An argument does not fit.
        RuntimeError: `backend` cannot run here.

    Determinism: the same positions on every backend, run and thread count.
    """
    (rows,) = checks.tensor_list("[rows]", [rows])
    checks.floating("[rows]", [rows])
    if rows.dim() != 2:
        raise ValueError(f"`rows`: expected shape (R, N), got {tuple(rows.shape)}; view it as a matrix first")
    k = _whole_number(k, rows.shape[1], "the length of a row of `rows`")
    module = backends.choose("topk_magnitude_rows", rows.device.type, backend)
    result: Tensor = module.topk_magnitude_rows(rows.detach(), k)
    return result


def gather(tensors: Sequence[Tensor], indices: Sequence[Tensor], *, backend: str | None = None) -> list[Tensor]:
    """Elements of many tensors by flat index: `out[i] = tensors[i].take(indices[i])`, in one call.

    Args:
        tensors: Any dtype of 1 to 16 bytes, any shape and strides, on one device.
        indices: One int32 or int64 tensor (n_i,) per tensor: flat (row-major) positions in [0, numel).
        backend: One of `BACKENDS`; None chooses by device.

    Returns:
        One contiguous tensor (n_i,) per input, of its dtype. Bits are copied. Nothing is mutated.

    Raises:
        TypeError, ValueError, IndexError: An argument does not fit; nothing has been read.
        RuntimeError: `backend` cannot run here.
    """
    tensors = checks.tensor_list("tensors", tensors)
    checks.same_length("indices", indices, "tensors", len(tensors))
    checks.index_tensors(indices, tensors, "tensors")
    if not tensors:
        return []
    module = backends.choose("gather", tensors[0].device.type, backend)
    if not getattr(module, "checks_index_ranges", False):
        checks.index_ranges(indices, [t.numel() for t in tensors], "tensors")
    counts = [index.numel() for index in indices]
    if len({tensor.dtype for tensor in tensors}) == 1:
        values = list(torch.empty(sum(counts), dtype=tensors[0].dtype, device=tensors[0].device).split(counts))
    else:
        values = [torch.empty(n, dtype=t.dtype, device=t.device) for t, n in zip(tensors, counts, strict=True)]
    module.gather(tensors, [index.contiguous() for index in indices], values)
    return values


def unchecked_gather_(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], *, backend: str | None = None
) -> None:
    """`gather` of arguments that fit, into contiguous `values`: checking indices would have a GPU wait."""
    backends.choose("gather", tensors[0].device.type, backend).gather(tensors, indices, values)


def scatter_(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> None:
    """Writes elements of many tensors by flat index: `tensors[i].flat[indices[i]] = values[i]`, in one call.

    Args:
        tensors: Mutated in place at `indices` alone. Any dtype of 1 to 16 bytes, any shape and strides.
        indices: One int32 or int64 tensor (n_i,) per tensor: distinct flat positions in [0, numel).
        values: One tensor (n_i,) per tensor, of its dtype and device.
        backend: One of `BACKENDS`; None chooses by device.

    Raises:
        TypeError, ValueError, IndexError: An argument does not fit; nothing has been written.
        RuntimeError: `backend` cannot run here.
    """
    tensors = checks.tensor_list("tensors", tensors)
    values = checks.tensor_list("values", values)
    checks.same_length("indices", indices, "tensors", len(tensors))
    checks.same_length("values", values, "tensors", len(tensors))
    checks.no_overlap("tensors", tensors)
    checks.index_tensors(indices, tensors, "tensors")
    for i, (tensor, index, value) in enumerate(zip(tensors, indices, values, strict=True)):
        checks.shape_dtype(f"values[{i}]", value, index.shape, tensor.dtype)
        checks.same_device(f"values[{i}]", value, f"tensors[{i}]", tensor)
    if not tensors:
        return
    module = backends.choose("scatter_", tensors[0].device.type, backend)
    if not getattr(module, "checks_index_ranges", False):
        checks.index_ranges(indices, [t.numel() for t in tensors], "tensors")
    module.scatter_(tensors, indices, values)


def sddmm(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Selected entries of a weight gradient: `(dy.T @ x).take(indices)`, without the rest of the product.

    A sampled dense-dense matrix product: with i = indices[j] // N_in and c = indices[j] % N_in::

        values[j] = sum over t of dy[t, i] * x[t, c]

    Args:
        dy: (T, N_out), the gradient of a linear layer's output. float32, bfloat16, float16 or float64, any strides.
        x: (T, N_in), its input; dtype and device of `dy`, any strides. Each size at most 2^31 - 1.
        indices: int32 or int64 (k,), flat positions in the (N_out, N_in) weight; ascending is fastest.
        out: Where the values go: (k,) in the dtype below, contiguous; mutated. None: a new tensor.
        accumulate: Add to `out`, once, instead of writing it.
        backend: One of `BACKENDS`; None chooses by device.

    Returns:
        `out`, or a new tensor: (k,) float32, or float64 for float64 factors. Products and sums are of that dtype.

    Raises:
        TypeError, ValueError, IndexError: An argument does not fit; nothing has been written.
        RuntimeError: `backend` cannot run here.

    Determinism: bit-equal from run to run and over thread counts (the reference: as far as torch's matrix product is);
    backends agree to rounding.
    """
    dy, x = checks.tensor_list("[dy, x]", [dy, x])
    checks.floating("[dy, x]", [dy, x])
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"`dy`, `x`: expected shapes (T, N_out) and (T, N_in), got {tuple(dy.shape)} and {tuple(x.shape)}; "
            "flatten the leading dimensions of both"
        )
    if dy.dtype != x.dtype:
        raise ValueError(f"`x`: expected {short(dy.dtype)} like `dy`, got {short(x.dtype)}; convert one of them")
    if max(*dy.shape, *x.shape) >= 2**31:
        raise ValueError(
            f"`dy`, `x`: expected sizes below 2^31, got {tuple(dy.shape)} and {tuple(x.shape)}; split the tokens"
        )
    checks.index_tensors([indices], [dy], "dy")
    dtype = opmath_dtype(dy.dtype)
    if out is None:
        if accumulate:
            raise ValueError("`out`: expected a tensor to accumulate into, got None; pass it, or accumulate=False")
        out = torch.empty(indices.shape, dtype=dtype, device=dy.device)
    else:
        checks.shape_dtype("out", out, indices.shape, dtype)
        checks.same_device("out", out, "dy", dy)
        checks.in_memory("`out`", out)
        if not out.is_contiguous():
            raise ValueError(f"`out`: expected contiguous, got strides {out.stride()}; make it so first")
    if indices.numel():
        module = backends.choose("sddmm", dy.device.type, backend)
        if not getattr(module, "checks_index_ranges", False):
            checks.index_ranges([indices], [dy.shape[1] * x.shape[1]], "weight")
        module.sddmm(dy.detach(), x.detach(), indices.contiguous(), out.detach(), accumulate)
    return out


def prepare_sddmm(indices: Tensor, *, backend: str | None = None) -> Callable[..., Tensor]:
    """`sddmm` of these indices, for any `dy`, `x` and `out` that fit, unchecked: a GPU has not to be waited for."""
    kernel = backends.choose("sddmm", indices.device.type, backend).sddmm

    def run(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(indices.shape, dtype=opmath_dtype(dy.dtype), device=dy.device)
        kernel(dy, x, indices, out, False)
        return out

    return run


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    maximize: bool = False,
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW step on the selected coordinates of many parameters; every other element keeps its bits.

    For each selected coordinate, with g = grad / grad_scale (negated to maximize) and t = step::

        param      <- param * (1 - lr * weight_decay)
        exp_avg    <- exp_avg + (1 - beta1) * (g - exp_avg)
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g * g
        denom       = sqrt(exp_avg_sq) / sqrt(1 - beta2^t) + eps
        param      <- param - lr / (1 - beta1^t) * exp_avg / denom

    Args:
        params: Mutated in place at `indices` alone. float32, bfloat16, float16 or float64, any strides, one device.
        grads: Shape of the parameter, any strides; or (n_i,), the selected values alone in the order of
            `indices`. The parameter's dtype; float32 also fits a 16-bit parameter. Not mutated.
        exp_avgs: (n_i,) per parameter, float32 (float64 for a float64 parameter), contiguous; mutated. For a
            wholly selected parameter: its shape, contiguous or in its memory order.
        exp_avg_sqs: Like `exp_avgs`; mutated.
        indices: One int32 or int64 tensor (n_i,) of distinct flat positions per parameter; None: all of them.
        step: Number of this step, counted from 1; a number or a tensor of one element.
        lr: Learning rate; a number or a tensor of one element.
        beta1: Decay rate of the first moment, in [0, 1).
        beta2: Decay rate of the second moment, in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled decay, on the selected coordinates alone.
        max_exp_avg_sqs: AMSGrad's running maximum, like `exp_avg_sqs`; mutated. None: plain AdamW.
        masters: For 16-bit parameters, float32 values that accumulate in the parameter's place, like `exp_avgs`;
            mutated. Where the stored parameter is no longer the rounded master, the parameter wins.
        maximize: Ascend instead.
        grad_scale: Gradients are divided by it (torch.amp.GradScaler's scale); a number or a tensor of one element.
        found_inf: A tensor of one element; when it is not 0, nothing is written. The cuda and triton backends read it,
            and the tensors above, on the device, without waiting for it; those are then not checked.
        backend: One of `BACKENDS`; None chooses by device.

    Raises:
        TypeError, ValueError, IndexError: An argument does not fit; nothing has been written.
        RuntimeError: `backend` cannot run here.

    Determinism: bit-equal from run to run and over thread counts; backends agree to rounding.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101.
    """
    params = checks.tensor_list("params", params)
    checks.floating("params", params)
    optional = [("max_exp_avg_sqs", max_exp_avg_sqs), ("masters", masters)]
    lists = [("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs), ("indices", indices)]
    for name, values in lists + [(name, values) for name, values in optional if values is not None]:
        checks.same_length(name, values, "params", len(params))
    grads = checks.tensor_list("grads", grads)
    state = [("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)]
    for name, values in state + ([] if max_exp_avg_sqs is None else [("max_exp_avg_sqs", max_exp_avg_sqs)]):
        checks.tensor_list(name, values)
    checks.index_tensors(indices, params, "params", allow_none=True)
    checks.index_ranges(indices, [p.numel() for p in params], "params")
    scalars = {"step": step, "lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    for name, scalar in scalars.items():
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(
                f"`{name}`: expected a tensor of one element, got shape {tuple(scalar.shape)}; one call has one {name}"
            )
    if _is_known(step) and step < 1:
        raise ValueError(f"`step`: expected the number of this step, counted from 1, got {step}; add 1 before the call")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"`{name}`: expected a decay rate in [0, 1), got {beta}; pass the rate, not 1 - rate")
    if _is_known(grad_scale) and grad_scale == 0:
        raise ValueError("`grad_scale`: expected a divisor other than 0, got 0; pass 1.0 for unscaled gradients")
    if not params:
        return
    segments = [
        AdamWSegment(
            param.detach(),
            exp_avgs[i],
            exp_avg_sqs[i],
            None if (index := indices[i]) is None else index.contiguous(),
            None if max_exp_avg_sqs is None else max_exp_avg_sqs[i],
            None if masters is None else masters[i],
        )
        for i, param in enumerate(params)
    ]
    for i, segment in enumerate(segments):
        _check_state(i, segment)
    hyper = AdamWHyper(lr, beta1, beta2, eps, weight_decay, step, maximize, grad_scale, found_inf)
    prepare_sparse_adamw(segments, backend=backend).step([g.detach() for g in grads], [hyper])


def prepare_sparse_adamw(segments: Sequence[AdamWSegment], *, backend: str | None = None) -> AdamWPlan:
    """A reusable step over `segments`; `SparseAdamW` keeps one between steps.

    Every step checks the gradients it is given. Of the segments, shapes, dtypes and the range of indices are taken as
    they come.
    """
    for field, name in (("indices", "indices"), *((field, f"{field}s") for field in _STATE)):
        checks.all_in_memory(name, [getattr(segment, field) for segment in segments])
    module = backends.choose("prepare_sparse_adamw", segments[0].param.device.type, backend)
    plan: AdamWPlan = module.prepare_sparse_adamw(segments)
    return plan


def _whole_number(k: int, largest: int, what: str) -> int:
    """A valid k."""
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"`k`: expected an int, got {type(k).__name__}; round it first")
    k = k.__index__()
    if not 0 <= k <= largest:
        raise ValueError(f"`k`: expected 0 to {what}, {largest}, got {k}; clamp it")
    return k


_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")


def _is_known(scalar: float | Tensor) -> bool:
    """Whether its value can be read without waiting for a device."""
    return not isinstance(scalar, Tensor) or scalar.device.type == "cpu"


def _check_state(i: int, segment: AdamWSegment) -> None:
    param = segment.param
    shape = param.shape if segment.indices is None else segment.indices.shape
    for field in _STATE:
        if (tensor := getattr(segment, field)) is None:
            continue
        name = f"{field}s"
        checks.shape_dtype(f"{name}[{i}]", tensor, shape, opmath_dtype(param.dtype))
        checks.same_device(f"{name}[{i}]", tensor, f"params[{i}]", param)
        if tensor.stride() != segment.exp_avg.stride():
            raise ValueError(
                f"`{name}[{i}]`: expected the strides of `exp_avgs[{i}]`, {segment.exp_avg.stride()}, "
                f"got {tensor.stride()}; allocate them alike"
            )
    if segment.indices is not None and not segment.exp_avg.is_contiguous():
        raise ValueError(
            f"`exp_avgs[{i}]`: expected contiguous, got strides {segment.exp_avg.stride()}; make it so first"
        )
    if segment.master is not None and param.itemsize != 2:
        raise ValueError(
            f"`masters[{i}]`: expected None for a {short(param.dtype)} parameter, got a tensor; only 16-bit "
            "parameters have masters"
        )
