"""Argument checks of the public ops: every message names the argument, what was expected and got, and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..common.memory import check_memory, reach_of
from ..common.names import short
from ._compiled import reader as _reader
from .dtypes import FLOAT_DTYPES, INDEX_DTYPES


def tensor_list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as a list, once all are strided, in memory and on one device."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"`{name}`: expected a list or tuple of tensors, got {type(tensors).__name__}; wrap it in a list"
        )
    if _reader is not None and _reader.are_plain(list(tensors)):
        return list(tensors)
    device = None
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}[{i}]`: expected a tensor, got {type(tensor).__name__}; leave out what is not one")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"`{name}[{i}]`: expected a strided tensor, got layout {tensor.layout}; call .to_dense() first"
            )
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"`{name}[{i}]`: expected device {device} like `{name}[0]`, got {tensor.device}; "
                "move them to one device"
            )
        reach = tensor.nbytes if tensor.is_contiguous() else reach_of(tensor)
        if (
            tensor.untyped_storage().nbytes() < reach + tensor.storage_offset() * tensor.itemsize
            or tensor.is_neg()
            or tensor.is_conj()
            or type(tensor) not in _PLAIN
        ):
            in_memory(_label(name, i), tensor)
    return list(tensors)


_PLAIN = (Tensor, Parameter)

Name = str | Callable[[int], str]
"""Of a list in an error: its argument's name, or what to call each of its tensors."""


def _label(name: Name, i: int) -> str:
    return f"`{name}[{i}]`" if isinstance(name, str) else name(i)


def in_memory(label: str, tensor: Tensor) -> None:
    """Raises unless the values of a tensor lie in memory, which its storage still has."""
    if not tensor.numel():
        return
    storage = tensor.untyped_storage()
    if storage.device != tensor.device or not (type(tensor) in _PLAIN or tensor.data_ptr()):
        raise TypeError(
            f"{label}: expected a tensor with memory, got a {type(tensor).__name__}; pass whole plain tensors"
        )
    if tensor.is_neg() or tensor.is_conj():
        raise TypeError(
            f"{label}: expected values in memory, got a lazy conjugate or negative; call .resolve_conj() or "
            ".resolve_neg() first"
        )
    check_memory(label, tensor)


def all_in_memory(name: Name, tensors: Sequence[Tensor | None]) -> None:
    """Calls `in_memory` where it is not plain to see, which takes a quarter of a microsecond."""
    doubtful = [
        i
        for i, tensor in enumerate(tensors)
        if tensor is not None
        and (
            tensor.untyped_storage().nbytes()
            < (tensor.nbytes if tensor.is_contiguous() else reach_of(tensor))
            + tensor.storage_offset() * tensor.itemsize
            or type(tensor) not in _PLAIN
        )
    ]
    for i in doubtful:
        tensor = tensors[i]
        assert tensor is not None
        in_memory(_label(name, i), tensor)


def no_overlap(name: Name, tensors: Iterable[Tensor]) -> None:
    """Raises ValueError for a tensor to write that has two elements in one place: the last write would win."""
    for i, tensor in enumerate(tensors):
        if not tensor.is_contiguous() and _overlaps(tensor):
            raise ValueError(
                f"{_label(name, i)}: expected one memory location per element, got an expanded or overlapping tensor "
                f"of shape {tuple(tensor.shape)} with strides {tensor.stride()}; write to its base, or clone it first"
            )


def _overlaps(tensor: Tensor) -> bool:
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    extent, is_nested = 1, True
    for stride, size in dims:
        is_nested = is_nested and stride >= extent  # one step leaves all that the smaller strides reach
        extent += (size - 1) * stride
    if is_nested or extent < tensor.numel() or dims[0][0] == 0:
        return not is_nested
    offsets = np.zeros(1, dtype=np.int64)
    for stride, size in dims:
        offsets = np.unique(offsets[:, None] + stride * np.arange(size))
    return len(offsets) < tensor.numel()


def floating(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises TypeError for a dtype that is not one of FLOAT_DTYPES."""
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in FLOAT_DTYPES:
            remedy = "take .abs() or torch.view_as_real first" if tensor.is_complex() else "convert it first"
            raise TypeError(
                f"`{name}[{i}]`: expected float32, bfloat16, float16 or float64, got {short(tensor.dtype)}; {remedy}"
            )


def same_length(name: str, values: Sequence[object], like: str, length: int) -> None:
    """Raises unless there is one entry per tensor."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"`{name}`: expected a list or tuple, got {type(values).__name__}; wrap it in a list")
    if len(values) != length:
        raise ValueError(
            f"`{name}`: expected {length} entries, one per `{like}`, got {len(values)}; pass them in the same order"
        )


def index_tensors(
    indices: Sequence[Tensor | None], tensors: Sequence[Tensor], like: str, *, allow_none: bool = False
) -> None:
    """Raises unless all are one-dimensional int32 or int64 on their tensor's device; None, where allowed, means all."""
    for i, (index, tensor) in enumerate(zip(indices, tensors, strict=True)):
        if index is None and allow_none:
            continue
        if not isinstance(index, Tensor) or index.dtype not in INDEX_DTYPES or index.dim() != 1:
            got = f"{short(index.dtype)} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise TypeError(
                f"`indices[{i}]`: expected a one-dimensional int32 or int64 tensor, got {got}; flatten or convert it"
            )
        if index.device != tensor.device:
            same_device(f"indices[{i}]", index, f"{like}[{i}]", tensor)
    all_in_memory("indices", indices)


def index_ranges(indices: Sequence[Tensor | None], numels: Sequence[int], like: str) -> None:
    """Raises IndexError for an index that is no position among `numels[i]`. One look, so a GPU is waited for once."""
    present = [(index, numel) for index, numel in zip(indices, numels, strict=True) if index is not None]
    if not sum(index.numel() for index, _ in present):
        return
    device = present[0][0].device
    flat = torch.cat([index.long() for index, _ in present])
    counts = torch.tensor([index.numel() for index, _ in present], dtype=torch.int64, device=device)
    limits = torch.tensor([numel for _, numel in present], dtype=torch.int64, device=device)
    limits = limits.repeat_interleave(counts, output_size=flat.numel())
    if bool(((flat < 0) | (flat >= limits)).any()):
        for i, (index, numel) in enumerate(zip(indices, numels, strict=True)):
            if index is not None and bool(((index < 0) | (index.long() >= numel)).any()):
                raise out_of_range(f"`indices[{i}]`", index, numel, f"`{like}[{i}]`")


def out_of_range(label: str, index: Tensor, numel: int, like: str) -> IndexError:
    """The error for indices that are no positions in their tensor."""
    low, high = (int(value) for value in index.aminmax())
    if 0 <= low and high < numel:
        return IndexError(
            f"{label}: expected flat positions that stay what they are until the call is done, got some that were out "
            "of range when they were read; write them before or after"
        )
    return IndexError(
        f"{label}: expected flat positions in [0, {numel}) of {like}, got {low} to {high}; they index the flattened "
        "tensor, not a row of it"
    )


def same_device(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Raises ValueError unless both are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"`{name}`: expected device {other.device} like `{like}`, got {tensor.device}; move it there")


def shape_dtype(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raises unless it is a tensor of exactly this shape and dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}`: expected a tensor, got {type(tensor).__name__}; pass one per tensor")
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"`{name}`: expected {short(dtype)} of shape {tuple(shape)}, got {short(tensor.dtype)} of shape "
            f"{tuple(tensor.shape)}; reshape or convert it"
        )
