"""Lists of tensors, walked by the compiled module where there is one: the Python share of a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._tables import DTYPE_CODES, Table

try:
    from saft_kernels import _C
except ImportError:
    _C = None  # type: ignore[assignment]

_reader: _C.TensorReader | None = None if _C is None else _C.TensorReader(Tensor, torch.nn.Parameter)
if _reader is not None and not _reader.is_available:
    _reader = None


class PointerColumn:
    """A column of a table that follows the data pointers of contiguous tensors of given sizes and dtypes."""

    def __init__(self, table: Table, column: int, tensors: Sequence[Tensor]) -> None:
        self._column = table[:, column]
        self._expected = np.array([(t.numel(), DTYPE_CODES[t.dtype]) for t in tensors], dtype=np.int64).reshape(-1, 2)

    def move(self, tensors: list[Tensor]) -> bool:
        """Writes the pointers. False, and the column is undefined, when a tensor is not what it has to be."""
        if len(tensors) != len(self._column):
            return False
        if _reader is not None:
            address, row_bytes = self._column.ctypes.data, self._column.strides[0]
            return _reader.move_pointers(tensors, address, row_bytes, self._expected.ctypes.data)
        if not all(map(Tensor.is_contiguous, tensors)) or self._expected.tolist() != [
            [t.numel(), DTYPE_CODES.get(t.dtype, -1)] for t in tensors
        ]:
            return False
        self._column[:] = list(map(Tensor.data_ptr, tensors))
        return True


def gradients(parameters: list[Tensor]) -> list[Tensor] | None:
    """`p.grad` of each; None when one of them has none."""
    if _C is not None:
        return _C.attributes(parameters, "grad")
    grads = [grad for p in parameters if (grad := p.grad) is not None]
    return grads if len(grads) == len(parameters) else None


def same_objects(now: list[Any], then: list[Any]) -> bool:
    """Whether both hold the same objects."""
    if _C is not None:
        return _C.same_objects(now, then)
    return len(now) == len(then) and all(map(is_, now, then))


def same_items(dicts: list[dict[str, Any]], key: str, values: list[Any]) -> bool:
    """Whether `dicts[i][key] is values[i]`, for all."""
    if _C is not None:
        return _C.same_items(dicts, key, values)
    return same_objects(list(map(dict.get, dicts, repeat(key))), values)
