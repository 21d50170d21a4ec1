"""Files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` on success, removed on error."""
    target = Path(path)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def safetensors_function(name: str) -> Callable[..., Any]:
    """Of safetensors or safetensors.torch, by name."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("mask and delta files need safetensors; pip install 'saft_kernels[io]'") from error
    return getattr(safetensors, name, None) or getattr(safetensors.torch, name)  # type: ignore[no-any-return]
