"""Gradient release: the selected values leave a gradient the moment backward has made it, and the rest is freed.

A hook on every parameter replaces `p.grad` by a `SelectedGrad`, whose values are views of one flat buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..common.allocator import free_gradient, return_holes
from ..common.pause import is_paused
from ..ops.dtypes import opmath_dtype
from .members import Member
from .selected_grad import Selected, SelectedGrad, take


def selected_values(member: Member, buffer: GradientBuffer | None) -> Tensor:
    """See `SparseAdamW.selected_grad`; of a member whose selection is pending, all values of its gradient."""
    parameter, gradient, index = member.parameter, member.parameter.grad, member.counted
    if type(gradient) is SelectedGrad:
        return gradient.selected.values
    if gradient is None:
        if buffer is not None and parameter in buffer:
            return buffer[parameter].values.zero_()
        numel = parameter.numel() if index is None else index.numel()
        return torch.zeros(numel, dtype=parameter.dtype, device=parameter.device)
    return gradient.detach().reshape(-1) if index is None else take(gradient, index.to(gradient.device))


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
        self._left_holes = False  # dense gradients may have, in the heap
        self.observers: list[Callable[[], None]] = []  # called when the selection may have changed
        weakref.finalize(self, _remove, self._hooks)

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._selected

    def __getitem__(self, parameter: Tensor) -> Selected:
        return self._selected[parameter]

    def get(self, parameter: Tensor) -> Selected | None:
        """What is released of a parameter; None: its gradient stays dense. Another object after each selection."""
        return self._selected.get(parameter)

    def update(self, members: Sequence[Member], awaits_first_step: bool) -> None:
        """Follows the optimizer: its parameters, and what is selected of them. Keeps what stays the same."""
        self._awaits_first_step = awaits_first_step
        before, self._selected = self._selected, {}
        fresh: list[tuple[Member, Tensor]] = []
        for member in members:
            if (index := member.counted) is None:
                continue
            selected = before.get(member.parameter)
            if selected is not None and selected.is_of(member):
                selected.index = index
                self._selected[member.parameter] = selected
            else:
                fresh.append((member, index))
        self._allocate(fresh)
        self._left_holes |= any(member.parameter.device.type == "cpu" for member, _ in fresh)
        self._gradients = {p: g for p, g in self._gradients.items() if self._selected.get(p) is g.selected}
        self._hook([member.parameter for member in members])
        for observer in self.observers:
            observer()

    def _allocate(self, members: Iterable[tuple[Member, Tensor]]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Member, Tensor]]] = {}
        for member, index in members:
            parameter = member.parameter
            kinds.setdefault((parameter.device, opmath_dtype(parameter.dtype)), []).append((member, index))
        for (device, dtype), alike in kinds.items():
            counts = [index.numel() for _, index in alike]
            parts = torch.zeros(sum(counts), dtype=dtype, device=device).split(counts)
            for (member, index), values in zip(alike, parts, strict=True):
                self._selected[member.parameter] = Selected(member, member.version, index, values)

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
        del gradient  # whose memory is returned only if nobody holds it
        free_gradient(parameter)
        if self._left_holes:
            self._left_holes = False
            return_holes()
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
            total = selected.take(gradient) + values.to(gradient.dtype)
            ops.scatter_([gradient.detach()], [selected.index], [total])

    def _gradient(self, parameter: Tensor, selected: Selected) -> SelectedGrad:
        gradient = self._gradients.get(parameter)
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype  # torch 2.10: what p.grad has to be
        if gradient is None or gradient.dtype != dtype or gradient.device != parameter.device:
            gradient = self._gradients[parameter] = SelectedGrad(parameter, selected, dtype)
        return gradient


def _releasing(buffer: GradientBuffer) -> Callable[[Tensor], None]:
    reference = weakref.ref(buffer)

    def release(parameter: Tensor) -> None:
        if (buffer := reference()) is not None and not is_paused(parameter):
            buffer.release(parameter)

    return release


def _remove(hooks: dict[Tensor, RemovableHandle]) -> None:
    for handle in hooks.values():
        handle.remove()
