"""What runs on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .. import ops
from .._version import __version__

_PACKAGES = ("numpy", "triton", "safetensors", "open_clip_torch", "timm")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The lines to paste into a bug report."""
    lines = [
        f"saft_kernels     {__version__}",
        f"python           {platform.python_version()} on {platform.platform()}",
        f"torch            {torch.__version__}",
        *(f"{package:16} {_version(package)}" for package in _PACKAGES),
        "",
        f"GPU              {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}",
        "",
        "backends, in order of preference",
    ]
    for name in ops.BACKENDS:
        device_type = "cuda" if name in ("cuda", "triton") else None
        reason = ops.why_unavailable(name, device_type=device_type)
        state = f"available{ops.describe(name)}" if reason is None else f"not available: {reason}"
        lines.append(f"  {name:14} {state}")
    lines += ["", "what you can rely on", "  README.md, under The contract: selection, training, files, errors"]
    return "\n".join(lines)
