"""Thin callers of the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import _tables
from ._adamw import AdamWHyper, AdamWSegment, is_compact, same_memory_order
from ._types import TopK

try:
    from saft_kernels import _C
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

ISA = -1
"""Instruction set: -1 the best this processor has, else a position in `_C.isas()`. The tests set it."""


def why_unavailable(device_type: str | None) -> str | None:
    """Why this backend cannot run on tensors of `device_type` (None: any), or None when it can."""
    if _import_error is not None:
        return f"the compiled module is missing ({_import_error}); install a C++17 compiler and reinstall"
    if device_type not in (None, "cpu"):
        return f"it runs on CPU tensors, got {device_type}"
    return None


def description() -> str:
    """What was compiled, for `python -m saft_kernels`."""
    threads = f"{torch.get_num_threads()} threads" if _C.has_openmp else "single-threaded: built without OpenMP"
    return f"{_C.isas()[ISA]}, {threads}"


def topk_magnitude(tensors: Sequence[Tensor], k: int) -> TopK:
    """See `saft_kernels.ops.topk_magnitude`."""
    layouts = _tables.Layouts()
    table = _tables.table((layouts.tensor_desc(t) for t in tensors), 5)
    indices = torch.empty(k, dtype=torch.int64)
    counts = torch.zeros(len(tensors), dtype=torch.int64)
    threshold, num_nonfinite = _C.topk_magnitude(
        table.ctypes.data,
        len(tensors),
        k,
        indices.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
        ISA,
    )
    return TopK(indices.split(counts.tolist()), threshold, num_nonfinite)


def gather(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """See `saft_kernels.ops.gather`."""
    indices = [i.contiguous() for i in indices]
    values = [torch.empty(i.numel(), dtype=t.dtype) for t, i in zip(tensors, indices, strict=True)]
    layouts = _tables.Layouts()
    table = _tables.gather_table(layouts, tensors, indices, values)
    _C.gather(table.ctypes.data, len(table), torch.get_num_threads())
    return values


def scatter_(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.scatter_`."""
    indices = [i.contiguous() for i in indices]
    values = [v.contiguous() for v in values]
    layouts = _tables.Layouts()
    table = _tables.gather_table(layouts, tensors, indices, values)
    _C.scatter(table.ctypes.data, len(table), torch.get_num_threads())
    torch.autograd.graph.increment_version(tensors)


