"""What the tensors of a step have to be: the one check, for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.names import short
from . import checks
from .adamw import AdamWSegment, StalePlan, same_memory_order
from .tables import Words
from .walk import PointerColumn


class Forms:
    """The sizes, dtypes and devices that a plan was made for, and the check of what a step is about to read."""

    def __init__(self, segments: Sequence[AdamWSegment]) -> None:
        self._segments = list(segments)
        self._names = [s.name for s in segments]
        self._made_for = [(s.param.numel(), s.param.dtype, s.param.device) for s in segments]

    def check(self, grads: Sequence[Tensor]) -> list[bool]:
        """Whether each gradient has the selected values alone, once all tensors are what the step may read.

        Raises StalePlan and ValueError.
        """
        are_compact = []
        for i, (segment, made_for, grad) in enumerate(zip(self._segments, self._made_for, grads, strict=True)):
            param, exp_avg = segment.param, segment.exp_avg
            if (param.numel(), param.dtype, param.device) != made_for:
                numel, dtype, device = made_for
                raise StalePlan(
                    f"{self._param(i)}: expected {numel} elements of {short(dtype)} on {device}, for which the step "
                    f"was prepared, got {param.numel()} of {short(param.dtype)} on {param.device}; prepare another step"
                )
            compact = grad.shape != param.shape
            if compact and not (segment.takes_compact and grad.shape == (segment.count,)):
                raise ValueError(
                    f"{self._grad(i)}: expected shape {tuple(param.shape)}"
                    + f", or ({segment.count},) for the selected values alone" * segment.takes_compact
                    + f", got {tuple(grad.shape)}; pass the gradient of this parameter"
                )
            if grad.dtype != param.dtype and not (param.itemsize == 2 and grad.dtype == torch.float32):
                raise ValueError(
                    f"{self._grad(i)}: expected {short(param.dtype)} like {self._param(i)}, got {short(grad.dtype)}; "
                    "convert it first"
                )
            if grad.device != param.device:
                raise ValueError(
                    f"{self._grad(i)}: expected device {param.device} like {self._param(i)}, got {grad.device}; move "
                    "the model before building the optimizer"
                )
            # a walk over memory: both have to be laid out alike
            if segment.indices is None and not exp_avg.is_contiguous() and not same_memory_order(param, exp_avg):
                raise ValueError(
                    f"`exp_avgs[{i}]`: expected the strides of a wholly selected parameter, {param.stride()}, or "
                    f"contiguous, got {exp_avg.stride()}; lay the state out like the parameter"
                )
            are_compact.append(compact)
        params = [s.param for s in self._segments]
        checks.all_in_memory(self._grad, grads)
        checks.all_in_memory(self._param, params)
        checks.no_overlap(self._param, params)
        return are_compact

    def out_of_range(self, i: int) -> IndexError:
        """The error for a segment whose indices are no positions in its parameter."""
        segment, name = self._segments[i], self._names[i]
        assert segment.indices is not None
        label = f"state of {name!r}: indices" if name else f"`indices[{i}]`"
        return checks.out_of_range(label, segment.indices, segment.param.numel(), self._param(i))

    def _grad(self, i: int) -> str:
        return f"gradient of {self._names[i]!r}" if self._names[i] else f"`grads[{i}]`"

    def _param(self, i: int) -> str:
        return f"parameter {self._names[i]!r}" if self._names[i] else f"`params[{i}]`"


_LOWEST_ADDRESS = 2**16  # torch says 0 for what was freed, and the offset of a view of it; nothing is mapped below


class Follower:
    """Two columns of a table that follow parameters and gradients from step to step.

    What else of them a plan writes down has to be written again only when `follow` says so.
    """

    def __init__(self, segments: Sequence[AdamWSegment], params: Words, grads: Words) -> None:
        self._forms = Forms(segments)
        self._params = [s.param for s in segments]
        # a parameter that moves is rare: then, its memory is looked at
        self._param_column = PointerColumn(params, is_fixed=True)
        self._grad_column = PointerColumn(grads)
        self._grad_addresses = grads

    def follow(self, grads: list[Tensor], *, anew: bool) -> list[bool] | None:
        """Writes the addresses. None while forms are those of the last call, unless `anew`; else as `Forms.check`."""
        try:
            same = self._param_column.move(self._params) & self._grad_column.move(grads)
        except (RuntimeError, TypeError):
            self._forms.check(grads)  # says which tensor it was
            raise
        return None if same and not anew else self._forms.check(grads)

    def out_of_range(self, i: int) -> IndexError:
        """The error of `Forms.out_of_range`."""
        return self._forms.out_of_range(i)

    def check_memory(self, grads: Sequence[Tensor]) -> None:
        """Raises ValueError for a gradient whose memory was freed since it had the form it has."""
        if self._grad_addresses.min(initial=_LOWEST_ADDRESS) < _LOWEST_ADDRESS:
            self._forms.check(grads)
