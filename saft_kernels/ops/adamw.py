"""What one sparse AdamW step is made of; every backend takes these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .walk import Watch, gradients, have_gradients, same_objects, shared, shared_parameters

__all__ = [
    "AdamWHyper",
    "AdamWPlan",
    "AdamWSegment",
    "HostHyper",
    "StalePlan",
    "Watch",
    "gradients",
    "have_gradients",
    "is_compact",
    "same_memory_order",
    "same_objects",
    "shared",
    "shared_parameters",
]


@dataclass(frozen=True, slots=True)
class AdamWHyper:
    """The scalars of one (param group, step count).

    `lr`, `step` and `grad_scale` may be tensors of one element, and `found_inf` is one: a GPU backend then reads them
    on the device, when the step runs. With a `found_inf` other than 0 the step writes nothing.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: float | Tensor
    maximize: bool = False
    grad_scale: float | Tensor = 1.0
    found_inf: Tensor | None = None

    def on_host(self) -> HostHyper:
        """All of it as numbers. Waits for the device when there are tensors on one."""
        return HostHyper(
            float(self.lr),
            float(self.beta1),
            float(self.beta2),
            float(self.eps),
            float(self.weight_decay),
            float(self.step),
            bool(self.maximize),
            float(self.grad_scale),
            self.found_inf is not None and bool(self.found_inf),
        )


@dataclass(frozen=True, slots=True)
class HostHyper:
    """AdamWHyper in numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: float
    maximize: bool
    grad_scale: float
    found_inf: bool

    @property
    def bias_correction1(self) -> float:
        """1 - beta1^step."""
        return 1.0 - float(self.beta1**self.step)

    @property
    def bias_correction2_sqrt(self) -> float:
        """sqrt(1 - beta2^step)."""
        return math.sqrt(1.0 - float(self.beta2**self.step))


@dataclass(frozen=True, slots=True)
class AdamWSegment:
    """One parameter with its selected coordinates and their state.

    `indices` is None for a wholly selected parameter; the state then has the parameter's shape. `hyper` is the
    row of the hyperparameters that apply, `name` what errors call the parameter, `takes_compact`
    whether its gradients may come as the selected values alone.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    indices: Tensor | None = None
    max_exp_avg_sq: Tensor | None = None
    master: Tensor | None = None
    hyper: int = 0
    name: str = ""
    takes_compact: bool = True

    @property
    def count(self) -> int:
        """Selected coordinates of this parameter."""
        return self.exp_avg.numel()


class StalePlan(RuntimeError):
    """A parameter changed its size, dtype or device since the plan was made; nothing was written."""


class AdamWPlan(Protocol):
    """A step made ready for one list of segments: while their tensors keep their form, `step` is cheap."""

    def step(self, grads: list[Tensor], hypers: Sequence[AdamWHyper]) -> None:
        """One step. `grads[i]`: shape of the i-th parameter, or (count,) with the selected values alone.

        Raises StalePlan, and ValueError for a gradient that is neither or has another dtype or device; nothing is
        written then.
        """


def is_compact(grad: Tensor, param: Tensor, count: int) -> bool:
    """Whether `grad` holds the selected values alone."""
    return grad.shape != param.shape and grad.shape == (count,)


def same_memory_order(*tensors: Tensor) -> bool:
    """Whether the tensors are dense, without overlap, and laid out alike: a walk over memory visits all in step."""
    first = tensors[0]
    if any(t.shape != first.shape or t.stride() != first.stride() for t in tensors[1:]):
        return False
    extent = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size > 1:
            if stride != extent:
                return False
            extent *= size
    return True
