"""Safetensors files (github.com/huggingface/safetensors), read into memory that the tensors own.

The safetensors package maps the files it reads: values would follow a file that is written over, and one that becomes
shorter ends the process; of bytes in memory it gives no metadata. It writes through a temporary file of its own, its
metadata in another order every time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

METADATA = "__metadata__"
"""The one name that no tensor in such a file can have."""

_NAMES = {
    **{
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.complex64: "C64",
    },
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"},
    **{torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""torch's dtypes by the names that files have for them."""
_MAX_HEADER = 100_000_000  # what the safetensors package takes


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes are in a file."""

    dtype: str
    """As the file has it."""
    shape: tuple[int, ...]
    start: int
    end: int

    def torch_dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for one that torch has no name for."""
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype that torch has, got {self.dtype} for {name!r}; leave the tensor out")
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """What a file says about its content. Entries are in the order of their bytes, without a gap to the file's end."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    end: int
    """Of the header: the first tensor's bytes come next."""


def read_header(file: BinaryIO) -> Header:
    """Raises ValueError unless the file is a whole safetensors file, as far as its header and its size tell."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise ValueError(f"it has {size:,} bytes and no header that fits into them")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    try:
        table = json.loads(text.decode(), object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    metadata = table.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    "".join([*table, *metadata, *metadata.values()]).encode()  # half a surrogate pair is no text
    entries = {name: _entry(name, row, 8 + length) for name, row in table.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    at = 8 + length
    for name, entry in entries.items():
        if entry.start != at:
            raise ValueError(f"the bytes of {name!r} do not follow those of the tensor before")
        at = entry.end
    if at != size:
        raise ValueError(f"its header speaks of {at:,} bytes, it has {size:,}")
    return Header(metadata, entries, 8 + length)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header has a name twice")
    return table


def _entry(name: str, row: Any, start: int) -> Entry:
    if not isinstance(row, dict) or not row.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header has no dtype, shape and offsets for {name!r}")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and isinstance(dtype, str)):
        raise ValueError(f"its header has no sound entry for {name!r}")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, *offsets)):
        raise ValueError(f"a size or offset of {name!r} is no number of 0 or more")
    entry = Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else max(0, offsets[1] - offsets[0])
    if entry.end - entry.start != expected:
        raise ValueError(f"{name!r} has {entry.end - entry.start:,} bytes, its shape and dtype ask for {expected:,}")
    return entry


def read_tensor(file: BinaryIO, name: str, entry: Entry) -> Tensor:
    """One tensor, in memory of its own. Raises ValueError when the file has become shorter."""
    raw = read_bytes(file, entry.start, entry.end)
    return raw.view(entry.torch_dtype(name)).reshape(entry.shape)


def read_bytes(file: BinaryIO, start: int, end: int) -> Tensor:
    """Bytes of a file as uint8. Raises ValueError when it is shorter."""
    # NumPy's memory: torch's is aligned, so that malloc, reading tensor after tensor, does not use the last one's again
    raw = np.empty(end - start, dtype=np.uint8)
    view = raw.data
    file.seek(start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"it ends after {start + done:,} bytes; it has become shorter while it was read")
        done += count
    return torch.from_numpy(raw) if end > start else torch.empty(0, dtype=torch.uint8, device="cpu")


def read(
    path: str | os.PathLike[str], check: Callable[[Mapping[str, str]], None] | None = None
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file; `check` sees the metadata before any tensor is read. Raises ValueError."""
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        header = read_header(file)
        if check is not None:
            check(header.metadata)
        tensors = {name: read_tensor(file, name, entry) for name, entry in header.entries.items()}
        if changed(before, os.fstat(file.fileno())):
            raise ValueError("it was written to while it was read")
    return header.metadata, tensors


def read_checked(
    path: str | os.PathLike[str], format: str, version: str, *, unchecked: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of one of our own files, which must have the checksum that it states.

    Args:
        path: The file.
        format: What its metadata must say.
        version: Likewise.
        unchecked: A file that has these metadata and no others needs no checksum.

    Raises:
        ValueError: Another file, or one that has been altered.
    """

    def check(metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != format:
            raise ValueError(f"its format is {metadata.get('format')!r}")
        if metadata.get("version") != version:
            raise ValueError(f"its version is {metadata.get('version')!r}, this package reads {version!r}")

    metadata, tensors = read(path, check)
    if metadata.keys() != set(unchecked) and metadata.get("checksum") != checksum(metadata, tensors):
        raise ValueError("its checksum is not that of its content")
    return metadata, tensors


def changed(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether a file was written to between two looks at it."""
    return (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino)


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file: equal content gives equal bytes.

    Raises:
        ValueError: A tensor called `__metadata__`, or by something that is no text.
    """
    if METADATA in tensors:
        raise ValueError(
            f"expected tensor names that a safetensors file can hold, got {METADATA!r}, which it has for itself; "
            "rename that tensor"
        )
    table: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    at = 0
    # the largest elements first, so that each is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        tensor = tensors[name]
        offsets = [at, at := at + tensor.numel() * tensor.itemsize]
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected names that are text, got {error.object!r}; rename the tensor") from error
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(bytes_of(tensors[name]))


def bytes_of(tensor: Tensor) -> memoryview:
    """The values in row-major order, little-endian."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride() != (1,):  # contiguous() leaves a single element its stride, and view() refuses that
        flat = torch.empty(flat.shape, dtype=flat.dtype, device="cpu").copy_(flat)
    return flat.view(torch.uint8).numpy().data


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything in a file but itself, with lengths between: no two files share their input."""
    total = hashlib.sha256()
    for key in sorted(metadata):
        if key != "checksum":
            total.update(f"{key}:{len(metadata[key])}:{metadata[key]}\n".encode())
    for key in sorted(tensors):
        total.update(f"{key}:{tensors[key].dtype}:{tensors[key].numel()}\n".encode())
        total.update(bytes_of(tensors[key]))
    return total.hexdigest()
