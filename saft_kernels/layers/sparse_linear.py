"""F.linear whose weight gets the selected entries of its gradient alone, in the optimizer's buffer.

Eager and compiled graphs differ. An autograd.Function sees what autocast and F.linear do, and hands the entries over
itself. A graph takes operators: the entries are the gradient of a leaf that stands for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ops
from ..ops.dtypes import opmath_dtype
from .weight_gradient import Product, plan


@dataclass(frozen=True, eq=False)
class Entries:
    """The selected entries of a weight.

    Attributes:
        indices: int32 or int64 (k,), ascending flat positions in the weight; k > 0.
        compute: Makes the gradient's values there, (k,), of dY and X: see `plan`.
        deliver: Takes them; `deliver.product(compute, dy, x)` computes them, too.
        leaf: (k,), requires grad, is never read; what autograd accumulates into it is delivered, too.
    """

    indices: Tensor
    compute: Callable[..., Tensor]
    deliver: Any
    leaf: Tensor

    @classmethod
    def of(cls, weight: Tensor, indices: Tensor, deliver: Any) -> Entries:
        """A GPU has to be waited for."""
        zero = torch.zeros((), dtype=opmath_dtype(weight.dtype), device=weight.device)
        leaf = zero.expand(len(indices)).requires_grad_()  # without memory

        def move(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            if gradient is not None:
                deliver(gradient)

        leaf.register_post_accumulate_grad_hook(move)
        return cls(indices, plan(indices, (weight.shape[0], weight.shape[1])), deliver, leaf)


def sparse_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, entries: Entries | None, skip_bias: bool
) -> Tensor:
    """The bits of F.linear(input, weight, bias).

    Args:
        input: (*, N_in).
        weight: (N_out, N_in), requires grad; its `.grad` gets nothing but `entries`.
        bias: (N_out,) or None.
        entries: What is computed of the weight's gradient; None: nothing.
        skip_bias: No gradient for the bias either.
    """
    if not torch.compiler.is_compiling():
        if (weight if weight._base is None else weight._base)._backward_hooks:  # they want the whole gradient
            return functional.linear(input, weight, bias)
        result: Tensor = _SparseLinear.apply(input, weight, bias, entries, skip_bias)
        return result
    dtype = _autocast_dtype(input)
    if dtype is not None:
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    leaf = positions = rows = columns = None
    row_bounds: list[int] = []
    entry_bounds: list[int] = []
    if entries is not None:
        leaf, positions = entries.leaf, entries.indices
        if isinstance(p := entries.compute, Product):
            positions, rows, columns = p.positions, p.rows, p.columns
            row_bounds, entry_bounds = p.row_bounds, p.entry_bounds
    result = _linear_op(input, weight, bias, leaf, positions, rows, columns, row_bounds, entry_bounds, skip_bias)
    return result


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast would cast the operands of a product to; None: it leaves them alone."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


def _flat(tensor: Tensor) -> Tensor:
    """(*, N) -> (T, N)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _other_gradients(ctx: Any, grad_output: Tensor, dy: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of input and bias, in the dtype of `grad_output`, of which `dy` is a view."""
    needs_input, _, needs_bias, *_ = ctx.needs_input_grad
    grad_input = grad_bias = None
    if needs_input:
        grad_input = torch.mm(dy, weight)
        if grad_output.dim() != 2:
            grad_input = grad_input.view(*grad_output.shape[:-1], weight.shape[1])
    if needs_bias and not ctx.skip_bias:
        grad_bias = dy.sum(0) if dy is grad_output else grad_output.sum_to_size(grad_output.shape[-1])
    return grad_input, grad_bias


# ---- eager ----


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, entries: Entries | None, skip_bias: bool
    ) -> Tensor:
        dtype = _autocast_dtype(input) if torch._C._is_any_autocast_enabled() else None
        cast = input if dtype is None else input.to(dtype)  # once, for the product and for backward
        # F.linear chooses its kernel, and autocast what it caches, by whether gradients are recorded. Of a contiguous
        # input there is one kernel
        if dtype is not None or not cast.is_contiguous():
            torch.set_grad_enabled(True)  # apply() puts it back
        output = functional.linear(cast, weight, bias)
        if output.requires_grad:
            output = output.detach()
        ctx.input_dtype, ctx.entries, ctx.skip_bias = input.dtype, entries, skip_bias
        # the weight itself: autocast's copy of it would be kept from forward to backward
        ctx.save_for_backward(None if entries is None else cast, weight)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable takes 5 us: only where there is something for it to do
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, grad_output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    dy, entries = _flat(grad_output), ctx.entries
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    grad_input, grad_bias = _other_gradients(ctx, grad_output, dy, weight)
    if entries is not None and _is_accumulated(ctx.next_functions[1][0]):
        entries.deliver.product(entries.compute, dy, _flat(input))
    if grad_input is not None and grad_input.dtype != ctx.input_dtype:
        grad_input = grad_input.to(ctx.input_dtype)
    return grad_input, None, grad_bias, None, None


_backward_once = once_differentiable(_backward)


def _is_accumulated(node: Any) -> bool:
    """Whether this backward pass goes on to a weight: torch.autograd.grad and backward(inputs=...) may not."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad, which wants the weight's gradient as its result
        return False


# ---- compiled graphs ----


@torch.library.custom_op(
    "saft_kernels::sddmm", mutates_args=(), schema="(Tensor dy, Tensor x, Tensor indices) -> Tensor"
)
def _sddmm_op(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return ops.prepare_sddmm(indices)(dy, x)


@_sddmm_op.register_fake
def _(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return dy.new_empty(indices.shape, dtype=opmath_dtype(dy.dtype))


@torch.library.custom_op(
    "saft_kernels::sparse_linear",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, Tensor? leaf, Tensor? positions, Tensor? rows, "
    "Tensor? columns, int[] row_bounds, int[] entry_bounds, bool skip_bias) -> Tensor",
)
def _linear_op(input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return functional.linear(input, weight, bias)


@_linear_op.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return functional.linear(input, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, leaf, positions, rows, columns, ctx.row_bounds, ctx.entry_bounds, ctx.skip_bias = inputs
    ctx.save_for_backward(None if leaf is None else input, weight, positions, rows, columns)


def _backward_of_op(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, positions, rows, columns = ctx.saved_tensors
    dy, grad_leaf = _flat(grad_output), None
    grad_input, grad_bias = _other_gradients(ctx, grad_output, dy, weight)
    if ctx.needs_input_grad[3]:
        if ctx.row_bounds:
            grad_leaf = Product(positions, rows, columns, ctx.row_bounds, ctx.entry_bounds)(dy, _flat(input))
        else:
            grad_leaf = _sddmm_op(dy, _flat(input), positions)
    return grad_input, None, grad_bias, grad_leaf, *[None] * 6


_linear_op.register_autograd(_backward_of_op, setup_context=_save)
