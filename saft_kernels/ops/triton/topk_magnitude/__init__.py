"""topk_magnitude on GPUs without a CUDA toolkit: one read of the data, whatever k.

Algorithm  guess and verify (Floyd & Rivest 1975; Monroe et al. 2011), as in csrc/topk_magnitude/cpu.cpp:
  sample   a stratified sample brackets the k-th key: [lo, hi]
  filter   the only full read. key > hi: sure; lo <= key <= hi: band. One bit per element for each, counts per tile
  collect  the keys of the band, in order of position
  select   the exact k-th key, by radix passes over those keys
  tally    per tile, the band keys above the threshold and equal to it
  emit     sure + band keys above the threshold + the tile's share of the ties, which go to the lowest positions by a
           scan over tiles
The guess is verified on the device, and its verdict arrives with the result: if it was wrong, or the band outgrew its
buffer, radix passes over the data find the exact key, and one more filter uses it as both ends of the bracket.

Synchronisation  one, for the result; two when the guess fails.
Workspace        2 bits per element, plus 4 B (8 B with fp64) per band element for at most numel / 64 + 2^17 of them,
                 plus 32 B per tile and 512 KB: 7.8 % of fp32 data at most.
Determinism      atomics add integers only; none decides membership or order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ...reference import key_to_float
from ...types import TopK
from ..constants import HAS_BF16, HAS_FP16, HAS_FP64
from ..launch import INTERPRETED, launch, to_device
from . import exact_kernels as exact
from . import guess_kernels as guess
from . import rows as rows
from .pieces import GATHERED, ITEM_SIZES, Sizes, cut


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work. Reasoned from bytes and instructions; not yet measured on hardware."""

    sizes: Sizes
    filter_warps: int = 4
    filter_vectors: int = 128  # of 16 B, in a step; 4 steps make a block, and a gathered tile is whole blocks
    gathered_block: int = 1024
    words_warps: int = 8  # collect and emit, one tile per program
    sample_lines: int = 2**17
    lines_per_program: int = 64
    small_numel: int = 2**17  # up to here everything is band; no sample
    list_block: int = 2048
    list_programs: int = 264


TUNING = Tuning(Sizes(line=16, gathered_tile=4096, direct_tile=65_536))
if INTERPRETED:  # few, large numpy operations
    TUNING = Tuning(
        Sizes(line=16, gathered_tile=2**16, direct_tile=2**18),
        filter_vectors=2**11,
        gathered_block=2**16,
        lines_per_program=2**14,
        list_block=2**16,
        small_numel=2**10,
    )

