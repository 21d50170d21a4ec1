"""What runs on this machine, why the rest does not, and what was measured where."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from .. import ops
from .._version import __version__

_PACKAGES = ("numpy", "triton", "safetensors", "open_clip_torch", "timm")

TESTED = {"python": ((3, 10), (3, 13)), "torch": ((2, 11), (2, 14)), "triton": ((3, 6), (3, 8))}
"""Oldest and newest version that the tests have passed with. On GPUs fewer: the rows of bench/results say which."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def untested(package: str, version: str) -> str:
    """A warning, in parentheses, for a version outside of what is tested; else empty."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    oldest, newest = TESTED.get(package, (found, found))
    if not found or oldest <= found <= newest:
        return ""
    oldest_to_newest = " to ".join(".".join(map(str, bound)) for bound in (oldest, newest))
    return f" (never tested: {oldest_to_newest} are)"


_RESULTS = Path(__file__).parents[2] / "bench" / "results"  # of a checkout


def _measured() -> list[str]:
    """A line per device: which of the committed rows are its, of which commits."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in sorted(_RESULTS.glob("*.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row.get("device"):
                    benches, commits = found.setdefault(row["device"], (set(), set()))
                    benches.add(path.stem)
                    commits.add(row["commit"].rstrip("+"))
    return [
        f"  {device}: {', '.join(sorted(benches))}; "
        + (f"commit {', '.join(sorted(commits))}" if len(commits) < 3 else f"{len(commits)} commits")
        for device, (benches, commits) in sorted(found.items())
    ]


def report() -> str:
    """The lines to paste into a bug report."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: _version(package) for package in _PACKAGES}
    lines = [
        f"saft_kernels     {__version__}",
        f"platform         {platform.platform()}",
        *(f"{package:16} {version}{untested(package, version)}" for package, version in versions.items()),
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
    if measured := _measured():
        lines += ["", "measured (bench/results)", *measured]
    lines += ["", "what you can rely on", "  docs/contract.md, What is promised: selection, training, files, errors"]
    return "\n".join(lines)
