"""Selection without the dense gradient of the model: each parameter's gradient is used, and freed, as it comes.

`Candidates` keeps the k largest of tensors that come one at a time, in any order. "One pass" feeds it during the one
backward pass; "blocks" feeds it the mean gradients of one block of parameters after another, each from a pass over all
batches. "host" adds up in host memory, and selects there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..common.allocator import free_gradient
from ..ops.dtypes import index_dtype, opmath_dtype
from .budget import budget, largest_of_rows
from .gradients import check_dense, nonfinite_error
from .parts import local, local_gradient

Streaming = bool | Literal["host", "blocks"]

Passes = Callable[[Iterable[Any]], Iterator[None]]
"""Runs forward and backward on each batch; yields after each."""

Accumulate = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""The summed gradients of some parameters, from a pass over all batches; others are freed after each backward."""


def check_streaming(streaming: Streaming, score: str, blocks: int, batches: Iterable[Any] | None) -> None:
    """Raises ValueError for a mode that does not exist or does not go with the rest."""
    if streaming not in (False, True, "host", "blocks") or isinstance(streaming, int) != isinstance(streaming, bool):
        raise ValueError(f"`streaming`: expected False, True, 'host' or 'blocks', got {streaming!r}; see select()")
    if streaming is not False and score != "mean_grad":
        raise ValueError(f"`score`: expected 'mean_grad' with streaming, got {score!r}; pass streaming=False")
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"`blocks`: expected a positive int, got {blocks!r}; it is the number of passes over the data")
    if streaming == "blocks" and blocks > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"`batches`: expected what can be read {blocks} times, got {type(batches).__name__}, which is empty after "
            "its first use; pass a list or a DataLoader, or streaming='host'"
        )


class Candidates:
    """The k largest magnitudes of tensors offered in any order: the set that ops.topk_magnitude picks of all.

    At most 3 k candidates are held at once. For scope "tensor" or "row", `density` of each.
    """

    def __init__(
        self, numels: Mapping[str, int], density: float, k: int | None, scope: str, backend: str | None
    ) -> None:
        self._numels = numels  # in the order that breaks ties
        self._density, self._scope, self._backend = density, scope, backend
        self._k = budget(density, k, sum(numels.values())) if scope == "global" else None
        self.clear()

    def clear(self) -> None:
        """Forgets all offers."""
        self._indices: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._threshold = 0.0
        self._num_nonfinite: dict[str, int] = {}

    def offer(self, name: str, gradient: Tensor) -> None:
        """Takes what may be selected of a tensor; it is not kept, and not changed."""
        numel = gradient.numel()
        if self._scope == "row":
            bad = numel - int(gradient.isfinite().sum())
            if bad:
                self._num_nonfinite[name] = bad
                return
            index = largest_of_rows(gradient, self._density, self._backend)
            self._indices[name] = index.to(index_dtype(numel))
            self._values[name] = gradient.detach().reshape(-1).index_select(0, index)
            return
        quota = budget(self._density, None, numel) if self._k is None else min(self._k, numel)
        top = ops.topk_magnitude([gradient], quota, backend=self._backend)
        if top.num_nonfinite:
            self._num_nonfinite[name] = top.num_nonfinite
            return
        index = top.indices[0]
        values = gradient.detach().reshape(-1).index_select(0, index)
        if self._threshold:
            # equal ones stay: the order of tensors decides. Flushed denormals are equal, too
            rises = values.to(opmath_dtype(values.dtype)).abs() >= self._threshold
            index, values = index[rises], values[rises]
        self._indices[name], self._values[name] = index.to(index_dtype(numel)), values
        if self._k is not None and sum(v.numel() for v in self._values.values()) > 2 * self._k:
            self._prune(self._k)

    def _prune(self, k: int) -> None:
        names = [name for name in self._numels if name in self._values]
        top = ops.topk_magnitude([self._values[name] for name in names], k, backend=self._backend)
        self._threshold = top.threshold
        for name, kept in zip(names, top.indices, strict=True):
            self._indices[name], self._values[name] = self._indices[name][kept], self._values[name][kept]

    def any_nonzero(self) -> bool:
        """Whether any offer had an element other than zero."""
        return bool(self._num_nonfinite) or any(bool(values.any()) for values in self._values.values())

    def indices(self) -> dict[str, Tensor]:
        """Ascending flat indices per tensor. Raises ValueError for the first tensor with inf or NaN."""
        for name, numel in self._numels.items():
            if name in self._num_nonfinite:
                raise nonfinite_error(name, self._num_nonfinite[name], numel)
        if self._k is not None:
            self._prune(self._k)
        return self._indices


