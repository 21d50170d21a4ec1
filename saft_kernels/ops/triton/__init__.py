"""Triton kernels, one file per op. Triton is imported when a tensor first needs it, not before."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

# the module of each op, by its name in ops/reference.py
_OPS = {
    "topk_magnitude": "topk_magnitude",
    "gather": "gather_scatter",
    "scatter_": "gather_scatter",
    "prepare_sparse_adamw": "sparse_adamw",
    "sddmm": "sddmm",
}


def why_unavailable(device_type: str | None) -> str | None:
    """Why this backend cannot run on tensors of `device_type` (None: any), or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type not in (None, "cuda", "cpu"):
        return f"it runs on CUDA and ROCm tensors, got {device_type}"
    if device_type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return "it runs on CUDA and ROCm tensors, got cpu; the interpreter (TRITON_INTERPRET=1) is for tests"
    try:
        # sets the functions in place of the modules of the same name, whoever imported those first
        modules = {module: importlib.import_module(f".{module}", __name__) for module in _OPS.values()}
        globals().update((op, getattr(modules[module], op)) for op, module in _OPS.items())
    except (ImportError, RuntimeError) as error:
        return f"triton cannot be imported ({error})"
    from .launch import INTERPRETED

    if device_type == "cpu" and not INTERPRETED:
        return "it runs on CUDA and ROCm tensors, got cpu; TRITON_INTERPRET=1 was set after triton was imported"
    if device_type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET=1 is set: the interpreter reads CPU tensors only"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return None


def description() -> str:
    """What would compile the kernels, for `python -m saft_kernels`."""
    from .launch import INTERPRETED, triton_version

    return f"triton {triton_version}{', interpreted' if INTERPRETED else ''}"
