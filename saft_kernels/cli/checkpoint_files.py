"""One file of somebody's checkpoint: its tensors, read one by one, and the same file again with changed values."""

from __future__ import annotations

import argparse
import os
import pathlib
import struct
import sys
import zipfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..common import tensor_files
from ..common.names import short
from ..delta.file import FORMAT as DELTA_FORMAT
from ..mask import FORMAT as MASK_FORMAT

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # timm's are called .pth.tar
# where training scripts put the model's state dict
_NESTS = ("state_dict", "model", "model_state_dict", "module", "state_dict_ema", "model_ema")
# what trainers save beside it, and torch.load(weights_only=True) does not know: data, of which nothing is run
_DATA_TYPES: list[Any] = [
    *(argparse.Namespace, np.dtype, *(type(np.dtype(code)) for code in "?bhilBHILefd")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
]
_CHUNK = 2**24
# bytes that tensors may have beyond those that the file holds for them
_MAX_EXPANDED = 2**26

Elements = tuple[Tensor, Tensor]
"""Flat positions in a tensor, and new values for them."""
Advance = Callable[[int], object]
"""Is told how many bytes more have been read or written."""


class TensorFile:
    """A file with tensors, open for reading. `tensors` are on the meta device; `read` has their values.

    Raises:
        ValueError: Another kind of file, or one that only running code from it could read. OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.others: list[str] = []
        """What is no tensor, or none of a dtype that torch has."""
        self.copies: list[str] = []
        """State dicts beside this one, of the same names: an average of the weights, say."""
        self._file = open(path, "rb")  # noqa: SIM115
        self._before = os.fstat(self._file.fileno())
        self.nbytes = self._before.st_size
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """The values of a tensor, which do not follow the file."""
        raise NotImplementedError

    def memory(self, name: str) -> Hashable:
        """Equal for names of one tensor."""
        raise NotImplementedError

    def write(self, file: BinaryIO, changes: Mapping[str, Elements], advance: Advance) -> None:
        """The same file, with other values in some elements."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def check_unchanged(self) -> None:
        """Raises ValueError when the file has been written to since it was opened."""
        if tensor_files.changed(self._before, os.fstat(self._file.fileno())):
            raise ValueError(
                f"{self.path}: expected a file that stays as it is, got one that was written to while it was read; try "
                "again when that is over"
            )

    def _error(self, expected: str, error: Exception, remedy: str) -> ValueError:
        # torch says first how to run the file's code, and then what is wrong with it
        text = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error).strip() or type(error).__name__
        lines = text.splitlines()
        line = next((line for line in lines if "GLOBAL" in line), lines[0]).partition(" Please use")[0]
        return ValueError(f"{self.path}: expected {expected} ({line.strip()[:160]}); {remedy}")


class SafetensorsFile(TensorFile):
    """A .safetensors file."""

    def _open(self) -> None:
        try:
            self._header = tensor_files.read_header(self._file)
        except ValueError as error:
            raise self._error("a .safetensors file, got another or a damaged one", error, "get it anew") from error
        form = self._header.metadata.get("format", "")
        if form in (DELTA_FORMAT, MASK_FORMAT):
            raise ValueError(
                f"{self.path}: expected a checkpoint, got a {form.rpartition('.')[2]}; "
                "`saft-kernels apply` makes a checkpoint of the base and a delta"
            )
        for name, entry in self._header.entries.items():
            if entry.dtype in tensor_files.DTYPES:
                self.tensors[name] = torch.empty(entry.shape, dtype=tensor_files.DTYPES[entry.dtype], device="meta")
            else:
                self.others.append(name)

    def read(self, name: str) -> Tensor:
        """Reads the bytes of that tensor alone."""
        try:
            return tensor_files.read_tensor(self._file, name, self._header.entries[name])
        except ValueError as error:
            raise self._error(f"the values of {name!r}, got fewer", error, "get the file anew") from error

    def memory(self, name: str) -> Hashable:
        """The name: in these files no tensor is another."""
        return name

    def write(self, file: BinaryIO, changes: Mapping[str, Elements], advance: Advance) -> None:
        """Copies it, tensor by tensor."""
        self._copy(file, 0, self._header.end, advance)
        for name, entry in self._header.entries.items():
            if name in changes:
                tensor = self.read(name)
                ops.scatter_([tensor], [changes[name][0]], [changes[name][1]])
                file.write(tensor_files.bytes_of(tensor))
                advance(entry.end - entry.start)
            else:
                self._copy(file, entry.start, entry.end, advance)

    def _copy(self, file: BinaryIO, start: int, end: int, advance: Advance) -> None:
        for at in range(start, end, _CHUNK):
            stop = min(at + _CHUNK, end)
            try:
                file.write(tensor_files.bytes_of(tensor_files.read_bytes(self._file, at, stop)))
            except ValueError as error:
                raise self._error("as many bytes as before, got fewer", error, "get the file anew") from error
            advance(stop - at)


