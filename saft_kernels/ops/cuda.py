"""Thin callers of the compiled CUDA kernels. They run on torch's current stream, with memory of its allocator."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import tables
from ._compiled import _C, import_error
from .adamw import AdamWHyper, AdamWSegment, HostHyper
from .dtypes import DTYPE_CODES
from .forms import Follower
from .types import TopK

MAX_BLOCKS = 0
"""An upper bound on every grid; 0: what fills the device. The tests set it."""

FILL_WORKSPACE: int | None = None
"""A byte to fill the workspace with before use; None: leave it as it comes. The tests set it."""

# saft::TopKCudaResult
_THRESHOLD, _NONFINITE, _STATUS, _READS, _OFFSETS = range(5)


def why_unavailable(device_type: str | None) -> str | None:
    """Why this backend cannot run on tensors of `device_type` (None: any), or None when it can."""
    remedy = "reinstall with nvcc and a C++17 compiler; SAFT_BUILD_CUDA=1 says what fails"
    if import_error is not None:
        return f"the compiled module is missing ({import_error}); {remedy}"
    if not _C.has_cuda:
        return f"the module was compiled without CUDA; {remedy}"
    if device_type not in (None, "cuda"):
        return f"it runs on CUDA tensors, got {device_type}"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _why_device_unavailable(torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


@functools.cache
def _why_device_unavailable(device: int) -> str | None:
    return _C.cuda_unavailable(device) or None


def description() -> str:
    """What it runs on, for `python -m saft_kernels`."""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"


class PendingTopK:
    """A selection that is enqueued. It owns what the kernels read on the host's behalf."""

    def __init__(self, plan: _C.TopKCudaPlan, tensors: Sequence[Tensor], indices: Tensor, result: Tensor) -> None:
        self._plan = plan
        self._occupied = np.array([t.numel() > 0 for t in tensors], dtype=bool)
        self._indices = indices
        self._result = result
        self.reads = 0
        """How often the data was read, known after `result()`: 1 unless a guess failed."""

    def result(self) -> TopK:
        """Waits for the kernels: one device-to-host copy."""
        words = self._result.cpu().numpy()
        if words[_STATUS] != 0:
            raise RuntimeError(
                "topk_magnitude on CUDA: `tensors` changed while they were read; order the streams that write them"
            )
        self.reads = int(words[_READS])
        ends = np.append(words[_OFFSETS:][self._occupied], self._indices.numel())
        counts = np.zeros(len(self._occupied), dtype=np.int64)
        counts[self._occupied] = np.diff(ends)
        threshold = _C.topk_magnitude_cuda_threshold(self._plan, int(words[_THRESHOLD]))
        return TopK(self._indices.split(counts.tolist()), threshold, int(words[_NONFINITE]))


def launch_topk_magnitude(tensors: Sequence[Tensor], k: int) -> PendingTopK:
    """Enqueues a selection on the current stream of the tensors' device and returns at once.

    Workspace: 1 bit per element and 6 B (fp64: 10 B) per band element, of which there is room for N/256 and twice what
    the sample's error bound implies. In all at most 0.23 B (fp64: 0.3 B) per element, 300 B per tensor and 40 MB; it
    is torch's again when the kernels are done. Tensors made on another stream: order the streams before, and
    `record_stream` them.
    """
    device = tensors[0].device
    with torch.cuda.device(device):
        layouts = tables.Layouts()
        rows = tables.tensor_table(layouts, tensors)
        plan = _C.topk_magnitude_cuda_plan(rows.ctypes.data, len(tensors), k)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        if FILL_WORKSPACE is not None:
            workspace.fill_(FILL_WORKSPACE)
        indices = torch.empty(k, dtype=torch.int64, device=device)
        result = torch.empty(plan.result_words, dtype=torch.int64, device=device)
        _C.topk_magnitude_cuda(
            plan,
            rows.ctypes.data,
            workspace.data_ptr(),
            indices.data_ptr(),
            result.data_ptr(),
            torch.cuda.current_stream(device).cuda_stream,
            MAX_BLOCKS,
        )
    return PendingTopK(plan, tensors, indices, result)


def topk_magnitude(tensors: Sequence[Tensor], k: int) -> TopK:
    """See `saft_kernels.ops.topk_magnitude`. Workspace: see `launch_topk_magnitude`."""
    return launch_topk_magnitude(tensors, k).result()


