"""Tables of int64 that mirror the C structs of csrc/: what the compiled backends read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .adamw import AdamWSegment
from .dtypes import DTYPE_CODES

Table = npt.NDArray[np.int64]


def layout(tensor: Tensor) -> tuple[int, ...]:
    """Sizes, then strides, with mergeable dimensions merged; empty when the tensor is contiguous."""
    if tensor.is_contiguous():
        return ()
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return (*sizes, *strides)


class Layouts:
    """Owns the layout arrays that table rows point to; keep it as long as the table."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, ...], Table] = {}

    def columns(self, shape_and_strides: tuple[int, ...]) -> tuple[int, int]:
        """The `ndim` and `layout` fields of one tensor."""
        if not shape_and_strides:
            return 0, 0
        array = self._arrays.get(shape_and_strides)
        if array is None:
            array = self._arrays[shape_and_strides] = np.array(shape_and_strides, dtype=np.int64)
        return len(shape_and_strides) // 2, array.ctypes.data

    def tensor_desc(self, tensor: Tensor) -> tuple[int, int, int, int, int]:
        """saft::TensorDesc."""
        return (
            tensor.data_ptr(),
            tensor.numel(),
            DTYPE_CODES[tensor.dtype],
            *self.columns(layout(tensor)),
        )


def table(rows: Iterable[Sequence[int]], num_columns: int) -> Table:
    """Rows of equal length as one C-contiguous int64 array."""
    return np.array(list(rows), dtype=np.int64).reshape(-1, num_columns)


def sddmm_params(dy: Tensor, x: Tensor, indices: Tensor, out: Tensor, accumulate: bool) -> Table:
    """saft::SddmmParams."""
    factors = [(t.data_ptr(), *t.stride()) for t in (dy, x)]
    sizes = (DTYPE_CODES[dy.dtype], dy.shape[0], dy.shape[1], x.shape[1])
    selected = (indices.data_ptr(), indices.itemsize, out.data_ptr(), indices.numel(), accumulate)
    return np.array([*factors[0], *factors[1], *sizes, *selected], dtype=np.int64)


def gather_table(
    layouts: Layouts, tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> Table:
    """saft::GatherSegment rows; indices and values are contiguous."""
    contiguous = (0, 0)
    rows = [
        (
            tensor.data_ptr(),
            tensor.itemsize,
            *(contiguous if tensor.is_contiguous() else layouts.columns(layout(tensor))),
            index.data_ptr(),
            index.itemsize,
            value.data_ptr(),
            index.numel(),
            tensor.numel(),
        )
        for tensor, index, value in zip(tensors, indices, values, strict=True)
    ]
    return table(rows, 9)


class AdamWColumn:
    """Columns of saft::AdamWSegment."""

    PARAM, PARAM_DTYPE, PARAM_NDIM = 0, 2, 3
    GRAD, GRAD_DTYPE, GRAD_NDIM = 5, 7, 8
    COMPACT = 17
    COUNT = 19  # of columns


def adamw_table(segments: Iterable[AdamWSegment]) -> Table:
    """saft::AdamWSegment rows. What depends on where and how parameter and gradient lie is the plan's to fill in."""

    def row(segment: AdamWSegment) -> tuple[int, ...]:
        state = (segment.exp_avg, segment.exp_avg_sq, segment.max_exp_avg_sq, segment.master)
        indices = segment.indices
        return (
            *(0, segment.param.numel(), DTYPE_CODES[segment.param.dtype], 0, 0),
            *(0, segment.param.numel(), 0, 0, 0),
            0 if indices is None else indices.data_ptr(),
            8 if indices is None else indices.itemsize,
            *(0 if t is None else t.data_ptr() for t in state),
            segment.count,
            0,
            segment.hyper,
        )

    return table(map(row, segments), AdamWColumn.COUNT)
