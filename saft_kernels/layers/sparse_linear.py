"""F.linear with the gradient of a leaf that stands for the weight's selected entries in place of the weight's own.

Eager and compiled graphs differ: an autograd.Function sees what autocast and F.linear do; a graph takes operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ops
from ..ops.dtypes import opmath_dtype


def sparse_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, indices: Tensor | None, skip_bias: bool
) -> Tensor:
    """The bits of F.linear(input, weight, bias).

    Args:
        input: (*, N_in).
        weight: (N_out, N_in); gets no gradient.
        bias: (N_out,) or None.
        values: (k,), a leaf that gets the weight's gradient at `indices`; None: no gradient is computed.
        indices: int32 or int64 (k,), ascending flat positions in `weight`; None without `values`.
        skip_bias: No gradient for the bias either.
    """
    if torch.compiler.is_compiling():
        dtype = _autocast_dtype(input)
        if dtype is not None:
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        result: Tensor = _linear_op(input, weight, bias, values, indices, skip_bias)
    else:
        result = _SparseLinear.apply(input, weight, bias, values, indices, skip_bias)
    return result


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast would cast the operands of a product to; None: it leaves them alone."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


def _gradients(
    needed: tuple[bool, ...], grad_output: Tensor, input: Tensor | None, weight: Tensor, indices: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Those of input, bias and values, in the dtype of `grad_output`."""
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    grad_input = grad_bias = grad_values = None
    if needed[0]:
        grad_input = (dy @ weight).view(*grad_output.shape[:-1], weight.shape[1])
    if needed[1]:
        grad_bias = grad_output.sum_to_size(grad_output.shape[-1])
    if needed[2]:
        assert input is not None
        assert indices is not None
        grad_values = _sddmm_op(dy, input.reshape(-1, input.shape[-1]), indices)
    return grad_input, grad_bias, grad_values


# ---- eager ----


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        indices: Tensor | None,
        skip_bias: bool,
    ) -> Tensor:
        dtype = _autocast_dtype(input)
        cast = input if dtype is None else input.to(dtype)  # once, for the product and for backward
        # F.linear chooses its kernel by whether the weight requires grad, and autocast what it caches
        with torch.enable_grad():
            output = functional.linear(cast.detach(), weight, bias).detach()
        ctx.input_dtype = input.dtype
        ctx.skip_bias = skip_bias
        # the weight itself: autocast's copy of it would be kept from forward to backward
        ctx.save_for_backward(cast if values is not None else None, weight, indices)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, indices = ctx.saved_tensors
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[2] and not ctx.skip_bias, ctx.needs_input_grad[3]
        weight = weight.to(grad_output.dtype)
        grad_input, grad_bias, grad_values = _gradients(needed, grad_output, input, weight, indices)
        if grad_input is not None:
            grad_input = grad_input.to(ctx.input_dtype)
        return grad_input, None, grad_bias, grad_values, None, None


# ---- compiled graphs ----


@torch.library.custom_op(
    "saft_kernels::sddmm", mutates_args=(), schema="(Tensor dy, Tensor x, Tensor indices) -> Tensor"
)
def _sddmm_op(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return ops.unchecked_sddmm(dy, x, indices)


@_sddmm_op.register_fake
def _(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return dy.new_empty(indices.shape, dtype=opmath_dtype(dy.dtype))


@torch.library.custom_op(
    "saft_kernels::sparse_linear",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, Tensor? values, Tensor? indices, bool skip_bias) -> Tensor",
)
def _linear_op(
    input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, indices: Tensor | None, skip_bias: bool
) -> Tensor:
    return functional.linear(input, weight, bias)


@_linear_op.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, indices: Tensor | None, skip_bias: bool
) -> Tensor:
    return functional.linear(input, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, values, indices, ctx.skip_bias = inputs
    ctx.save_for_backward(input if values is not None else None, weight, indices)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, indices = ctx.saved_tensors
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[2] and not ctx.skip_bias, ctx.needs_input_grad[3]
    grad_input, grad_bias, grad_values = _gradients(needed, grad_output, input, weight, indices)
    return grad_input, None, grad_bias, grad_values, None, None


_linear_op.register_autograd(_backward, setup_context=_save)
