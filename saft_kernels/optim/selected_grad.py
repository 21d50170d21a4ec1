"""`SelectedGrad`: a gradient of which only the selected values exist.

It is a tensor of the parameter's shape and dtype with no memory of its own but the k_p selected values, in fp32, which
are views of a flat buffer. Because it stands in `p.grad`, all that loops do to gradients goes on working: accumulation
over backward passes, `zero_grad()` of the optimizer or of the model, `torch.nn.utils.clip_grad_norm_`,
torch.amp.GradScaler. An operation it does not know raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from ..common.names import short
from ..selection.gradients import check_dense
from .members import Member, check_range, same_index

# by their names in ATen
_IN_PLACE = {"add_", "sub_", "mul_", "div_", "neg_", "zero_", "copy_", "clamp_", "clamp_min_", "clamp_max_"}
_IN_PLACE |= {"_foreach_mul_", "_foreach_div_", "_foreach_zero_", "_foreach_clamp_min_", "_foreach_clamp_max_"}
_IN_PLACE |= {"_amp_foreach_non_finite_check_and_unscale_"}
_REDUCTIONS = {"norm", "linalg_vector_norm", "_foreach_norm", "sum", "any", "count_nonzero"}


class Queue(Protocol):
    """See `optim/release.py`."""

    def put(self, selected: Selected, gradients: list[Tensor], /) -> None:
        """Takes the gradient out of a list of one."""

    def settle(self) -> None:
        """Takes the values of all that wait."""


@dataclass(slots=True, eq=False)
class Selected:
    """The selected values of one parameter's gradient, as of one selection.

    Attributes:
        index: (k_p,) flat positions.
        stored: (k_p,) values, as far as they have been taken.
        gradient: What stands in `p.grad` for them; None: not made yet.
        queue: Where gradients wait for their values to be taken together; None: they do not.
        is_waiting: Whether this one does.
    """

    member: Member
    version: int
    index: Tensor
    stored: Tensor
    gradient: SelectedGrad | None = None
    queue: Queue | None = None
    is_waiting: bool = False

    @property
    def values(self) -> Tensor:
        """(k_p,) the values."""
        if self.is_waiting and self.queue is not None:
            self.queue.settle()
        return self.stored

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follows a model to another device or dtype. The values are then undefined."""
        self.index = self.index.to(device)
        if (self.stored.device, self.stored.dtype) != (device, dtype):
            self.stored = torch.empty_like(self.stored, device=device, dtype=dtype)

    def is_of(self, member: Member) -> bool:
        """Whether the values are of what is selected of this member now."""
        return self.member is member and self.version == member.version

    def take(self, dense: Tensor) -> Tensor:
        """The selected values of a tensor of the parameter's shape, in its dtype."""
        if self.index.device != dense.device:  # a model may have moved to its device after the mask was bound
            self.index = self.index.to(dense.device)
        try:
            return take(dense, self.index)
        except (IndexError, RuntimeError):
            check_range(self.member)
            raise


def take(dense: Tensor, index: Tensor) -> Tensor:
    """The values of a tensor at flat positions, in its dtype."""
    # 5 us; ops.gather would check the indices in every backward pass, for which a GPU would have to wait
    return dense.detach().reshape(-1).index_select(0, index)


class SelectedGrad(Tensor):
    """A gradient of which only the selected values exist. As a tensor it is zero elsewhere."""

    selected: Selected

    # results of operations are plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, selected: Selected, dtype: torch.dtype | None = None) -> SelectedGrad:
        """Of the shape, strides and device of `like`, and of its dtype where `dtype` is None."""
        self: SelectedGrad = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=like.device
        )
        self.selected = selected
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        values = self.selected.values
        return f"SelectedGrad({values.numel()} values of shape {tuple(self.shape)}: {values})"

    @property
    def data(self) -> Tensor:
        """The gradient itself, as for other tensors; what is assigned to it is copied to the selected values."""
        return SelectedGrad(self, self.selected)

    @data.setter
    def data(self, value: Tensor) -> None:
        values = self.selected.values
        if isinstance(value, SelectedGrad) and value.selected.index is self.selected.index:
            value = value.selected.values
        elif type(value) is not SelectedGrad and value.shape == self.shape:
            value = self.selected.take(value)
        elif type(value) is SelectedGrad or value.shape != values.shape:
            raise RuntimeError(
                f"gradient under release_grads=True: expected `.data` of shape {tuple(self.shape)}, or "
                f"{tuple(values.shape)} for the selected values alone, got {tuple(value.shape)}; write to "
                "optimizer.selected_grad(p), a plain tensor of them"
            )
        with torch.no_grad():
            values.copy_(value)

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
            moved = ", or zero_grad() before the model is moved or converted" if op == "_to_copy" else ""
            parallel = ", and optimizer.all_reduce_grads() in place of DistributedDataParallel" if is_parallel else ""
            # not a TypeError: in p.grad + x, Python would replace it by one that says nothing
            raise RuntimeError(
                f"gradient under release_grads=True: expected an operation on its selected values, got {op}; use "
                f"optimizer.selected_grad(p), a plain tensor of them{moved}{parallel}"
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
    """The values of what is operated on: a gradient, or a list of gradients, where dense ones may be among them."""
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
    if isinstance(arg, Tensor) and isinstance(first, SelectedGrad):
        if arg.shape == first.shape:
            return first.selected.take(arg)
        if arg.numel() != 1:
            raise _UnsupportedError
    return arg


def of_another_selection(name: str) -> ValueError:
    """The error for values that were gathered before the selection changed."""
    return ValueError(
        f"gradient of {name!r}: expected the values that are selected now, got those of another selection or "
        "optimizer; call zero_grad() after what changed the selection, and run backward again"
    )


def step_gradient(member: Member, gradient: Tensor) -> Tensor:
    """What a step takes: a dense gradient as it is, the values of a released one.

    Raises:
        ValueError: They were gathered for another selection; a dense gradient is not one of this parameter.
    """
    if type(gradient) is not SelectedGrad:
        _check_form(member, gradient)
        return gradient.resolve_neg()
    if not gradient.selected.is_of(member) and not same_index(gradient.selected.index, member.index):
        raise of_another_selection(member.name)
    return gradient.selected.values


def _check_form(member: Member, gradient: Tensor) -> None:
    """Assignment to `p.grad` checks its form, but `p.grad.data = other` does not."""
    parameter = member.local
    fits = gradient.dtype == parameter.dtype or (parameter.itemsize == 2 and gradient.dtype == torch.float32)
    if gradient.shape != parameter.shape or gradient.device != parameter.device or not fits:
        raise ValueError(
            f"gradient of {member.name!r}: expected {short(parameter.dtype)} of shape {tuple(parameter.shape)} on "
            f"{parameter.device}, got {short(gradient.dtype)} of shape {tuple(gradient.shape)} on {gradient.device}; "
            "call zero_grad(), and run backward again"
        )


def check_selectable(member: Member) -> None:
    """Raises for a gradient that selection cannot use."""
    gradient = member.gradient
    if gradient is not None and type(gradient) is not SelectedGrad:
        check_dense(member.name, gradient)
        _check_form(member, gradient)
    if type(gradient) is SelectedGrad:
        raise ValueError(
            f"gradient of {member.name!r} at selection: expected all of it, got its selected values; call reselect() "
            "after step() and zero_grad(), before the next backward pass"
        )
