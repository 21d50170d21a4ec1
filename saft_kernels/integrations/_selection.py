"""Selecting into an optimizer that a framework has built: without names, and behind its own wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import selection
from .._pools import Position, places
from ..optim import SparseAdamW
from ..selection import SparseMask


def select_into(
    optimizer: Optimizer,
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    progress: bool = True,
) -> SparseMask:
    """Selects for an optimizer that is already there, from the mean gradient over `batches`.

    For scripts whose framework builds the optimizer: what `saft_kernels.select` and `SparseAdamW(mask=...)` do, with
    the budgets of the optimizer and its groups, whether or not they carry names. Moments of elements that were and
    stay selected are kept. Under torch.distributed every rank calls it, with its own share of the batches.

    Args:
        optimizer: A SparseAdamW, or a wrapper with it as its `.optimizer` (accelerate, Lightning). What it selects is
            changed, nothing else.
        model: Holds all parameters of the optimizer. Parameters and their `.grad` are left as they were.
        batches: Read once, start to end. Batches count equally, whatever their size.
        loss_fn: `loss_fn(model, batch)` returns the scalar mean loss of the batch; autocast belongs inside it.
        progress: Shows a tqdm bar, where tqdm is installed.

    Returns:
        What is selected, under the names of `model.named_parameters()`.

    Raises:
        ValueError: No batches, a gradient that is not finite, none but zeros, or a parameter that is not the model's.
        TypeError: An optimizer of another class; `loss_fn` returned something else than a scalar tensor.
    """
    sparse = unwrapped(optimizer)
    named = dict(model.named_parameters())
    with _named(sparse, named):
        members = places(sparse.param_groups)
        candidates = {name: p for _, name, p in members if p.requires_grad}
        with selection._gradients_set_aside(named.values()):
            sums = selection._accumulate(model, batches, loss_fn, named, candidates, progress)
        if torch.distributed.is_initialized():
            for total in sums.values():
                torch.distributed.all_reduce(total)
        sparse.reselect()
        picking = sparse._selection
        picking.sums = {position: sums[name] for position, name, _ in members if name in sums}
        picking.num_sums = picking.steps
        try:
            picked: dict[Position, Tensor | None] | None = picking.select(sparse.param_groups, 1.0, sparse.backend)
        finally:
            picking.restart()
        sparse._adopt(picked or {})
        return _selected(sparse)


def use_mask(optimizer: Optimizer, model: nn.Module, mask: SparseMask) -> None:
    """Makes `mask` what an optimizer without names, built but not yet stepped, selects. `model` has the names."""
    sparse = unwrapped(optimizer)
    with _named(sparse, dict(model.named_parameters())):
        sparse._use_mask(mask)


def unwrapped(optimizer: Optimizer) -> SparseAdamW:
    """The SparseAdamW in the wrappers of accelerate and Lightning."""
    inner: Any = optimizer
    while not isinstance(inner, SparseAdamW):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"`optimizer`: expected a SparseAdamW, got {type(optimizer).__name__}; build it with "
                "saft_kernels.SparseAdamW"
            )
    return inner


def _selected(optimizer: SparseAdamW) -> SparseMask:
    mask = optimizer.mask
    assert mask is not None
    return mask


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
