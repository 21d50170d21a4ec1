"""Argument checks of the public ops: every message names the argument, what was expected and got, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..common.names import short
from .dtypes import FLOAT_DTYPES, INDEX_DTYPES


def tensor_list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A list of strided tensors on one device."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"`{name}`: expected a list or tuple of tensors, got {type(tensors).__name__}; wrap it in a list"
        )
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}[{i}]`: expected a tensor, got {type(tensor).__name__}; leave out what is not one")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"`{name}[{i}]`: expected a strided tensor, got layout {tensor.layout}; call .to_dense() first"
            )
        if type(tensor) not in (Tensor, Parameter) and tensor.numel() and not tensor.data_ptr():
            raise TypeError(
                f"`{name}[{i}]`: expected a tensor with memory, got a {type(tensor).__name__}; pass the values it wraps"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"`{name}[{i}]`: expected device {tensors[0].device} like `{name}[0]`, got {tensor.device}; "
                "move them to one device"
            )
        if tensor.is_conj() or tensor.is_neg():
            # the memory does not hold the values yet
            raise TypeError(
                f"`{name}[{i}]`: expected values in memory, got a lazy conjugate or negative; call .resolve_conj() or "
                ".resolve_neg() first"
            )
    return list(tensors)


def no_overlap(name: str, tensors: Sequence[Tensor]) -> None:
    """Tensors to write: no expanded dimension, where one write would land on many elements."""
    for i, tensor in enumerate(tensors):
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"`{name}[{i}]`: expected one memory location per element, got an expanded tensor with strides "
                f"{tensor.stride()}; write to its base, or clone it first"
            )


def floating(name: str, tensors: Sequence[Tensor]) -> None:
    """Real floating dtypes the kernels know."""
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in FLOAT_DTYPES:
            remedy = "take .abs() or torch.view_as_real first" if tensor.is_complex() else "convert it first"
            raise TypeError(
                f"`{name}[{i}]`: expected float32, bfloat16, float16 or float64, got {short(tensor.dtype)}; {remedy}"
            )


def same_length(name: str, values: Sequence[object], like: str, length: int) -> None:
    """One entry per tensor."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"`{name}`: expected a list or tuple, got {type(values).__name__}; wrap it in a list")
    if len(values) != length:
        raise ValueError(
            f"`{name}`: expected {length} entries, one per `{like}`, got {len(values)}; pass them in the same order"
        )


def index_tensors(
    indices: Sequence[Tensor | None], tensors: Sequence[Tensor], like: str, *, allow_none: bool = False
) -> None:
    """One-dimensional int32 or int64, on the tensors' device; None, where allowed, means all."""
    for i, (index, tensor) in enumerate(zip(indices, tensors, strict=True)):
        if index is None and allow_none:
            continue
        if not isinstance(index, Tensor) or index.dtype not in INDEX_DTYPES or index.dim() != 1:
            got = f"{short(index.dtype)} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise TypeError(
                f"`indices[{i}]`: expected a one-dimensional int32 or int64 tensor, got {got}; flatten or convert it"
            )
        same_device(f"indices[{i}]", index, f"{like}[{i}]", tensor)


def index_ranges(indices: Sequence[Tensor | None], tensors: Sequence[Tensor], like: str) -> None:
    """Every index is a position in its tensor: one look, so that a GPU is waited for once."""
    present = [(index, tensor.numel()) for index, tensor in zip(indices, tensors, strict=True) if index is not None]
    if not sum(index.numel() for index, _ in present):
        return
    device = present[0][0].device
    flat = torch.cat([index.long() for index, _ in present])
    counts = torch.tensor([index.numel() for index, _ in present], device=device)
    numels = torch.tensor([numel for _, numel in present], device=device)
    limits = numels.repeat_interleave(counts, output_size=flat.numel())
    if bool(((flat < 0) | (flat >= limits)).any()):
        for i, (index, tensor) in enumerate(zip(indices, tensors, strict=True)):
            if index is not None and bool(((index < 0) | (index >= tensor.numel())).any()):
                raise out_of_range(i, index, tensor, like)


def out_of_range(i: int, index: Tensor, tensor: Tensor, like: str) -> IndexError:
    """For indices that are no positions in their tensor."""
    low, high = (int(value) for value in index.aminmax())
    return IndexError(
        f"`indices[{i}]`: expected flat positions in [0, {tensor.numel()}) of `{like}[{i}]`, got {low} to {high}; they "
        "index the flattened tensor, not a row of it"
    )


def same_device(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """On one device."""
    if tensor.device != other.device:
        raise ValueError(f"`{name}`: expected device {other.device} like `{like}`, got {tensor.device}; move it there")


def shape_dtype(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """A tensor of exactly this shape and dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}`: expected a tensor, got {type(tensor).__name__}; pass one per tensor")
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"`{name}`: expected {short(dtype)} of shape {tuple(shape)}, got {short(tensor.dtype)} of shape "
            f"{tuple(tensor.shape)}; reshape or convert it"
        )
