"""Choosing the parameters to train: `select()`."""

from __future__ import annotations

import fnmatch
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..common.log import say
from ..common.memory import out_of_memory_says
from ..common.names import listing, short
from ..common.pause import releasing_paused
from ..mask import SparseMask, log_mask
from ..ops.dtypes import FLOAT_DTYPES, opmath_dtype
from .budget import DEFAULT_DENSITY, budget, check_budget
from .gradients import check_dense
from .parts import (
    check_parts,
    check_unflattened,
    describe,
    gather_whole,
    here,
    is_distributed,
    local,
    local_gradient,
    part_of,
    reshard,
)
from .ranks import together
from .scores import SCORES, Score
from .shards import any_nonzero, check_finite, select_indices
from .streaming import Candidates, Streaming, check_streaming, offer_blocks, offer_one_pass, sum_on_host

__all__ = ["SparseMask", "select"]

Scope = Literal["global", "tensor", "row"]


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
        progress: Shows on stderr how far it is, with tqdm's bar on a terminal and a line elsewhere, and what it has
            selected. Lines go to the logger "saft_kernels" where that is at INFO; the last one in any case.
        backend: See `saft_kernels.ops.topk_magnitude`.

    Where parameters are split over ranks, as by `fully_shard`, every rank calls it, with its own batches, as many as
    the others; all get the mask of the whole model. Not with streaming=True or "blocks".

    Returns:
        A SparseMask over all parameters of the model, in the order of `named_parameters()`.

    Raises:
        ValueError: A budget or glob that cannot be met, no batches, a gradient that is not finite, or none but zeros.
        TypeError: `loss_fn` returned something else than a scalar tensor; a complex parameter; a sparse gradient; a
            DTensor that is split otherwise than along one dimension; a flattened parameter, as of
            FullyShardedDataParallel.
        NotImplementedError: streaming=True or "blocks" with parameters that are split over ranks.
        RuntimeError: Another rank has failed, or none but it calls; it says which.
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
    reshard(model)
    named = dict(model.named_parameters())
    candidates = _candidates(named, include, exclude)
    budget(density, k, sum(p.numel() for p in candidates.values()), "the candidate parameters")
    for device_type in {"cpu"} if streaming == "host" else {p.device.type for p in candidates.values()}:
        ops.check_backend(backend, "topk_magnitude", device_type)  # an error now, not after all batches

    for name, parameter in candidates.items():
        check_unflattened(
            f"parameter {name!r}", parameter, "select on the model before it is wrapped, or use fully_shard"
        )
    parts = [part_of(parameter) for parameter in candidates.values()]
    ranks = check_parts((f"parameter {name!r}", parameter) for name, parameter in candidates.items())
    if ranks is not None and streaming in (True, "blocks"):
        raise NotImplementedError(
            "select(): expected streaming=False or 'host' with parameters that are split over "
            f"{ranks.size} ranks, got streaming={streaming!r}, which does not work there yet; pass 'host'"
        )

    def pick(scores: dict[str, Tensor]) -> dict[str, Tensor]:
        indices = select_indices(list(scores), list(scores.values()), parts, density, k, scope, backend)
        return dict(zip(scores, gather_whole(parts, indices)[0], strict=True))

    def passes(batches: Iterable[Any]) -> Iterator[None]:
        assert loss_fn is not None
        return _backward_passes(model, batches, loss_fn, progress)

    def accumulate(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert batches is not None
        return _accumulate(passes(batches), named, some, scoring)

    with (
        together(ranks, "select()"),
        _gradients_set_aside(named.values()),
        releasing_paused(named.values()),
        out_of_memory_says("select()", _remedy(streaming, blocks)),
    ):
        if ranks is not None:
            options: dict[str, object] = {"density": density, "k": k, "score": score, "scope": scope}
            options["streaming"] = streaming
            if batches is not None:
                options["number of batches"] = operator.length_hint(batches, -1)
            if score == "random":
                options["random numbers"] = _next_random_numbers(candidates.values())
            ranks.check_same("select()", {**describe(candidates.items()), **options})
        if batches is None:
            picked = pick({name: _score_of_weight(scoring, p) for name, p in candidates.items()})
        elif streaming in (True, "blocks"):
            top = Candidates({n: p.numel() for n, p in candidates.items()}, density, k, scope, backend)
            if streaming is True:
                offer_one_pass(top, batches, passes, named, candidates)
            else:
                offer_blocks(top, accumulate, named, candidates, blocks)
            _check_any(top.any_nonzero(), candidates)
            picked = top.indices()
        else:
            host = streaming == "host"
            with nullcontext() if ranks is None else ranks.apart():  # the model's own collectives
                sums = sum_on_host(batches, passes, named, candidates) if host else accumulate(candidates)
            _check_any(any_nonzero(sums.values(), ranks), candidates)
            if scoring.of_mean is not None:
                # before the weights make something else of inf and NaN
                check_finite(list(sums), list(sums.values()), parts)
                with torch.no_grad():
                    weights = {name: local(parameter) for name, parameter in candidates.items()}
                    sums = {n: scoring.of_mean(total, weights[n].to(total.dtype)) for n, total in sums.items()}
            picked = pick(sums)
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    mask = SparseMask({name: picked.get(name, empty) for name in named}, {name: p.shape for name, p in named.items()})
    log_mask("select()", mask, show=progress)
    return mask


def _check_loss_fn(loss_fn: object) -> None:
    if not callable(loss_fn):
        raise TypeError(
            f"`loss_fn`: expected a function of model and batch, got {type(loss_fn).__name__}; the order is "
            "select(model, batches, loss_fn)"
        )
    if not _takes_two(loss_fn):
        raise TypeError(
            f"`loss_fn`: expected a function of model and batch, got {loss_fn!r}, which cannot be called with two "
            "arguments; write lambda model, batch: loss"
        )


def _takes_two(function: Any) -> bool:
    """Whether it can be called with two arguments, as far as it says: what it wraps does not matter."""
    try:
        signature = inspect.signature(
            function.forward if isinstance(function, nn.Module) else function, follow_wrapped=False
        )
    except (ValueError, TypeError):  # it does not say
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def _check_score(score: str, batches: object, loss_fn: object) -> Score:
    if score not in SCORES:
        raise ValueError(f"`score`: expected one of {', '.join(SCORES)}, got {score!r}")
    scoring = SCORES[score]
    for name, value in (("batches", batches), ("loss_fn", loss_fn)):
        if scoring.needs_gradients and value is None:
            raise TypeError(
                f"`{name}`: expected one for score={score!r}, got None; only 'weight' and 'random' need none"
            )
        if not scoring.needs_gradients and value is not None:
            raise TypeError(f"`{name}`: expected None for score={score!r}, got {type(value).__name__}; drop it")
    if scoring.needs_gradients:
        _check_loss_fn(loss_fn)
    return scoring


def _score_of_weight(scoring: Score, parameter: Tensor) -> Tensor:
    """This rank's part of it. Random numbers are drawn for the whole: the same for any number of ranks."""
    assert scoring.of_mean is not None
    weight = local(parameter).detach()
    if scoring.is_random and is_distributed(parameter):
        weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=weight.device)
    weight = weight.to(opmath_dtype(parameter.dtype))
    found = scoring.of_mean(weight, weight)
    return here(found, parameter) if scoring.is_random else found


