"""Selecting into an optimizer that a framework has built: without names, and behind its own wrapper."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..mask import SparseMask
from ..optim.budgets import NOTHING, Pool, Position, or_whole, places
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
    """
    sparse = unwrapped(optimizer)
    picked: dict[Position, Tensor | None] = {}
    num_candidates = dict.fromkeys(range(len(sparse.param_groups)), 0)
    with _named(sparse, dict(model.named_parameters())):
        names = {position: name for position, name, _ in places(sparse.param_groups)}
        for pool in sparse._selection.pools(sparse.param_groups):
            picked.update(_pick(sparse, pool, names, model, batches, loss_fn, options))
            for position, parameter in pool.members.items():
                num_candidates[position[0]] += parameter.numel() * (pool.is_dense or parameter.requires_grad)
        sparse.reselect()
        for i, group in enumerate(sparse.param_groups):
            group["num_candidates"] = num_candidates[i]
        sparse._adopt(picked)
        mask = sparse.mask
        assert mask is not None
        return mask


def _pick(
    optimizer: SparseAdamW,
    pool: Pool,
    names: Mapping[Position, str],
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    options: dict[str, Any],
) -> dict[Position, Tensor | None]:
    """The indices of one budget; None for all of a parameter."""
    if pool.is_dense:
        return dict.fromkeys(pool.members)
    picked: dict[Position, Tensor | None] = dict.fromkeys(pool.members, NOTHING)
    candidates = {position: p for position, p in pool.members.items() if p.requires_grad}
    of_model = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    mine = [names[position] for position in candidates]
    with _averaged_over_ranks(candidates.values()):
        mask = select(
            model,
            batches,
            loss_fn,
            density=DEFAULT_DENSITY if pool.density is None else pool.density,
            k=pool.k,
            scope=optimizer._selection.scope if pool.k is None else "global",  # type: ignore[arg-type]
            include=None if of_model == set(mine) else [glob.escape(name) for name in mine],
            **{"backend": optimizer.backend, **options},
        )
    for position, parameter in candidates.items():
        picked[position] = or_whole(parameter, mask[names[position]].to(parameter.device))
    return picked


def use_mask(optimizer: Optimizer, model: nn.Module, mask: SparseMask) -> None:
    """Makes `mask` what an optimizer without names, built but not yet stepped, selects. `model` has the names."""
    sparse = unwrapped(optimizer)
    with _named(sparse, dict(model.named_parameters())):
        sparse._use_mask(mask)


def unwrapped(optimizer: Optimizer) -> SparseAdamW:
    """The SparseAdamW in the wrappers of accelerate and Lightning."""
    inner: Any = optimizer
    while not isinstance(inner, SparseAdamW):
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"`optimizer`: expected a SparseAdamW, got {type(inner).__name__}; build it with "
                "saft_kernels.SparseAdamW"
            )
        inner = inner.optimizer
    return inner


@contextmanager
def _named(optimizer: SparseAdamW, named: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives the groups the model's names, for the moment: with names, torch would refuse a later group without."""
    names = {parameter: name for name, parameter in named.items()}
    for position, name, parameter in places(optimizer.param_groups):
        if parameter not in names:
            raise ValueError(
                f"`model`: expected all parameters of the optimizer, got none that is {name!r} (group {position[0]}, "
                f"number {position[1]}); pass the model that the optimizer was built for"
            )
    before = [group.get("param_names") for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    try:
        yield
    finally:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            if old is None:
                del group["param_names"]
            else:
                group["param_names"] = old


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
