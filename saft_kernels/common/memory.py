"""Running out of memory, said with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# what torch's CPU allocator says; it raises a plain RuntimeError
_CPU_ALLOCATOR = ("not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR)


@contextmanager
def out_of_memory_says(what: str, remedy: str) -> Iterator[None]:
    """Turns a failed allocation inside into a torch.OutOfMemoryError that names the remedy."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise torch.OutOfMemoryError(f"{what}: expected it to fit in memory, got: {got}; {remedy}") from error
