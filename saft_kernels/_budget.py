"""How many elements to select, and which: shared by `select()` and `SparseAdamW`."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops

DEFAULT_DENSITY = 1e-3
SCOPES = ("global", "tensor")


def check_budget(density: float | None, k: int | None, scope: str = "global") -> None:
    """Raises ValueError for a budget no model could have. A density other than the default excludes k."""
    if scope not in SCOPES:
        raise ValueError(f"`scope`: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if k is None:
        if not isinstance(density, numbers.Real) or not 0 < density <= 1:
            raise ValueError(f"`density`: expected a number in (0, 1], got {density!r}; 1e-3 trains 0.1 %")
        return
    if density not in (None, DEFAULT_DENSITY):
        raise ValueError(f"expected `density` or `k`, got both: density={density!r}, k={k!r}; drop one")
    if scope == "tensor":
        raise ValueError(f"`k`: expected None with scope='tensor', got {k!r}; give the `density` of each tensor")
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"`k`: expected a positive int, got {k!r}; to train a share of the elements, pass `density`")


def budget(density: float | None, k: int | None, numel: int, what: str = "the parameters") -> int:
    """Selected elements out of `numel`: k, or density * numel, at least one."""
    if k is not None:
        if k > numel:
            raise ValueError(f"`k`: expected at most {numel}, the number of elements of {what}, got {k}; lower it")
        return int(k)
    assert density is not None
    return min(numel, max(1, round(density * numel)))


def select_indices(
    names: Sequence[str],
    scores: Sequence[Tensor],
    density: float | None,
    k: int | None,
    scope: str,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """int64 flat indices per tensor, of the budget's largest |score|. Non-finite scores raise ValueError."""
    if scope == "tensor":
        picks = [ops.topk_magnitude([s], budget(density, None, s.numel()), backend=backend) for s in scores]
        indices = tuple(pick.indices[0] for pick in picks)
        num_nonfinite = sum(pick.num_nonfinite for pick in picks)
    else:
        numel = sum(s.numel() for s in scores)
        topk = ops.topk_magnitude(scores, budget(density, k, numel), backend=backend)
        indices, num_nonfinite = topk.indices, topk.num_nonfinite
    if num_nonfinite:
        check_finite(names, scores)
    return indices


def check_finite(names: Sequence[str], gradients: Sequence[Tensor]) -> None:
    """Raises ValueError for the first gradient with inf or NaN."""
    for name, gradient in zip(names, gradients, strict=True):
        bad = gradient.numel() - int(gradient.isfinite().sum())
        if bad:
            raise nonfinite_error(name, bad, gradient.numel())


def nonfinite_error(name: str, bad: int, numel: int) -> ValueError:
    """For a gradient with inf or NaN."""
    return ValueError(
        f"gradient of {name!r} at selection: expected finite values, got {bad} inf or NaN of {numel}; nothing was "
        "selected. Lower the learning rate or loss scale, or look for the bad batch"
    )


def check_dense(name: str, gradient: Tensor) -> None:
    """Raises TypeError for a gradient of sparse layout."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"gradient of {name!r}: expected a dense tensor, got layout {gradient.layout}; build the embedding with "
            "sparse=False"
        )
