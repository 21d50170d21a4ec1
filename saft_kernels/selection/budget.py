"""How many elements to select, and which: shared by `select()` and `SparseAdamW`."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .gradients import check_finite

DEFAULT_DENSITY = 1e-3
SCOPES = ("global", "tensor", "row")


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
    if scope != "global":
        raise ValueError(f"`k`: expected None with scope={scope!r}, got {k!r}; give the `density` of each {scope}")
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
    if scope == "row":
        check_finite(names, scores)
        assert density is not None
        return tuple(largest_of_rows(score, density, backend) for score in scores)
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


def num_rows(shape: Sequence[int]) -> int:
    """Rows are slices of the first dimension: one output unit of a weight. A vector is one row, as is a scalar."""
    return shape[0] if len(shape) > 1 else 1


def budget_of(tensor: Tensor, density: float | None, scope: str) -> int:
    """Selected elements of a tensor by itself: under scope "tensor" or "row"."""
    rows = num_rows(tensor.shape) if scope == "row" else 1
    return rows * budget(density, None, tensor.numel() // rows) if tensor.numel() else 0


def largest_of_rows(score: Tensor, density: float, backend: str | None) -> Tensor:
    """Flat indices of each row's largest |score|; ties go to the smaller index. Finite scores."""
    if not score.numel():
        return torch.empty(0, dtype=torch.int64, device=score.device)
    rows = score.detach().reshape(num_rows(score.shape), -1)
    return ops.topk_magnitude_rows(rows, budget(density, None, rows.shape[1]), backend=backend)
