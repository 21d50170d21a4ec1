"""Selecting into an optimizer that a framework has built: without names, and behind its own wrapper."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..mask import SparseMask
from ..optim.budgets import Picked, Pool
from ..optim.members import or_whole
from ..optim.ranks import refuse_split
from ..optim.sparse_adamw import SparseAdamW
from ..selection.budget import DEFAULT_DENSITY
from ..selection.select_mask import select


def select_into(
    optimizer: Optimizer,
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    **options: Any,
) -> SparseMask:
    """Selects for an optimizer that is already there, from the mean gradient over `batches`.

    For scripts whose framework builds the optimizer: what `saft_kernels.select` and `SparseAdamW(mask=...)` do, with
    the budgets of the optimizer and its groups, whether or not they carry names. Moments of elements that were and
    stay selected are kept. Under torch.distributed every rank calls it with its own share of the batches, as many as
    the others, and gradients are averaged over the ranks.

    Args:
        optimizer: A SparseAdamW, or a wrapper with it as its `.optimizer` (accelerate, Lightning). What it selects is
            changed, nothing else.
        model: Holds all parameters of the optimizer. Parameters and their `.grad` are left as they were.
        batches: Read once, start to end; once per budget where groups have budgets of their own.
        loss_fn: `loss_fn(model, batch)` returns the scalar mean loss; autocast belongs inside it.
        options: Further keyword arguments of `saft_kernels.select`, such as `progress=False`.

    Returns:
        What is selected, under the names of `model.named_parameters()`.

    Raises:
        ValueError: No batches, a gradient that is not finite, none but zeros, or a parameter that is not the model's.
            Nothing was changed.
        TypeError: An optimizer of another class; `loss_fn` returned something else than a scalar tensor.
        NotImplementedError: Its parameters are DTensors, as of fully_shard.
    """
    sparse = unwrapped(optimizer)
    remedy = "call optimizer.use_mask(saft_kernels.select(model, batches, loss_fn)) on all ranks in its place"
    refuse_split(sparse.param_groups, "select_into(), as of a SelectionCallback", remedy)
    names = _names(sparse, model)
    members = sparse.members()
    picked = Picked({}, {})
    for pool in sparse.pools():
        mine = candidates = pool.of(members)
        if not pool.is_dense:
            candidates = [member for member in mine if member.parameter.requires_grad]
            mask = _select(sparse, pool, [names[m.parameter] for m in candidates], model, batches, loss_fn, options)
            for member in candidates:
                index = mask[names[member.parameter]].to(member.parameter.device)
                picked.indices[member.position] = or_whole(member.parameter, index)
        picked.add(pool, mine, candidates)
    sparse.adopt(picked)
    own = sparse.mask
    assert own is not None
    return SparseMask(
        {names[member.parameter]: own[member.name] for member in members},
        {names[member.parameter]: member.parameter.shape for member in members},
    )


def _select(
    optimizer: SparseAdamW,
    pool: Pool,
    candidates: Sequence[str],
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    options: dict[str, Any],
) -> SparseMask:
    """What one budget selects of its candidates."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _averaged_over_ranks([parameters[name] for name in candidates]):
        return select(
            model,
            batches,
            loss_fn,
            density=DEFAULT_DENSITY if pool.density is None else pool.density,
            k=pool.k,
            scope=pool.scope,  # type: ignore[arg-type]
            include=None if parameters.keys() == set(candidates) else [glob.escape(name) for name in candidates],
            **{"backend": optimizer.backend, **options},
        )


class FirstBatches:
    """The first batches of a loader, each time they are read; a framework's training starts at the first again.

    Args:
        loader: The framework's.
        max_batches: As many, at most; None: all, where they end and can be read again.
        length: How many there are; None where the loader does not know.
        dataset: What it loads; an iterator can be read only once.

    Raises:
        ValueError: `max_batches` is none, and reading would not end or would leave nothing to train on. Nothing was
            read.
    """

    def __init__(self, loader: Iterable[Any], max_batches: int | None, length: int | None, dataset: object) -> None:
        is_stream = isinstance(dataset, Iterator)
        if max_batches is None and (length is None or is_stream):
            what = "a stream that is read once" if is_stream else "one of unknown length, which may never end"
            raise ValueError(
                f"SelectionCallback: expected `max_batches` with such training data, got None for {what}; pass "
                "max_batches=100 to select from that many (a stream that cannot start again then trains on what is "
                "left), or select beforehand, from other batches, with saft_kernels.select"
            )
        self._loader = loader
        self._count = min(n for n in (max_batches, length) if n is not None)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._loader, self._count)


def check_max_batches(max_batches: int | None) -> None:
    """Raises ValueError where it is neither None nor a positive int."""
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ValueError(f"`max_batches`: expected a positive int or None, got {max_batches!r}; None takes all")


def name_parameters(optimizer: SparseAdamW, model: nn.Module) -> None:
    """Gives the optimizer the model's names, as if it had been built of `model.named_parameters()`."""
    names = _names(optimizer, model)
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]


def unwrapped(optimizer: Optimizer) -> SparseAdamW:
    """The SparseAdamW in the wrappers of accelerate and Lightning."""
    inner: Any = optimizer
    while hasattr(inner, "optimizer"):  # Lightning's wrappers are instances of SparseAdamW too
        inner = inner.optimizer
    if not isinstance(inner, SparseAdamW):
        raise TypeError(
            f"`optimizer`: expected a SparseAdamW, got {type(inner).__name__}; build it with saft_kernels.SparseAdamW"
        )
    return inner


def _names(optimizer: SparseAdamW, model: nn.Module) -> dict[Tensor, str]:
    """The model's names of the optimizer's parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for member in optimizer.members(split=True):
        if member.parameter not in names:
            i, j = member.position
            raise ValueError(
                f"`model`: expected all parameters of the optimizer, got none that is {member.name!r} (group {i}, "
                f"number {j}); pass the model that the optimizer was built for"
            )
    return names


@contextmanager
def _averaged_over_ranks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """What DistributedDataParallel does; the model may be the one inside it. Else each rank selects from its data."""
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return

    def average(gradient: Tensor) -> Tensor:
        gradient = gradient / distributed.get_world_size()
        distributed.all_reduce(gradient)
        return gradient

    handles = [parameter.register_hook(average) for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
