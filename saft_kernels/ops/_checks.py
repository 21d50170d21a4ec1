"""Argument checks of the public ops: every message names the argument, what was expected and got, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def tensor_list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A list of strided tensors on one device."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"`{name}`: expected a list or tuple of tensors, got {type(tensors).__name__}; wrap it in a list"
        )
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}[{i}]`: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"`{name}[{i}]`: expected a strided tensor, got layout {tensor.layout}; call .to_dense() first"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"`{name}[{i}]`: expected device {tensors[0].device} like `{name}[0]`, got {tensor.device}; "
                "move them to one device"
            )
    return list(tensors)


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
    if len(values) != length:
        raise ValueError(f"`{name}`: expected {length} entries, one per `{like}`, got {len(values)}")


def index_tensors(indices: Sequence[Tensor | None], tensors: Sequence[Tensor], like: str) -> None:
    """One-dimensional int32 or int64, in range, on the tensors' device."""
    for i, (index, tensor) in enumerate(zip(indices, tensors, strict=True)):
        if index is None:
            continue
        if not isinstance(index, Tensor) or index.dtype not in INDEX_DTYPES or index.dim() != 1:
            got = f"{short(index.dtype)} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise TypeError(f"`indices[{i}]`: expected a one-dimensional int32 or int64 tensor, got {got}")
        if index.device != tensor.device:
            raise ValueError(f"`indices[{i}]`: expected device {tensor.device} like `{like}[{i}]`, got {index.device}")
        if index.numel() == 0:
            continue
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= tensor.numel():
            raise IndexError(
                f"`indices[{i}]`: expected flat positions in [0, {tensor.numel()}) of `{like}[{i}]`, "
                f"got {low} to {high}"
            )


def shape_dtype(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Exactly this shape and dtype."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"`{name}`: expected {short(dtype)} of shape {tuple(shape)}, got {short(tensor.dtype)} of shape "
            f"{tuple(tensor.shape)}"
        )


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")