@contextmanager
def _on_gradient(parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `take(name, parameter)` runs whenever backward has added to a parameter's gradient."""
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
        for name, parameter in parameters.items()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _free(name: str, parameter: Tensor) -> None:
    free_gradient(parameter)


def _rng_state() -> Callable[[], None]:
    """A function that makes the next random numbers those that would come now."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def offer_one_pass(
    top: Candidates,
    batches: Iterable[Any],
    passes: Passes,
    named: Mapping[str, Tensor],
    candidates: Mapping[str, Tensor],
) -> None:
    """Offers the gradients of one batch during its backward pass."""
    batch = _only(batches)
    restore = _rng_state()
    late: set[str] = set()
    while True:
        seen, again = _offer_as_it_comes(top, passes(batch), named, candidates, late)
        if not again:
            break
        # of these a first part was taken for the whole. Once more, and they stay until the end of backward
        late |= again
        top.clear()
        restore()
    for name, parameter in candidates.items():
        if name not in seen:
            top.offer(name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            free_gradient(parameter)


def _offer_as_it_comes(
    top: Candidates,
    passes: Iterator[None],
    named: Mapping[str, Tensor],
    candidates: Mapping[str, Tensor],
    late: set[str],
) -> tuple[set[str], set[str]]:
    """Names that were offered; and those whose gradient came in parts, as under reentrant checkpointing."""
    seen: set[str] = set()
    again: set[str] = set()

    def take(name: str, parameter: Tensor) -> None:
        if name not in candidates:
            free_gradient(parameter)
        elif name not in late and parameter.grad is not None:
            check_dense(name, parameter.grad)
            (again if name in seen else seen).add(name)
            top.offer(name, parameter.grad)
            free_gradient(parameter)

    with _on_gradient(named, take):
        for _ in passes:
            pass
    return seen, again


def _only(batches: Iterable[Any]) -> list[Any]:
    iterator = iter(batches)
    first = list(zip(range(2), iterator, strict=False))
    if len(first) > 1:
        raise ValueError(
            "`batches`: expected one batch with streaming=True, got more; the mean over many takes streaming='host' or "
            "'blocks'"
        )
    return [batch for _, batch in first]


def offer_blocks(
    top: Candidates, accumulate: Accumulate, named: Mapping[str, Tensor], candidates: Mapping[str, Tensor], blocks: int
) -> None:
    """Offers the mean gradients of one block of parameters after another."""
    restore = _rng_state()
    for block in _split(candidates, blocks):
        restore()
        with _on_gradient({name: p for name, p in named.items() if name not in block}, _free):
            sums = accumulate(block)
        while sums:
            top.offer(*sums.popitem())
        for parameter in block.values():
            free_gradient(parameter)


def _split(candidates: Mapping[str, Tensor], blocks: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive parameters of about the same number of elements together."""
    total, done = sum(p.numel() for p in candidates.values()), 0
    numbered: dict[int, dict[str, Tensor]] = {}
    for name, parameter in candidates.items():
        middle = done + parameter.numel() / 2
        numbered.setdefault(min(blocks - 1, int(middle * blocks / max(total, 1))), {})[name] = parameter
        done += parameter.numel()
    yield from numbered.values()


def sum_on_host(
    batches: Iterable[Any], passes: Passes, named: Mapping[str, Tensor], candidates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The summed gradient per candidate, in host memory: fp32, fp64 for fp64 parameters."""
    sums: dict[str, Tensor] = {}

    def take(name: str, parameter: Tensor) -> None:
        gradient = local_gradient(parameter)
        if name in candidates and gradient is not None:
            check_dense(name, gradient)
            gradient = gradient.detach().cpu()
            if name in sums:
                sums[name].add_(gradient)
            else:
                sums[name] = gradient.to(opmath_dtype(gradient.dtype))
        del gradient
        free_gradient(parameter)

    with _on_gradient(named, take):
        for _ in passes(batches):
            pass
    for name, parameter in candidates.items():
        if name not in sums:
            sums[name] = torch.zeros(local(parameter).shape, dtype=parameter.dtype, device="cpu")
    return {name: sums[name] for name in candidates}
