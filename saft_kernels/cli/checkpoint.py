"""Somebody's checkpoint: a file, or a folder of shards with their index, as Hugging Face's libraries save models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ..common import files
from ..common.names import listing, plain_names
from .checkpoint_files import TORCH_SUFFIXES, Advance, Elements, SafetensorsFile, TensorFile, TorchFile

_INDEX = ".index.json"
# what trainers save beside a model, under a suffix of models
_NO_MODELS = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state", "random_states")
# of a folder, what is no copy of the weights in another format
_OTHER_WEIGHTS = (".safetensors", *TORCH_SUFFIXES, ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".pkl", ".pdparams")


class Checkpoint:
    """The tensors of a checkpoint, by plain name and on the meta device; `read` has their values, one by one.

    Args:
        path: A file of tensors; an index of shards; or a folder with one of these.

    Raises:
        ValueError: No checkpoint, or one that only running code from it could read. OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index, paths, wanted = _locate(path)
        self._stack = ExitStack()
        self._files: list[TensorFile] = []
        try:
            for part in paths:
                self._files.append(_open(part))
                self._stack.callback(self._files[-1].close)
            self._where = self._by_name(wanted)
        except BaseException:
            self._stack.close()
            raise
        self.tensors: dict[str, Tensor] = {
            name: self._files[part].tensors[given] for name, (part, given) in self._where.items()
        }
        self.others = [name for file in self._files for name in file.others]
        self.copies = [name for file in self._files for name in file.copies]

    def _by_name(self, wanted: Mapping[str, str] | None) -> dict[str, tuple[int, str]]:
        """Plain name -> number of the file, and the name there."""
        where: dict[str, tuple[int, str]] = {}
        for part, file in enumerate(self._files):
            for name in file.tensors:
                if wanted is None or wanted.get(name) == file.path.name:
                    where[name] = (part, name)
        others = {name for file in self._files for name in file.others}
        if missing := [name for name in wanted or () if name not in where and name not in others]:
            raise ValueError(
                f"{self.index}: expected the tensors that it names in its shards, got none of {listing(missing)}; get "
                "the checkpoint anew"
            )
        return {plain: where[name] for plain, name in plain_names(where).items()}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def is_folder(self) -> bool:
        """Whether `save` writes a folder."""
        return _is_folder(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of its files of tensors."""
        return sum(file.nbytes for file in self._files)

    def read(self, name: str) -> Tensor:
        """The values of a tensor, which do not follow its file."""
        part, given = self._where[name]
        return self._files[part].read(given)

    def memory(self, name: str) -> Hashable:
        """Equal for names of one tensor."""
        part, given = self._where[name]
        return part, self._files[part].memory(given)

    def part(self, name: str) -> int:
        """The number of the file that a tensor is in."""
        return self._where[name][0]

    def check_unchanged(self) -> None:
        """Raises ValueError when one of its files has been written to since it was opened."""
        for file in self._files:
            file.check_unchanged()

    def save(self, output: Path, changes: Mapping[str, Elements], advance: Advance) -> list[str]:
        """Writes the same checkpoint with other values in some elements, whole or not at all.

        Returns:
            Names of files and folders beside the shards that were not copied: weights in another format, and folders.
        """
        parts: list[dict[str, Elements]] = [{} for _ in self._files]
        for name, changed in changes.items():
            part, given = self._where[name]
            parts[part][given] = changed
        if not self.is_folder:
            with files.replacing(output) as file:
                self._files[0].write(file, parts[0], advance)
                self.check_unchanged()
            return []
        with files.new_folder(output) as folder:
            for source, elements in zip(self._files, parts, strict=True):
                with open(folder / source.path.name, "wb") as shard:
                    source.write(shard, elements, advance)
            left_out = self._copy_others(folder)
            self.check_unchanged()
        return left_out

    def _copy_others(self, folder: Path) -> list[str]:
        """Configuration, tokenizer and the index; not what would be the model before in another format."""
        own = {folder.name, *(file.path.name for file in self._files)}
        left_out = []
        for path in sorted(folder_of(self.path).iterdir()):
            if path.name in own:
                continue
            other_index = path.name.endswith(_INDEX) and path.name != (self.index.name if self.index else None)
            if not path.is_file() or path.suffix in _OTHER_WEIGHTS or other_index:
                left_out.append(path.name)
            else:
                shutil.copy(path, folder / path.name)
        return left_out


def check_format(output: Path, model: Path) -> None:
    """Raises ValueError for the name of another format than the model's, OSError for a folder that is there."""
    if _is_folder(model):
        files.new_output(output)
        return
    suffixes = [".safetensors"] if model.suffix == ".safetensors" else list(TORCH_SUFFIXES)
    if output.suffix not in suffixes:
        raise ValueError(
            f"{output}: expected a name that ends in {' or '.join(suffixes)}, the format of {model}, got "
            f"{output.suffix or 'no suffix'!r}; the format is kept"
        )
    files.output(output)


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint that is one, or an index."""
    return path if path.is_dir() else path.parent


def _is_folder(path: Path) -> bool:
    return path.is_dir() or path.name.endswith(_INDEX)


def _open(path: Path) -> TensorFile:
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{path}: expected a file, got a pipe, a device or a folder; it is read more than once, copy it"
        )
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _locate(path: Path) -> tuple[Path | None, list[Path], dict[str, str] | None]:
    """The index, the files, and the file's name per tensor, where there is an index."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a checkpoint, got no file and no folder; check the name")
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(_INDEX):
        shards = _read_index(path)
        return path, [path.parent / name for name in sorted(set(shards.values()))], shards
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(
            f"{path}: expected a checkpoint named *.safetensors or *{', *'.join(TORCH_SUFFIXES)}, an index of such "
            f"files, or their folder, got {path.suffix or 'no suffix'!r}; pass one of these"
        )
    return None, [path], None


def _in_folder(folder: Path) -> Path:
    """The one checkpoint in a folder: an index before a file, safetensors before torch's, as transformers looks."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith((".", *_NO_MODELS)))
    kinds = [
        [name for name in names if name.endswith(f".safetensors{_INDEX}")],
        [name for name in names if name.endswith(".safetensors")],
        [name for name in names if name.endswith(_INDEX)],
        [name for name in names if name.endswith(TORCH_SUFFIXES)],
    ]
    found = next((kind for kind in kinds if kind), [])
    if len(found) != 1:
        got = f"{len(found)}, {listing(found)}" if found else "none"
        raise ValueError(
            f"{folder}: expected a folder with one checkpoint, or with the index of its shards, got {got}; pass a file"
        )
    return folder / found[0]


def _read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file. Raises ValueError."""
    with open(path, encoding="utf-8") as file:
        try:
            shards = json.load(file)["weight_map"]
            sound = bool(shards) and all(isinstance(name, str) and Path(name).name == name for name in shards.values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected an index of shards with a weight_map, got another file ({error!r}); get it anew"
            ) from error
    suffixes = {Path(name).suffix for name in shards.values()} if sound else set()
    if not sound or not suffixes <= {".safetensors", *TORCH_SUFFIXES}:
        raise ValueError(
            f"{path}: expected file names in its weight_map, of files beside it, got others; get the checkpoint anew"
        )
    return dict(shards)
