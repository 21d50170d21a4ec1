"""sparse_grad: linear layers that compute only the selected entries of their weight gradient.

A layer's backward hands the selected entries to the optimizer's buffer (see `optim/release.py`), which adds them up:
where a layer is used twice, where a weight has a dense gradient from elsewhere, over several backward passes.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ..common.pause import is_paused
from ..optim.ranks import refuse_split
from ..optim.release import GradientBuffer
from ..optim.selected_grad import Selected
from ..optim.sparse_adamw import SparseAdamW
from .sparse_linear import Entries, sparse_linear
from .weight_gradient import Product

__all__ = ["SparseGrad", "sparse_grad"]

DENSE_SHARE = 0.2
"""Selected share of a weight from which the dense product is faster: bench/results/sddmm_cpu.csv, 2 cores of an AMD
EPYC (Zen 3), 2026-11-24."""


def sparse_grad(model: nn.Module, optimizer: SparseAdamW) -> SparseGrad:
    """Makes linear layers compute only the selected entries of their weight gradients, dW = dY^T X.

    Covers nn.Linear and nn.MultiheadAttention. The forward pass, the gradients of inputs and selected biases, module
    classes and state_dict() stay as they are; weights and biases of these layers without selected elements get no
    gradient. `p.grad` of the weights is what SparseAdamW(release_grads=True) makes of it: a `SelectedGrad`.

    Everything else keeps its gradient: convolutions, embeddings, norms; weights used outside of these modules (one tied
    to an embedding gets the sum of both); subclasses with a forward of their own; parametrized and wholly selected
    weights, and those of which more than `DENSE_SHARE` is selected. The handle says which, and why. A weight with a
    hook of `register_hook` has a dense gradient as long as it has the hook, but for compiled graphs.

    Args:
        model: Changed in place: each module covered has a `forward` attribute, until `.remove()`. Copies and pickles
            of the model are plain.
        optimizer: A SparseAdamW with release_grads=True and a selection. Later selections are followed.

    Returns:
        A handle, and a context manager, with `.remove()`.

    Works with autocast, GradScaler, gradient accumulation, both kinds of activation checkpointing and torch.compile,
    whose graphs do not break at these layers; for several ranks see `SparseAdamW.all_reduce_grads`. Not supported:
    DistributedDataParallel and double backward, which raise; FullyShardedDataParallel, whose weights stay dense;
    torch.func; torch.autograd.grad of a weight covered, which then takes no part.

    Raises:
        TypeError: `optimizer` is no SparseAdamW.
        ValueError: It does not release gradients, or has not selected yet; no layer is covered; the model has sparse
            gradients already, or is a DistributedDataParallel.
        NotImplementedError: Its parameters are DTensors, as of fully_shard.

    Selected entries come out of a matrix product of the rows and columns that hold one, made a block of rows at a time,
    or from `saft_kernels.sddmm`: what takes less time on the device of the weight (on NVIDIA GPUs the product nearly
    always, on CPUs `sddmm`), chosen when the selection is made. Nothing waits for a GPU in training: CUDA graphs
    capture it. SAFT_BACKEND forces a backend for `sddmm`, the optimizer's `backend` does not.

    Precision: sums in fp32 (fp64 for fp64), not rounded to the dtype of the layer; products of fp32 factors as precise
    as torch's (TF32 where it is allowed). Determinism: that of torch's matrix product, or of `sddmm`.
    """
    return SparseGrad(model, optimizer)


class SparseGrad:
    """What `sparse_grad` changed, until `remove()`.

    Attributes:
        sparse: Names of the weights of which only selected entries of the gradient are computed, or none.
        dense: Name of every other weight of a linear layer -> why its gradient is dense.
        ways: Name of each sparse weight -> how its entries are computed.
    """

    def __init__(self, model: nn.Module, optimizer: SparseAdamW) -> None:
        buffer = _check_arguments(model, optimizer)
        self._buffer = weakref.ref(buffer)
        self._weights: dict[Tensor, _Weight] = {}
        self._kept: dict[str, str] = {}
        self._modules = self._find(model, optimizer)
        if not self._modules:
            raise ValueError(
                "`model`: expected an nn.Linear or nn.MultiheadAttention with weights of the optimizer, got none; use "
                "the optimizer without sparse_grad"
            )
        for module in self._modules:
            module.forward = _Forward(module, self._weights, self._buffer)
        self._update()
        buffer.observers.append(self._update)

    def _find(self, model: nn.Module, optimizer: SparseAdamW) -> list[nn.Module]:
        """The modules to change. Fills `_weights` and `_kept`."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        trained = {member.parameter for member in optimizer.members()}
        modules = []
        for prefix, module in model.named_modules():
            weights = _weights_and_biases(module)
            reason = _why_not(module) if weights else None
            for name, (weight, bias) in weights.items():
                if reason is None and weight in trained:
                    self._weights.setdefault(weight, _Weight(names[weight], weight, bias))
                else:
                    path = names.get(weight, f"{prefix}.{name}")
                    self._kept[path] = reason or "it is not a parameter of the optimizer"
            if any(weight in self._weights for weight, _ in weights.values()) and reason is None:
                modules.append(module)
        return modules

    @property
    def sparse(self) -> tuple[str, ...]:
        """See the class."""
        return tuple(weight.name for weight in self._weights.values() if weight.why_dense is None)

    @property
    def dense(self) -> dict[str, str]:
        """See the class."""
        mine = {w.name: w.why_dense for w in self._weights.values() if w.why_dense is not None}
        return {**mine, **self._kept}

    @property
    def ways(self) -> dict[str, str]:
        """See the class."""
        return {w.name: w.way for w in self._weights.values() if w.why_dense is None}

    def _update(self) -> None:
        for weight in self._weights.values():
            weight.update(self._buffer())

    def remove(self) -> None:
        """The layers compute dense gradients again."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules = []
        buffer = self._buffer()
        if buffer is not None and self._update in buffer.observers:
            buffer.observers.remove(self._update)

    def __enter__(self) -> SparseGrad:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


# ---- which layers ----


def _check_arguments(model: nn.Module, optimizer: SparseAdamW) -> GradientBuffer:
    if not isinstance(optimizer, SparseAdamW):
        raise TypeError(f"`optimizer`: expected a SparseAdamW, got {type(optimizer).__name__}; others step densely")
    if optimizer.released is None:
        raise ValueError(
            "`optimizer`: expected release_grads=True, got False; selected entries have no place in a dense p.grad"
        )
    remedy = "leave it out: with release_grads=True each gradient is freed as soon as backward has made it"
    refuse_split(optimizer.param_groups, "sparse_grad()", remedy)
    if optimizer.mask is None:
        raise ValueError(
            "`optimizer`: expected a selection, got none yet; pass a mask, or call sparse_grad after the first step()"
        )
    if isinstance(model, DistributedDataParallel):
        raise ValueError(f"`model`: expected a plain module, got {_DDP}")
    if any(isinstance(module.__dict__.get("forward"), _Forward) for module in model.modules()):
        raise ValueError("`model`: expected dense gradients, got sparse ones already; .remove() the handle you have")
    return optimizer.released


_DDP = (
    "DistributedDataParallel, which averages dense gradients only; without it, call optimizer.all_reduce_grads() "
    "between backward and step()"
)


def _weights_and_biases(module: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The weight matrices of an nn.Linear or nn.MultiheadAttention, without its out_proj, which is an nn.Linear."""
    if isinstance(module, nn.Linear):
        names, bias = ("weight",), module._parameters.get("bias")
    elif isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # type: ignore[assignment]
        bias = module._parameters.get("in_proj_bias")
    else:
        return {}
    return {name: (weight, bias) for name in names if (weight := module._parameters.get(name)) is not None}


