"""What SparseAdamW keeps per parameter: allocation, layout, and the move to another selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import ops
from ..ops.adamw import same_memory_order
from ..ops.dtypes import opmath_dtype
from .members import State

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")


def new_states(parameters: Sequence[Tensor], indices: Sequence[Tensor | None], group: Mapping[str, Any]) -> list[State]:
    """State before the first step: tensors of their own, so that what saves one of them writes no others."""
    states: list[State] = [{"step": step} for step in count_tensors([0.0] * len(parameters))[0]]
    for parameter, index, state in zip(parameters, indices, states, strict=True):
        if group["capturable"]:
            state["step"] = state["step"].to(parameter.device)
        keys = (
            ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"] + ["master"] * (parameter.itemsize == 2)
        )
        for key in keys:
            state[key] = _zeros(parameter, index)
        source = parameter.detach()
        if index is not None:
            # a model may have moved to its device after the mask was bound
            index = state["indices"] = index.to(parameter.device)
            source = source.take(index.long())
        if "master" in state:
            state["master"].copy_(source)
    return states


def count_tensors(counts: Sequence[float]) -> tuple[list[Tensor], npt.NDArray[np.float32]]:
    """Scalars over the memory of one array, and the array. Each has a storage of its own: that of its one number."""
    array = np.array(counts, dtype=np.float32)
    return [torch.from_numpy(array[i : i + 1].reshape(())) for i in range(len(array))], array


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype of the moments: a complex parameter's own, as in torch.optim.AdamW; else what the kernels compute in."""
    return parameter.dtype if parameter.is_complex() else opmath_dtype(parameter.dtype)


def _zeros(parameter: Tensor, index: Tensor | None) -> Tensor:
    """State of a wholly selected parameter has its shape, and its memory order where that is dense."""
    dtype, device = state_dtype(parameter), parameter.device
    if index is not None:
        return torch.zeros(index.numel(), dtype=dtype, device=device)
    if same_memory_order(parameter):
        return torch.empty_strided(parameter.shape, parameter.stride(), dtype=dtype, device=device).zero_()
    return torch.zeros(parameter.shape, dtype=dtype, device=device)


def carry_over(parameter: Tensor, old: State, old_index: Tensor | None, new: State, new_index: Tensor | None) -> None:
    """Copies the step count, and the moments of elements selected before and after, from `old` to `new`."""
    before, after = (
        torch.arange(parameter.numel(), device=parameter.device)
        if index is None
        else index.to(parameter.device, torch.int64)
        for index in (old_index, new_index)
    )
    stays = torch.isin(after, before, assume_unique=True)
    source = torch.searchsorted(before, after[stays])
    target = stays.nonzero().flatten()
    for key in MOMENTS:
        if key in old and key in new:
            ops.scatter_([new[key]], [target], [old[key].take(source)])
    new["step"].copy_(old["step"])
