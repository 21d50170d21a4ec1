"""Lists of tensors, walked by the compiled module where there is one: the Python share of a step."""

from __future__ import annotations

from itertools import repeat
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._compiled import _C
from .tables import Words

_reader: _C.TensorReader | None = None if _C is None else _C.TensorReader(Tensor, torch.nn.Parameter)
if _reader is not None and not _reader.is_available:
    _reader = None


class PointerColumn:
    """A column of a table that follows the data pointers of tensors, and tells when anything else has changed.

    With `is_fixed`, a pointer that has moved is such a change, too.
    """

    def __init__(self, column: Words, is_fixed: bool = False) -> None:
        self._column = column
        self._address, self._row_bytes = column.ctypes.data, column.strides[0]
        self._forms = np.zeros(len(column), dtype=np.uint64)
        self._forms_address = self._forms.ctypes.data
        self._is_fixed = is_fixed
        self._interpreted: list[tuple[object, ...]] | None = None

    def move(self, tensors: list[Tensor]) -> bool:
        """Writes the pointers. True when dtype, device, shape and strides are those of the last call."""
        assert len(tensors) == len(self._column)
        if _reader is not None:
            same = _reader.read(tensors, self._address, self._row_bytes, self._forms_address, self._is_fixed)
            if same is not None:
                self._interpreted = None
                return same
            self._forms[:] = 0
        pointers = list(map(Tensor.data_ptr, tensors))
        for tensor, pointer in zip(tensors, pointers, strict=True):
            if not pointer and tensor.numel():
                raise TypeError(
                    f"expected tensors with memory, got a {type(tensor).__name__}; pass the values it wraps"
                )
        forms: list[tuple[object, ...]] = [(t.dtype, t.device, t.shape, t.stride()) for t in tensors]
        if self._is_fixed:
            forms = list(zip(forms, pointers, strict=True))
        self._column[:] = pointers
        same, self._interpreted = forms == self._interpreted, forms
        return same


def gradients(parameters: list[Tensor]) -> list[Tensor] | None:
    """`p.grad` of each, with its values in memory (autograd may negate lazily); None when one of them has none."""
    if _reader is not None:
        return _reader.gradients(parameters)
    grads = [grad.resolve_neg() for p in parameters if (grad := p.grad) is not None]
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
