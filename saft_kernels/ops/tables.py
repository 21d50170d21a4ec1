"""The structs of csrc/ as numpy dtypes, and tables of them: what the compiled backends read.

A field has one name, there and here. Every field is 64 bits wide. tests/test_tables.py compares the two.
"""

from __future__ import annotations

import struct as binary
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ._compiled import reader as _reader
from .adamw import AdamWSegment
from .dtypes import DTYPE_CODES

Table = npt.NDArray[np.void]
"""Rows of one of the structs below, or one field of them that is a struct itself."""

Words = npt.NDArray[np.int64]


def struct(*fields: str | tuple[str, np.dtype[np.void]], of: type = np.int64) -> np.dtype[np.void]:
    """A dtype of named fields, one after the other; those without a dtype are `of` 64 bits."""
    return np.dtype([(field, of) if isinstance(field, str) else field for field in fields])


def names(row: np.dtype[np.void]) -> tuple[str, ...]:
    """The fields of a struct, in order."""
    assert row.names is not None
    return row.names


def packer(row: np.dtype[np.void]) -> Callable[[Any], bytes]:
    """A function that packs one row out of an object which has the struct's fields as attributes."""

    def flat(row: np.dtype[np.void], prefix: str = "") -> Iterator[tuple[str, str]]:
        for name in names(row):
            field = row[name]
            if field.names:
                yield from flat(field, f"{prefix}{name}.")
            else:
                yield prefix + name, {np.int64: "q", np.float64: "d"}[field.type]

    fields, formats = zip(*flat(row), strict=True)
    read, pack = attrgetter(*fields), binary.Struct("".join(formats)).pack
    return lambda source: pack(*read(source))


TENSOR_DESC = struct("data", "numel", "dtype", "ndim", "layout")
ADAMW_SEGMENT = struct(
    *(("param", TENSOR_DESC), ("grad", TENSOR_DESC)),
    *("indices", "index_bytes", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"),
    *("count", "grad_is_compact", "hyper"),
)
ADAMW_HYPER = struct(
    *("lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction1", "bias_correction2_sqrt"),
    *("grad_scale", "maximize"),
    of=np.float64,
)
ADAMW_CUDA_HYPER = struct(
    ("number", ADAMW_HYPER),
    *("lr", "step", "grad_scale", "found_inf"),
    *("lr_dtype", "step_dtype", "grad_scale_dtype", "found_inf_dtype"),
)
GATHER_SEGMENT = struct(
    *("data", "itemsize", "ndim", "layout", "indices", "index_bytes", "values", "count", "numel"),
)
TOPK_ROWS = struct("data", "dtype", "num_rows", "numel", "row_stride", "stride", "k")
SDDMM_FACTOR = struct("data", "token_stride", "channel_stride")
SDDMM_PARAMS = struct(
    *(("dy", SDDMM_FACTOR), ("x", SDDMM_FACTOR)),
    *("dtype", "num_tokens", "num_outputs", "num_inputs", "indices", "index_bytes", "values", "k", "accumulate"),
)
_pack_sddmm = binary.Struct("15q").pack


# ---- layouts ----


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
    """Owns the arrays that `layout` fields point to; keep it as long as the table."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, ...], Words] = {}

    def write(self, rows: Table, layouts: Sequence[tuple[int, ...]]) -> None:
        """The fields `ndim` and `layout` of rows: of each, what `layout()` says of its tensor."""
        rows["ndim"] = [len(sizes_and_strides) // 2 for sizes_and_strides in layouts]
        rows["layout"] = [self._address(sizes_and_strides) if sizes_and_strides else 0 for sizes_and_strides in layouts]

    def _address(self, sizes_and_strides: tuple[int, ...]) -> int:
        array = self._arrays.get(sizes_and_strides)
        if array is None:
            array = self._arrays[sizes_and_strides] = np.array(sizes_and_strides, dtype=np.int64)
        return array.ctypes.data


# ---- tables. Column by column: half the time of row by row ----


def _write_layouts(layouts: Layouts, rows: Table, tensors: Sequence[Tensor]) -> None:
    """Writes the layouts of rows that are zero: mostly, there is none."""
    if not all(map(Tensor.is_contiguous, tensors)):
        layouts.write(rows, [layout(t) for t in tensors])


def tensor_table(layouts: Layouts, tensors: Sequence[Tensor]) -> Table:
    """TENSOR_DESC rows."""
    table = np.zeros(len(tensors), TENSOR_DESC)
    if _reader is not None and _reader.describe(list(tensors), table.ctypes.data):
        return table
    table["data"] = [t.data_ptr() for t in tensors]
    table["numel"] = [t.numel() for t in tensors]
    table["dtype"] = [DTYPE_CODES[t.dtype] for t in tensors]
    _write_layouts(layouts, table, tensors)
    return table


def topk_rows(rows: Tensor, k: int) -> Table:
    """One TOPK_ROWS row."""
    table = np.zeros(1, TOPK_ROWS)
    table["data"], table["dtype"] = rows.data_ptr(), DTYPE_CODES[rows.dtype]
    table["num_rows"], table["numel"] = rows.shape
    table["row_stride"], table["stride"] = rows.stride()
    table["k"] = k
    return table


def gather_table(
    layouts: Layouts, tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> Table:
    """GATHER_SEGMENT rows; indices and values are contiguous."""
    table = np.zeros(len(tensors), GATHER_SEGMENT)
    table["data"] = [t.data_ptr() for t in tensors]
    table["itemsize"] = [t.itemsize for t in tensors]
    _write_layouts(layouts, table, tensors)
    table["indices"] = [i.data_ptr() for i in indices]
    table["index_bytes"] = [i.itemsize for i in indices]
    table["values"] = [v.data_ptr() for v in values]
    table["count"] = [i.numel() for i in indices]
    table["numel"] = [t.numel() for t in tensors]
    return table


def sddmm_params(dy: Tensor, x: Tensor, indices: Tensor, out: Tensor, accumulate: bool) -> bytes:
    """One SDDMM_PARAMS row. A numpy row takes ten times as long, more than the kernel does in small layers."""
    return _pack_sddmm(
        *(dy.data_ptr(), *dy.stride(), x.data_ptr(), *x.stride()),
        *(DTYPE_CODES[dy.dtype], dy.shape[0], dy.shape[1], x.shape[1]),
        *(indices.data_ptr(), indices.itemsize, out.data_ptr(), indices.numel(), accumulate),
    )


def adamw_table(segments: Sequence[AdamWSegment]) -> Table:
    """ADAMW_SEGMENT rows. What depends on where and how parameter and gradient lie is the plan's to fill in."""
    table = np.zeros(len(segments), ADAMW_SEGMENT)
    table["param"]["numel"] = table["grad"]["numel"] = [s.param.numel() for s in segments]
    table["param"]["dtype"] = [DTYPE_CODES[s.param.dtype] for s in segments]
    table["indices"] = [address(s.indices) for s in segments]
    table["index_bytes"] = [8 if s.indices is None else s.indices.itemsize for s in segments]
    table["exp_avg"] = [s.exp_avg.data_ptr() for s in segments]
    table["exp_avg_sq"] = [s.exp_avg_sq.data_ptr() for s in segments]
    table["max_exp_avg_sq"] = [address(s.max_exp_avg_sq) for s in segments]
    table["master"] = [address(s.master) for s in segments]
    table["count"] = [s.count for s in segments]
    table["hyper"] = [s.hyper for s in segments]
    return table


def address(tensor: Tensor | None) -> int:
    """The address of its elements; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
