"""Other people's checkpoints: their tensors, and the same file again with changed values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import files, tensor_files

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# where training scripts put the model's state dict
_NESTS = ("state_dict", "model", "model_state_dict", "module")


class Checkpoint:
    """A checkpoint in memory of its own: writing to `tensors` changes the copy that `save` writes.

    `tensors` are those of the model's state dict by the names in the file; what is no tensor there is in `others`.

    Raises:
        ValueError: No checkpoint, or one that only running code from it could read. OSError: It cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._metadata: dict[str, str] | None = None
        if self.path.suffix == ".safetensors":
            self._content: Any = self._read_safetensors()
        elif self.path.suffix in TORCH_SUFFIXES:
            self._content = read_torch(self.path)
        else:
            raise ValueError(
                f"{self.path}: expected a checkpoint named *.safetensors or *{', *'.join(TORCH_SUFFIXES)}, got "
                f"{self.path.suffix or 'no suffix'!r}; pass one such file, not a folder or an index of shards"
            )
        state = find_state_dict(self._content)
        if state is None:
            raise ValueError(
                f"{self.path}: expected a state dict, alone or under {', '.join(_NESTS)}, got "
                f"{_describe(self._content)}; save model.state_dict()"
            )
        self.tensors: dict[str, Tensor] = {n: t for n, t in state.items() if isinstance(t, Tensor)}
        self.others: list[str] = [name for name in state if name not in self.tensors]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the same checkpoint with the tensors' present values, in the same format. Whole or not at all."""
        check_format(path, self.path)
        with files.replacing(path) as file:
            if self._metadata is not None:
                tensor_files.write(file, self._content, self._metadata)
            else:
                torch.save(self._content, file)

    def _read_safetensors(self) -> dict[str, Tensor]:
        try:
            self._metadata, tensors = tensor_files.read(self.path)
            return tensors
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.path}: expected a .safetensors file, got another or a damaged one ({_line(error)}); get it anew"
            ) from error


def check_format(output: str | os.PathLike[str], model: Path) -> None:
    """Raises ValueError for a name of another format than the model's."""
    suffixes = [".safetensors"] if model.suffix == ".safetensors" else list(TORCH_SUFFIXES)
    if Path(output).suffix not in suffixes:
        raise ValueError(
            f"{os.fspath(output)}: expected a name that ends in {' or '.join(suffixes)}, the format of {model}, got "
            f"{Path(output).suffix or 'no suffix'!r}; the format is kept"
        )


def read_torch(path: Path) -> Any:
    """`torch.load` of data alone: no code of the file is run."""
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            content = torch.load(file, map_location="cpu", weights_only=True)
            if tensor_files.changed(before, os.fstat(file.fileno())):
                raise ValueError("it was written to while it was read")
            return content
    except Exception as error:
        # without a name it comes from a seek that the file's content asks for
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"{path}: expected a file that torch.load(weights_only=True) reads, got another, damaged or pickled one "
            f"({_line(error)}); save a state dict of tensors"
        ) from error


def find_state_dict(content: Any) -> Mapping[str, Any] | None:
    """The innermost state dict, looking under the usual names first; None: there is none."""
    if not isinstance(content, Mapping):
        return None
    for nest in _NESTS:
        if isinstance(content.get(nest), Mapping) and (found := find_state_dict(content[nest])) is not None:
            return found
    has_tensors = any(isinstance(value, Tensor) for value in content.values())
    return content if has_tensors and all(isinstance(name, str) for name in content) else None


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = ", ".join(map(repr, list(content)[:4]))
        return f"a dictionary of {keys}" if keys else "an empty dictionary"
    return type(content).__name__


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
