"""topk_magnitude: every backend against a stable sort. Equality is exact everywhere: there is no tolerance here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEFAULTS, Backend, assert_message, bits, flushed_denormals, other_default, sparse_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saft_kernels
from saft_kernels import TopK, topk_magnitude

OP = "topk_magnitude"

TILE = 65_536
SMALL = 5_003  # no sample: the cpu backend keeps every element as a candidate
SAMPLED = 3 * TILE + 17  # above 2^17: sample, filter, verify, select
LARGE = 2**21 + 77


@dataclass(frozen=True)
class Format:
    """A dtype and the bit patterns that matter."""

    dtype: torch.dtype
    width: int
    one: int
    inf: int

    def __str__(self) -> str:  # the test ids
        return str(self.dtype).removeprefix("torch.")

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def denormals(self) -> int:
        """Patterns below the least normal number."""
        return self.sign - self.inf

    def tensor(self, patterns: np.ndarray) -> Tensor:
        unsigned = np.asarray(patterns, dtype=np.uint64).astype(f"u{self.width // 8}")
        return torch.from_numpy(unsigned.view(f"i{self.width // 8}")).view(self.dtype)

    def rounded(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(self.dtype)


FP32 = Format(torch.float32, 32, 0x3F80_0000, 0x7F80_0000)
BF16 = Format(torch.bfloat16, 16, 0x3F80, 0x7F80)
FP16 = Format(torch.float16, 16, 0x3C00, 0x7C00)
FP64 = Format(torch.float64, 64, 0x3FF0_0000_0000_0000, 0x7FF0_0000_0000_0000)
FORMATS = [FP32, BF16, FP16, FP64]

all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)


# ---- the oracle ----


def magnitudes(tensor: Tensor) -> np.ndarray:
    """|x| in logical order, exact in fp64."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        patterns = flat.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
        values = patterns.view(np.float32)
    else:
        values = flat.numpy()
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.abs(values.astype(np.float64))


