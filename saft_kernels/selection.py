"""Choosing the parameters to train: `select()` and its result, `SparseMask`."""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _files, ops

Scope = Literal["global", "tensor"]
SCOPES = ("global", "tensor")
SCORES = ("mean_grad",)

_FORMAT = "saft_kernels.SparseMask"


# ---- budgets ----


def check_budget(density: float | None, k: int | None, scope: str) -> None:
    """Raises ValueError for a budget no model could have."""
    if scope not in SCOPES:
        raise ValueError(f"`scope`: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if k is not None:
        if scope == "tensor":
            raise ValueError("`k`: expected None with scope='tensor', which takes `density` of each tensor")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"`k`: expected a positive int, got {k!r}")
    elif density is None or not 0 < density <= 1:
        raise ValueError(f"`density`: expected a number in (0, 1], got {density!r}; 1e-3 trains 0.1 %")


def budget(density: float | None, k: int | None, numel: int, what: str = "the parameters") -> int:
    """Selected elements out of `numel`: k, or density * numel, at least one."""
    if k is not None:
        if k > numel:
            raise ValueError(f"`k`: expected at most {numel}, the number of elements of {what}, got {k}")
        return k
    assert density is not None
    return min(numel, max(1, round(density * numel)))


def select_indices(
    names: Sequence[str],
    scores: Sequence[Tensor],
    density: float | None,
    k: int | None,
    scope: str,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """int64 flat indices per tensor, of the budget's largest |score|. Non-finite scores raise ValueError."""
    if scope == "tensor":
        picks = [
            ops.topk_magnitude([s], budget(density, None, s.numel()) if s.numel() else 0, backend=backend)
            for s in scores
        ]
        indices = tuple(pick.indices[0] for pick in picks)
        num_nonfinite = sum(pick.num_nonfinite for pick in picks)
    else:
        numel = sum(s.numel() for s in scores)
        topk = ops.topk_magnitude(scores, budget(density, k, numel), backend=backend)
        indices, num_nonfinite = topk.indices, topk.num_nonfinite
    if num_nonfinite:
        for name, score in zip(names, scores, strict=True):
            bad = int((~score.isfinite()).sum())
            if bad:
                raise ValueError(
                    f"gradient of {name!r} at selection: expected finite values, got {bad} inf or NaN of "
                    f"{score.numel()} ({num_nonfinite} in all); nothing was selected. Lower the learning rate or loss "
                    "scale, or look for the bad batch"
                )
    return indices


# ---- SparseMask ----


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
        lines = [f"{'tensor':{width}}  {'selected':>10}  {'numel':>12}  {'density':>9}  {'share':>7}"]
        lines += [
            f"{row.name:{width}}  {row.k:>10,}  {row.numel:>12,}  {row.density:>9.3%}  {row.k / total:>7.2%}"
            for row in self.rows
            if row.k
        ]
        numel = sum(row.numel for row in self.rows)
        lines.append(f"{'total':{width}}  {total:>10,}  {numel:>12,}  {total / max(numel, 1):>9.3%}  {1:>7.0%}")
        return "\n".join(lines)


class SparseMask(Mapping[str, Tensor]):
    """Which elements of which tensors are trained.

    A mapping of tensor name to its flat (row-major) indices: ascending, int32 where the tensor has fewer than 2^31
    elements, else int64, on the CPU. Tensors without selected elements are in it, with no indices.
    """

    def __init__(self, indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        if indices.keys() != shapes.keys():
            raise ValueError("`shapes`: expected the names of `indices`")
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shapes[name]) for name in indices}
        self._indices: dict[str, Tensor] = {}
        for name, index in indices.items():
            numel = math.prod(self.shapes[name])
            if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"indices of {name!r}: expected one-dimensional int32 or int64, got {index.dtype}")
            index = index.detach().cpu()
            if index.numel() and not (int(index[0]) >= 0 and int(index[-1]) < numel):
                raise ValueError(f"indices of {name!r}: expected flat positions in [0, {numel})")
            if bool((index[1:] <= index[:-1]).any()):
                raise ValueError(f"indices of {name!r}: expected ascending and distinct")
            self._indices[name] = index.to(index_dtype(numel))

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

    def summary(self) -> MaskSummary:
        """Selected elements per tensor; print it."""
        return MaskSummary(
            tuple(SummaryRow(name, shape, math.prod(shape), self[name].numel()) for name, shape in self.shapes.items())
        )

    def iou(self, other: SparseMask) -> float:
        """Intersection over union of two masks of one model: 1 for equal masks, 0 for disjoint ones."""
        if self.shapes != other.shapes:
            raise ValueError(f"`other`: expected a mask of the same model; {_first_difference(self, other)}")
        both = sum(int(torch.isin(self[n], other[n], assume_unique=True).sum()) for n in self)
        either = self.k + other.k - both
        return both / either if either else 1.0

    def bind(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """Indices per parameter, in the order given, on its device. Raises ValueError for another model's names."""
        named = list(named_parameters)
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        missing = [name for name in self if name not in shapes and self[name].numel()]
        unknown = [name for name in shapes if name not in self.shapes]
        if missing or unknown:
            raise ValueError(
                "`mask`: expected the parameter names of this model, got a mask for another one: "
                f"{_listing('not in the model', missing)}{_listing('not in the mask', unknown)}"
                "pass model.named_parameters() of the model it was selected on"
            )
        for name, shape in shapes.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"`mask`: expected shape {shape} for {name!r}, got {self.shapes[name]}: a mask for another model"
                )
        return [self[name].to(parameter.device) for name, parameter in named]

    def to_dense(self) -> dict[str, Tensor]:
        """Bool tensors of the tensors' shapes, True where selected."""
        dense = {}
        for name, shape in self.shapes.items():
            dense[name] = torch.zeros(math.prod(shape), dtype=torch.bool)
            dense[name][self[name].long()] = True
            dense[name] = dense[name].view(shape)
        return dense

    @classmethod
    def from_dense(cls, masks: Mapping[str, Tensor]) -> SparseMask:
        """From tensors that are non-zero (True) where selected."""
        return cls(
            {name: mask.reshape(-1).nonzero().flatten() for name, mask in masks.items()},
            {name: mask.shape for name, mask in masks.items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file: the indices per tensor, shapes in the header. Whole or not at all."""
        save_file = _safetensors("save_file")
        metadata = {"format": _FORMAT, "version": "1", "shapes": json.dumps(self.shapes)}
        with _files.replacing(path) as temporary:
            save_file({n: i for n, i in self._indices.items() if i.numel()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseMask:
        """Reads a file written by `save`. Raises ValueError when it is something else."""
        safe_open = _safetensors("safe_open")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}")
                if metadata.get("version") != "1":
                    raise ValueError(f"version {metadata.get('version')!r} is newer than this package reads")
                shapes = json.loads(metadata["shapes"])
                empty = torch.empty(0, dtype=torch.int32)
                stored = set(file.keys())
                indices = {name: file.get_tensor(name) if name in stored else empty for name in shapes}
            return cls(indices, shapes)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)}: expected a mask saved by SparseMask.save: {error}") from error


def index_dtype(numel: int) -> torch.dtype:
    """int32 where every flat position fits."""
    return torch.int32 if numel < 2**31 else torch.int64


def _safetensors(name: str) -> Callable[..., Any]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("mask files need safetensors; pip install saft_kernels[io]") from error
    return getattr(safetensors, name, None) or getattr(safetensors.torch, name)  # type: ignore[no-any-return]


def _listing(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more} {what}; "


def _first_difference(mask: SparseMask, other: SparseMask) -> str:
    for name in {**mask.shapes, **other.shapes}:
        a, b = mask.shapes.get(name), other.shapes.get(name)
        if a != b:
            return f"{name!r} has shape {a or 'none'} here and {b or 'none'} there"
    return "the order of names differs"


# ---- select ----


def select(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    density: float = 1e-3,
    k: int | None = None,
    score: str = "mean_grad",
    scope: Scope = "global",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    progress: bool = True,
    backend: str | None = None,
) -> SparseMask:
    """The parameters whose downstream-loss gradient is largest in magnitude.

    The score of an element is |mean over batches of its gradient|; the k largest over all candidate parameters
    together are selected.

    Args:
        model: Its parameters with `requires_grad` are the candidates. Parameters and their `.grad` are left as they
            were; buffers change as forward passes change them (use `model.eval()` to freeze batch norm statistics).
        batches: Read once, start to end. Batches count equally, whatever their size.
        loss_fn: `loss_fn(model, batch)` returns the scalar mean loss of the batch; autocast belongs inside it.
        density: Share of the candidate elements to select, in (0, 1].
        k: Number of elements to select, in place of `density`.
        score: "mean_grad", as in the paper.
        scope: "global", one budget over all candidates, or "tensor", `density` of each tensor.
        include: Glob or globs (fnmatch) over parameter names; only matches are candidates.
        exclude: Glob or globs over parameter names; matches are no candidates.
        progress: Shows a tqdm bar, where tqdm is installed.
        backend: See `saft_kernels.ops.topk_magnitude`.

    Returns:
        A SparseMask over all parameters of the model, in the order of `named_parameters()`.

    Raises:
        ValueError: A budget or name that cannot be met, no batches, or a loss or gradient that is not finite.
        TypeError: `loss_fn` returned something else than a scalar tensor.

    Memory: one gradient per candidate element, in fp32 (fp64 for fp64 parameters), while it runs; for 16-bit
    parameters also the 16-bit gradient of one backward pass.

    Source: SAFT, ECCV 2024, arXiv 2407.03036, section 3.
    """
    if density != 1e-3 and k is not None:
        raise ValueError(f"expected `density` or `k`, got both: density={density!r}, k={k!r}; drop one")
    check_budget(density, k, scope)
    if score not in SCORES:
        raise ValueError(f"`score`: expected one of {', '.join(SCORES)}, got {score!r}")
    named = dict(model.named_parameters())
    candidates = _candidates(named, include, exclude)
    budget(density, k, sum(p.numel() for p in candidates.values()), "the candidate parameters")
    with _gradients_set_aside(candidates.values()):
        sums = _accumulate(model, batches, loss_fn, candidates, progress)
    names = list(sums)
    indices = select_indices(names, list(sums.values()), density, k, scope, backend)
    picked = dict(zip(names, indices, strict=True))
    empty = torch.empty(0, dtype=torch.int64)
    return SparseMask({name: picked.get(name, empty) for name in named}, {name: p.shape for name, p in named.items()})


def _candidates(
    named: Mapping[str, Tensor], include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> dict[str, Tensor]:
    def matches(name: str, globs: Sequence[str] | str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in ([globs] if isinstance(globs, str) else globs))

    candidates = {
        name: parameter
        for name, parameter in named.items()
        if parameter.requires_grad
        and (include is None or matches(name, include))
        and (exclude is None or not matches(name, exclude))
    }
    if not candidates:
        raise ValueError(
            f"expected parameters with requires_grad that pass include={include!r} and exclude={exclude!r}, got none "
            f"of {len(named)}"
        )
    for name, parameter in candidates.items():
        if parameter.is_complex():
            raise TypeError(f"parameter {name!r}: expected a real dtype, got {parameter.dtype}; exclude it")
    return candidates


@contextmanager
def _gradients_set_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """The caller's `.grad` tensors are out of the way inside, and back afterwards."""
    parameters = list(parameters)
    saved = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, saved, strict=True):
            parameter.grad = grad


def _accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    candidates: Mapping[str, Tensor],
    progress: bool,
) -> dict[str, Tensor]:
    """The summed gradient per candidate: ranks as the mean does. 16-bit gradients are summed in fp32."""
    low_precision = {name: p for name, p in candidates.items() if p.itemsize == 2}
    sums: dict[str, Tensor] = {}
    num_batches = 0
    with torch.enable_grad():
        for batch in _progress(batches, progress):
            loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"`loss_fn`: expected a scalar tensor, got {got}; return the mean loss of the batch")
            loss.backward()
            num_batches += 1
            for name, parameter in low_precision.items():
                if parameter.grad is not None:
                    grad = parameter.grad.detach()
                    sums[name] = sums[name].add_(grad) if name in sums else grad.float()
                    parameter.grad = None
    if not num_batches:
        raise ValueError("`batches`: expected at least one batch, got none; a generator is empty after its first use")
    for name, parameter in candidates.items():
        if parameter.grad is not None:
            if parameter.grad.layout != torch.strided:
                raise TypeError(
                    f"gradient of {name!r}: expected a dense one, got layout {parameter.grad.layout}; build the "
                    "embedding with sparse=False"
                )
            sums[name] = parameter.grad.detach()
    untouched = [name for name in candidates if name not in sums]
    if len(untouched) == len(candidates):
        raise ValueError("`loss_fn`: expected a loss that depends on the candidate parameters, got no gradient at all")
    # a parameter the loss does not reach has gradient zero
    for name in untouched:
        sums[name] = torch.zeros_like(candidates[name])
    return {name: sums[name] for name in candidates}


def _progress(batches: Iterable[Any], enabled: bool) -> Iterable[Any]:
    if not enabled:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc="selecting", unit="batch", leave=False)  # type: ignore[no-any-return]
