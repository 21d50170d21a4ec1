"""Lists of tensors, walked by the compiled module where there is one: the Python share of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter

from ._compiled import _C
from ._compiled import reader as _reader


class PointerColumn:
    """A column of a table that follows the data pointers of tensors, and tells when anything else has changed.

    With `is_fixed`, a pointer that has moved is such a change, too.
    """

    def __init__(self, column: npt.NDArray[np.int64], is_fixed: bool = False) -> None:
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
                    f"expected tensors with memory, got a {type(tensor).__name__}; pass whole plain tensors"
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


def have_gradients(parameters: list[Tensor], gradients: list[Tensor]) -> bool:
    """Whether `p.grad is gradient` for each."""
    if _reader is not None:
        return _reader.have_gradients(parameters, gradients)
    return len(parameters) == len(gradients) and all(p.grad is g for p, g in zip(parameters, gradients, strict=True))


def same_objects(now: list[Any], then: list[Any]) -> bool:
    """Whether both hold the same objects."""
    if _C is not None:
        return _C.same_objects(now, then)
    return len(now) == len(then) and all(map(is_, now, then))


class Watch:
    """The tensors of many dicts, by object and by memory: what a step that keeps their addresses has to compare.

    `tensor.data = other`, `set_`, `share_memory_` and a resized storage leave the object and move its memory; torch
    tells nobody.

    Args:
        dicts: The state of each parameter.
        keys: Which tensors of a dict are watched; those that are missing or None have to stay so.
    """

    def __init__(self, dicts: list[dict[str, Any]], keys: set[str]) -> None:
        self._dicts, self._keys = dicts, keys
        self._compiled = None if _reader is None else _C.Watch(_reader, dicts, keys)
        if self._compiled is not None and not self._compiled.is_readable:
            self._compiled = None
        self._seen = None if self._compiled is not None else self._look()
        self._tensors_then = [tensor for _, tensor in self._tensors()]  # whose ids are theirs as long as they live
        self._shared = shared(self._tensors_then)

    def holds(self) -> bool:
        """Whether all are the same objects, with the same dtype, device, shape and strides at the same address."""
        return self._look() == self._seen if self._compiled is None else self._compiled.holds()

    def _tensors(self) -> Iterator[tuple[int, Tensor]]:
        for values in self._dicts:
            for at, key in enumerate(self._keys):
                if (tensor := values.get(key)) is not None:
                    yield at, tensor

    def _look(self) -> list[tuple[object, ...]]:
        return [
            (at, id(t), t.dtype, t.device, t.shape, t.stride(), t.data_ptr() if t.numel() else 0)
            for at, t in self._tensors()
        ]


def shared(tensors: Iterable[Tensor]) -> list[object]:
    """A second owner in C++ for each plain CPU tensor, as long as the result lives: torch reads those in half the time.

    The first reference that C++ adds to a tensor, and the last that it drops, also count one of Python's: 30 ns for
    every call that takes the tensor by value, as the DLPack functions do (AMD EPYC, Zen 3, torch 2.14, 2026-11-26).
    torch.ScriptList would own them all, but Ctrl-C while it is made ends the process.
    """
    return [torch._C._to_dlpack(t) for t in tensors if type(t) is Tensor and t.is_cpu and not t.requires_grad]


def shared_parameters(parameters: list[Tensor]) -> list[object]:
    """`shared` for parameters: their gradient accumulators are owners that torch.utils.swap_tensors puts up with.

    On a CPU alone: an accumulator belongs to the stream that it was made on.
    """
    found: list[object] = []
    for p in parameters:
        if type(p) in (Tensor, Parameter) and p.device.type == "cpu" and p.is_leaf and p.requires_grad:
            found.append(get_gradient_edge(p).node)
    return found