def _why_not(module: nn.Module) -> str | None:
    """Why a module with linear weights keeps its forward; None: it can be changed."""
    base = nn.Linear if isinstance(module, nn.Linear) else nn.MultiheadAttention
    if type(module).forward is not base.forward:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__ and module.forward != types.MethodType(base.forward, module):
        return "something else has replaced the module's forward"
    return None


class _Weight:
    """A weight matrix, its selected entries, and the way from there to the optimizer."""

    def __init__(self, name: str, parameter: Tensor, bias: Tensor | None) -> None:
        self.name = name
        self.parameter = parameter
        self.bias = bias
        self.skip_bias = False  # nothing is selected of it
        self.why_dense: str | None = None
        self._selected: Selected | None = None  # what all below was made for
        self._indices: Tensor | None = None
        self.entries: Entries | None = None  # None: nothing is selected, or the gradient is dense
        self._ranges: dict[tuple[int, int], Entries | None] = {}

    def update(self, buffer: GradientBuffer | None) -> None:
        """Follows the selection."""
        if buffer is None:
            return
        self.skip_bias = self.bias is not None and self.bias in buffer and not buffer[self.bias].index.numel()
        parameter = self.parameter
        selected = buffer.get(parameter)
        if selected is not None and selected.index.device != parameter.device:  # the model has moved
            selected.index = selected.index.to(parameter.device)
        if selected is not None and selected is self._selected and selected.index is self._indices:
            return
        self._selected, self._indices, self.entries, self.why_dense = selected, None, None, None
        self._ranges.clear()
        if selected is None:
            self.why_dense = "it is wholly selected, or its selection is pending"
            return
        count = selected.index.numel()
        if count > DENSE_SHARE * parameter.numel():
            self.why_dense = f"{count / parameter.numel():.0%} of it is selected, and the dense product is faster"
            return
        self._indices = selected.index
        if count:
            deliver = _Delivery(parameter, selected, weakref.ref(buffer))
            self.entries = Entries.of(parameter, selected.index, deliver)

    @property
    def way(self) -> str:
        """How the entries are computed."""
        if self.entries is None:
            return "nothing is selected"
        return str(self.entries.compute) if isinstance(self.entries.compute, Product) else "sampled by sddmm"

    def rows(self, first: int, weight: Tensor) -> Entries | None:
        """The entries of a range of rows, `weight`, as those of a weight of its own; None where none is selected."""
        key = first, weight.shape[0]
        if self.entries is not None and key not in self._ranges:
            self._ranges[key] = self._of_range(first, weight)
        return self._ranges.get(key)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _of_range(self, first: int, weight: Tensor) -> Entries | None:
        assert self.entries is not None
        indices, (height, width) = self.entries.indices, weight.shape
        bounds = torch.tensor([first * width, (first + height) * width], device=indices.device)
        low, high = torch.searchsorted(indices, bounds.to(indices.dtype)).tolist()
        if low == high:
            return None
        deliver = replace(self.entries.deliver, around=(low, len(indices) - high))
        return Entries.of(weight, indices[low:high] - first * width, deliver)


