"""Memory of gradients that leaves the process when they are freed."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

import torch
from torch import Tensor, UntypedStorage

SMALLEST_FREED = 1 << 17  # bytes: the default limit from which malloc itself returns what is freed, block by block


def free_gradient(parameter: Tensor) -> None:
    """Sets `parameter.grad` to None, and frees it as `free` does."""
    gradients = [parameter.grad]
    parameter.grad = None
    free(gradients)


def free(tensors: list[Any]) -> None:
    """Empties the list, and has the memory of tensors that nothing else holds go back to the system.

    Under glibc, freed is not returned: the first free of a mapped block of up to 32 MiB moves all blocks of its size
    to the heap for good. There, an aligned block does not fit where one of the same size was freed, once anything
    small lies beside it: gradients that are freed one by one then take as much memory as all of them together.

    On Linux, for CPU tensors of 128 KiB and more that torch has allocated; its price are page faults when the
    addresses are used again.
    """
    while tensors:
        tensor = tensors.pop()
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.nbytes < SMALLEST_FREED:
            continue
        if not tensor.is_cpu:
            continue
        storage = tensor.untyped_storage()
        # memory that torch did not allocate is not resizable, and its owner may read it once more
        if not storage.resizable() or _owners(tensor, storage) != _sole_owner():
            continue
        if torch.cuda.is_initialized() and tensor.is_pinned():  # a device has these pages
            continue
        first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if (libc := _libc()) is not None and end > first:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def return_holes() -> None:
    """Has what earlier blocks left in glibc's heap go back to the system; some milliseconds."""
    if (libc := _libc()) is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" and hasattr(mmap, "MADV_DONTNEED") else None


def _owners(tensor: Tensor, storage: UntypedStorage) -> tuple[int, ...] | None:
    """How many hold the object, the tensor and its storage; None where torch does not say."""
    if not hasattr(torch._C, "_storage_Use_Count") or not hasattr(tensor, "_use_count"):
        return None
    # numpy arrays hold the object, DLPack capsules the tensor, views the storage
    in_cpp = tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(tensor), sys.getrefcount(storage), *in_cpp


@functools.cache
def _sole_owner() -> tuple[int, ...]:
    """The `_owners` of a tensor that only the caller holds, by a local name, with its storage by another."""
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()
    return _owners(tensor, storage) or ()
