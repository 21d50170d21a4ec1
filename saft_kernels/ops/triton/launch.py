"""How every kernel is launched."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..tables import Words

triton_version: str = triton.__version__


@triton.jit
def _probe_kernel() -> None:
    pass


INTERPRETED = not isinstance(_probe_kernel, triton.runtime.JITFunction)
"""Whether kernels run as Python, on CPU tensors."""


def device_function(function: Any) -> Any:
    """`triton.jit` for what kernels call; interpreted, the function itself, 20 times faster than a nested jit."""
    return function if INTERPRETED else triton.jit(function)


OPTIONS = {"enable_fp_fusion": False}
"""Compile options of every kernel: a default that changes between versions of triton never decides about bits."""


def launch(kernel: Any, num_programs: int, *args: object, num_warps: int, **constants: object) -> None:
    """`kernel` on a one-dimensional grid, when there is anything to do."""
    if num_programs > 0:
        kernel[(num_programs,)](*args, num_warps=num_warps, **OPTIONS, **constants)


def staged(table: Words, device: torch.device) -> Tensor:
    """A copy in pinned memory, which torch keeps until copies out of it are done: they need not wait."""
    host = torch.empty(len(table), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    host.numpy()[:] = table
    return host


def to_device(table: Words, device: torch.device) -> Tensor:
    """A copy that does not wait for the device."""
    return staged(table, device).to(device, non_blocking=True)