def sddmm(dy: Tensor, x: Tensor, indices: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `saft_kernels.ops.sddmm`. Enqueued on the current stream of the tensors' device; nothing waits.

    Workspace: both factors once more, channel by channel, for at most 8,192 tokens at a time, and 1 B per channel;
    above 8,192 tokens also 8 B per value. It is torch's again when the kernels are done.
    """
    with torch.cuda.device(dy.device):
        params = tables.sddmm_params(dy, x, indices, out, accumulate)
        size = _C.sddmm_cuda_workspace_bytes(params)
        workspace = torch.empty(size, dtype=torch.uint8, device=dy.device)
        if FILL_WORKSPACE is not None:
            workspace.fill_(FILL_WORKSPACE)
        stream = torch.cuda.current_stream(dy.device).cuda_stream
        _C.sddmm_cuda(params, workspace.data_ptr(), stream, MAX_BLOCKS)


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Makes `device` current; the address of torch's stream on it."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


# ---- gather, scatter_ ----


def _copy(
    kernel: Callable[[int, int, int, int, int], None],
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
) -> None:
    device = tensors[0].device
    layouts = tables.Layouts()
    rows = tables.gather_table(layouts, tensors, indices, values)
    num_bytes = _C.gather_scatter_cuda_table_bytes(rows.ctypes.data, len(rows))
    with _current_stream(device) as stream:
        table = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        kernel(rows.ctypes.data, len(rows), table.data_ptr(), stream, MAX_BLOCKS)


def gather(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.gather`; `values` are written. One launch, after one that uploads the table."""
    _copy(_C.gather_cuda, tensors, indices, values)


def scatter_(tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See `saft_kernels.ops.scatter_`. One launch, after one that uploads the table."""
    _copy(_C.scatter_cuda, tensors, [i.contiguous() for i in indices], [v.contiguous() for v in values])
    torch.autograd.graph.increment_version(tensors)


# ---- sparse_adamw_ ----


@dataclass(frozen=True, slots=True)
class CudaHyper:
    """saft::AdamWCudaHyper: numbers, and device addresses that replace them; 0: none."""

    number: HostHyper
    lr: int
    step: int
    grad_scale: int
    found_inf: int
    lr_dtype: int
    step_dtype: int
    grad_scale_dtype: int
    found_inf_dtype: int


_pack_hyper = tables.packer(tables.ADAMW_CUDA_HYPER)


class Plan:
    """One launch per step, on torch's current stream of the parameters' device. Nothing waits for the device.

    Everything but the gradients' addresses and the hyperparameters lies in a device table, which is written when the
    form (dtype, shape, strides) of a parameter or gradient changes, or a parameter moves. Gradients move at every step
    (`zero_grad(set_to_none=True)`): their addresses are kernel arguments, as are the hyperparameters. Those that are
    tensors on the device (`lr`, `step`, `grad_scale`, `found_inf`) are read by the kernel; on the CPU, by the host.

    CUDA graphs: a captured step keeps its arguments, and replays read `lr`, `step`, `grad_scale` and `found_inf` from
    their tensors, so new values need no new capture. Gradients have to be where they were, as `torch.cuda.graph`
    makes them. A table is never written twice, so steps outside the graph do not disturb replays. Step once before the
    capture, for then the captured step is one kernel; else the table's writes are captured and replayed with it.
    The plan, its parameters and its state have to live as long as the graph.

    Streams: steps write the same memory; order streams as for any other writes.
    """

    def __init__(self, segments: Sequence[AdamWSegment]) -> None:
        self.segments = list(segments)
        self._params = [s.param for s in self.segments]
        self._device = self._params[0].device
        self._layouts = tables.Layouts()
        self._rows = tables.adamw_table(self.segments)
        self._rows_address = self._rows.ctypes.data
        self._follower = Follower(self.segments, self._rows["param"]["data"], self._rows["grad"]["data"])
        self._table: Tensor | None = None
        self._table_stream = 0
        self._captured_tables: set[Tensor] = set()

    def step(self, grads: list[Tensor], hypers: Sequence[AdamWHyper]) -> None:
        """One step."""
        with _current_stream(self._device) as stream:
            found_infs = list({id(h.found_inf): h.found_inf for h in hypers if h.found_inf is not None}.values())
            on_device = [f for f in found_infs if f.device.type != "cpu" or f.device == self._device]
            if any(bool(f) for f in found_infs if f.device.type == "cpu" and f.device != self._device):
                return
            if len(on_device) > 1:
                found = torch.stack([f.to(self._device).reshape(()) != 0 for f in on_device])
                on_device = [found.any().to(torch.float32)]
            held: list[Tensor] = []  # until the kernel is enqueued
            found_inf = self._scalar(on_device[0], held)[1:] if on_device else (0, 0)
            packed = b"".join([self._pack(hyper, found_inf, held) for hyper in hypers])
            table = self._device_table(grads, stream)
            _C.sparse_adamw_cuda(self._rows_address, len(self._rows), packed, table.data_ptr(), stream, MAX_BLOCKS)
        torch.autograd.graph.increment_version(self._params)

    def _scalar(self, value: float | Tensor, held: list[Tensor]) -> tuple[float, int, int]:
        """A number, the address that replaces it (0: none), and the dtype code there."""
        if not isinstance(value, Tensor):
            return float(value), 0, 0
        if value.device != self._device:
            if value.device.type == "cpu":
                return float(value), 0, 0
            value = value.to(self._device, non_blocking=True)
        if value.dtype not in DTYPE_CODES:
            value = value.to(torch.float64)
        held.append(value)
        return 0.0, value.data_ptr(), DTYPE_CODES[value.dtype]

    def _pack(self, hyper: AdamWHyper, found_inf: tuple[int, int], held: list[Tensor]) -> bytes:
        lr, lr_address, lr_dtype = self._scalar(hyper.lr, held)
        step, step_address, step_dtype = self._scalar(hyper.step, held)
        grad_scale, scale_address, scale_dtype = self._scalar(hyper.grad_scale, held)
        number = HostHyper(
            lr=lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            step=math.inf if step_address else step,  # then the kernel computes the bias corrections; these are 1
            maximize=hyper.maximize,
            grad_scale=grad_scale,
            found_inf=False,
        )
        return _pack_hyper(
            CudaHyper(
                number,
                lr=lr_address,
                step=step_address,
                grad_scale=scale_address,
                found_inf=found_inf[0],
                lr_dtype=lr_dtype,
                step_dtype=step_dtype,
                grad_scale_dtype=scale_dtype,
                found_inf_dtype=found_inf[1],
            )
        )

    def _device_table(self, grads: list[Tensor], stream: int) -> Tensor:
        """The table for these gradients; their addresses are in `_rows` afterwards."""
        table, self._table = self._table, None  # whatever is raised, what was seen meanwhile is not in it
        are_compact = self._follower.follow(grads, anew=table is None)
        self._follower.check_memory(grads)
        capturing = _is_capturing()
        if table is None or are_compact is not None:
            assert are_compact is not None
            self._fill(grads, are_compact)
            num_bytes = _C.sparse_adamw_cuda_table_bytes(self._rows_address, len(self._rows))
            table = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            _C.sparse_adamw_cuda_table(self._rows_address, len(self._rows), table.data_ptr(), stream)
            if capturing:  # it holds nothing before a replay, and is this capture's alone
                return table
            self._table_stream = stream
        elif capturing:
            self._captured_tables.add(table)
        elif stream != self._table_stream:
            table.record_stream(torch.cuda.current_stream(self._device))
        self._table = table
        return table

    def _fill(self, grads: Sequence[Tensor], are_compact: list[bool]) -> None:
        """Writes what depends on the form of parameters and gradients."""
        param_layouts, grad_layouts, read_compactly = [], [], []
        for segment, grad, compact in zip(self.segments, grads, are_compact, strict=True):
            param = segment.param
            if segment.indices is None and not segment.exp_avg.is_contiguous():
                # the walk is over the state's memory: dimensions in that order
                order = sorted(range(param.dim()), key=param.stride, reverse=True)
                grad = grad.view(param.shape).permute(order) if compact else grad.permute(order)
                param, compact = param.permute(order), False
            param_layouts.append(tables.layout(param))
            grad_layouts.append(tables.layout(grad))
            read_compactly.append(compact)
        self._layouts.write(self._rows["param"], param_layouts)
        self._layouts.write(self._rows["grad"], grad_layouts)
        self._rows["grad"]["dtype"] = [DTYPE_CODES[grad.dtype] for grad in grads]
        self._rows["grad_is_compact"] = read_compactly


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


prepare_sparse_adamw = Plan
