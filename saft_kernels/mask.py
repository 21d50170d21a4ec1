"""`SparseMask`: which elements of a model are trained."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .common import files, tensor_files
from .common.log import say
from .common.memory import check_memory, out_of_memory_says
from .common.names import listing, plain_names, short
from .ops.dtypes import INDEX_DTYPES, index_dtype

__all__ = ["MaskSummary", "SparseMask", "SummaryRow"]

FORMAT = "saft_kernels.SparseMask"
_VERSION = "1"


@dataclass(frozen=True)
class SummaryRow:
    """One tensor of a mask."""

    name: str
    shape: tuple[int, ...]
    numel: int
    k: int

    @property
    def density(self) -> float:
        """Selected share of the tensor."""
        return self.k / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class MaskSummary:
    """Rows in the mask's order; `str()` is a table of the tensors that have selected elements."""

    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        total = sum(row.k for row in self.rows)
        width = max([len(row.name) for row in self.rows] + [len("tensor")])
        lines = [f"{'tensor':{width}}  {'selected':>10}  {'numel':>15}  {'density':>9}  {'share':>7}"]
        lines += [
            f"{row.name:{width}}  {row.k:>10,}  {row.numel:>15,}  {row.density:>9.3%}  {row.k / total:>7.2%}"
            for row in self.rows
            if row.k
        ]
        numel = sum(row.numel for row in self.rows)
        lines.append(f"{'total':{width}}  {total:>10,}  {numel:>15,}  {total / max(numel, 1):>9.3%}  {1:>7.0%}")
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """How many elements are selected of how many, and the three tensors that have most of them, in one line."""
        k, numel = sum(row.k for row in self.rows), sum(row.numel for row in self.rows)
        rows = sorted((row for row in self.rows if row.k), key=lambda row: -row.k)
        most = ", ".join(f"{row.name} ({100 * row.k / k:.3g} %)" for row in rows[:3])
        share = f"{100 * k / max(numel, 1):.4g} %"
        return (
            f"selected {k:,} of {numel:,} elements ({share}), in {len(rows)} of {len(self.rows)} tensors"
            f"{'; most in ' if most else ''}{most}"
        )


