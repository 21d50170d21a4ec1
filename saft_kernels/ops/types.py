"""Result types of the ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopK(NamedTuple):
    """The k elements of largest magnitude over several tensors.

    Attributes:
        indices: One int64 tensor per input: flat positions (row-major order of the logical tensor), ascending.
            Their lengths sum to k.
        threshold: |x| of the k-th element, in fp32 (fp64 when an input is fp64); inf when k is 0, NaN when a
            NaN is at rank k.
        num_nonfinite: inf and NaN among ALL elements, selected or not.
    """

    indices: tuple[Tensor, ...]
    threshold: float
    num_nonfinite: int
