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
from .members import State, count

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")


def new_states(parameters: Sequence[Tensor], indices: Sequence[Tensor | None], group: Mapping[str, Any]) -> list[State]:
    """State before the first step: in one buffer per kind of value, dtype and device, where a step walks along it."""
    states: list[State] = [{"step": step} for step in count_tensors([0.0] * len(parameters))[0]]
    if group["capturable"]:
        states = [{"step": s["step"].to(p.device)} for s, p in zip(states, parameters, strict=True)]
    rows_by_kind: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for row, parameter in enumerate(parameters):
        kind = (parameter.device, state_dtype(parameter), parameter.itemsize == 2)
        rows_by_kind.setdefault(kind, []).append(row)
    for (device, dtype, has_master), rows in rows_by_kind.items():
        counts = [count(parameters[row], indices[row]) for row in rows]
        keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"] + ["master"] * has_master
        for key in keys:
            for row, part in zip(rows, _zeros(counts, dtype, device), strict=True):
                states[row][key] = _shaped(parameters[row], indices[row], part)
    for parameter, index, state in zip(parameters, indices, states, strict=True):
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


def _zeros(counts: Sequence[int], dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
    """Flat tensors side by side in one buffer; on a CPU each has a storage of its own, so that it is saved alone."""
    buffer = torch.zeros(sum(counts), dtype=dtype, device=device)
    if device.type != "cpu":
        return list(buffer.split(list(counts)))
    array, ends = buffer.numpy(), np.cumsum(counts, dtype=np.int64)
    return [torch.from_numpy(array[end - n : end]) for n, end in zip(counts, ends.tolist(), strict=True)]


def _shaped(parameter: Tensor, index: Tensor | None, flat: Tensor) -> Tensor:
    """State of a wholly selected parameter has its shape, and its memory order where that is dense."""
    if index is not None:
        return flat
    if same_memory_order(parameter):
        flat = flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat.view(parameter.shape).detach()  # no view to autograd, which differentiable=True writes to


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
