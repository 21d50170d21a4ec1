"""Constants that kernels and host share: the codes of dtypes, and which word of a table's row is what.

Kernels read them as globals of type constexpr: triton's cache knows the value of those, and not of a module's
attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import triton.language as tl

from ..dtypes import DTYPE_CODES

# saft::ScalarType
FP32 = tl.constexpr(DTYPE_CODES[torch.float32])
BF16 = tl.constexpr(DTYPE_CODES[torch.bfloat16])
FP16 = tl.constexpr(DTYPE_CODES[torch.float16])
FP64 = tl.constexpr(DTYPE_CODES[torch.float64])

# a set of codes has a bit for each
HAS_FP32 = tl.constexpr(1 << FP32.value)
HAS_BF16 = tl.constexpr(1 << BF16.value)
HAS_FP16 = tl.constexpr(1 << FP16.value)
HAS_FP64 = tl.constexpr(1 << FP64.value)


def row_dtype(name: str, constants: Mapping[str, Any], of: type = np.int64) -> np.dtype[np.void]:
    """The rows that kernels read by `constants` whose names begin with `name` and an underscore, as a numpy dtype.

    Each of them is the position of a word: PIECE_FIRST is the field "first" of PIECE. The number of words, with what
    pads the row, is PIECE_WORDS. Fields are `of` 64 bits; those whose name ends with "_at" are addresses.
    """
    positions = {key[len(name) + 1 :].lower(): at.value for key, at in constants.items() if key.startswith(name + "_")}
    words = positions.pop("words")
    assert sorted(positions.values()) == list(range(len(positions))), f"{name}: a word has no name, or two"
    assert len(positions) <= words
    return np.dtype(
        {
            "names": list(positions),
            "formats": [np.int64 if field.endswith("_at") else of for field in positions],
            "offsets": [8 * at for at in positions.values()],
            "itemsize": 8 * words,
        }
    )
