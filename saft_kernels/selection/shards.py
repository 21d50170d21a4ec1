"""Selection from a model that is split over ranks: what one process would select of all, to the bit.

The k largest of all are among the ranks' own k largest. Each rank reads its gradients once, and offers its largest; the
k-th key of all offers is found digit by digit, from histograms that the ranks add up: counts, so that the outcome is
the same whatever the number of ranks. Ties go to the lowest position in the whole, which is found in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .. import ops
from . import budget as budgets
from . import gradients
from .budget import budget, largest_of_rows, num_rows
from .parts import Part, ranks_of, whole_counts
from .ranks import Ranks

_MARGIN = 1.25
"""Of what a rank offers at first, over its equal share: shards of a large model differ by less, as a rule."""
_SLACK = 64
"""Elements that it offers beyond: small shards differ by more."""
_DIGIT = 11
"""Bits of a key that one histogram tells, for one budget: 16 KB."""
_MOST_COUNTS = 1 << 17
"""In a histogram of many budgets."""


def select_indices(
    names: Sequence[str],
    scores: Sequence[Tensor],
    parts: Sequence[Part | None],
    density: float | None,
    k: int | None,
    scope: str,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """int64 flat indices per tensor, of the budget's largest |score|. Non-finite scores raise ValueError.

    Args:
        names: What errors call the tensors.
        scores: What this rank has of them.
        parts: Which part that is; where any is split, all its ranks have to come here with the same budget.
        density: The budget, of the whole; or else k.
        k: Number of elements.
        scope: What a budget is of: see `select()`.
        backend: See `saft_kernels.ops`.
    """
    ranks = ranks_of(parts)
    if ranks is None:
        return budgets.select_indices(names, scores, density, k, scope, backend)
    if scope == "row":
        check_finite(names, scores, parts)
        return _of_rows(scores, parts, ranks, density, backend)
    numels = [_numel(score, part) for score, part in zip(scores, parts, strict=True)]
    if scope == "tensor":
        quotas = [budget(density, None, numel) if numel else 0 for numel in numels]
        limits = [score.numel() for score in scores]
        segments = list(range(len(scores)))
    else:
        quotas, limits = [budget(density, k, sum(numels))], [sum(score.numel() for score in scores)]
        segments = [0] * len(scores)
    num_nonfinite = 0

    def offer(counts: list[int]) -> list[Tensor]:
        nonlocal num_nonfinite
        if scope == "tensor":
            tops = [ops.topk_magnitude([s], n, backend=backend) for s, n in zip(scores, counts, strict=True)]
            indices = [top.indices[0] for top in tops]
        else:
            tops = [ops.topk_magnitude(scores, counts[0], backend=backend)]
            indices = list(tops[0].indices)
        num_nonfinite = sum(top.num_nonfinite for top in tops)
        return indices

    at_most = [min(quota, limit) for quota, limit in zip(quotas, limits, strict=True)]
    # an equal share, and some more; whose offers are all taken offers all it may
    share = [min(most, int(quota / ranks.size * _MARGIN) + _SLACK) for most, quota in zip(at_most, quotas, strict=True)]
    while True:
        offers = offer(share)
        rows = [torch.full_like(index, segment) for index, segment in zip(offers, segments, strict=True)]
        picked = _largest(scores, parts, ranks, offers, rows, quotas)
        taken = [0] * len(quotas)
        for index, segment in zip(picked, segments, strict=True):
            taken[segment] += index.numel()
        is_short = [n == offered < most for n, offered, most in zip(taken, share, at_most, strict=True)]
        is_any_short, is_any_nonfinite = ranks.any([any(is_short), num_nonfinite > 0])
        if is_any_nonfinite:
            check_finite(names, scores, parts)
        if not is_any_short:
            return tuple(picked)
        share = [most if short else n for n, most, short in zip(share, at_most, is_short, strict=True)]


def _of_rows(
    scores: Sequence[Tensor], parts: Sequence[Part | None], ranks: Ranks, density: float | None, backend: str | None
) -> tuple[Tensor, ...]:
    """As `largest_of_rows` of each tensor. Where a rank has whole rows, it asks nobody."""
    assert density is not None
    picked: dict[int, Tensor] = {}
    split: list[int] = []
    offers: list[Tensor] = []
    segments: list[Tensor] = []
    quotas: list[int] = []
    for at, (score, part) in enumerate(zip(scores, parts, strict=True)):
        if part is None or (part.dim == 0 and len(part.shape) > 1):
            picked[at] = largest_of_rows(score, density, backend)
            continue
        rows = num_rows(part.shape)
        numel = _numel(score, part)
        quota = budget(density, None, numel // rows) if numel else 0
        matrix = score.detach().reshape(rows, -1) if score.numel() else score.new_empty(rows, 0)
        width = matrix.shape[1]
        index = ops.topk_magnitude_rows(matrix, min(quota, width), backend=backend)
        split.append(at)
        offers.append(index)
        segments.append(index.div(max(1, width), rounding_mode="floor") + len(quotas))
        quotas += [quota] * rows
    if split:
        some = [scores[at] for at in split], [parts[at] for at in split]
        picked |= zip(split, _largest(*some, ranks, offers, segments, quotas), strict=True)
    return tuple(picked[at] for at in range(len(scores)))


def _largest(
    scores: Sequence[Tensor],
    parts: Sequence[Part | None],
    ranks: Ranks,
    offers: Sequence[Tensor],
    segments: Sequence[Tensor],
    quotas: Sequence[int],
) -> list[Tensor]:
    """Those of this rank's offers that are among the largest of all ranks' offers.

    Args:
        scores: Local.
        parts: Which part of each tensor this rank has.
        ranks: That come here together.
        offers: Local flat indices per tensor, ascending.
        segments: Which budget each offer falls under.
        quotas: Elements of each budget.
    """
    device = scores[0].device
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32
    values = [ops.magnitude_keys(s.detach().take(i), dtype) for s, i in zip(scores, offers, strict=True)]
    keys, rows = torch.cat(values).long(), torch.cat(list(segments))
    numbers, is_mine, first = [], [], sum(_numel(score, part) for score, part in zip(scores, parts, strict=True))
    bits = max(1, first.bit_length())
    for score, part, index in zip(scores, parts, offers, strict=True):
        # the larger, the earlier in the whole
        numbers.append(first - (index if part is None else part.to_whole(index)))
        # what all ranks have is counted once
        is_mine.append(torch.full_like(index, part is not None or ranks.is_first, dtype=torch.bool))
        first -= _numel(score, part)
    places, counted = torch.cat(numbers), torch.cat(is_mine)
    quota = torch.tensor(quotas, dtype=torch.int64, device=device)
    key_bits = torch.iinfo(values[0].dtype).bits - 1
    threshold, left, found = _kth(keys[counted], rows[counted], quota, key_bits, ranks.sum)
    chosen, tied = keys > threshold[rows], keys == threshold[rows]
    # of what all ranks have, one may offer ties that the one who counts them does not: they come too late
    if None in parts or bool((found > left).any()):
        some = tied & counted
        lowest, _, _ = _kth(places[some], rows[some], left, bits, ranks.sum)
        tied &= places >= lowest[rows]
    chosen |= tied
    sizes = [index.numel() for index in offers]
    return [index[here] for index, here in zip(offers, chosen.split(sizes), strict=True)]


def _kth(
    keys: Tensor, rows: Tensor, quotas: Tensor, bits: int, add_up: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, the largest key at or above which lie as many keys of all ranks as its quota, or more.

    Args:
        keys: (n,) int64, 0 to 2^bits.
        rows: (n,) int64.
        quotas: (R,) int64. Where there are fewer keys, the result is 0.
        bits: Of a key.
        add_up: Adds up counts over the ranks.

    Returns:
        The key; how many equal to it belong to the quota; and how many there are.
    """
    width = _DIGIT
    while width > 1 and len(quotas) << width > _MOST_COUNTS:
        width -= 1
    prefix, left, found = torch.zeros_like(quotas), quotas, quotas
    for shift in reversed(range(0, bits, width)):
        here = keys >> (shift + width) == prefix[rows]
        digits = (keys[here] >> shift) & ((1 << width) - 1)
        counts = torch.bincount((rows[here] << width) + digits, minlength=len(quotas) << width)
        counts = add_up(counts).view(-1, 1 << width)
        at_least = counts.flip(1).cumsum(1).flip(1)
        digit = ((at_least >= left[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)
        found = counts.gather(1, digit).flatten()
        left = left - at_least.gather(1, digit).flatten() + found
        prefix = (prefix << width) | digit.flatten()
    return prefix, left, found


def _numel(score: Tensor, part: Part | None) -> int:
    """Of the whole."""
    return score.numel() if part is None else part.numel


# ---- what one process would find in gradients ----


def any_nonzero(tensors: Iterable[Tensor], ranks: Ranks | None) -> bool:
    """Whether any element on any rank is other than zero."""
    found = gradients.any_nonzero(tensors)
    return found if ranks is None else ranks.any([found])[0]


def check_finite(names: Sequence[str], scores: Sequence[Tensor], parts: Sequence[Part | None]) -> None:
    """Raises ValueError on every rank for the first gradient with inf or NaN, in whatever part of it."""
    if ranks_of(parts) is None:
        gradients.check_finite(names, scores)
        return
    found = whole_counts([score.numel() - int(score.isfinite().sum()) for score in scores], parts)
    for name, score, part, n in zip(names, scores, parts, found, strict=True):
        if n:
            raise gradients.nonfinite_error(name, n, _numel(score, part))
