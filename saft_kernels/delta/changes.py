"""The fine-tune as data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Content:
    """What a file holds, by tensor name. Tensors with k = 0 are there for their `rest` alone."""

    shapes: dict[str, tuple[int, ...]]
    indices: dict[str, Tensor]  # ascending, int64
    values: dict[str, Tensor]
    originals: dict[str, Tensor] | None
    checksums: dict[str, str]  # of the originals
    rest: dict[str, str]  # of whole tensors, the changed elements set to zero; empty: not taken
    tied: dict[str, str]
    numel: int


def bytes_of(tensor: Tensor) -> memoryview:
    """The values in row-major order, little-endian."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(values: Tensor) -> str:
    """The first 64 bits of SHA-256 over the little-endian values, in row-major order."""
    return hashlib.sha256(bytes_of(values)).hexdigest()[:16]