class Oracle:
    """The contract word by word: a stable sort by (NaN first, descending |x|), first tensor first."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        values = np.concatenate([magnitudes(t) for t in tensors]) if tensors else np.empty(0)
        nan = np.isnan(values)
        self.values = values
        self.order = np.lexsort((-np.where(nan, 0, values), ~nan)).astype(np.int32)
        self.num_nonfinite = int((~np.isfinite(values)).sum())
        self.first = np.cumsum([0, *(t.numel() for t in tensors)])

    def check(self, result: TopK, k: int) -> None:
        assert isinstance(result, TopK)
        assert len(result.indices) == len(self.first) - 1, f"k={k}"
        chosen = np.sort(self.order[:k])
        inside = np.searchsorted(chosen, self.first)
        for i, index in enumerate(result.indices):
            assert index.dtype == torch.int64
            assert index.dim() == 1
            expected = chosen[inside[i] : inside[i + 1]] - self.first[i]
            assert np.array_equal(index.cpu().numpy(), expected), f"indices[{i}] for k={k}"
        threshold = np.inf if k == 0 else self.values[self.order[k - 1]]
        assert type(result.threshold) is float
        assert np.array_equal(result.threshold, threshold, equal_nan=True), f"{result.threshold=}, {threshold=}, {k=}"
        assert type(result.num_nonfinite) is int
        assert result.num_nonfinite == self.num_nonfinite, f"k={k}"


def several_ks(numel: int, more: Iterable[int] = ()) -> list[int]:
    """0, 1, N-1, N and the densities people use."""
    ks = {0, 1, 2, numel // 1000, numel // 100, numel // 10, numel // 2, numel - 1, numel, *more}
    return sorted(k for k in ks if 0 <= k <= numel)


def check(
    backend: Backend, tensors: Sequence[Tensor], ks: Iterable[int] | None = None, oracle: Oracle | None = None
) -> None:
    """Right for every k, and the inputs keep their bits."""
    oracle = oracle or Oracle(tensors)
    before = [bits(t) for t in tensors]
    for k in several_ks(len(oracle.values)) if ks is None else ks:
        result = backend.topk_magnitude(tensors, k)
        assert all(index.device == tensors[i].device for i, index in enumerate(result.indices))
        oracle.check(result, k)
    assert all(torch.equal(bits(t), b) for t, b in zip(tensors, before, strict=True))


# ---- values that break selectors ----


def signs(rng: np.random.Generator, fmt: Format, numel: int) -> np.ndarray:
    return rng.integers(0, 2, numel).astype(np.uint64) * np.uint64(fmt.sign)


def normal(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.rounded(rng.standard_normal(numel))


def all_equal(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.tensor(np.full(numel, fmt.one + 3, dtype=np.uint64) | signs(rng, fmt, numel))


def all_zero(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.tensor(signs(rng, fmt, numel))


def few_nonzero(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    """Fewer than any k of interest but 1: the threshold is 0, and zeros fill up from the front."""
    patterns = signs(rng, fmt, numel)
    at = rng.choice(numel, numel // 2000 + 1, replace=False)
    patterns[at] = fmt.one + rng.integers(0, 3, len(at)).astype(np.uint64)
    return fmt.tensor(patterns)


def narrow_bucket(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    """fp32: [1, 1.00003], 252 consecutive bit patterns; fewer where the dtype is coarser."""
    span = 252 if fmt.width >= 32 else 5
    return fmt.tensor((fmt.one + rng.integers(0, span, numel)).astype(np.uint64) | signs(rng, fmt, numel))


def ascending_bucket(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    """A narrow bucket whose tiles have nothing in common."""
    patterns = fmt.one + np.arange(numel) * (252 if fmt.width >= 32 else 5) // numel
    return fmt.tensor(patterns.astype(np.uint64) | signs(rng, fmt, numel))


def denormals(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.tensor(rng.integers(1, fmt.denormals, numel).astype(np.uint64) | signs(rng, fmt, numel))


def random_patterns(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    """Every exponent, NaN payload and sign alike; 16-bit dtypes tie on every value."""
    return fmt.tensor(rng.integers(0, 2**64, numel, dtype=np.uint64) >> np.uint64(64 - fmt.width))


def with_nonfinite(share: float) -> Callable[[np.random.Generator, Format, int], Tensor]:
    def make(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
        patterns = bits(normal(rng, fmt, numel)).numpy().view(f"u{fmt.width // 8}").astype(np.uint64)
        at = rng.choice(numel, max(7, int(share * numel)), replace=False)
        payload = rng.integers(0, fmt.denormals, len(at)).astype(np.uint64)
        payload[::3] = 0  # inf
        patterns[at] = (np.uint64(fmt.inf) | payload) | signs(rng, fmt, len(at))
        return fmt.tensor(patterns)

    return make


def all_nan(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    payload = rng.integers(1, fmt.denormals, numel).astype(np.uint64)
    return fmt.tensor((np.uint64(fmt.inf) | payload) | signs(rng, fmt, numel))


def all_inf(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.tensor(np.full(numel, fmt.inf, dtype=np.uint64) | signs(rng, fmt, numel))


def winners_at_the_end(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    values = rng.standard_normal(numel)
    values[-(numel // 8) :] *= 500
    return fmt.rounded(values)


def ascending(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.rounded(np.sort(np.abs(rng.standard_normal(numel))))


def descending(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.rounded(-np.sort(-np.abs(rng.standard_normal(numel))))


def four_values(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    return fmt.rounded(rng.choice([1.0, -2.0, 2.0, 0.5], numel))


def heavy_tail(rng: np.random.Generator, fmt: Format, numel: int) -> Tensor:
    """Gradients by rows and columns of very different scale; fp16 overflows to inf in places."""
    columns = 61
    rows = -(-numel // columns)
    scale = np.exp(4 * rng.standard_normal((rows, 1)) + 2 * rng.standard_normal((1, columns)))
    return fmt.rounded((rng.standard_normal((rows, columns)) * scale).reshape(-1)[:numel])


VALUES: dict[str, Callable[[np.random.Generator, Format, int], Tensor]] = {
    "normal": normal,
    "all_equal": all_equal,
    "all_zero": all_zero,
    "few_nonzero": few_nonzero,
    "narrow_bucket": narrow_bucket,
    "ascending_bucket": ascending_bucket,
    "denormals": denormals,
    "random_patterns": random_patterns,
    "few_nonfinite": with_nonfinite(0.0),
    "mostly_nonfinite": with_nonfinite(0.7),
    "all_nan": all_nan,
    "all_inf": all_inf,
    "winners_at_the_end": winners_at_the_end,
    "ascending": ascending,
    "descending": descending,
    "four_values": four_values,
    "heavy_tail": heavy_tail,
}


@functools.cache
def values_and_oracle(values: str, fmt: Format, numel: int) -> tuple[Tensor, Oracle]:
    """Made once for all backends."""
    tensor = VALUES[values](np.random.default_rng(len(values) + numel), fmt, numel)
    assert tensor.shape == (numel,)
    return tensor, Oracle([tensor])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("numel", [SMALL, SAMPLED], ids=["small", "sampled"])
@all_formats
def test_values(backend: Backend, fmt: Format, numel: int, values: str) -> None:
    tensor, oracle = values_and_oracle(values, fmt, numel)
    check(backend, [backend.to(tensor)], oracle=oracle)


@pytest.mark.parametrize("numel", [SMALL, SAMPLED], ids=["small", "sampled"])
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "beside_float64"])
@all_formats
def test_denormals_count_under_flush_to_zero(backend: Backend, fmt: Format, mixed: bool, numel: int) -> None:
    rng = np.random.default_rng(0)
    tensors = [backend.to(denormals(rng, fmt, numel))]
    if mixed:
        tensors.append(backend.to(torch.zeros(100, dtype=torch.float64)))
    oracle = Oracle(tensors)
    with flushed_denormals():
        check(backend, tensors, [1, numel // 100, numel], oracle)


@pytest.mark.parametrize("values", ["normal", "few_nonzero", "narrow_bucket", "few_nonfinite"])
@pytest.mark.parametrize("fmt", [FP32, BF16], ids=str)
def test_millions(backend: Backend, fmt: Format, values: str) -> None:
    tensor, oracle = values_and_oracle(values, fmt, LARGE)
    check(backend, [backend.to(tensor)], [1, 100, LARGE // 1000, LARGE // 10], oracle)


@pytest.mark.parametrize(("period", "phase"), [(16, 0), (32, 17), (512, 0), (512, 255), (1024, 7)])
def test_period_equal_to_the_sample_stride(backend: Backend, period: int, phase: int) -> None:
    numel = 2**21  # the cpu backend samples a line of 16 in 512 elements when k is small, denser for larger ones
    values = np.linspace(0.5, 1, numel)
    values[phase::period] += 10
    many = numel // period
    check(backend, [backend.to(FP32.rounded(values))], [many // 2, many, many + 500])


def splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E37_79B9_7F4A_7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))


def cpu_sample_constant(name: str) -> int:
    source = (Path(__file__).parent.parent / "csrc" / "topk_magnitude" / "cpu_sample.h").read_text()
    match = re.search(rf"{name} = (?:index_t\(1\) << )?(\d+)", source)
    assert match, f"csrc/topk_magnitude/cpu_sample.h has no {name}: what the sample skips has to be worked out anew"
    return 2 ** int(match[1]) if "<<" in match[0] else int(match[1])


def lines_the_cpu_sample_skips(numel: int, k: int) -> np.ndarray:
    """Mirrors Sample of csrc/topk_magnitude/cpu_sample.h for one tensor. Were it to differ, the test below would
    still pass, but no longer make the first guess fail."""
    line_numel = cpu_sample_constant("kLineNumel")
    best = int((9 * numel * (k / numel) ** 0.5) ** (2 / 3))
    sample_numel = min(max(best, cpu_sample_constant("kMinSample")), cpu_sample_constant("kMaxSample"))
    num_lines = -(-numel // line_numel)
    num_sampled = min(num_lines, sample_numel // line_numel)
    j = np.arange(num_sampled, dtype=np.uint64)
    jitter = (splitmix64(j) >> np.uint64(11)) * 2.0**-53
    sampled = np.minimum(num_lines - 1, ((j + jitter) * (num_lines / num_sampled)).astype(np.int64))
    skipped = np.setdiff1d(np.arange(num_lines), sampled)
    return (skipped[:, None] * line_numel + np.arange(line_numel)).reshape(-1)


@functools.cache
def values_hidden_from_the_sample(fmt: Format, factor: float, share: float, k: int) -> tuple[Tensor, Oracle]:
    numel, rng = 2**21, np.random.default_rng(3)
    hidden = rng.permutation(lines_the_cpu_sample_skips(numel, k))[: int(share * numel)]
    values = rng.uniform(1, 2, numel)
    values[hidden] *= factor
    tensor = fmt.rounded(values)
    return tensor, Oracle([tensor])


@pytest.mark.parametrize(
    ("fmt", "factor", "share", "density"),
    [(FP32, 64, 0.01, 0.01), (BF16, 64, 0.2, 0.1), (FP32, 1 / 64, 0.2, 0.9), (FP64, 1 / 64, 0.2, 0.9)],
    ids=["few_large", "many_large", "small", "small_float64"],
)
def test_what_the_sample_does_not_see(
    backend: Backend, fmt: Format, factor: float, share: float, density: float
) -> None:
    """Large values where the sample does not look: too many are sure. Small ones: too few are candidates."""
    k = int(density * 2**21)
    tensor, oracle = values_hidden_from_the_sample(fmt, factor, share, k)
    check(backend, [backend.to(tensor)], [k], oracle)


# ---- sizes, tiles, tensors ----

SIZES = [1, 7, 15, 16, 17, 63, 64, 65, 127, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1]


@pytest.mark.parametrize("numel", SIZES)
@all_formats
def test_sizes_around_words_lines_and_tiles(backend: Backend, fmt: Format, numel: int) -> None:
    rng = np.random.default_rng(numel)
    tensor = fmt.rounded(rng.standard_normal(numel))
    tensor[-1] = 100  # the last element counts
    check(backend, [backend.to(tensor)], several_ks(numel, [5]))


def test_words_of_every_population(backend: Backend) -> None:
    """Of word w, 64 elements, w % 65 are selected: a dense selection is expanded word by word."""
    rng = np.random.default_rng(3)
    words, bit = divmod(np.arange(SAMPLED), 64)
    shuffled = rng.permuted(np.tile(np.arange(64), (words[-1] + 1, 1)), axis=1)
    selected = shuffled[words, bit] < words % 65
    tensor = FP32.rounded(np.where(selected, 2.0, 1.0) * rng.uniform(1.0, 1.9, SAMPLED))
    check(backend, [backend.to(tensor)], [int(selected.sum())])


def test_all_near_the_threshold_in_one_place(backend: Backend) -> None:
    """Of 6 million elements, 60,000 side by side are nearly alike: candidates that a sample cannot tell apart."""
    rng = np.random.default_rng(4)
    values = 1e-3 * np.abs(rng.standard_normal(6_000_000))
    values[400_000:460_000] = rng.uniform(3.0, 3.001, 60_000)
    check(backend, [backend.to(FP32.rounded(values))], [15_000, 30_000, 45_000])


@pytest.mark.parametrize("values", ["all_equal", "four_values"])
@pytest.mark.parametrize(
    "fmts",
    [[FP32], [BF16], [FP16, BF16, FP32], [FP32, FP64, BF16]],
    ids=lambda fmts: "+".join(map(str, fmts)),
)
def test_tie_runs_across_tiles_and_tensors(backend: Backend, fmts: list[Format], values: str) -> None:
    """The quota of ties ends at, one before and one after every border."""
    rng = np.random.default_rng(1)
    sizes = [TILE + 5, 3, 0, TILE - 1, 1, 0, TILE, 2 * TILE + 40]
    # one magnitude in every dtype, but other bits
    make = (lambda n: np.full(n, 1.5)) if values == "all_equal" else (lambda n: rng.choice([1.0, -2.0, 2.0, 0.5], n))
    tensors = [backend.to(fmts[i % len(fmts)].rounded(make(n))) for i, n in enumerate(sizes)]
    tensors[-1][-3:] = 7.0
    borders = {TILE, 2 * TILE, TILE + 5, TILE + 8, 2 * TILE + 7, 3 * TILE + 8, 4 * TILE + 8, 5 * TILE + 8}
    ks = sorted({border + 3 + delta for border in borders for delta in (-1, 0, 1)})
    check(backend, tensors, ks)


def test_all_winners_in_one_tensor(backend: Backend) -> None:
    rng = np.random.default_rng(2)
    tensors = [FP32.rounded(rng.standard_normal(n) * scale) for n, scale in [(90_000, 1), (40_000, 1e6), (90_000, 1)]]
    tensors = [backend.to(t) for t in tensors]
    check(backend, tensors, [1, 30_000, 39_999, 40_000, 40_001])


def test_100_000_tiny_tensors(backend: Backend) -> None:
    rng = np.random.default_rng(4)
    # a backend that makes several torch calls per tensor gets fewer
    sizes = rng.integers(0, 4, 100_000 if backend.name in ("cpu", "cuda") else 10_000)
    base = backend.to(BF16.rounded(rng.standard_normal(int(sizes.sum()))))
    tensors = base.split(sizes.tolist())
    oracle = Oracle([base])
    result = backend.topk_magnitude(tensors, 2_345)
    assert len(result.indices) == len(sizes)
    first = torch.from_numpy(np.cumsum(sizes) - sizes)
    counts = torch.tensor([len(index) for index in result.indices])
    whole = torch.cat([index.cpu() for index in result.indices]) + torch.repeat_interleave(first, counts)
    oracle.check(TopK((whole,), result.threshold, result.num_nonfinite), 2_345)


def test_many_tensors_of_mixed_dtypes_and_sizes(backend: Backend) -> None:
    rng = np.random.default_rng(5)
    names = list(VALUES)
    tensors = [
        backend.to(VALUES[names[i % len(names)]](rng, FORMATS[i % 3], int(rng.integers(200, 9_000)))) for i in range(60)
    ]
    check(backend, tensors)
    with_double = [*tensors, backend.to(random_patterns(rng, FP64, 50_000))]
    check(backend, with_double)


def test_float64_falls_between_the_other_dtypes(backend: Backend) -> None:
    """Neighbours that only fp64 tells apart, magnitudes beyond fp32 in both directions, and fp32 denormals."""
    one = np.array([1.0, 1 + 2.0**-40, 1 - 2.0**-40, 1 + 2.0**-23, 1e300, 1e-300, 2.0**-149, 2.0**-150, 0.0, 5e-324])
    tensors = [
        FP32.rounded(np.array([1.0, 1 + 2.0**-23, 2.0**-149, 2.0**-148, 3.4e38, 0.0])),
        FP64.rounded(one),
        BF16.tensor(np.array([0x3F80, 0x0001, 0x7F7F, 0x0000])),
        FP16.tensor(np.array([0x3C00, 0x0001, 0x03FF, 0x7BFF])),
    ]
    tensors = [backend.to(t) for t in tensors]
    check(backend, tensors, range(sum(t.numel() for t in tensors) + 1))


def test_16_bit_ties_take_the_first_positions(backend: Backend) -> None:
    for fmt in (BF16, FP16):
        tensor = backend.to(fmt.rounded(np.array([0.1, -3.0, 3.0, 2.0, -3.0, 3.0])))
        result = backend.topk_magnitude([tensor, tensor], 6)
        assert [index.tolist() for index in result.indices] == [[1, 2, 4, 5], [1, 2]]
        assert result.threshold == 3.0


# ---- layouts ----

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "step_3": lambda x: x[::3],
    "transposed": lambda x: x[: len(x) // 40 * 40].view(-1, 40).t(),
    "narrow_columns": lambda x: x[: len(x) // 50 * 50].view(-1, 50)[:, 11:14],
    "one_column": lambda x: x[: len(x) // 7 * 7].view(-1, 7)[:, 3],
    "expanded_rows": lambda x: x[: len(x) // 9].expand(9, -1),
    "expanded_columns": lambda x: x[: len(x) // 9, None].expand(-1, 9),
    "expanded_scalar": lambda x: x[:1].expand(len(x)),
    "channels_last": lambda x: x[: len(x) // 60 * 60].view(-1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x[: len(x) // 24 * 24].view(4, -1, 3, 2)[:, 1:, :, 1:].permute(2, 0, 3, 1),
    "size_1_dims": lambda x: x[None, ::2, None],
    "offset_1": lambda x: x[1:],
    "offset_5_not_to_the_end": lambda x: x[5:-9],
    "overlapping": lambda x: x.as_strided((len(x) - 40, 3), (1, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numel", [SMALL, 5 * TILE + 3], ids=["small", "sampled"])
@pytest.mark.parametrize("fmt", [FP32, BF16, FP64], ids=str)
def test_layouts(backend: Backend, fmt: Format, numel: int, layout: str) -> None:
    rng = np.random.default_rng(6)
    view = LAYOUTS[layout](backend.to(random_patterns(rng, fmt, numel) if numel == SMALL else normal(rng, fmt, numel)))
    beside = backend.to(normal(rng, fmt, 999))[::2]
    check(backend, [beside, view, beside], [1, view.numel() // 50, view.numel() // 2, view.numel()])


def test_zero_dimensional_and_empty(backend: Backend) -> None:
    def make(*values: float) -> Tensor:
        return backend.to(torch.tensor(values))

    scalar = backend.to(torch.tensor(-5.0))
    tensors = [make(), scalar, make().reshape(0, 3), make(1.0, 6.0), scalar, make()[::2]]
    check(backend, tensors, range(5))
    check(backend, [make(), make().reshape(4, 0)], [0])
    assert backend.topk_magnitude([], 0) == TopK((), float("inf"), 0)


def test_k_0_still_counts_nonfinite(backend: Backend) -> None:
    tensor, oracle = values_and_oracle("mostly_nonfinite", FP32, SAMPLED)
    assert oracle.num_nonfinite > SAMPLED // 2
    assert backend.topk_magnitude([backend.to(tensor)], 0).num_nonfinite == oracle.num_nonfinite


# ---- what the caller may pass ----


def test_accepts_parameters_tuples_and_integers(backend: Backend) -> None:
    tensor = torch.nn.Parameter(backend.to(torch.tensor([[1.0, -4.0], [3.0, 2.0]])))
    for k in (2, np.int64(2), torch.tensor(2)):
        result = backend.topk_magnitude((tensor,), k)
        assert result.indices[0].tolist() == [1, 2]
        assert result.threshold == 3.0
        assert not result.indices[0].requires_grad


def test_results_are_separate_memory_safe_tensors(backend: Backend) -> None:
    """Keeping one index tensor, or writing to it, does not disturb the next call."""
    tensor = backend.to(torch.tensor([1.0, 9.0, 8.0]))
    first = backend.topk_magnitude([tensor], 2).indices[0]
    backend.topk_magnitude([-tensor.flip(0)], 2)
    assert first.tolist() == [1, 2]


def good() -> Tensor:
    return torch.ones(3)


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "one_tensor": (lambda: topk_magnitude(good(), 1), TypeError, ["`tensors`", "list or tuple", "Tensor"]),
    "generator": (lambda: topk_magnitude((t for t in [good()]), 1), TypeError, ["`tensors`", "list", "generator"]),
    "not_a_tensor": (lambda: topk_magnitude([good(), 3.0], 1), TypeError, ["`tensors[1]`", "a tensor", "float"]),
    "sparse": (
        lambda: topk_magnitude([good().to_sparse()], 1),
        TypeError,
        ["`tensors[0]`", "strided", "torch.sparse_coo", ".to_dense()"],
    ),
    "integer": (
        lambda: topk_magnitude([good(), good().long()], 1),
        TypeError,
        ["`tensors[1]`", "float32, bfloat16, float16 or float64", "int64", "convert it"],
    ),
    "complex": (
        lambda: topk_magnitude([good() * 1j], 1),
        TypeError,
        ["`tensors[0]`", "complex64", "view_as_real"],
    ),
    "lazy_negative": (
        lambda: topk_magnitude([(good() * 1j).conj().imag], 1),
        TypeError,
        ["`tensors[0]`", "lazy", ".resolve_neg()"],
    ),
    "devices": (
        lambda: topk_magnitude([good(), good().to("meta")], 1),
        ValueError,
        ["`tensors[1]`", "cpu", "`tensors[0]`", "meta", "one device"],
    ),
    "k_float": (lambda: topk_magnitude([good()], 1.0), TypeError, ["`k`", "an int", "float"]),
    "k_bool": (lambda: topk_magnitude([good()], True), TypeError, ["`k`", "an int", "bool"]),
    "k_none": (lambda: topk_magnitude([good()], None), TypeError, ["`k`", "an int", "NoneType"]),
    "k_negative": (lambda: topk_magnitude([good()], -1), ValueError, ["`k`", "0 to", "3", "-1"]),
    "k_too_large": (lambda: topk_magnitude([good(), good()], 7), ValueError, ["`k`", "0 to", "`tensors`", "6", "7"]),
    "k_of_nothing": (lambda: topk_magnitude([], 1), ValueError, ["`k`", "0 to", "0", "1"]),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_torch_do_not_matter(backend: Backend, default: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = [torch.randn(3_000).to(dtype), torch.randn(50, 60), torch.zeros(0), torch.tensor(torch.nan)]
    tensors = [backend.to(x) for x in values]
    tensors[1] = tensors[1].t()
    for k in (0, 1, 700, 6_001):
        expected = backend.topk_magnitude(tensors, k)
        with other_default(default):
            actual = backend.topk_magnitude(tensors, k)
        for index, wanted in zip(actual.indices, expected.indices, strict=True):
            assert (index.dtype, index.device) == (torch.int64, tensors[0].device)
            assert torch.equal(index, wanted)
        assert str(actual.threshold) == str(expected.threshold)
        assert actual.num_nonfinite == expected.num_nonfinite == 1


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, error, parts = ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert_message(caught, parts)


# ---- determinism ----


@pytest.mark.parametrize("values", ["normal", "four_values", "few_nonfinite", "ascending_bucket"])
@pytest.mark.parametrize("layout", ["contiguous", "every_other"])
@pytest.mark.parametrize("fmt", [FP32, BF16], ids=str)
def test_any_number_of_threads(
    backend: Backend, num_threads: Callable[[int], None], fmt: Format, layout: str, values: str
) -> None:
    tensor = backend.to(values_and_oracle(values, fmt, SAMPLED)[0])
    if layout == "every_other":
        tensor = torch.stack([tensor, tensor], -1)[:, 0]
    oracle = Oracle([tensor])
    for threads in (1, 2, 3, 8, 2):
        num_threads(threads)
        check(backend, [tensor], [SAMPLED // 100, SAMPLED // 2], oracle)


# ---- large indices ----


def test_survivors_beyond_one_part_of_a_slab(backend: Backend, num_threads: Callable[[int], None]) -> None:
    """The cpu backend keeps a bit per element, in parts of 1 MB and then 2 MB per thread."""
    num_threads(1)
    selected = torch.rand(25 << 20, generator=torch.Generator().manual_seed(0)) < 0.3
    x = backend.to(torch.where(selected, -2.0, 1.0).to(torch.bfloat16))
    result = backend.topk_magnitude([x], int(selected.sum()))
    assert torch.equal(result.indices[0].cpu(), selected.nonzero().flatten())


def test_storage_offsets_above_2_31(backend: Backend) -> None:
    """Few elements, far apart: 64-bit strides and offsets at the price of a few pages."""
    if backend.device != "cpu":
        pytest.skip("memory that is not there is a CPU's privilege")
    base = sparse_memory(2**31 + 2**20, torch.bfloat16)
    rows = base.as_strided((2_049, 8), (2**20, 3))
    base[2**31 :: 3][:8] = torch.tensor([1, 5, 2, 4, 3, 8, 7, 6], dtype=torch.bfloat16)
    base[2**20] = 4.5
    check(backend, [rows, base[:: 2**20]], [0, 1, 4, 9, 12, 17, 40])


@pytest.mark.slow
def test_numel_above_2_32(backend: Backend) -> None:
    """Expanded rows: 2^32 elements and more in 128 KiB."""
    if backend.name == "reference":
        pytest.skip("the reference would need 34 GB")
    rows, columns = 2**16 + 3, 2**16 + 1
    row = torch.arange(columns, dtype=torch.float32).flip(0).remainder(251).to(torch.bfloat16)
    row[777] = 1000
    tensor = backend.to(row).expand(rows, columns)
    small = backend.to(torch.tensor([2000.0, 999.0]))
    assert tensor.numel() > 2**32
    every_row = torch.arange(rows) * columns + 777
    result = backend.topk_magnitude([small, tensor], rows + 1)
    assert result.indices[0].tolist() == [0]
    assert torch.equal(result.indices[1].cpu(), every_row)
    assert result.threshold == 1000
    assert result.num_nonfinite == 0
    result = backend.topk_magnitude([tensor, small], rows - 5)
    assert torch.equal(result.indices[0].cpu(), every_row[: rows - 6])
    assert result.indices[1].tolist() == [0]


@pytest.mark.slow
def test_contiguous_numel_above_2_31(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference would need 17 GB")
    tensor = (
        backend.to(sparse_memory(2**31 + 99, torch.bfloat16))
        if backend.device != "cpu"
        else sparse_memory(2**31 + 99, torch.bfloat16)
    )
    positions = [5, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 98]
    tensor[positions] = backend.to(torch.tensor([1, 2, 3, 2, float("nan")], dtype=torch.bfloat16))
    result = backend.topk_magnitude([tensor], 7)
    assert result.indices[0].tolist() == [0, 1, *positions]
    assert result.threshold == 0
    assert result.num_nonfinite == 1
    result = backend.topk_magnitude([tensor], 3)
    assert result.indices[0].tolist() == [2**31 - 1, 2**31, 2**31 + 98]


# ---- properties ----


@st.composite
def tensors_and_k(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    """Up to six tensors of any dtype, shape and layout, with many duplicates and special values; any k."""
    tensors = []
    for _ in range(draw(st.integers(0, 6))):
        fmt = draw(st.sampled_from(FORMATS))
        special = [0, 1, fmt.denormals - 1, fmt.denormals, fmt.one - 1, fmt.one, fmt.one + 1, fmt.inf - 1, fmt.inf]
        pattern = st.sampled_from([*special, fmt.inf + 1, fmt.sign - 1]) | st.integers(0, fmt.sign - 1)
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        numel = int(np.prod(shape))
        patterns = draw(st.lists(pattern, min_size=numel, max_size=numel))
        negative = draw(st.integers(0, 2**numel - 1)) if numel else 0
        words = [p | (fmt.sign if negative >> i & 1 else 0) for i, p in enumerate(patterns)]
        tensor = fmt.tensor(np.array(words, dtype=np.uint64)).reshape(shape)
        layout = draw(st.sampled_from(["as_is", "reversed_dims", "skip", "expanded"]))
        if layout == "reversed_dims":
            tensor = tensor.permute(tuple(range(tensor.dim()))[::-1])
        elif layout == "skip" and tensor.dim():
            tensor = tensor[..., ::2]
        elif layout == "expanded":
            tensor = tensor.expand(draw(st.integers(1, 3)), *tensor.shape)
        tensors.append(tensor)
    return tensors, draw(st.integers(0, sum(t.numel() for t in tensors)))


@settings(max_examples=120)
@given(case=tensors_and_k())
def test_property_any_small_input(backend: Backend, case: tuple[list[Tensor], int]) -> None:
    tensors, k = case
    if backend.device != "cpu":
        tensors = [backend.to(t) for t in tensors]
    check(backend, tensors, [k])


@settings(max_examples=12)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(sorted(VALUES)), st.sampled_from(FORMATS), st.integers(64, 2 * TILE)),
        min_size=3,
        max_size=6,
    ),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_property_any_sampled_input(
    backend: Backend, parts: list[tuple[str, Format, int]], density: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensors = [backend.to(VALUES[name](rng, fmt, numel)) for name, fmt, numel in parts]
    tensors.append(backend.to(normal(rng, FP32, 2 * TILE)))  # enough to be sampled
    numel = sum(t.numel() for t in tensors)
    check(backend, tensors, {int(density * numel), int(density * numel / 1000)})


def test_public_name() -> None:
    assert saft_kernels.topk_magnitude is topk_magnitude
    assert saft_kernels.TopK is TopK
