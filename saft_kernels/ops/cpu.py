"""Thin callers of the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, tables
from ._compiled import _C, import_error
from .adamw import AdamWHyper, AdamWSegment, same_memory_order
from .dtypes import DTYPE_CODES
from .forms import Follower
from .types import TopK

ISA = -1
"""Instruction set: -1 the best this processor has, else a position in `_C.isas()`. The tests set it."""


def why_unavailable(device_type: str | None) -> str | None:
    """Why this backend cannot run on tensors of `device_type` (None: any), or None when it can."""
    if import_error is not None:
        remedy = "reinstall with a C++17 compiler; SAFT_REQUIRE_CPP=1 says what fails"
        return f"the compiled module is missing ({import_error}); {remedy}"
    if device_type not in (None, "cpu"):
        return f"it runs on CPU tensors, got {device_type}"
    return None


def description() -> str:
    """What was compiled, for `python -m saft_kernels`."""
    threads = f"{torch.get_num_threads()} threads" if _C.has_openmp else "single-threaded: built without OpenMP"
    return f"{_C.isas()[ISA]}, {threads}"


def topk_magnitude(tensors: Sequence[Tensor], k: int) -> TopK:
    """See `saft_kernels.ops.topk_magnitude`."""
    layouts = tables.Layouts()
    table = tables.tensor_table(layouts, tensors)
    indices = torch.empty(k, dtype=torch.int64, device="cpu")
    counts = torch.zeros(len(tensors), dtype=torch.int64, device="cpu")
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


def topk_magnitude_rows(rows: Tensor, k: int) -> Tensor:
    """See `saft_kernels.ops.topk_magnitude_rows`. Memory: 8 B (fp64: 16 B) per element of a row and thread."""
    if len(rows) == 1:  # by tiles, which threads share
        return topk_magnitude([rows], k).indices[0]
    indices = torch.empty(len(rows) * k, dtype=torch.int64, device="cpu")
    table = tables.topk_rows(rows, k)
    _C.topk_magnitude_rows(table.ctypes.data, indices.data_ptr(), torch.get_num_threads())
    return indices


checks_index_ranges = True  # gather, scatter_ and sddmm do it in the kernel


def _out_of_range(i: int, indices: Sequence[Tensor], tensors: Sequence[Tensor]) -> IndexError:
    return checks.out_of_range(f"`indices[{i}]`", indices[i], tensors[i].numel(), f"`tensors[{i}]`")


def gather(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.gather`; indices are contiguous, `values` are written."""
    layouts = tables.Layouts()
    table = tables.gather_table(layouts, tensors, indices, values)
    failed = _C.gather(table.ctypes.data, len(table), torch.get_num_threads())
    if failed >= 0:
        raise _out_of_range(failed, indices, tensors)


def scatter_(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.scatter_`."""
    indices = [i.contiguous() for i in indices]
    values = [v.contiguous() for v in values]
    layouts = tables.Layouts()
    table = tables.gather_table(layouts, tensors, indices, values)
    failed = _C.scatter(table.ctypes.data, len(table), torch.get_num_threads())
    if failed >= 0:
        raise _out_of_range(failed, indices, tensors)
    torch.autograd.graph.increment_version(tensors)


def sddmm(dy: Tensor, x: Tensor, indices: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `saft_kernels.ops.sddmm`. Memory: 1 KB (fp64: 2 KB) per row and column that has a selected entry."""
    params = tables.sddmm_params(dy, x, indices, out, accumulate)
    if not _C.sddmm(params, torch.get_num_threads(), ISA):
        raise checks.out_of_range("`indices[0]`", indices, dy.shape[1] * x.shape[1], "`weight[0]`")


_pack_hyper = tables.packer(tables.ADAMW_HYPER)


class Plan:
    """The segment table. Between steps only pointers that moved are written again."""

    def __init__(self, segments: Sequence[AdamWSegment]) -> None:
        self.segments = list(segments)
        self._layouts = tables.Layouts()
        self._table = tables.adamw_table(self.segments)
        self._address = self._table.ctypes.data
        self._params = [s.param for s in self.segments]
        self._follower = Follower(self.segments, self._table["param"]["data"], self._table["grad"]["data"])
        self._is_filled = False  # for tensors of the form that the follower has seen, in place

    def step(self, grads: list[Tensor], hypers: Sequence[AdamWHyper]) -> None:
        """One step."""
        on_host = [hyper.on_host() for hyper in hypers]
        if any(hyper.found_inf for hyper in on_host):
            return
        packed = b"".join(map(_pack_hyper, on_host))
        copies = self._follow(grads)
        # before the kernel: after it, what torch holds of a parameter is out of the cache
        torch.autograd.graph.increment_version(self._params)
        failed = _C.sparse_adamw(self._address, len(self._table), packed, torch.get_num_threads(), ISA)
        if failed >= 0:
            self._follower.check_memory(grads)
            raise self._follower.out_of_range(failed)
        del copies

    def _follow(self, grads: list[Tensor]) -> list[Tensor]:
        """Makes the table that of these gradients, and of the parameters as they are now.

        Returns gradients laid out anew, which have to live until the kernel is done.
        """
        was_filled, self._is_filled = self._is_filled, False
        are_compact = self._follower.follow(grads, anew=not was_filled)
        copies = [] if are_compact is None else self._fill(grads, are_compact)
        self._is_filled = not copies  # the steady state: at most gradients have moved
        return copies

    def _fill(self, grads: list[Tensor], are_compact: list[bool]) -> list[Tensor]:
        """Writes what depends on the form of parameters and gradients; returns gradients laid out anew."""
        copies: list[Tensor] = []
        param_layouts, grad_layouts = [], []
        grad_data = self._table["grad"]["data"]
        for row, (segment, grad, compact) in enumerate(zip(self.segments, grads, are_compact, strict=True)):
            param, exp_avg = segment.param, segment.exp_avg
            laid_out = grad.contiguous() if compact else grad
            # then the walk is over memory: all of them have to be laid out alike
            is_in_memory_order = segment.indices is None and not exp_avg.is_contiguous()
            if is_in_memory_order and not same_memory_order(param, laid_out):
                values = laid_out.view(param.shape) if compact else laid_out
                laid_out = torch.empty_like(param, dtype=grad.dtype).copy_(values)
            if laid_out is not grad:
                copies.append(laid_out)
                grad_data[row] = laid_out.data_ptr()
            no_layouts = segment.indices is None and same_memory_order(param, exp_avg, laid_out)
            param_layouts.append(() if no_layouts else tables.layout(param))
            grad_layouts.append(() if no_layouts else tables.layout(laid_out))
        self._layouts.write(self._table["param"], param_layouts)
        self._layouts.write(self._table["grad"], grad_layouts)
        self._table["grad"]["dtype"] = [DTYPE_CODES[grad.dtype] for grad in grads]
        self._table["grad_is_compact"] = are_compact
        return copies


prepare_sparse_adamw = Plan
