"""sparse_adamw on GPUs without a CUDA toolkit: one launch for all parameters, and no wait for the device.

Launches         one; a second for fp64 parameters beside others, whose registers would cost the others occupancy; and
                 one of a single program where lr, step, grad_scale or found_inf are on the device.
Host to device   one copy from pinned memory: of the scalars (128 B per row of them), and of two addresses per segment
                 when a tensor moved; none when all is as before. What else the kernels read goes over when the plan is
                 first used, and when a tensor changed its layout or dtype.
CUDA graphs      a captured step has tables of its own, which live as long as the plan. What is a number when it is
                 captured stays that number. A step before the capture compiles the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import tables
from ...adamw import AdamWHyper, AdamWSegment, StalePlan, is_compact, same_memory_order
from ...dtypes import DTYPE_CODES
from ...tables import Words
from ...walk import PointerColumn
from ..coordinates import Layouts, align, tiles
from ..launch import INTERPRETED, launch, staged, to_device
from . import kernels as kernels


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work. Reasoned from bytes, registers and instructions; not yet measured on hardware."""

    # Coordinates of a program. 150 k of them in 300 tensors are 900 programs or less: all resident on 132
    # multiprocessors, at the 68 registers per thread that fp32 takes on sm_90.
    block: int = 256
    # Elements in a step of a wholly selected tensor: one vector per thread and array. Not equal to `block`, or Triton
    # would lay the two paths out alike.
    direct_block: int = 512
    direct_tile: int = 8192  # elements of a program
    num_warps: int = 4


TUNING = Tuning()
if INTERPRETED:  # few, large numpy operations
    TUNING = Tuning(block=2**15, direct_block=2**14, direct_tile=2**17)

_FP64 = DTYPE_CODES[torch.float64]
_SCALAR_COLUMNS = kernels.SCALAR_COLUMNS.value
_NUM_INPUTS = kernels.LR_AT.value  # fp64; the addresses follow


class Mirror:
    """Words on the host, and the same words on the device as of the last call."""

    def __init__(self, words: Words, device: torch.device) -> None:
        self.words = words
        self._device = device
        self._sent: Words | None = None
        self._copy = torch.empty(0, dtype=torch.int64)

    def on_device(self, prefix: int) -> Tensor:
        """A tensor that the next call overwrites. When words from `prefix` on are as they were, they stay there."""
        if self._sent is None:
            self._copy = to_device(self.words, self._device)
        elif not np.array_equal(self._sent, self.words):
            end = prefix if np.array_equal(self._sent[prefix:], self.words[prefix:]) else len(self.words)
            self._copy[:end].copy_(staged(self.words[:end], self._device), non_blocking=True)
        else:
            return self._copy
        self._sent = self.words.copy()
        return self._copy

    def captured(self, kept: list[Tensor], *, is_fixed: bool) -> Tensor:
        """A tensor for a CUDA graph; `kept` takes what has to live. `is_fixed`: the words never change."""
        if is_fixed and self._sent is not None:
            kept.append(self._copy)
            return self._copy
        host = staged(self.words, self._device)
        kept += [host, host.to(self._device, non_blocking=True)]
        return kept[-1]


