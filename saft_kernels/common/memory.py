"""Memory that tensors should have and do not; and running out of it, said with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import mul

import torch
from torch import Tensor

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


def reach_of(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, of a tensor that has any."""
    strides = tensor.stride()
    numel: int = sum(map(mul, strides, tensor.shape)) - sum(strides) + 1
    return numel * tensor.itemsize


def has_memory(tensor: Tensor) -> bool:
    """Whether its storage holds all of its elements: `untyped_storage().resize_()` asks no tensor."""
    if not tensor.numel() or tensor.is_meta:
        return True
    return bool(_end_of(tensor) <= tensor.untyped_storage().nbytes())


def check_memory(label: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor whose storage was freed: torch's own operations would end the process."""
    if not has_memory(tensor):
        raise ValueError(
            f"{label}: expected a storage of {_end_of(tensor)} bytes or more, got "
            f"{tensor.untyped_storage().nbytes()}: its memory was freed; resize it back before the call"
        )


def _end_of(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.itemsize + reach_of(tensor)