class Plan:
    """The segment table. Between steps only pointers that moved are written again."""

    # columns of saft::AdamWSegment
    _PARAM, _PARAM_DTYPE, _PARAM_NDIM = 0, 2, 3
    _GRAD, _GRAD_DTYPE, _GRAD_NDIM, _COMPACT, _NUM_COLUMNS = 5, 7, 8, 17, 19

    def __init__(self, segments: Sequence[AdamWSegment]) -> None:
        self.segments = list(segments)
        self._layouts = _tables.Layouts()
        self._table = _tables.table((self._row(s) for s in self.segments), self._NUM_COLUMNS)
        self._params = [s.param for s in self.segments]
        self._numels = [p.numel() for p in self._params]
        # what the parameter and gradient columns were filled for
        self._seen: list[tuple[object, ...] | None] = [None] * len(self.segments)
        self._contiguous_grads: tuple[list[int], list[torch.dtype]] | None = None

    def _row(self, segment: AdamWSegment) -> tuple[int, ...]:
        state = (segment.exp_avg, segment.exp_avg_sq, segment.max_exp_avg_sq, segment.master)
        indices = segment.indices
        return (
            *(0, segment.param.numel(), _tables.DTYPE_CODES[segment.param.dtype], 0, 0),
            *(0, segment.param.numel(), 0, 0, 0),
            0 if indices is None else indices.data_ptr(),
            8 if indices is None else indices.itemsize,
            *(0 if t is None else t.data_ptr() for t in state),
            segment.count,
            0,
            segment.hyper,
        )

    def step(self, grads: Sequence[Tensor], hypers: Sequence[AdamWHyper]) -> None:
        """One step."""
        on_host = [hyper.on_host() for hyper in hypers]
        if any(hyper.found_inf for hyper in on_host):
            return
        copies = [] if self._move_pointers(grads) else self._refill(grads)
        scalars = np.array(
            [
                (h.lr, h.beta1, h.beta2, h.eps, h.weight_decay)
                + (h.bias_correction1, h.bias_correction2_sqrt, h.grad_scale, h.maximize)
                for h in on_host
            ],
            dtype=np.float64,
        )
        _C.sparse_adamw(self._table.ctypes.data, len(self._table), scalars.ctypes.data, torch.get_num_threads(), ISA)
        del copies
        torch.autograd.graph.increment_version(self._params)

    def _move_pointers(self, grads: Sequence[Tensor]) -> bool:
        """The steady state: all tensors are contiguous, as in the last step, and at most their storage moved."""
        if (
            self._contiguous_grads is None
            or not all(map(Tensor.is_contiguous, self._params))
            or not all(map(Tensor.is_contiguous, grads))
            or list(map(Tensor.numel, self._params)) != self._numels
            or (list(map(Tensor.numel, grads)), [grad.dtype for grad in grads]) != self._contiguous_grads
        ):
            return False
        self._seen = [None] * len(self._params)  # the table is about to point elsewhere
        self._table[:, self._PARAM] = list(map(Tensor.data_ptr, self._params))
        self._table[:, self._GRAD] = list(map(Tensor.data_ptr, grads))
        return True

    def _refill(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Writes what changed; returns gradients laid out anew, which have to live until the kernel is done."""
        copies = []
        for row, (param, grad) in enumerate(zip(self._params, grads, strict=True)):
            now = (
                param.data_ptr(),
                grad.data_ptr(),
                param.shape,
                param.stride(),
                grad.shape,
                grad.stride(),
                grad.dtype,
            )
            if now != self._seen[row]:
                laid_out = self._fill(row, self.segments[row], grad)
                copied = laid_out is not grad
                if copied:
                    copies.append(laid_out)
                self._seen[row] = None if copied else now
        contiguous = not copies and all(t.is_contiguous() for t in (*self._params, *grads))
        self._contiguous_grads = ([g.numel() for g in grads], [g.dtype for g in grads]) if contiguous else None
        return copies

    def _fill(self, row: int, segment: AdamWSegment, grad: Tensor) -> Tensor:
        """Writes one row's parameter and gradient columns; returns the gradient it points to."""
        columns = self._table[row]
        param, exp_avg = segment.param, segment.exp_avg
        if param.numel() != self._numels[row] or _tables.DTYPE_CODES[param.dtype] != columns[self._PARAM_DTYPE]:
            raise RuntimeError(
                f"`params[{row}]`: expected {self._numels[row]} elements of the dtype the step was prepared for, "
                f"got {param.numel()} of {param.dtype}; prepare another step"
            )
        compact = is_compact(grad, param, segment.count)
        if compact:
            grad = grad.contiguous()
        if segment.indices is None and not exp_avg.is_contiguous():
            # the walk is over memory: all of them have to be laid out alike
            if not same_memory_order(param, exp_avg):
                raise ValueError(
                    f"`exp_avgs[{row}]`: expected the strides of a wholly selected parameter, {param.stride()}, "
                    f"or contiguous, got {exp_avg.stride()}; lay the state out like the parameter"
                )
            if not same_memory_order(param, grad):
                grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad.view(param.shape) if compact else grad)
        in_memory_order = segment.indices is None and same_memory_order(param, exp_avg, grad)
        layouts = ((), ()) if in_memory_order else (_tables.layout(param), _tables.layout(grad))
        columns[self._PARAM] = param.data_ptr()
        columns[self._PARAM_NDIM : self._PARAM_NDIM + 2] = self._layouts.columns(layouts[0])
        columns[self._GRAD] = grad.data_ptr()
        columns[self._GRAD_DTYPE] = _tables.DTYPE_CODES[grad.dtype]
        columns[self._GRAD_NDIM : self._GRAD_NDIM + 2] = self._layouts.columns(layouts[1])
        columns[self._COMPACT] = compact
        return grad


prepare_sparse_adamw = Plan
