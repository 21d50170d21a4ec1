"""Gradient release: the selected values leave a gradient the moment backward has made it, and the rest is freed.

A hook on every parameter replaces `p.grad` by a `SelectedGrad`: a tensor of the parameter's shape and dtype with no
memory of its own but the k_p selected values, in fp32, which are views of a flat buffer. Because it stands in `p.grad`,
all that loops do to gradients goes on working: accumulation over backward passes, `zero_grad()` of the optimizer or
of the model, `torch.nn.utils.clip_grad_norm_`, torch.amp.GradScaler. An operation it does not know raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils.hooks import RemovableHandle

from ..common.pause import _pauses
from ..ops.dtypes import opmath_dtype
from .budgets import places
from .state import State, same_index

if TYPE_CHECKING:
    from .sparse_adamw import SparseAdamW

# by their names in ATen
_IN_PLACE = {"add_", "sub_", "mul_", "div_", "neg_", "zero_", "copy_", "clamp_", "clamp_min_", "clamp_max_"}
_IN_PLACE |= {"_foreach_mul_", "_foreach_div_", "_foreach_zero_", "_foreach_clamp_min_", "_foreach_clamp_max_"}
_IN_PLACE |= {"_amp_foreach_non_finite_check_and_unscale_"}
_REDUCTIONS = {"norm", "linalg_vector_norm", "_foreach_norm", "sum", "any", "count_nonzero"}


@dataclass(slots=True, eq=False)
class Selected:
    """What is selected of one parameter, and its place in the buffer: both (k_p,)."""

    index: Tensor
    values: Tensor

    def take(self, dense: Tensor) -> Tensor:
        """The selected values of a tensor of the parameter's shape, in its dtype."""
        if self.index.device != dense.device:  # a model may have moved to its device after the mask was bound
            self.index = self.index.to(dense.device)
        # 5 us; ops.gather would check the indices in every backward pass, for which a GPU would have to wait
        return dense.detach().reshape(-1).index_select(0, self.index)


class SelectedGrad(Tensor):
    """A gradient of which only the selected values exist. As a tensor it is zero elsewhere."""

    selected: Selected

    # results of operations are plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, selected: Selected) -> SelectedGrad:
        """Of the shape, strides, dtype and device of `like`."""
        self: SelectedGrad = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        self.selected = selected
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        values = self.selected.values
        return f"SelectedGrad({values.numel()} values of shape {tuple(self.shape)}: {values})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = func.overloadpacket.__name__
        first = args[0]
        if op in ("detach", "alias") and isinstance(first, SelectedGrad):
            return SelectedGrad(first, first.selected)
        try:
            if op not in _IN_PLACE | _REDUCTIONS or (op in _REDUCTIONS and _is_partial(func, args, kwargs or {})):
                raise _UnsupportedError
            # a result that is written to something plain would be k_p numbers in the place of a whole gradient
            operands = [_values(first), *(_plain(arg, first) for arg in args[1:])]
        except _UnsupportedError:
            is_parallel = distributed.is_available() and distributed.is_initialized()
            parallel = ", and optimizer.all_reduce_grads() in place of DistributedDataParallel" if is_parallel else ""
            # not a TypeError: in p.grad + x, Python would replace it by one that says nothing
            raise RuntimeError(
                f"gradient under release_grads=True: expected an operation on its selected values, got {op}; use "
                f"optimizer.selected_grad(p), a plain tensor of them{parallel}"
            ) from None
        result = func(*operands, **(kwargs or {}))
        return first if isinstance(result, Tensor) and op in _IN_PLACE else result


class _UnsupportedError(Exception):
    pass


