"""The choice of backend: `backend="..."`, else SAFT_BACKEND, else the first that runs on the device."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In order of preference. Adding a backend: a module of this name beside this file, and its name here."""

_PLAIN_ON_GPUS = ("topk_magnitude_rows",)
"""Ops that have no kernel there on purpose: nothing to warn of."""

_ENVIRONMENT_VARIABLE = "SAFT_BACKEND"


@functools.cache
def _module(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported."""
    qualified = f"{__package__}.{name}"
    try:
        return importlib.import_module(qualified)
    except ImportError as error:
        return "it is not part of this release" if error.name == qualified else f"{error}"


def why_unavailable(name: str, op: str | None = None, device_type: str | None = None) -> str | None:
    """Why a backend cannot run (an op, on a kind of device), or None when it can."""
    module = _module(name)
    if isinstance(module, str):
        return module
    reason: str | None = module.why_unavailable(device_type)
    if reason is None and op is not None and not hasattr(module, op):
        return f"it does not implement {op}"
    return reason


def describe(name: str) -> str:
    """What an available backend says of itself, in parentheses; empty when it has nothing to say."""
    description = getattr(_module(name), "description", None)
    return f" ({description()})" if description else ""


def forced(backend: str | None) -> tuple[str | None, str]:
    """The backend that is asked for, by argument or environment variable, and which of them did; None: neither."""
    source = "`backend`"
    if backend is None:
        backend = os.environ.get(_ENVIRONMENT_VARIABLE) or None
        source = f"the environment variable {_ENVIRONMENT_VARIABLE}"
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend, source


def choose(op: str, device_type: str, backend: str | None) -> ModuleType:
    """The module that implements `op` for tensors on `device_type`."""
    backend, source = forced(backend)
    if backend is not None:
        reason = why_unavailable(backend, op, device_type)
        if reason is not None:
            raise RuntimeError(
                f"{source}: backend {backend!r} cannot run {op} here: {reason}; leave it unset to choose automatically"
            )
    else:
        # Triton on CPU tensors is its interpreter: only by name
        names = [name for name in BACKENDS if not (name == "triton" and device_type == "cpu")]
        backend = next(name for name in names if why_unavailable(name, op, device_type) is None)
        if backend == "reference" and not (op in _PLAIN_ON_GPUS and device_type != "cpu"):
            _warn_slow(device_type)
    module = _module(backend)
    assert isinstance(module, ModuleType)
    return module


@functools.cache
def _warn_slow(device_type: str) -> None:
    """Once per process and kind of device."""
    fast = "cpu" if device_type == "cpu" else "triton"
    warnings.warn(
        f"saft_kernels runs on its reference backend (plain PyTorch, slower) for {device_type} tensors: "
        f"{why_unavailable(fast, None, device_type) or 'no faster backend has this op'}",
        RuntimeWarning,
        stacklevel=4,
    )