@dataclass(frozen=True, eq=False)
class _Delivery:
    """Adds values of the entries of a parameter to the optimizer's buffer, with zeros before and after them."""

    parameter: Tensor
    selected: Selected
    buffer: weakref.ref[GradientBuffer]
    around: tuple[int, int] = (0, 0)

    def __call__(self, values: Tensor) -> None:
        """Adds values, (k,)."""
        if (buffer := self._buffer()) is not None:
            buffer.add(self.parameter, functional.pad(values, self.around) if any(self.around) else values)

    def product(self, compute: Callable[..., Tensor], dy: Tensor, x: Tensor) -> None:
        """Adds the entries of dy^T x. See `GradientBuffer.add_product`."""
        if any(self.around):
            self(compute(dy, x, None))
        elif (buffer := self._buffer()) is not None:
            buffer.add_product(self.parameter, compute, dy, x)

    def _buffer(self) -> GradientBuffer | None:
        buffer = self.buffer()
        if buffer is not None and buffer.get(self.parameter) is not self.selected:
            raise RuntimeError(
                "sparse_grad: expected one selection from forward to backward, got another in between; run forward "
                "again"
            )
        return buffer


# ---- the forward of a layer ----


class _Forward:
    """What a module's `forward` becomes. In copies and pickles of the module it is the class's again."""

    def __init__(
        self, module: nn.Module, weights: Mapping[Tensor, _Weight], buffer: weakref.ref[GradientBuffer]
    ) -> None:
        self._module = module
        self._buffer = buffer
        self._plain = types.MethodType(type(module).forward, module)
        mine = [weight for weight, _ in _weights_and_biases(module).values()]
        self._sparse: Callable[..., Any] = self._linear_module
        if isinstance(module, nn.MultiheadAttention):
            mine.append(module.out_proj.weight)
            self._sparse = types.MethodType(_with_linear(type(module).forward, self._linear), module)
        self._weights = [weights[weight] for weight in mine if weight in weights]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_paused(self._weights[0].parameter) or not torch.is_grad_enabled() or self._buffer() is None:
            return self._plain(*args, **kwargs)
        if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(f"sparse_grad: expected a plain module, got one inside {_DDP}")
        return self._sparse(*args, **kwargs)

    def _linear_module(self, input: Tensor) -> Tensor:
        parameters: dict[str, Any] = self._module._parameters
        return self._linear(input, parameters["weight"], parameters["bias"])

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear, for the weights of this module and for ranges of their rows, which attention projects with."""
        for known in self._weights:
            if weight is known.parameter or weight._base is known.parameter:
                break
        else:
            return functional.linear(input, weight, bias)
        if known.why_dense is not None or not weight.requires_grad:
            return functional.linear(input, weight, bias)
        entries = known.entries
        if entries is not None and entries.indices.device != weight.device:  # the model has moved
            known.update(self._buffer())
            entries = known.entries
        if weight is not known.parameter:
            first = int(weight.storage_offset() - known.parameter.storage_offset()) // max(1, weight.stride(0))
            entries = known.rows(first, weight)
        return sparse_linear(input, weight, bias, entries, known.skip_bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return types.MethodType(type(self._module).forward, memo[id(self._module)])

    def __reduce__(self) -> Any:
        return getattr, (self._module, "forward")  # of a module that does not have this attribute yet


def _with_linear(function: Any, linear: Callable[..., Tensor]) -> Any:
    """A copy of nn.MultiheadAttention.forward in which `linear` is called wherever it comes to F.linear."""
    projections = ("_in_projection", "_in_projection_packed")
    rebound = {name: _rebound(getattr(functional, name), linear=linear) for name in projections}
    attention = _rebound(functional.multi_head_attention_forward, linear=linear, **rebound)
    names = types.SimpleNamespace(**{**vars(functional), "multi_head_attention_forward": attention})
    return _rebound(function, F=names)


def _rebound(function: Any, **names: Any) -> Any:
    """A copy of a function for which some global names mean something else."""
    namespace = {**function.__globals__, **names}
    del namespace["__name__"]  # by which Dynamo would look up the original's
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
