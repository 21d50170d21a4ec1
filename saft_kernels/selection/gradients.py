"""Gradients that selection can use: dense, finite, not all zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..common.memory import check_memory


def any_nonzero(tensors: Iterable[Tensor]) -> bool:
    """Whether any element is other than zero; NaN is, and what has no memory to tell."""
    return any(tensor.is_meta or bool(tensor.any()) for tensor in tensors)


def check_dense(name: str, gradient: Tensor) -> None:
    """Raises TypeError for a gradient of sparse layout, ValueError for one whose memory was freed."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"gradient of {name!r}: expected a dense tensor, got layout {gradient.layout}; build the embedding with "
            "sparse=False"
        )
    check_memory(f"gradient of {name!r}", gradient)


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
