"""Gradient release: the selected values leave a gradient as soon as backward has made it, and the rest is freed.

A hook on every parameter replaces `p.grad` by a `SelectedGrad`, whose values are views of one flat buffer. On a GPU,
where a launch costs more than the values of most gradients, they wait until there are enough of them for one launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..common.allocator import SMALLEST_FREED, free, free_gradient, return_holes
from ..common.pause import is_paused
from ..ops.dtypes import opmath_dtype
from ..selection.parts import as_distributed, is_distributed, local, local_gradient
from .members import Member, check_range
from .selected_grad import Selected, SelectedGrad, take


def selected_values(member: Member, buffer: GradientBuffer | None) -> Tensor:
    """See `SparseAdamW.selected_grad`; of a member whose selection is pending, all values of its gradient."""
    parameter, gradient, index = member.parameter, member.gradient, member.counted
    if type(gradient) is SelectedGrad:
        return gradient.selected.values
    if gradient is None:
        if buffer is not None and parameter in buffer:
            return buffer[parameter].values.zero_()
        numel = member.local.numel() if index is None else index.numel()
        return torch.zeros(numel, dtype=parameter.dtype, device=parameter.device)
    return gradient.detach().reshape(-1) if index is None else take(gradient, index.to(gradient.device))


_MOST_WAITING = {"cuda": 32 << 20}
"""Bytes of gradients that wait on a kind of device for their values to be taken together. Elsewhere, none do."""


class _Queue:
    """Gradients of one device that wait until they are many, one of them is read, or backward is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._selected: list[Selected] = []
        self._gradients: list[Tensor] = []
        self._num_bytes = 0
        self._largest = 0  # bytes of a gradient, so far
        self._limit = 0
        self._backward = -1  # the pass at whose end the queue is settled
        self._stream: torch.cuda.Stream | None = None  # that the gradients are made on

    def put(self, selected: Selected, gradients: list[Tensor]) -> None:
        """Takes the gradient out of a list of one."""
        num_bytes = gradients[0].nbytes
        self._largest = max(self._largest, num_bytes)
        if self._device.type == "cuda" and not self._is_on_stream():
            self.settle()
        if not self._gradients:
            self._start()
        self._num_bytes += num_bytes
        self._selected.append(selected)
        self._gradients.append(gradients.pop())
        backward = torch._C._current_graph_task_id()
        if backward < 0 or self._num_bytes >= self._limit:
            self.settle()
            return
        selected.is_waiting = True
        if backward != self._backward:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.settle)

    def settle(self) -> None:
        """Takes the values of all."""
        all_selected, self._selected = self._selected, []
        gradients, self._gradients = self._gradients, []
        self._num_bytes = 0
        for selected in all_selected:
            selected.is_waiting = False
        if not gradients:
            return
        if self._stream is None or self._is_on_stream():
            _take(all_selected, gradients)
        else:
            with torch.cuda.stream(self._stream):
                _take(all_selected, gradients)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _start(self) -> None:
        self._limit = min(self._largest, _MOST_WAITING[self._device.type])
        if self._device.type == "cuda":
            self._stream = torch.cuda.current_stream(self._device)
            if torch.cuda.is_current_stream_capturing():
                self._limit = 0  # a graph has no host to spare, and its tables would have to live as long as it

    def _is_on_stream(self) -> bool:
        now: int = torch._C._cuda_getCurrentRawStream(self._device.index)
        return self._stream is not None and now == self._stream.cuda_stream


def _take(all_selected: Sequence[Selected], gradients: Sequence[Tensor]) -> None:
    """Writes the selected values of each gradient to where they are stored."""
    if len(gradients) == 1:
        _take_one(all_selected[0], gradients[0])
        return
    try:
        _take_many(all_selected, gradients)
    except (IndexError, RuntimeError):
        for selected in all_selected:
            check_range(selected.member)
        raise


def _take_one(selected: Selected, gradient: Tensor) -> None:
    flat = gradient.detach() if gradient.requires_grad else gradient
    flat = flat if flat.dim() == 1 else flat.ravel()
    try:
        if gradient.dtype is selected.stored.dtype:
            torch.index_select(flat, 0, selected.index, out=selected.stored)
        else:
            selected.stored.copy_(flat.index_select(0, selected.index))
    except (IndexError, RuntimeError):
        check_range(selected.member)
        raise


def _take_many(all_selected: Sequence[Selected], gradients: Sequence[Tensor]) -> None:
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, gradient in enumerate(gradients):
        by_dtype.setdefault(gradient.dtype, []).append(i)
    for dtype, alike in by_dtype.items():
        stored = [all_selected[i].stored for i in alike]
        is_exact = all(values.dtype == dtype for values in stored)
        values = stored if is_exact else [torch.empty_like(v, dtype=dtype) for v in stored]
        dense = [gradients[i].detach().resolve_neg() for i in alike]
        ops.unchecked_gather_(dense, [all_selected[i].index for i in alike], values)
        if not is_exact:
            torch._foreach_copy_(stored, values)


_buffers: weakref.WeakSet[GradientBuffer] = weakref.WeakSet()