class SparseMask(Mapping[str, Tensor]):
    """Which elements of which tensors are trained.

    A mapping of tensor name to its flat (row-major) indices: ascending, int32 where the tensor has fewer than 2^31
    elements, else int64, on the CPU. Tensors without selected elements are in it, with no indices.
    """

    _is_logged = False  # `log_mask` has said what is in it

    def __init__(self, indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        if indices.keys() != shapes.keys():
            odd = sorted(indices.keys() ^ shapes.keys())
            raise ValueError(f"`shapes`: expected the names of `indices`, got a difference: {listing(odd)}")
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shapes[name]) for name in indices}
        self._indices: dict[str, Tensor] = {}
        for name, index in indices.items():
            if any(size < 0 for size in self.shapes[name]):
                raise ValueError(
                    f"shape of {name!r}: expected sizes of 0 or more, got {self.shapes[name]}; pass p.shape"
                )
            numel = math.prod(self.shapes[name])
            if index.dim() != 1 or index.dtype not in INDEX_DTYPES:
                raise TypeError(
                    f"indices of {name!r}: expected one-dimensional int32 or int64, got {short(index.dtype)} of shape "
                    f"{tuple(index.shape)}; SparseMask.from_dense takes bool tensors"
                )
            _check_whole(f"indices of {name!r}", index)
            index = index.detach().cpu()
            if bool((index[1:] <= index[:-1]).any()):
                raise ValueError(f"indices of {name!r}: expected ascending and distinct, got others; take .unique()")
            if index.numel() and not 0 <= int(index[0]) <= int(index[-1]) < numel:
                raise ValueError(
                    f"indices of {name!r}: expected flat positions in [0, {numel}), got {int(index[0])} to "
                    f"{int(index[-1])}; they index the flattened tensor of shape {self.shapes[name]}"
                )
            self._indices[name] = index.to(index_dtype(numel), copy=True)

    def __getitem__(self, name: str) -> Tensor:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        return f"SparseMask(k={self.k:,}, density={self.density:.3%}, tensors={len(self)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseMask):
            return NotImplemented
        return self.shapes == other.shapes and all(torch.equal(self[n], other[n]) for n in self)

    __hash__ = None  # type: ignore[assignment]

    @property
    def k(self) -> int:
        """Selected elements."""
        return sum(index.numel() for index in self._indices.values())

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """k / numel."""
        return self.k / self.numel if self.numel else 0.0

    def digest(self) -> str:
        """A text that is the same for equal masks, and hardly for others."""
        found = hashlib.blake2b(json.dumps(self.shapes).encode(), digest_size=16)
        for index in self._indices.values():
            found.update(index.numpy().tobytes())
        return found.hexdigest()

    def summary(self) -> MaskSummary:
        """Selected elements per tensor; print it."""
        return MaskSummary(
            tuple(SummaryRow(name, shape, math.prod(shape), self[name].numel()) for name, shape in self.shapes.items())
        )

    def iou(self, other: SparseMask) -> float:
        """Intersection over union of two masks of one model: 1 for equal masks, 0 for disjoint ones."""
        if self.shapes != other.shapes:
            raise ValueError(f"`other`: expected a mask of the same model, got another: {_difference(self, other)}")
        both = sum(int(torch.isin(self[n], other[n], assume_unique=True).sum()) for n in self)
        either = self.k + other.k - both
        return both / either if either else 1.0

    def bind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """Indices per parameter, in the order given, on its device. Raises ValueError for another model's names.

        Names may differ by what DataParallel and DistributedDataParallel ("module."), torch.compile, FSDP and
        activation checkpointing put into them, here and in the mask.
        """
        named = list(named_parameters)
        if not {name for name, _ in named} <= self.shapes.keys():
            own = plain_names(self.shapes)
            names = {name: own.get(plain, name) for plain, name in plain_names(name for name, _ in named).items()}
            named = [(names[name], parameter) for name, parameter in named]
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        missing = [name for name in self if name not in shapes and self[name].numel()]
        unknown = [name for name in shapes if name not in self.shapes]
        if missing or unknown:
            differences = [f"{listing(missing)} not in the model"] * bool(missing)
            differences += [f"{listing(unknown)} not in the mask"] * bool(unknown)
            raise ValueError(
                "`mask`: expected the parameter names of this model, got a mask for another one: "
                f"{', '.join(differences)}; pass model.named_parameters() of the model it was selected on"
            )
        for name, shape in shapes.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"`mask`: expected shape {shape} for {name!r}, got {self.shapes[name]}: a mask for another model; "
                    "select on this one"
                )
        return [self[name].to(parameter.device) for name, parameter in named]

    def to_dense(self) -> dict[str, Tensor]:
        """Bool tensors of the tensors' shapes, True where selected.

        Memory is taken for what is selected: the pages around it.

        Raises:
            torch.OutOfMemoryError: There is no room for so many elements, selected or not.
        """
        dense = {}
        for name, shape in self.shapes.items():
            numel = math.prod(shape)
            with out_of_memory_says(f"dense mask of {name!r}, {numel:,} elements", f"use its indices: mask[{name!r}]"):
                # NumPy's zeros are pages that the system has not yet given; torch's are written
                flat = torch.from_numpy(_zeros(numel))
            flat[self[name].long()] = True
            dense[name] = flat.view(shape)
        return dense

    @classmethod
    def from_dense(cls, masks: Mapping[str, Tensor], model: nn.Module | None = None) -> SparseMask:
        """From tensors that are non-zero (True) where selected: `{name: mask}`, as SalUn and others save them.

        Args:
            masks: Tensors of any dtype. `torch.load(file, map_location="cpu", weights_only=True)` reads a file of them.
            model: Makes it a mask of all its parameters, under its names and in its order: nothing is selected in
                those that `masks` lacks, and names may differ by what DistributedDataParallel ("module.") and
                torch.compile put into them.

        Raises:
            ValueError: A name or shape that `model` does not have; a mask whose memory was freed.
            TypeError: `masks` holds something that is no tensor, or one that is not whole and in memory, as a DTensor.
        """
        masks = dict(masks)
        for name, mask in masks.items():
            if not isinstance(mask, Tensor):
                raise TypeError(
                    f"`masks`[{name!r}]: expected a tensor, got {type(mask).__name__}; pass the masks alone"
                )
            _check_whole(f"`masks`[{name!r}]", mask)
        indices = {name: mask.reshape(-1).nonzero().flatten() for name, mask in masks.items()}
        shapes = {name: mask.shape for name, mask in masks.items()}
        if model is None:
            return cls(indices, shapes)
        named = dict(model.named_parameters())
        given = plain_names(masks)
        if unknown := [given[plain] for plain in given.keys() - plain_names(named).keys()]:
            raise ValueError(
                f"`masks`: expected names of the model's parameters, got {listing(sorted(unknown))}; they are called "
                f"{listing(list(named))}"
            )
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        found = {}
        for plain, name in plain_names(named).items():
            found[name] = indices[given[plain]] if plain in given else empty
            if plain in given and shapes[given[plain]] != named[name].shape:
                raise ValueError(
                    f"`masks`[{given[plain]!r}]: expected shape {tuple(named[name].shape)} of the model's parameter, "
                    f"got {tuple(shapes[given[plain]])}; pass a mask of this model"
                )
        return cls({name: found[name] for name in named}, {name: p.shape for name, p in named.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file: the indices per tensor, shapes and a checksum in the header.

        Whole or not at all; equal masks give equal bytes.

        Raises:
            ValueError: A tensor with selected elements is called `__metadata__`.
            OSError: The file cannot be written; `path` is as it was.
        """
        tensors = {name: index for name, index in self._indices.items() if index.numel()}
        metadata = {"format": FORMAT, "version": _VERSION, "shapes": json.dumps(self.shapes)}
        metadata["checksum"] = tensor_files.checksum(metadata, tensors)
        with files.replacing(path) as file:
            tensor_files.write(file, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseMask:
        """Reads a file written by `save`. Raises ValueError when it is something else, or has been altered."""
        try:
            # masks had no checksum at first
            metadata, stored = tensor_files.read_checked(
                path, FORMAT, _VERSION, unchecked=("format", "version", "shapes")
            )
            shapes = json.loads(metadata["shapes"])
            empty = torch.empty(0, dtype=torch.int32, device="cpu")
            return cls(dict.fromkeys(shapes, empty) | stored, shapes)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{os.fspath(path)}: expected a mask saved by SparseMask.save, got another file or a damaged one "
                f"({error}); save the mask again"
            ) from error


def log_mask(what: str, mask: SparseMask, *, show: bool = False) -> None:
    """Says what a mask selects, as `say` does: once, by the first that has it."""
    mask._is_logged = mask._is_logged or say(f"{what}: {mask.summary().headline}", show=show)


def _check_whole(label: str, tensor: Tensor) -> None:
    """Raises for a tensor of which not all elements are here to be read."""
    if hasattr(tensor, "full_tensor") or tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        got = f"one on {tensor.device} of {tensor.layout}; call to_dense(), or load it into memory"
        if hasattr(tensor, "full_tensor"):
            got = "a DTensor; call full_tensor() on all ranks"
        raise TypeError(f"{label}: expected a whole strided tensor in memory, got {got}")
    check_memory(label, tensor)


def _zeros(numel: int) -> npt.NDArray[np.bool_]:
    try:
        return np.zeros(numel, dtype=np.bool_)
    except (ValueError, OverflowError) as error:  # beyond what NumPy can count
        raise MemoryError(str(error)) from error


def _difference(mask: SparseMask, other: SparseMask) -> str:
    name = next(n for n in {**mask.shapes, **other.shapes} if mask.shapes.get(n) != other.shapes.get(n))
    return f"{name!r} has shape {mask.shapes.get(name)} here and {other.shapes.get(name)} there"
