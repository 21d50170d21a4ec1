"""What an element is selected by. `select(score=...)` takes these names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8


@dataclass(frozen=True)
class Score:
    """From gradients and parameters to scores, of which the largest magnitudes are selected.

    `of_batch` maps the gradient of one batch, before the mean over batches; `of_mean` maps that mean and the parameter.
    Tensors come in opmath and are not mutated.
    """

    of_batch: Callable[[Tensor], Tensor] | None = None
    of_mean: Callable[[Tensor, Tensor], Tensor] | None = None
    needs_gradients: bool = True
    is_random: bool = False


SCORES = {
    "mean_grad": Score(),
    "mean_abs_grad": Score(of_batch=lambda g: g.abs()),
    "fisher": Score(of_batch=lambda g: g.square()),
    "relative_grad": Score(of_mean=lambda g, w: g / (w.abs() + EPS)),
    "grad_times_weight": Score(of_mean=lambda g, w: g * w),
    "weight": Score(of_mean=lambda _, w: w, needs_gradients=False),
    "random": Score(of_mean=lambda _, w: torch.rand_like(w), needs_gradients=False, is_random=True),
}
