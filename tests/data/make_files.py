"""Writes mask.safetensors and delta*.safetensors: files as commit ec6e920 wrote them.

Run it with that commit's package, and never with a later one (how: make_state_dicts.py); later ones have to read them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saft_kernels import SparseDelta, SparseMask

FOLDER = Path(__file__).parent
SHAPES = {"a.weight": (9, 5), "a.bias": (11,), "nothing": (4, 3), "scalar": ()}
INDICES = {"a.weight": [0, 7, 8, 21, 44], "a.bias": [3, 10], "nothing": [], "scalar": [0]}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def mask() -> SparseMask:
    """What mask.safetensors holds."""
    return SparseMask.from_dense({name: of_indices(name, INDICES[name]) for name in SHAPES})


def of_indices(name: str, indices: list[int]) -> Tensor:
    """True at flat positions."""
    found = torch.zeros(SHAPES[name], dtype=torch.bool)
    found.view(-1)[indices] = True
    return found


def base() -> dict[str, Tensor]:
    """Of every dtype, a tensor of 12 elements; two names of one tensor."""
    tensors = {str(dtype)[6:]: torch.arange(12).to(dtype).view(3, 4) for dtype in DTYPES}
    return {**tensors, "tied": tensors["float32"]}


def tuned() -> dict[str, Tensor]:
    """Other values in two places of each."""
    tensors = {name: value.clone() for name, value in base().items() if name != "tied"}
    for value in tensors.values():
        value[0, 1], value[2, 3] = 40, -7
    return {**tensors, "tied": tensors["float32"]}


if __name__ == "__main__":
    mask().save(FOLDER / "mask.safetensors")
    delta = SparseDelta.diff(base(), tuned())
    delta.save(FOLDER / "delta.safetensors")
    delta.save(FOLDER / "delta_with_originals.safetensors", include_original=True)