class Plan:
    """The tables of one list of segments. Between steps only what moved is written, and copied, again."""

    def __init__(self, segments: Sequence[AdamWSegment]) -> None:
        self.segments = list(segments)
        self._params = [s.param for s in self.segments]
        self._device = self._params[0].device
        self._numels = [p.numel() for p in self._params]
        self._codes = [DTYPE_CODES[p.dtype] for p in self._params]
        self._tiles = self._cut()
        self._addresses = np.zeros((len(self.segments), 2), dtype=np.int64)  # of parameters and gradients
        self._params_column = PointerColumn(self._addresses[:, 0])
        self._grads_column = PointerColumn(self._addresses[:, 1])
        self._is_filled = False  # for tensors of the form that the columns have seen
        # rows, layouts, tiles; where each begins; kinds, tiles and number of tiles of each launch
        self._fixed = Mirror(np.zeros(0, dtype=np.int64), self._device)
        self._layouts_at = 0
        self._launches: list[tuple[int, int, int]] = []
        # scalars, or what they are computed from; then the addresses of each parameter and its gradient
        self._moving = Mirror(np.zeros(0, dtype=np.int64), self._device)
        self._scalars = torch.empty(0, dtype=torch.int64)
        self._captured: list[Tensor] = []

    def _cut(self) -> list[Words]:
        """The tiles of each launch: fp64 parameters apart."""
        counts = np.array([s.count for s in self.segments], dtype=np.int64)
        whole = np.array([s.indices is None for s in self.segments], dtype=bool)
        cut = tiles(counts, np.where(whole, TUNING.direct_tile, TUNING.block))
        is_fp64 = np.array(self._codes)[cut[:, 0]] == _FP64
        return [part for part in (cut[~is_fp64], cut[is_fp64]) if len(part)]

    def step(self, grads: list[Tensor], hypers: Sequence[AdamWHyper]) -> None:
        """One step, enqueued on the current stream."""
        for hyper in hypers:
            if hyper.found_inf is not None and not self._is_here(hyper.found_inf) and bool(hyper.found_inf):
                return
        if self._device.type == "cpu":  # interpreted
            self._step(grads, hypers, is_capturing=False)
        else:
            with torch.cuda.device(self._device):
                self._step(grads, hypers, is_capturing=torch.cuda.is_current_stream_capturing())
        torch.autograd.graph.increment_version(self._params)

    def _step(self, grads: list[Tensor], hypers: Sequence[AdamWHyper], *, is_capturing: bool) -> None:
        was_filled, self._is_filled = self._is_filled, False
        same = self._params_column.move(self._params) & self._grads_column.move(grads)
        if not (same and was_filled):
            self._fill_rows(grads)
        self._is_filled = True
        if not self._launches:
            return
        num_rows = 1 << (len(hypers) - 1).bit_length()  # a power of two, for the kernel that computes scalars
        num_words = num_rows * _SCALAR_COLUMNS
        if len(self._moving.words) != num_words + 2 * len(self._params):
            self._moving = Mirror(np.zeros(num_words + 2 * len(self._params), dtype=np.int64), self._device)
        self._moving.words[num_words:] = self._addresses.reshape(-1)
        rows = self._moving.words[:num_words].reshape(-1, _SCALAR_COLUMNS)
        converted: list[Tensor] = []  # alive until the kernels are enqueued
        on_device = any(self._is_here(x) for h in hypers for x in (h.lr, h.step, h.grad_scale, h.found_inf))
        for row, hyper in zip(rows, [*hypers, *[hypers[-1]] * (num_rows - len(hypers))], strict=True):
            if on_device:
                self._write_inputs(row, hyper, converted)
            else:
                self._write_scalars(row, hyper)
        if is_capturing:
            moving = self._moving.captured(self._captured, is_fixed=False)
            fixed = self._fixed.captured(self._captured, is_fixed=True)
        else:
            moving, fixed = self._moving.on_device(num_words), self._fixed.on_device(0)
        scalars = self._compute_scalars(moving, num_rows, is_capturing) if on_device else moving
        for kinds, tiles_at, num_tiles in self._launches:
            launch(
                kernels.sparse_adamw_kernel,
                num_tiles,
                *(scalars, moving[num_words:], fixed, fixed[self._layouts_at :], fixed[tiles_at:]),
                KINDS=kinds,
                BLOCK=TUNING.block,
                DIRECT_BLOCK=TUNING.direct_block,
                num_warps=TUNING.num_warps,
            )

    # ---- scalars ----

    def _is_here(self, scalar: float | Tensor | None) -> bool:
        """Whether the kernel reads it."""
        return isinstance(scalar, Tensor) and scalar.device == self._device

    def _number(self, name: str, scalar: float | Tensor) -> float:
        """The value of what is not on the device."""
        if isinstance(scalar, Tensor) and scalar.device.type != "cpu":
            raise ValueError(f"`{name}`: expected a tensor on {self._device} or the CPU, got {scalar.device}; move it")
        return float(scalar)

    def _write_scalars(self, row: Words, hyper: AdamWHyper) -> None:
        """All are numbers; as csrc/sparse_adamw.h's AdamWScalars."""
        for name, scalar in (("lr", hyper.lr), ("step", hyper.step), ("grad_scale", hyper.grad_scale)):
            self._number(name, scalar)
        h = hyper.on_host()
        row[: kernels.SKIP.value + 1].view(np.float64)[:] = (
            *(1 - h.lr * h.weight_decay, 1 - h.beta1, h.beta2, 1 - h.beta2),
            *(h.lr / h.bias_correction1, h.bias_correction2_sqrt, h.eps),
            *((-1.0 if h.maximize else 1.0) / h.grad_scale, 0.0),
        )

    def _write_inputs(self, row: Words, hyper: AdamWHyper, converted: list[Tensor]) -> None:
        """What scalars_kernel reads: numbers, and the addresses of what is on the device."""
        named = (("lr", hyper.lr), ("step", hyper.step), ("grad_scale", hyper.grad_scale))
        beta1, beta2 = float(hyper.beta1), float(hyper.beta2)
        row[:_NUM_INPUTS].view(np.float64)[:] = (
            *(0.0 if self._is_here(scalar) else self._number(name, scalar) for name, scalar in named),
            *(beta1, beta2, *(math.log(beta) if beta else -math.inf for beta in (beta1, beta2))),
            *(float(hyper.eps), float(hyper.weight_decay), -1.0 if hyper.maximize else 1.0),
        )
        tensors = (hyper.lr, hyper.step, hyper.grad_scale, hyper.found_inf)
        row[_NUM_INPUTS : _NUM_INPUTS + len(tensors)] = [self._address(scalar, converted) for scalar in tensors]

    def _address(self, scalar: float | Tensor | None, converted: list[Tensor]) -> int:
        """Of an fp64 value, or that of an fp32 one and 1; 0 where there is a number."""
        if not isinstance(scalar, Tensor) or not self._is_here(scalar):
            return 0
        if scalar.dtype == torch.float32:
            return scalar.data_ptr() + 1
        if scalar.dtype != torch.float64:
            scalar = scalar.to(torch.float64)
            converted.append(scalar)
        return scalar.data_ptr()

    def _compute_scalars(self, inputs: Tensor, num_rows: int, is_capturing: bool) -> Tensor:
        scalars = self._scalars
        if is_capturing or len(scalars) != num_rows * _SCALAR_COLUMNS:
            scalars = torch.empty(num_rows * _SCALAR_COLUMNS, dtype=torch.int64, device=self._device)
            if is_capturing:
                self._captured.append(scalars)
            else:
                self._scalars = scalars
        launch(kernels.scalars_kernel, 1, inputs, scalars, ROWS=num_rows, num_warps=1)
        return scalars

    # ---- rows ----

    def _fill_rows(self, grads: list[Tensor]) -> None:
        """Rows, layouts and launches for these forms."""
        layouts = Layouts()
        rows = tables.table(
            (self._row(i, s, g, layouts) for i, (s, g) in enumerate(zip(self.segments, grads, strict=True))),
            kernels.ROW_COLUMNS.value,
        )
        words, (_, self._layouts_at, *tiles_at) = align(
            [rows, np.array(layouts.words or [0], dtype=np.int64), *self._tiles]
        )
        if not np.array_equal(words, self._fixed.words):
            self._fixed = Mirror(words, self._device)
        kinds = rows[:, kernels.KIND.value]
        self._launches = [
            (int(np.bitwise_or.reduce(1 << kinds[part[:, 0]])), at, len(part))
            for part, at in zip(self._tiles, tiles_at, strict=True)
        ]

    def _row(self, i: int, segment: AdamWSegment, grad: Tensor, layouts: Layouts) -> tuple[int, ...]:
        param, exp_avg, indices = segment.param, segment.exp_avg, segment.indices
        code = self._codes[i]
        if param.numel() != self._numels[i] or DTYPE_CODES.get(param.dtype) != code:
            raise StalePlan(
                f"`params[{i}]`: expected {self._numels[i]} elements of the dtype the step was prepared for, "
                f"got {param.numel()} of {param.dtype}; prepare another step"
            )
        state_like_param = indices is None and not exp_avg.is_contiguous()
        if state_like_param and not same_memory_order(param, exp_avg):
            raise ValueError(
                f"`exp_avgs[{i}]`: expected the strides of a wholly selected parameter, {param.stride()}, "
                f"or contiguous, got {exp_avg.stride()}; lay the state out like the parameter"
            )
        in_memory_order = indices is None and same_memory_order(param, exp_avg, grad)
        state = (exp_avg, segment.exp_avg_sq, segment.max_exp_avg_sq, segment.master)
        return (
            0 if indices is None else indices.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in state),
            0 if indices is None else indices.itemsize,
            segment.hyper,
            code + 3 * (param.itemsize == 2 and grad.dtype == torch.float32),
            is_compact(grad, param, segment.count),
            state_like_param and not in_memory_order,
            *((0, 0) if in_memory_order else layouts.columns(param)),
            *((0, 0) if in_memory_order else layouts.columns(grad)),
            *(0, 0),
        )


prepare_sparse_adamw = Plan