class GradientBuffer:
    """The selected values of all gradients, in one flat tensor per device and dtype, and the hooks that fill it.

    Parameters that are wholly selected, or whose selection is pending, keep their dense gradient. The hooks hold the
    buffer weakly, and go with it.
    """

    def __init__(self) -> None:
        self._selected: dict[Tensor, Selected] = {}
        self._queues: dict[torch.device, _Queue] = {}
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self.saw_nonzero = False  # in a gradient, selected or not, since zero gradients do not make a first step
        self._awaits_first_step = True
        self._left_holes = False  # dense gradients may have, in the heap
        self.observers: list[Callable[[], None]] = []  # called when the selection may have changed
        self._taken: dict[Tensor, weakref.ref[object]] = {}  # parameters that another optimizer has taken over
        weakref.finalize(self, _remove, self._hooks)
        _buffers.add(self)

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._selected

    def __getitem__(self, parameter: Tensor) -> Selected:
        return self._selected[parameter]

    @property
    def is_disturbed(self) -> bool:
        """Whether another optimizer has taken over gradients since."""
        return bool(self._taken)

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
        selected, gradient = self._selected.get(parameter), local_gradient(parameter)
        if selected is None or gradient is None or type(gradient) is SelectedGrad:
            return
        if gradient.layout is not torch.strided or (self._taken and self._is_taken(parameter)):
            return
        if self._awaits_first_step and not self.saw_nonzero:
            self.saw_nonzero = bool(gradient.any())
        if self._left_holes:
            self._left_holes = False
            return_holes()
        if not selected.stored.numel() and not is_distributed(parameter):  # else other ranks may have some
            del gradient
            free_gradient(parameter)
            return
        self._put(parameter, selected)
        if (queue := selected.queue) is not None:
            queue.put(selected, [gradient])
            return
        _take_one(selected, gradient)
        if gradient.nbytes >= SMALLEST_FREED:
            gradients = [gradient]
            del gradient  # whose memory is returned only if nobody holds it
            free(gradients)

    def _put(self, parameter: Tensor, selected: Selected) -> None:
        """Makes `p.grad` the gradient of the selected values."""
        if is_distributed(parameter):
            parameter.grad = as_distributed(self._gradient(parameter, selected), parameter)
            return
        if selected.gradient is not None:
            try:
                parameter.grad = selected.gradient  # torch compares device and dtype faster than we can
                return
            except (RuntimeError, TypeError):
                pass
        parameter.grad = self._gradient(parameter, selected)

    def _is_taken(self, parameter: Tensor) -> bool:
        by = self._taken.get(parameter)
        if by is not None and by() is None:
            del self._taken[parameter]
        return parameter in self._taken

    def settle(self) -> None:
        """Takes all values, which backward leaves to do only when it fails."""
        for queue in self._queues.values():
            queue.settle()

    def add(self, parameter: Tensor, values: Tensor) -> None:
        """Adds to the gradient of a parameter, as a backward pass would.

        Args:
            parameter: One of those in the buffer, with selected elements.
            values: (k_p,), any floating dtype, in the order of the parameter's indices.
        """
        selected, gradient = self._selected[parameter], parameter.grad
        if gradient is None:
            replacement = self._gradient(parameter, selected)
            selected.stored.copy_(values.detach())
            parameter.grad = replacement
        elif type(gradient) is SelectedGrad:
            gradient.selected.values.add_(values.detach())
        else:
            total = selected.take(gradient) + values.detach().to(gradient.dtype)
            ops.scatter_([gradient.detach()], [selected.index], [total])

    def add_product(self, parameter: Tensor, compute: Callable[..., Tensor], dy: Tensor, x: Tensor) -> None:
        """Adds the selected entries of dy^T x; where nothing is there yet, they are written to their place at once.

        Args:
            parameter: As of `add`; a matrix.
            compute: Takes dy, x, and where to write (k_p,) values, or None for a new tensor, which it returns.
            dy: (T, N_out).
            x: (T, N_in).
        """
        if parameter.grad is not None:
            self.add(parameter, compute(dy, x, None))
            return
        selected = self._selected[parameter]
        try:
            self._put(parameter, selected)
            stored = selected.stored
            if stored.dtype is opmath_dtype(dy.dtype):
                compute(dy, x, stored)
            else:
                stored.copy_(compute(dy, x, None))
        except BaseException:
            parameter.grad = None  # there was none, and there is none
            raise

    def _gradient(self, parameter: Tensor, selected: Selected) -> SelectedGrad:
        """What stands in `p.grad`. Follows a parameter to another device or dtype."""
        gradient = selected.gradient
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype  # torch 2.10: what p.grad has to be
        if gradient is None or gradient.dtype is not dtype or gradient.device != parameter.device:
            selected.move(parameter.device, opmath_dtype(parameter.dtype))
            if parameter.device.type in _MOST_WAITING and not is_distributed(parameter):
                selected.queue = self._queues.setdefault(parameter.device, _Queue(parameter.device))
            else:
                selected.queue = None
            gradient = selected.gradient = SelectedGrad(local(parameter), selected, dtype)
        return gradient


def take_over(parameters: Iterable[Tensor], optimizer: object, own: GradientBuffer | None) -> None:
    """Makes gradients those of one optimizer: as long as it lives, the others that have these parameters release none.

    One that was replaced may live on, in a scheduler, and would release what it has selected.

    Args:
        parameters: Its.
        optimizer: Which is built, or steps.
        own: Its buffer.
    """
    parameters = list(parameters)
    for buffer in [*_buffers]:
        if buffer is own:
            buffer._taken.clear()
        else:
            buffer._taken.update({p: weakref.ref(optimizer) for p in parameters if p in buffer._hooks})


def _releasing(buffer: GradientBuffer) -> Callable[[Tensor], None]:
    reference = weakref.ref(buffer)

    def release(parameter: Tensor) -> None:
        if (buffer := reference()) is not None and not is_paused(parameter):
            buffer.release(parameter)

    return release


def _remove(hooks: dict[Tensor, RemovableHandle]) -> None:
    for handle in hooks.values():
        handle.remove()
