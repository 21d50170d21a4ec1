"""sddmm on GPUs without a CUDA toolkit: both factors channel by channel, then a dot product per entry."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, launch

_ALIGNMENT = 16  # tokens: channels of the transposed factors start where a vector load may


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work. Reasoned from bytes and instructions; not yet measured on hardware."""

    entries: int = 8  # of a program; the loads of all of them are in flight at once
    tokens: int = 256
    num_warps: int = 4


TUNING = Tuning()
if INTERPRETED:  # few, large numpy operations
    TUNING = Tuning(entries=1024)


@triton.jit
def dot_kernel(
    dy,
    x,
    indices,
    values,
    k,
    num_inputs,
    padded_tokens,
    ACCUMULATE: tl.constexpr,
    OPMATH: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """values[j] (+)= dot(dy[output_j, :], x[input_j, :]), for ENTRIES entries per program.

    Traffic    per entry and token 2 * itemsize B, from L2 where the factors fit it; entries of one output are
               consecutive, so that dy's channel comes from L1.
    Contract   TOKENS running sums per entry, folded by tl.sum: the order depends on the number of tokens alone.
    """
    j = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    valid = j < k
    flat = tl.load(indices + j, mask=valid, other=0).to(tl.int64)
    output = flat // num_inputs
    dy_channel = dy + output[:, None] * padded_tokens
    x_channel = x + (flat - output * num_inputs)[:, None] * padded_tokens
    sums = tl.zeros([ENTRIES, TOKENS], dtype=OPMATH)
    for first in range(0, padded_tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)[None, :]
        mask = valid[:, None] & (token < padded_tokens)
        a = tl.load(dy_channel + token, mask=mask, other=0.0).to(OPMATH)
        sums += a * tl.load(x_channel + token, mask=mask, other=0.0).to(OPMATH)
    total = tl.sum(sums, axis=1)
    if ACCUMULATE:
        total += tl.load(values + j, mask=valid, other=0.0)
    tl.store(values + j, total, mask=valid)


def _by_channel(factor: Tensor) -> Tensor:
    """(N, T) contiguous, tokens padded by zeros to a multiple of _ALIGNMENT."""
    num_tokens, num_channels = factor.shape
    padded = -(-num_tokens // _ALIGNMENT) * _ALIGNMENT
    transposed = torch.empty(num_channels, padded, dtype=factor.dtype, device=factor.device)
    transposed[:, :num_tokens].copy_(factor.t())
    transposed[:, num_tokens:].zero_()
    return transposed


def sddmm(dy: Tensor, x: Tensor, indices: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `saft_kernels.ops.sddmm`. Nothing waits for the device. Workspace: both factors once more."""
    with torch.cuda.device(dy.device) if dy.device.type == "cuda" else contextlib.nullcontext():
        dy_channels, x_channels = _by_channel(dy), _by_channel(x)
        launch(
            dot_kernel,
            triton.cdiv(indices.numel(), TUNING.entries),
            *(dy_channels, x_channels, indices, out, indices.numel(), x.shape[1], dy_channels.shape[1]),
            ACCUMULATE=accumulate,
            OPMATH=tl.float64 if out.dtype == torch.float64 else tl.float32,
            ENTRIES=TUNING.entries,
            TOKENS=TUNING.tokens,
            num_warps=TUNING.num_warps,
        )
