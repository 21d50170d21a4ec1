"""The file of a SparseDelta: how indices become bytes, and how a damaged file is told from a good one.

docs/delta.md specifies the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..common import files, tensor_files
from ..common.names import short
from ..mask import SparseMask
from .changes import DTYPES, Changes

FORMAT = "saft_kernels.SparseDelta"
VERSION = "1"

_DTYPES = {short(dtype): dtype for dtype in DTYPES}


# ---- indices as bytes ----


def encode_gaps(gaps: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """LEB128: seven bits per byte, the lowest first; the top bit says that another byte follows."""
    lengths = np.ones(len(gaps), dtype=np.int64)
    for i in range(1, 9):
        lengths += gaps >> (7 * i) != 0
    starts = np.cumsum(lengths) - lengths
    encoded = np.empty(int(lengths.sum()), dtype=np.uint8)
    for i in range(int(lengths.max(initial=0))):
        longer = lengths > i
        byte = gaps[longer] >> (7 * i) & 0x7F
        encoded[starts[longer] + i] = byte | (0x80 * (lengths[longer] > i + 1))
    return encoded


def decode_gaps(encoded: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int64]:
    """The inverse of `encode_gaps`. Raises ValueError for bytes that are not `count` numbers."""
    ends = np.flatnonzero(encoded < 0x80) + 1
    if len(ends) != count or (count and ends[-1] != len(encoded)) or (not count and len(encoded)):
        raise ValueError(f"its gaps are {len(ends)} numbers, its table says {count}")
    lengths = np.diff(ends, prepend=0)
    starts = ends - lengths
    longest = int(lengths.max(initial=0))
    if longest > 9:
        raise ValueError(f"one of its gaps has {longest} bytes")
    gaps = np.zeros(count, dtype=np.int64)
    for i in range(longest):
        longer = lengths > i
        gaps[longer] |= (encoded[starts[longer] + i].astype(np.int64) & 0x7F) << (7 * i)
    return gaps


def to_gaps(indices: Iterable[Tensor]) -> npt.NDArray[np.int64]:
    """Unselected elements before each index, since the one before it in the same tensor."""
    parts = [np.diff(index.numpy().astype(np.int64), prepend=-1) - 1 for index in indices]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def from_gaps(gaps: npt.NDArray[np.int64], counts: Iterable[int]) -> list[Tensor]:
    """The inverse of `to_gaps`: one int64 tensor per count."""
    ends = np.cumsum(gaps + 1)
    indices, start = [], 0
    for count in counts:
        before = ends[start - 1] if start else 0
        indices.append(torch.from_numpy(ends[start : start + count] - before - 1))
        start += count
    return indices


# ---- files ----


def write(path: str | os.PathLike[str], changes: Changes, originals: Mapping[str, Tensor] | None) -> None:
    """The changes as a file, with originals or without; whole or not at all."""
    table: dict[str, list[Any]] = {}
    blobs: dict[str, list[Tensor]] = {}
    for name, value in changes.values.items():
        dtype = short(value.dtype)
        row = [dtype, list(changes.mask.shapes[name]), value.numel(), changes.checksums[name]]
        table[name] = [*row, changes.rest[name]] if changes.rest else row
        blobs.setdefault(f"values.{dtype}", []).append(value)
        if originals is not None:
            blobs.setdefault(f"originals.{dtype}", []).append(originals[name])
    tensors = {key: torch.cat(parts).cpu() for key, parts in blobs.items()}
    tensors["gaps"] = torch.from_numpy(encode_gaps(to_gaps(changes.mask.values())))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "numel": str(changes.numel),
        "tensors": json.dumps(table, separators=(",", ":")),
    }
    if changes.tied:
        metadata["tied"] = json.dumps(changes.tied, separators=(",", ":"))
    metadata["checksum"] = tensor_files.checksum(metadata, tensors)
    with files.replacing(path) as file:
        tensor_files.write(file, tensors, metadata)


def read(path: str | os.PathLike[str]) -> Changes:
    """Raises ValueError for another file, or for one of which any byte that counts has changed."""
    try:
        return _parse(*tensor_files.read_checked(path, FORMAT, VERSION))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{os.fspath(path)}: expected a delta saved by SparseDelta.save, got another file or a damaged one "
            f"({' '.join(str(error).split())}); get it anew, or make the delta again"
        ) from error


def _parse(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Changes:
    table: dict[str, list[Any]] = json.loads(metadata["tensors"])
    counts = {name: row[2] for name, row in table.items()}
    names_by_dtype: dict[str, list[str]] = {}
    for name, row in table.items():
        names_by_dtype.setdefault(row[0], []).append(name)
    parts: dict[str, dict[str, Tensor]] = {"values": {}, "originals": {}}
    for kind, found in parts.items():
        for dtype, names in names_by_dtype.items():
            blob = tensors.get(f"{kind}.{dtype}")
            if kind == "originals" and blob is None:
                continue
            if blob is None or blob.dtype != _DTYPES[dtype] or blob.dim() != 1:
                raise ValueError(f"it has no {kind}.{dtype}")
            found.update(zip(names, blob.split([counts[name] for name in names]), strict=True))
    indices = from_gaps(decode_gaps(tensors["gaps"].numpy(), sum(counts.values())), counts.values())
    has_originals = any(key.startswith("originals.") for key in tensors)
    return Changes(
        SparseMask(dict(zip(table, indices, strict=True)), {name: tuple(row[1]) for name, row in table.items()}),
        parts["values"],
        parts["originals"] if has_originals else None,
        checksums={name: row[3] for name, row in table.items()},
        rest={name: row[4] for name, row in table.items() if len(row) > 4},
        tied=json.loads(metadata.get("tied", "{}")),
        numel=int(metadata["numel"]),
    )
