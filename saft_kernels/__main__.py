"""`python -m saft_kernels`: the command `saft-kernels`; by itself versions, and which backends run, or why not."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, ops

_CONTRACT = """\
what you can rely on
  selection      exactly k elements, those a stable sort by (descending |g|, tensor, flat index) puts first; the same
                 bits on every backend, run and thread count; a gradient that is not finite raises, and names the tensor
  SparseAdamW    AdamW on the selected elements, in fp32, rounded once; every other element of every parameter keeps its
                 bits, whatever the weight decay; density=1.0 is torch.optim.AdamW, its state keys and checkpoints
  state          12 B per selected element (16 B with amsgrad; 4 B more for bf16 and fp16 parameters), none per other
  checkpoints    a resumed run has the bits of one that was not interrupted; a state that does not fit raises first
  errors         name the argument, what was expected, what came and the remedy, before anything is changed
  README.md      says the rest: dtypes, budgets, scores, and the differences from torch.optim.AdamW"""

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
    lines += ["", _CONTRACT]
    return "\n".join(lines)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main())