def _next_random_numbers(parameters: Iterable[Tensor]) -> list[float]:
    """What torch's default generators would draw now, one number for each type of device."""
    devices = {local(parameter).device.type: local(parameter).device for parameter in parameters}
    found = []
    for device in devices.values():
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            found.append(float(torch.rand((), device=device)))
    return found


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
            if (gradient := local_gradient(parameter)) is not None:
                grad = gradient.detach().to(opmath_dtype(parameter.dtype))
                grad = grad if scoring.of_batch is None else scoring.of_batch(grad)
                sums[name] = sums[name].add_(grad) if name in sums else grad
                parameter.grad = None
        for parameter in others:
            parameter.grad = None
    for name, parameter in candidates.items():
        if (gradient := local_gradient(parameter)) is not None:
            sums[name] = gradient.detach().resolve_neg()
        elif name not in sums:
            sums[name] = torch.zeros_like(local(parameter))  # the loss does not reach it
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
    """A bar on a terminal; elsewhere, as in a log file, a line that says what begins."""
    if not enabled:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        pass
    else:
        bar = tqdm(batches, desc="selecting", unit="batch", leave=False, disable=None)
        if not bar.disable:
            return bar  # type: ignore[no-any-return]
    count = operator.length_hint(batches, -1)
    say(f"select(): reads {'' if count < 0 else f'{count} '}batch{'' if count == 1 else 'es'}", show=True)
    return batches