def _is_partial(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a reduction is along a dimension: the selected values have but one."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given.get("dim") not in (None, []) or bool(given.get("keepdim"))


def _values(first: Any) -> Any:
    """Of what is operated on: a gradient, or a list of gradients, where dense ones may be among them."""
    if isinstance(first, SelectedGrad):
        return first.selected.values
    if isinstance(first, (list, tuple)):
        return [item.selected.values if isinstance(item, SelectedGrad) else item for item in first]
    raise _UnsupportedError


def _plain(arg: Any, first: Any) -> Any:
    """An operand for the selected values of `first`: of a whole tensor, the values at their places."""
    if isinstance(arg, (list, tuple)) and any(isinstance(item, Tensor) for item in arg):
        return [_plain(item, other) for item, other in zip(arg, first, strict=True)]
    if isinstance(arg, SelectedGrad):
        if isinstance(first, SelectedGrad) and first.selected.index is arg.selected.index:
            return arg.selected.values
        raise _UnsupportedError
    if isinstance(arg, Tensor) and isinstance(first, SelectedGrad) and arg.numel() != 1:
        if arg.shape == first.shape:
            return first.selected.take(arg)
        raise _UnsupportedError
    return arg


def selected_values(parameter: Tensor, index: Tensor | None, buffer: GradientBuffer | None) -> Tensor:
    """See `SparseAdamW.selected_grad`."""
    gradient = parameter.grad
    if type(gradient) is SelectedGrad:
        return gradient.selected.values
    if gradient is None:
        if buffer is not None and parameter in buffer:
            return buffer[parameter].values.zero_()
        numel = parameter.numel() if index is None else index.numel()
        return torch.zeros(numel, dtype=parameter.dtype, device=parameter.device)
    return gradient.detach().reshape(-1) if index is None else Selected(index, gradient).take(gradient)


def step_gradient(name: str, gradient: Tensor, state: State) -> Tensor:
    """What a step takes: a dense gradient as it is, the values of a released one.

    Raises:
        ValueError: They were gathered for another selection.
    """
    if type(gradient) is not SelectedGrad:
        return gradient.resolve_neg()
    if gradient.selected.index is not state.get("indices"):
        raise of_another_selection(name)
    return gradient.selected.values


def of_another_selection(name: str) -> ValueError:
    """The error for values that were gathered before the selection changed."""
    return ValueError(
        f"gradient of {name!r}: expected the values that are selected now, got those of another selection or "
        "optimizer; call zero_grad() after what changed the selection, and run backward again"
    )


def check_not_released(name: str, gradient: Tensor | None) -> None:
    """Raises ValueError for a gradient that selection cannot use."""
    if type(gradient) is SelectedGrad:
        raise ValueError(
            f"gradient of {name!r} at selection: expected all of it, got its selected values; call reselect() after "
            "step() and zero_grad(), before the next backward pass"
        )


class GradientBuffer:
    """The selected values of all gradients, in one flat tensor per device and dtype, and the hooks that fill it.

    Parameters that are wholly selected, or whose selection is pending, keep their dense gradient. The hooks hold the
    buffer weakly, and go with it.
    """

    def __init__(self) -> None:
        self._selected: dict[Tensor, Selected] = {}
        self._gradients: dict[Tensor, SelectedGrad] = {}  # made once
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self.saw_nonzero = False  # in a gradient, selected or not, since zero gradients do not make a first step
        self._awaits_first_step = True
        self.observers: list[Callable[[], None]] = []  # called when the selection may have changed
        weakref.finalize(self, _remove, self._hooks)

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._selected

    def __getitem__(self, parameter: Tensor) -> Selected:
        return self._selected[parameter]

    def update(self, optimizer: SparseAdamW) -> None:
        """Follows the optimizer: its parameters, and what is selected of them. Keeps what stays the same."""
        self._awaits_first_step = not any(optimizer.state.values())
        before, self._selected = self._selected, {}
        fresh: list[tuple[Tensor, Tensor]] = []
        for position, _, parameter in places(optimizer.param_groups):
            index = optimizer._index(position, parameter)
            if index is None or optimizer.param_groups[position[0]]["num_candidates"] is None:
                continue
            selected = before.get(parameter)
            if selected is not None and same_index(selected.index, index):
                selected.index = index
                self._selected[parameter] = selected
            else:
                fresh.append((parameter, index))
        self._allocate(fresh)
        self._gradients = {p: g for p, g in self._gradients.items() if self._selected.get(p) is g.selected}
        self._hook([p for group in optimizer.param_groups for p in group["params"]])
        for observer in self.observers:
            observer()

    def _allocate(self, members: Iterable[tuple[Tensor, Tensor]]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for parameter, index in members:
            kinds.setdefault((parameter.device, opmath_dtype(parameter.dtype)), []).append((parameter, index))
        for (device, dtype), alike in kinds.items():
            counts = [index.numel() for _, index in alike]
            parts = torch.zeros(sum(counts), dtype=dtype, device=device).split(counts)
            for (parameter, index), values in zip(alike, parts, strict=True):
                self._selected[parameter] = Selected(index, values)

    def _hook(self, parameters: Sequence[Tensor]) -> None:
        gone = self._hooks.keys() - set(parameters)
        for parameter in gone:
            self._hooks.pop(parameter).remove()
        hook = _releasing(self)
        for parameter in parameters:
            if parameter not in self._hooks:
                # frozen ones, too: they may be thawed; torch takes hooks only where a gradient is required
                requires_grad = parameter.requires_grad
                parameter.requires_grad_(True)
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(hook)
                parameter.requires_grad_(requires_grad)

    def release(self, parameter: Tensor) -> None:
        """Takes the selected values out of `parameter.grad` and frees it; a dense one is then a SelectedGrad."""
        selected, gradient = self._selected.get(parameter), parameter.grad
        if selected is None or gradient is None or type(gradient) is SelectedGrad or gradient.layout != torch.strided:
            return
        if self._awaits_first_step and not self.saw_nonzero:
            self.saw_nonzero = bool(gradient.any())
        values = selected.take(gradient) if selected.index.numel() else None
        del gradient
        parameter.grad = None
        if values is not None:
            self.add(parameter, values)

    def add(self, parameter: Tensor, values: Tensor) -> None:
        """Adds to the gradient of a parameter, as a backward pass would.

        Args:
            parameter: One of those in the buffer, with selected elements.
            values: (k_p,), any floating dtype, in the order of the parameter's indices.
        """
        selected, gradient, values = self._selected[parameter], parameter.grad, values.detach()
        if gradient is None:
            dtype = opmath_dtype(parameter.dtype)
            if (selected.values.device, selected.values.dtype) != (values.device, dtype):  # the model has moved
                selected.values = torch.empty_like(values, dtype=dtype)
            selected.values.copy_(values)
            parameter.grad = self._gradient(parameter, selected)
        elif type(gradient) is SelectedGrad:
            gradient.selected.values.add_(values)
        else:
            index = selected.index.to(gradient.device, torch.int64)
            gradient.detach().put_(index, values.to(gradient.dtype), accumulate=True)

    def _gradient(self, parameter: Tensor, selected: Selected) -> SelectedGrad:
        gradient = self._gradients.get(parameter)
        if gradient is None or gradient.dtype != parameter.dtype or gradient.device != parameter.device:
            gradient = self._gradients[parameter] = SelectedGrad(parameter, selected)
        return gradient


def _releasing(buffer: GradientBuffer) -> Callable[[Tensor], None]:
    reference = weakref.ref(buffer)

    def release(parameter: Tensor) -> None:
        if (buffer := reference()) is not None and not _pauses:
            buffer.release(parameter)

    return release


def _remove(hooks: dict[Tensor, RemovableHandle]) -> None:
    for handle in hooks.values():
        handle.remove()
