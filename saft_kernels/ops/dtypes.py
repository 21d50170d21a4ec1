"""The dtypes that the ops know, and what each becomes: a code for the kernels, a compute type, an index type."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)

DTYPE_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}
"""saft::ScalarType of csrc/common.h."""


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Compute and state dtype for a parameter dtype: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(numel: int) -> torch.dtype:
    """int32 where every flat position fits."""
    return torch.int32 if numel < 2**31 else torch.int64


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: `take` and `put_` know no float8 and no uint16. complex128 has no integer twin."""
    return tensor.detach().view(_INTEGERS.get(tensor.itemsize, tensor.dtype))
