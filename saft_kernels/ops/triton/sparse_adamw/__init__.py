"""sparse_adamw on GPUs without a CUDA toolkit: one launch for all parameters, and no wait for the device.

Launches         one; a second for fp64 parameters beside others, whose registers would cost the others occupancy; and
                 one of a single program where lr, step, grad_scale or found_inf are on the device.
Host to device   one copy from pinned memory: of the scalars (128 B per row of them), and of one address per segment
                 when a gradient moved; none when all is as before. What else the kernels read goes over when the plan
                 is first used, when a parameter moved, and when a tensor changed its layout or dtype.
CUDA graphs      a captured step copies nothing: its tables are those of the step before, where they say the same, or
                 are written by kernels that have the words as arguments, 96 each. They live as long as the plan. What
                 is a number when it is captured stays that number. A step before the capture compiles the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import tables
from ...adamw import AdamWHyper, AdamWSegment, same_memory_order
from ...forms import Follower
from ...tables import Table, Words
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

_SCALAR_WORDS = kernels.SCALAR_WORDS.value


class Mirror:
    """Words on the host, and the same words on the device as of the last call."""

    def __init__(self, words: Words, device: torch.device) -> None:
        self.words = words
        self._device = device
        self._sent: Words | None = None
        self._copy = torch.empty(0, dtype=torch.int64, device=device)
        self._is_captured = False  # a graph reads the copy: it is never written again

    def on_device(self, prefix: int) -> Tensor:
        """A tensor that the next call may overwrite. When words from `prefix` on are as they were, they stay there."""
        if self._sent is not None and np.array_equal(self._sent, self.words):
            return self._copy
        if self._sent is None or self._is_captured:
            self._copy, self._is_captured = to_device(self.words, self._device), False
        else:
            end = prefix if np.array_equal(self._sent[prefix:], self.words[prefix:]) else len(self.words)
            self._copy[:end].copy_(staged(self.words[:end], self._device), non_blocking=True)
        self._sent = self.words.copy()
        return self._copy

    def captured(self, kept: list[Tensor]) -> Tensor:
        """A tensor for a CUDA graph; `kept` takes it, for it has to live.

        What is not on the device yet gets there as kernel arguments: a copy would be a node of the graph, and every
        replay would wait for it, pinned memory or not.
        """
        if self._sent is not None and np.array_equal(self._sent, self.words):
            self._is_captured = True
            kept.append(self._copy)
        else:
            written = torch.zeros(len(self.words), dtype=torch.int64, device=self._device)
            torch._foreach_add_(written.unbind(), self.words.tolist())
            kept.append(written)
        return kept[-1]


class Plan:
    """The tables of one list of segments. Between steps only what moved is written, and copied, again."""

    def __init__(self, segments: Sequence[AdamWSegment]) -> None:
        self.segments = list(segments)
        self._params = [s.param for s in self.segments]
        self._device = self._params[0].device
        self._tiles = self._cut()
        self._param_addresses, self._grad_addresses = np.zeros((2, len(self.segments)), dtype=np.int64)
        self._follower = Follower(self.segments, self._param_addresses, self._grad_addresses)
        self._is_filled = False  # for tensors of the form that the follower has seen
        # segments, layouts, tiles; where each begins; kinds, tiles and number of tiles of each launch
        self._fixed = Mirror(np.zeros(0, dtype=np.int64), self._device)
        self._layouts_at = 0
        self._launches: list[tuple[int, int, int]] = []
        # scalars, or what they are computed from; then the address of each gradient
        self._moving = Mirror(np.zeros(0, dtype=np.int64), self._device)
        self._scalars = torch.empty(0, dtype=torch.int64, device=self._device)
        self._captured: list[Tensor] = []

    def _cut(self) -> list[Table]:
        """The tiles of each launch: fp64 parameters apart."""
        counts = np.array([s.count for s in self.segments], dtype=np.int64)
        whole = np.array([s.indices is None for s in self.segments], dtype=bool)
        cut = tiles(counts, np.where(whole, TUNING.direct_tile, TUNING.block))
        is_fp64 = np.array([p.dtype == torch.float64 for p in self._params])[cut["segment"]]
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
        are_compact = self._follower.follow(grads, anew=not was_filled)
        self._follower.check_memory(grads)
        if are_compact is not None:
            self._fill(grads, are_compact)
        self._is_filled = True
        if not self._launches:
            return
        num_hypers = 1 << (len(hypers) - 1).bit_length()  # a power of two, for the kernel that computes scalars
        num_words = num_hypers * _SCALAR_WORDS
        if len(self._moving.words) != num_words + len(self.segments):
            self._moving = Mirror(np.zeros(num_words + len(self.segments), dtype=np.int64), self._device)
        self._moving.words[num_words:] = self._grad_addresses
        words = self._moving.words[:num_words]
        converted: list[Tensor] = []  # alive until the kernels are enqueued
        on_device = any(self._is_here(x) for h in hypers for x in (h.lr, h.step, h.grad_scale, h.found_inf))
        for at, hyper in enumerate([*hypers, *[hypers[-1]] * (num_hypers - len(hypers))]):
            if on_device:
                self._write_inputs(words.view(kernels.INPUT)[at : at + 1], hyper, converted)
            else:
                self._write_scalars(words.view(kernels.SCALAR)[at : at + 1], hyper)
        if is_capturing:
            moving, fixed = self._moving.captured(self._captured), self._fixed.captured(self._captured)
        else:
            moving, fixed = self._moving.on_device(num_words), self._fixed.on_device(0)
        scalars = self._compute_scalars(moving, num_hypers, is_capturing) if on_device else moving
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

    def _write_scalars(self, row: Table, hyper: AdamWHyper) -> None:
        """All are numbers; as AdamWScalars of csrc/sparse_adamw/sparse_adamw.h."""
        for name, scalar in (("lr", hyper.lr), ("step", hyper.step), ("grad_scale", hyper.grad_scale)):
            self._number(name, scalar)
        h = hyper.on_host()
        row["decay"] = 1 - h.lr * h.weight_decay
        row["one_minus_beta1"] = 1 - h.beta1
        row["beta2"] = h.beta2
        row["one_minus_beta2"] = 1 - h.beta2
        row["step_size"] = h.lr / h.bias_correction1
        row["bias_correction2_sqrt"] = h.bias_correction2_sqrt
        row["eps"] = h.eps
        row["inverse_grad_scale"] = (-1.0 if h.maximize else 1.0) / h.grad_scale
        row["skip"] = 0.0

    def _write_inputs(self, row: Table, hyper: AdamWHyper, converted: list[Tensor]) -> None:
        """What scalars_kernel reads: numbers, and the addresses of what is on the device."""
        for name, scalar in (("lr", hyper.lr), ("step", hyper.step), ("grad_scale", hyper.grad_scale)):
            row[name] = 0.0 if self._is_here(scalar) else self._number(name, scalar)
            row[f"{name}_at"] = self._address(scalar, converted)
        row["found_inf_at"] = self._address(hyper.found_inf, converted)
        for name, beta in (("beta1", float(hyper.beta1)), ("beta2", float(hyper.beta2))):
            row[name] = beta
            row[f"log_{name}"] = math.log(beta) if beta else -math.inf
        row["eps"], row["weight_decay"] = float(hyper.eps), float(hyper.weight_decay)
        row["sign"] = -1.0 if hyper.maximize else 1.0

    def _address(self, scalar: float | Tensor | None, converted: list[Tensor]) -> int:
        """The address of an fp64 value, or that of an fp32 value plus 1; 0 where there is a number."""
        if not isinstance(scalar, Tensor) or not self._is_here(scalar):
            return 0
        if scalar.dtype == torch.float32:
            return scalar.data_ptr() + 1
        if scalar.dtype != torch.float64:
            scalar = scalar.to(torch.float64)
            converted.append(scalar)
        return scalar.data_ptr()

    def _compute_scalars(self, inputs: Tensor, num_hypers: int, is_capturing: bool) -> Tensor:
        scalars = self._scalars
        if is_capturing or len(scalars) != num_hypers * _SCALAR_WORDS:
            scalars = torch.empty(num_hypers * _SCALAR_WORDS, dtype=torch.int64, device=self._device)
            if is_capturing:
                self._captured.append(scalars)
            else:
                self._scalars = scalars
        launch(kernels.scalars_kernel, 1, inputs, scalars, HYPERS=num_hypers, num_warps=1)
        return scalars

    # ---- segments ----

    def _fill(self, grads: list[Tensor], are_compact: list[bool]) -> None:
        """Segments, layouts and launches for these forms."""
        table = np.zeros(len(self.segments), kernels.SEGMENT)
        layouts = Layouts()
        contiguous = (0, 0)
        param_layouts, grad_layouts, like_param = [], [], []
        for segment, grad in zip(self.segments, grads, strict=True):
            param, exp_avg, is_whole = segment.param, segment.exp_avg, segment.indices is None
            in_memory_order = is_whole and same_memory_order(param, exp_avg, grad)
            param_layouts.append(contiguous if in_memory_order else layouts.add(param))
            grad_layouts.append(contiguous if in_memory_order else layouts.add(grad))
            like_param.append(is_whole and not exp_avg.is_contiguous() and not in_memory_order)
        table["param"] = self._param_addresses
        table["indices"] = [tables.address(s.indices) for s in self.segments]
        table["index_bytes"] = [0 if s.indices is None else s.indices.itemsize for s in self.segments]
        table["exp_avg"] = [s.exp_avg.data_ptr() for s in self.segments]
        table["exp_avg_sq"] = [s.exp_avg_sq.data_ptr() for s in self.segments]
        table["max_exp_avg_sq"] = [tables.address(s.max_exp_avg_sq) for s in self.segments]
        table["master"] = [tables.address(s.master) for s in self.segments]
        table["grad_is_compact"], table["state_like_param"] = are_compact, like_param
        table["hyper"] = [s.hyper for s in self.segments]
        table["kind"] = [kernels.KINDS[p.dtype, g.dtype] for p, g in zip(self._params, grads, strict=True)]
        table["param_ndim"], table["param_layout"] = zip(*param_layouts, strict=True)
        table["grad_ndim"], table["grad_layout"] = zip(*grad_layouts, strict=True)
        words, (_, self._layouts_at, *tiles_at) = align([table, layouts.words(), *self._tiles])
        if not np.array_equal(words, self._fixed.words):
            self._fixed = Mirror(words, self._device)
        self._launches = [
            (int(np.bitwise_or.reduce(1 << table["kind"][part["segment"]])), at, len(part))
            for part, at in zip(self._tiles, tiles_at, strict=True)
        ]


prepare_sparse_adamw = Plan
