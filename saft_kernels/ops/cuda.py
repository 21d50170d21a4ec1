"""Thin callers of the compiled CUDA kernels. They run on torch's current stream, with memory of its allocator."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import _tables
from ._types import TopK

try:
    from saft_kernels import _C
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

MAX_BLOCKS = 0
"""An upper bound on every grid; 0: what fills the device. The tests set it."""

FILL_WORKSPACE: int | None = None
"""A byte to fill the workspace with before use; None: leave it as it comes. The tests set it."""

# saft::TopKCudaResult
_THRESHOLD, _NONFINITE, _STATUS, _READS, _OFFSETS = range(5)


def why_unavailable(device_type: str | None) -> str | None:
    """Why this backend cannot run on tensors of `device_type` (None: any), or None when it can."""
    if _import_error is not None:
        return f"the compiled module is missing ({_import_error}); install a C++17 compiler and nvcc, and reinstall"
    if not _C.has_cuda:
        return "the module was compiled without CUDA; install nvcc and reinstall (SAFT_BUILD_CUDA=1 shows what fails)"
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
        layouts = _tables.Layouts()
        codes = _tables.DTYPE_CODES
        # the GPU idles meanwhile, so no call per tensor that a contiguous one does not need
        rows = _tables.table(
            [
                (t.data_ptr(), t.numel(), codes[t.dtype], 0, 0) if t.is_contiguous() else layouts.tensor_desc(t)
                for t in tensors
            ],
            5,
        )
        plan = _C.topk_magnitude_cuda_plan(rows.ctypes.data, len(tensors), k)
        # torch keeps pinned memory until the copy out of it is done
        host_table = torch.empty(plan.table_bytes, dtype=torch.uint8, pin_memory=True)
        table = torch.empty(plan.table_bytes, dtype=torch.uint8, device=device)
        _C.topk_magnitude_cuda_table(plan, rows.ctypes.data, host_table.data_ptr(), table.data_ptr())
        table.copy_(host_table, non_blocking=True)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        if FILL_WORKSPACE is not None:
            workspace.fill_(FILL_WORKSPACE)
        indices = torch.empty(k, dtype=torch.int64, device=device)
        result = torch.empty(plan.result_words, dtype=torch.int64, device=device)
        _C.topk_magnitude_cuda(
            plan,
            table.data_ptr(),
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
        params = _tables.sddmm_params(dy, x, indices, out, accumulate)
        size = _C.sddmm_cuda_workspace_bytes(params.ctypes.data)
        workspace = torch.empty(size, dtype=torch.uint8, device=dy.device)
        if FILL_WORKSPACE is not None:
            workspace.fill_(FILL_WORKSPACE)
        stream = torch.cuda.current_stream(dy.device).cuda_stream
        _C.sddmm_cuda(params.ctypes.data, workspace.data_ptr(), stream, MAX_BLOCKS)
