"""A pause of gradient release: `select()` needs whole gradients of a model that an optimizer is training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_pauses: list[None] = []


@contextmanager
def releasing_paused() -> Iterator[None]:
    """Inside, gradients stay dense: `select()` may run on a model that an optimizer is training."""
    _pauses.append(None)
    try:
        yield
    finally:
        _pauses.pop()