class TorchFile(TensorFile):
    """A file of `torch.save`. Of an archive, as torch writes them since 1.6, a tensor is read where it lies."""

    def _open(self) -> None:
        self._content: Any = None
        # where the bytes of a tensor start in the file; None: the whole content is in memory
        self._offsets: dict[str, int] | None = None
        content = self._without_values()
        if content is None:
            content = self._content = self._load("cpu")
        state = find_state_dict(content)
        if state is None:
            raise ValueError(
                f"{self.path}: expected a state dict, alone or under {', '.join(_NESTS)}, got {_describe(content)}; "
                "save model.state_dict()"
            )
        self._state = state
        self.copies = [
            key
            for key, value in content.items()
            if isinstance(value, Mapping) and value is not state and value and value.keys() == state.keys()
        ]
        check_sizes(self.path, state)
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                if tensor.is_meta and self._offsets is None:
                    raise ValueError(
                        f"{self.path}: expected values, got {name!r} on the meta device; save a model that has them"
                    )
                self.tensors[name] = tensor.detach().to("meta")
            else:
                self.others.append(name)

    def _load(self, device: str) -> Any:
        self._file.seek(0)
        try:
            return load(self._file, device)
        except Exception as error:
            raise self._error(
                "a file that torch.load(weights_only=True) reads, got another, damaged or pickled one",
                error,
                "save a state dict of tensors",
            ) from error

    def _without_values(self) -> Any:
        """The content with tensors on the meta device, where the values lie in a whole archive as torch writes it."""
        try:
            sizes = self._records()
            content = self._load("meta")
        except Exception:
            return None  # damaged, or of the format before torch 1.6: torch.load says which
        state = find_state_dict(content) or {}
        offsets: dict[str, int] = {}
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                if tensor.layout != torch.strided:
                    return None
                storage = tensor.untyped_storage()
                offset = getattr(storage, "_checkpoint_offset", None)
                reach = (int(tensor.storage_offset()) + _reach(tensor)) * tensor.itemsize
                if offset is None or sizes.get(offset) != storage.nbytes() or reach > storage.nbytes():
                    return None
                offsets[name] = offset
        self._offsets = offsets
        return content

    def _records(self) -> dict[int, int]:
        """Where the archive's records start in the file -> their sizes."""
        with zipfile.ZipFile(self._file) as archive:
            entries = archive.infolist()
            orders = [archive.read(e) for e in entries if e.filename.endswith("/byteorder") and e.file_size < 10]
        if orders not in ([], [b"little"]) or sys.byteorder != "little":
            raise ValueError("values of another byte order")
        records = {}
        for entry in entries:
            self._file.seek(entry.header_offset)
            fields = struct.unpack("<4s5H3I2H", self._file.read(30))
            name = self._file.read(fields[-2])
            if fields[0] != b"PK\3\4" or name != entry.orig_filename.encode() or fields[3] or entry.compress_type:
                raise ValueError("an entry of the archive is not what its directory says")
            records[entry.header_offset + 30 + fields[-2] + fields[-1]] = entry.file_size
        return records

    def read(self, name: str) -> Tensor:
        """Reads the bytes from that tensor's first element to its last."""
        tensor: Tensor = self._state[name].detach()
        if self._offsets is None:
            return tensor
        start = self._offsets[name] + int(tensor.storage_offset()) * tensor.itemsize
        try:
            raw = tensor_files.read_bytes(self._file, start, start + _reach(tensor) * tensor.itemsize)
        except ValueError as error:
            raise self._error(f"the values of {name!r}, got fewer", error, "get the file anew") from error
        return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def memory(self, name: str) -> Hashable:
        """Where the tensor lies."""
        tensor = self._state[name]
        where = tensor.data_ptr() if self._offsets is None else (self._offsets[name], tensor.storage_offset())
        return where, tensor.dtype, tuple(tensor.shape), tensor.stride()

    def write(self, file: BinaryIO, changes: Mapping[str, Elements], advance: Advance) -> None:
        """Loads all of it, and saves that."""
        content = self._load("cpu") if self._content is None else self._content
        state = find_state_dict(content)
        assert state is not None
        for name, (index, values) in changes.items():
            ops.scatter_([state[name].detach()], [index], [values])
        torch.save(content, file)
        advance(self.nbytes)


def load(file: BinaryIO, device: str) -> Any:
    """`torch.load` of data alone: no code of the file is run."""
    with torch.serialization.safe_globals(_DATA_TYPES):
        return torch.load(file, map_location=device, weights_only=True)


def find_state_dict(content: Any) -> Mapping[str, Any] | None:
    """The innermost state dict, looking under the usual names first; None: there is none."""
    if not isinstance(content, Mapping):
        return None
    for nest in _NESTS:
        if isinstance(content.get(nest), Mapping) and (found := find_state_dict(content[nest])) is not None:
            return found
    has_tensors = any(isinstance(value, Tensor) for value in content.values())
    return content if has_tensors and all(isinstance(name, str) for name in content) else None


def check_sizes(path: Path, state: Mapping[str, Any]) -> None:
    """Raises ValueError for tensors that are no plain ones, or have far more elements than the file has bytes."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            got = "nested" if tensor.is_nested else tensor.dtype if tensor.is_quantized else tensor.layout
            raise ValueError(f"{path}: expected strided tensors, got {name!r}, which is {got}; save it dense")
        if (tensor.numel() - _reach(tensor)) * tensor.itemsize > _MAX_EXPANDED:
            raise ValueError(
                f"{path}: expected memory for every element, got {name!r} of {tensor.numel():,} elements of "
                f"{short(tensor.dtype)} expanded from {_reach(tensor):,}; clone it before it is saved"
            )


def _reach(tensor: Tensor) -> int:
    """Elements of the storage from the tensor's first to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = ", ".join(map(repr, list(content)[:4]))
        return f"a dictionary of {keys}" if keys else "an empty dictionary"
    return type(content).__name__
