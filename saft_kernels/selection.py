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

from . import _files, _streaming
from ._budget import DEFAULT_DENSITY, budget, check_budget, check_dense, check_finite, select_indices
from ._memory import out_of_memory_says
from ._named import listing, plain_names
from ._pools import any_nonzero
from ._release import releasing_paused
from ._scores import SCORES, Score
from ._state import index_dtype
from ._streaming import Candidates, Streaming, check_streaming
from .ops import _backends
from .ops._adamw import opmath_dtype
from .ops._checks import FLOAT_DTYPES, INDEX_DTYPES, short

Scope = Literal["global", "tensor", "row"]

_FORMAT = "saft_kernels.SparseMask"


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
        lines = [f"{'tensor':{width}}  {'selected':>10}  {'numel':>15}  {'density':>9}  {'share':>7}"]
        lines += [
            f"{row.name:{width}}  {row.k:>10,}  {row.numel:>15,}  {row.density:>9.3%}  {row.k / total:>7.2%}"
            for row in self.rows
            if row.k
        ]
        numel = sum(row.numel for row in self.rows)
        lines.append(f"{'total':{width}}  {total:>10,}  {numel:>15,}  {total / max(numel, 1):>9.3%}  {1:>7.0%}")
        return "\n".join(lines)


class SparseMask(Mapping[str, Tensor]):
    """Which elements of which tensors are trained.

    A mapping of tensor name to its flat (row-major) indices: ascending, int32 where the tensor has fewer than 2^31
    elements, else int64, on the CPU. Tensors without selected elements are in it, with no indices.
    """

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
        """Bool tensors of the tensors' shapes, True where selected."""
        dense = {}
        for name, shape in self.shapes.items():
            dense[name] = torch.zeros(math.prod(shape), dtype=torch.bool)
            dense[name][self[name].long()] = True
            dense[name] = dense[name].view(shape)
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
            ValueError: A name or shape that `model` does not have.
            TypeError: `masks` holds something that is no tensor.
        """
        masks = dict(masks)
        for name, mask in masks.items():
            if not isinstance(mask, Tensor):
                raise TypeError(
                    f"`masks`[{name!r}]: expected a tensor, got {type(mask).__name__}; pass the masks alone"
                )
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
        empty = torch.empty(0, dtype=torch.int64)
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
                    raise ValueError(f"its version is {metadata.get('version')!r}, this package reads '1'")
                shapes = json.loads(metadata["shapes"])
                names = file.keys()
                stored = {name: file.get_tensor(name) for name in names}
            empty = torch.empty(0, dtype=torch.int32)
            return cls(dict.fromkeys(shapes, empty) | stored, shapes)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{os.fspath(path)}: expected a mask saved by SparseMask.save, got another file or a damaged one "
                f"({error}); save the mask again"
            ) from error


def _safetensors(name: str) -> Callable[..., Any]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("mask and delta files need safetensors; pip install 'saft_kernels[io]'") from error
    return getattr(safetensors, name, None) or getattr(safetensors.torch, name)  # type: ignore[no-any-return]


def _difference(mask: SparseMask, other: SparseMask) -> str:
    name = next(n for n in {**mask.shapes, **other.shapes} if mask.shapes.get(n) != other.shapes.get(n))
    return f"{name!r} has shape {mask.shapes.get(name)} here and {other.shapes.get(name)} there"


# ---- select ----


def select(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    density: float = DEFAULT_DENSITY,
    k: int | None = None,
    score: str = "mean_grad",
    scope: Scope = "global",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    streaming: Streaming = False,
    blocks: int = 4,
    progress: bool = True,
    backend: str | None = None,
) -> SparseMask:
    """The parameters whose downstream-loss gradient is largest in magnitude.

    The score of an element is |mean over batches of its gradient|, unless `score` names another; the k largest over
    all candidate parameters together are selected.

    Args:
        model: Its parameters with `requires_grad` are the candidates. Parameters and their `.grad` are left as they
            were; buffers change as forward passes change them (use `model.eval()` to freeze batch norm statistics).
        batches: Read once, start to end. Batches count equally, whatever their size. Scores "weight" and "random" take
            none.
        loss_fn: `loss_fn(model, batch)` returns the scalar mean loss of the batch; autocast belongs inside it.
        density: Share of the candidate elements to select, in (0, 1].
        k: Number of elements to select, in place of `density`.
        score: "mean_grad", |mean g|, as in the paper; or, with g the gradient of one batch and w the parameter,
            "mean_abs_grad", mean |g|; "fisher", mean g^2, the diagonal of the empirical Fisher information (of batches,
            so it sharpens with smaller ones); "relative_grad", |mean g| / (|w| + 1e-8); "grad_times_weight",
            |mean g * w|; "weight", |w|; "random", uniform, from torch's default generator.
        scope: "global", one budget over all candidates; "tensor", `density` of each tensor; or "row", `density` of each
            slice of its first dimension (an output unit of a weight), at least one element. A vector is one row.
        include: Glob or globs (fnmatch) over parameter names; only matches are candidates.
        exclude: Glob or globs over parameter names; matches are no candidates.
        streaming: For models whose dense gradient does not fit; the mask is the same. True: one batch, of which each
            gradient is used and freed as backward makes it. "host": the gradients are added up in host memory, and
            selected from there. "blocks": `blocks` passes over the batches, which add up one share of the gradients
            each; the batches must come alike each time (torch's random numbers do).
        blocks: Number of passes with streaming="blocks".
        progress: Shows a tqdm bar, where tqdm is installed.
        backend: See `saft_kernels.ops.topk_magnitude`.

    Returns:
        A SparseMask over all parameters of the model, in the order of `named_parameters()`.

    Raises:
        ValueError: A budget or glob that cannot be met, no batches, a gradient that is not finite, or none but zeros.
        TypeError: `loss_fn` returned something else than a scalar tensor; a complex parameter; a sparse gradient.
        torch.OutOfMemoryError: It names the `streaming` to use instead. Parameters and gradients are as they were.

    Memory: one gradient per candidate element, in fp32 (fp64 for fp64 parameters), while it runs; for 16-bit
    parameters also the 16-bit gradient of one backward pass. With streaming=True: the largest gradient of one
    parameter, and at most 3 k values with their indices. "host": that gradient, and all sums in host memory. "blocks":
    the same as without streaming for 1 / `blocks` of the elements, at least those of the largest parameter.

    Source: SAFT, ECCV 2024, arXiv 2407.03036, section 3.
    """
    check_budget(density, k, scope)
    scoring = _check_score(score, batches, loss_fn)
    check_streaming(streaming, score, blocks, batches)
    named = dict(model.named_parameters())
    candidates = _candidates(named, include, exclude)
    budget(density, k, sum(p.numel() for p in candidates.values()), "the candidate parameters")
    for device_type in {"cpu"} if streaming == "host" else {p.device.type for p in candidates.values()}:
        _backends.choose("topk_magnitude", device_type, backend)  # an error now, not after all batches

    def pick(scores: dict[str, Tensor]) -> dict[str, Tensor]:
        indices = select_indices(list(scores), list(scores.values()), density, k, scope, backend)
        return dict(zip(scores, indices, strict=True))

    def passes(batches: Iterable[Any]) -> Iterator[None]:
        assert loss_fn is not None
        return _backward_passes(model, batches, loss_fn, progress)

    def accumulate(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert batches is not None
        return _accumulate(passes(batches), named, some, scoring)

    with (
        _gradients_set_aside(named.values()),
        releasing_paused(),
        out_of_memory_says("select()", _remedy(streaming, blocks)),
    ):
        if batches is None:
            picked = pick({name: _score_of_weight(scoring, parameter) for name, parameter in candidates.items()})
        elif streaming in (True, "blocks"):
            top = Candidates({n: p.numel() for n, p in candidates.items()}, density, k, scope, backend)
            if streaming is True:
                _streaming.offer_one_pass(top, batches, passes, named, candidates)
            else:
                _streaming.offer_blocks(top, accumulate, named, candidates, blocks)
            _check_any(top.any_nonzero(), candidates)
            picked = top.indices()
        else:
            host = streaming == "host"
            sums = _streaming.sum_on_host(batches, passes, named, candidates) if host else accumulate(candidates)
            _check_any(any_nonzero(sums.values()), candidates)
            if scoring.of_mean is not None:
                # before the weights make something else of inf and NaN
                check_finite(list(sums), list(sums.values()))
                with torch.no_grad():
                    sums = {n: scoring.of_mean(total, candidates[n].to(total.dtype)) for n, total in sums.items()}
            picked = pick(sums)
    empty = torch.empty(0, dtype=torch.int64)
    return SparseMask({name: picked.get(name, empty) for name in named}, {name: p.shape for name, p in named.items()})


def _check_score(score: str, batches: object, loss_fn: object) -> Score:
    if score not in SCORES:
        raise ValueError(f"`score`: expected one of {', '.join(SCORES)}, got {score!r}")
    scoring = SCORES[score]
    for name, value in (("batches", batches), ("loss_fn", loss_fn)):
        if scoring.needs_gradients and value is None:
            raise TypeError(
                f"`{name}`: expected one for score={score!r}, got None; only 'weight' and 'random' need none"
            )
        if scoring.needs_gradients and name == "loss_fn" and not callable(value):
            raise TypeError(
                f"`loss_fn`: expected a function of model and batch, got {type(value).__name__}; the order is "
                "select(model, batches, loss_fn)"
            )
        if not scoring.needs_gradients and value is not None:
            raise TypeError(f"`{name}`: expected None for score={score!r}, got {type(value).__name__}; drop it")
    return scoring


def _score_of_weight(scoring: Score, parameter: Tensor) -> Tensor:
    weight = parameter.detach().to(opmath_dtype(parameter.dtype))
    assert scoring.of_mean is not None
    return scoring.of_mean(weight, weight)


def _candidates(
    named: Mapping[str, Tensor], include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> dict[str, Tensor]:
    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    wanted, unwanted = ([globs] if isinstance(globs, str) else list(globs or []) for globs in (include, exclude))
    for argument, globs in (("include", wanted), ("exclude", unwanted)):
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in named):
                raise ValueError(
                    f"`{argument}`: expected globs over parameter names, got {glob!r}, which matches none of "
                    f"{len(named)}; they are called {listing(list(named))}"
                )
    candidates = {
        name: parameter
        for name, parameter in named.items()
        if parameter.requires_grad and (include is None or matches(name, wanted)) and not matches(name, unwanted)
    }
    if not candidates:
        raise ValueError(
            f"expected parameters with requires_grad that pass include={include!r} and exclude={exclude!r}, got none "
            f"of {len(named)}; call requires_grad_(True), or widen the globs"
        )
    for name, parameter in candidates.items():
        if parameter.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"parameter {name!r}: expected float32, bfloat16, float16 or float64, got {short(parameter.dtype)}; "
                "exclude it"
            )
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


def _backward_passes(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor], progress: bool
) -> Iterator[None]:
    """Yields after backward of each batch."""
    num_batches = 0
    for batch in _progress(batches, progress):
        with torch.enable_grad():
            loss = loss_fn(model, batch)
            _check_loss(loss)
            loss.backward()
        num_batches += 1
        yield
    if not num_batches:
        raise ValueError("`batches`: expected at least one batch, got none; a generator is empty after its first use")


def _accumulate(
    passes: Iterator[None], named: Mapping[str, Tensor], candidates: Mapping[str, Tensor], scoring: Score
) -> dict[str, Tensor]:
    """The summed gradient per candidate: it ranks as the mean does. 16-bit gradients are summed in fp32."""
    # the others add up in their .grad
    one_by_one = {name: p for name, p in candidates.items() if p.itemsize == 2 or scoring.of_batch is not None}
    others = [parameter for name, parameter in named.items() if name not in candidates]
    sums: dict[str, Tensor] = {}
    for _ in passes:
        for name, parameter in candidates.items():
            if parameter.grad is not None:
                check_dense(name, parameter.grad)
        for name, parameter in one_by_one.items():
            if parameter.grad is not None:
                grad = parameter.grad.detach().to(opmath_dtype(parameter.dtype))
                grad = grad if scoring.of_batch is None else scoring.of_batch(grad)
                sums[name] = sums[name].add_(grad) if name in sums else grad
                parameter.grad = None
        for parameter in others:
            parameter.grad = None
    for name, parameter in candidates.items():
        if parameter.grad is not None:
            sums[name] = parameter.grad.detach().resolve_neg()
        elif name not in sums:
            sums[name] = torch.zeros_like(parameter)  # the loss does not reach it
    return {name: sums[name] for name in candidates}


def _check_any(nonzero: bool, candidates: Mapping[str, Tensor]) -> None:
    if not nonzero:
        raise ValueError(
            f"`loss_fn`: expected a loss that depends on the candidate parameters, got no gradient but zeros for all "
            f"{len(candidates)} of them; is the model detached, or its output constant?"
        )


def _remedy(streaming: Streaming, blocks: int) -> str:
    """What to try when this mode runs out of memory."""
    if streaming is False:
        return (
            "pass streaming=True (one batch), 'blocks' (several passes) or 'host' (sums in host memory), or smaller "
            "batches"
        )
    if streaming == "blocks":
        return f"pass more blocks than {blocks}, or smaller batches, or checkpoint activations"
    return "pass smaller batches, or checkpoint activations"


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"`loss_fn`: expected a scalar tensor, got {got}; return the mean loss of the batch")
    if not loss.requires_grad:
        raise ValueError(
            "`loss_fn`: expected a loss with a gradient, got one without requires_grad; drop no_grad() and detach()"
        )


def _progress(batches: Iterable[Any], enabled: bool) -> Iterable[Any]:
    if not enabled:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc="selecting", unit="batch", leave=False)  # type: ignore[no-any-return]