SIDE = 1 << (guess.SAMPLE_BITS.value // 2)  # of the sample's histogram, as a square


class _Run:
    """One call: the tables, the workspace and the launches."""

    def __init__(self, tensors: Sequence[Tensor], k: int) -> None:
        self.tuning = TUNING
        self.device = tensors[0].device
        self.num_tensors = len(tensors)
        self.k = k
        self.pieces = pieces = cut(tensors, self.tuning.sizes)
        self.numel, self.dtypes = pieces.numel, pieces.dtypes
        self.key64 = bool(self.dtypes & HAS_FP64.value)
        self.max_key = 2**63 - 1 if self.key64 else 2**31 - 1
        num_sampled = min(pieces.num_lines, self.tuning.sample_lines)
        self.num_sampled = num_sampled if self.numel > self.tuning.small_numel and k else 0
        # zero bits at the end of the common key; fp32 and fp64 have none
        grains = {HAS_BF16.value: 2**16, HAS_FP16.value: 2**13, HAS_BF16.value | HAS_FP16.value: 2**13}
        self.capacity = min(self.numel, self.tuning.small_numel + min(self.numel // 64, k))
        header = np.zeros(1, rows.HEADER)
        header["k"], header["numel"], header["max_ndim"] = k, self.numel, pieces.max_ndim
        header["num_lines"], header["num_sampled_lines"] = pieces.num_lines, num_sampled
        header["num_pieces"], header["num_tiles"] = pieces.num_pieces, pieces.num_tiles
        header["grain"], header["capacity"] = grains.get(self.dtypes, 1), self.capacity
        table = to_device(np.concatenate([header.view(np.int64), pieces.table]), self.device)
        self.header, self.table = table, table[rows.HEADER_WORDS.value :]
        self.layouts = self.table[pieces.layouts_offset :]

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        # all that starts from zero; the sample's histogram is of int32
        sizes = [exact.NUM_DIGITS.value, SIDE * SIDE // 2 if self.num_sampled else 0, rows.STATE_WORDS.value]
        zeros = torch.zeros(sum(sizes) + self.num_tensors, dtype=torch.int64, device=self.device)
        self.digits, histogram, self.result = zeros.split([*sizes[:2], sizes[2] + self.num_tensors])
        self.histogram = histogram.view(torch.int32)
        self.state, self.selected = self.result.split([sizes[2], self.num_tensors])
        self.sure_words = empty(pieces.num_words, dtype=torch.int32)
        self.band_words = empty(pieces.num_words, dtype=torch.int32)
        self.counts = empty(2, pieces.num_tiles)
        self.tallies = empty(2, pieces.num_tiles)
        self.listed = empty(self.capacity, dtype=torch.int64 if self.key64 else torch.int32)
        self.indices = empty(k)

    def by_kind(self) -> list[tuple[int, Tensor, int, int]]:
        """Kind, table rows, number of tiles, elements per tile."""
        sizes = self.tuning.sizes
        return [
            (
                s.kind,
                self.table[s.offset :],
                s.num_tiles,
                sizes.gathered_tile if s.kind == GATHERED else sizes.direct_tile,
            )
            for s in self.pieces.spans
        ]

    def guess(self) -> None:
        """The bracket: [0, NaN] when the band may hold everything, [NaN, NaN] when nothing is wanted."""
        if self.num_sampled == 0:
            self.state[rows.STATE_HI.value].fill_(self.max_key)
            if self.k == 0:
                self.state[rows.STATE_LO.value].fill_(self.max_key)
            return
        lines = self.tuning.lines_per_program
        launch(
            guess.sample_kernel,
            triton.cdiv(self.num_sampled, lines),
            *(self.header, self.table, self.layouts, self.state, self.histogram),
            DTYPES=self.dtypes,
            LINES=lines,
            LINE=self.tuning.sizes.line,
            num_warps=4,
        )
        launch(
            guess.bracket_kernel, 1, self.header, self.state, self.histogram, KEY64=self.key64, SIDE=SIDE, num_warps=8
        )

    def filter(self) -> None:
        """Words and counts for the bracket."""
        tuning = self.tuning
        for kind, spans, num_tiles, tile in self.by_kind():
            if kind == GATHERED:
                launch(
                    guess.filter_gathered_kernel,
                    num_tiles,
                    *(self.header, self.table, self.layouts, spans, self.state),
                    *(self.sure_words, self.band_words, self.counts),
                    DTYPES=self.dtypes,
                    TILE=tile,
                    UNITS=min(tile, tuning.gathered_block) // 16,
                    num_warps=4,
                )
                continue
            launch(
                guess.filter_kernel,
                num_tiles,
                *(self.header, self.table, spans, self.state, self.sure_words, self.band_words, self.counts),
                KIND=kind,
                KEY64=self.key64,
                TILE=tile,
                UNITS=tuning.filter_vectors // int(ITEM_SIZES[kind]),
                num_warps=tuning.filter_warps,
            )

    def emit(self) -> tuple[np.void, list[int]]:
        """Everything after the filter; the state and the counts per tensor."""
        tuning = self.tuning
        sums = self.counts.cumsum(1)
        for kind, spans, num_tiles, tile in self.by_kind():
            launch(
                exact.collect_kernel,
                num_tiles,
                *(self.header, self.table, self.layouts, spans, self.state, self.band_words),
                *(self.counts, sums, self.listed),
                KIND=kind,
                DTYPES=self.dtypes,
                TILE=tile,
                num_warps=words_warps(tile, tuning),
            )
        num_programs = min(triton.cdiv(self.capacity, tuning.list_block), tuning.list_programs)

        def count_list() -> None:
            launch(
                exact.histogram_list_kernel,
                num_programs,
                *(self.state, self.listed, self.digits),
                BLOCK=tuning.list_block,
                num_warps=8,
            )

        self.select(count_list)
        launch(
            exact.tally_kernel,
            self.pieces.num_tiles,
            *(self.header, self.state, self.counts, sums, self.listed, self.tallies),
            BLOCK=256,
            num_warps=1,
        )
        tally_sums = self.tallies.cumsum(1)
        for kind, spans, num_tiles, tile in self.by_kind():
            launch(
                exact.emit_kernel,
                num_tiles,
                *(self.header, self.table, spans, self.state, self.sure_words, self.band_words),
                *(self.counts, sums, self.tallies, tally_sums, self.listed, self.indices, self.selected),
                KIND=kind,
                TILE=tile,
                num_warps=words_warps(tile, tuning),
            )
        return self.read()

    def select(self, count: Any) -> None:
        """Narrows SELECT_LO and SELECT_HI to one key. `count` fills the histogram of the current digit."""
        for _ in range(math.ceil((63 if self.key64 else 31) / exact.DIGIT_BITS.value)):
            count()
            launch(exact.narrow_kernel, 1, self.state, self.digits, num_warps=8)

    def select_in_data(self, state: np.void) -> None:
        """The exact k-th key becomes the bracket."""
        bracketed = state["failed"] == 2  # the bracket was right, the band too large for its buffer
        fresh = np.zeros(1, rows.STATE)
        fresh["select_lo"] = state["lo"] if bracketed else 0
        fresh["select_hi"] = state["hi"] if bracketed else self.max_key
        fresh["rank"] = state["rank"] if bracketed else self.k
        self.result.zero_()
        self.state.copy_(to_device(fresh.view(np.int64), self.device))

        def count_data() -> None:
            for kind, spans, num_tiles, tile in self.by_kind():
                launch(
                    exact.histogram_data_kernel,
                    num_tiles,
                    *(self.header, self.table, self.layouts, spans, self.state, self.digits),
                    KIND=kind,
                    DTYPES=self.dtypes,
                    TILE=tile,
                    BLOCK=min(tile, self.tuning.list_block),
                    num_warps=8,
                )

        self.select(count_data)
        for end, found in ((rows.STATE_LO, rows.STATE_SELECT_LO), (rows.STATE_HI, rows.STATE_SELECT_HI)):
            self.state[end.value].copy_(self.state[found.value])

    def read(self) -> tuple[np.void, list[int]]:
        """The state, and the counts per tensor: the only wait for the device."""
        words = self.result.cpu().numpy()
        (state,) = words[: rows.STATE_WORDS.value].view(rows.STATE)
        return state, words[rows.STATE_WORDS.value :].tolist()

    def run(self) -> TopK:
        """Guess, verify, and when the guess was wrong, know."""
        self.guess()
        self.filter()
        if self.k == 0:
            empty = tuple(self.indices[:0].clone() for _ in range(self.num_tensors))
            state, _ = self.read()
            return TopK(empty, math.inf, int(state["num_nonfinite"]))
        state, counts = self.emit()
        if state["failed"]:
            self.select_in_data(state)
            self.filter()
            state, counts = self.emit()
        dtype = torch.float64 if self.key64 else torch.float32
        threshold = key_to_float(int(state["select_lo"]), dtype)
        return TopK(self.indices.split(counts), threshold, int(state["num_nonfinite"]))


def words_warps(tile: int, tuning: Tuning) -> int:
    """Warps for one tile of words: 8 words per thread or so."""
    return max(1, min(tuning.words_warps, tile // 32 // 128))


def topk_magnitude(tensors: Sequence[Tensor], k: int) -> TopK:
    """See `saft_kernels.ops.topk_magnitude`."""
    if all(t.numel() == 0 for t in tensors):
        empty = torch.empty(0, dtype=torch.int64, device=tensors[0].device)
        return TopK(tuple(empty.clone() for _ in tensors), math.inf, 0)
    device = tensors[0].device
    if device.type == "cpu":  # interpreted
        return _Run(tensors, k).run()
    with torch.cuda.device(device):
        return _Run(tensors, k).run()
