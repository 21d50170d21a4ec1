"""sparse_adamw_: every backend against torch.optim.AdamW on the dense parameter with masked gradients, and fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BACKENDS,
    DEFAULTS,
    Backend,
    assert_message,
    assert_same_bits,
    bits,
    flushed_denormals,
    other_default,
    sparse_memory,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saft_kernels
from saft_kernels import ops, sparse_adamw_
from saft_kernels.ops import prepare_sparse_adamw
from saft_kernels.ops.adamw import AdamWHyper, AdamWSegment, StalePlan

OP = "prepare_sparse_adamw"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Two right implementations order the same few operations differently, or fuse some: a few roundings of 2^-24 (2^-53)
# per step, of values near 1 here.
ROUNDINGS = 16
TOLERANCE = {
    torch.float32: {"rtol": ROUNDINGS * 2.0**-24, "atol": ROUNDINGS * 2.0**-24},
    torch.float64: {"rtol": ROUNDINGS * 2.0**-53, "atol": ROUNDINGS * 2.0**-53},
}
# A 16-bit parameter is rounded once more per step. Where two fp32 results straddle a tie, and that is rare, they end
# one spacing apart, and a later step may bring the element near 0 with that difference. Spacings between 1 and 2:
SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
LEAST_DENORMAL = {torch.bfloat16: 0.0, torch.float16: 2.0**-24}  # bf16's is beyond the fp32 tolerance
SHARE_ONE_SPACING_APART = 0.005


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Options:
    lr: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    amsgrad: bool = False
    maximize: bool = False
    grad_scale: float = 1.0
    masters: bool = False
    as_tensors: bool = False

    @property
    def scalars(self) -> dict[str, Any]:
        names = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "grad_scale")
        return {name: getattr(self, name) for name in names}

    def scalars_of_step(self, step: int, backend: Backend) -> dict[str, Any]:
        """The scalars and the step number; as tensors on the device, those that may be."""
        scalars: dict[str, Any] = {**self.scalars, "step": step}
        if self.as_tensors:
            for name in ("step", "lr", "grad_scale"):
                scalars[name] = backend.to(torch.tensor(scalars[name], dtype=torch.float32))
            scalars["found_inf"] = backend.to(torch.tensor([0.0]))
        return scalars


OPTIONS = {
    "default": Options(),
    "no_weight_decay": Options(weight_decay=0.0),
    "amsgrad": Options(amsgrad=True),
    "maximize": Options(maximize=True),
    "grad_scale": Options(grad_scale=1024.0),
    "grad_scale_3": Options(grad_scale=3.0, maximize=True),
    "betas_0": Options(beta1=0.0, beta2=0.0, eps=0.1),
    "torch_defaults": Options(lr=1e-3, beta2=0.999, weight_decay=1e-2),
    "large_eps": Options(eps=0.5, amsgrad=True, maximize=True),
    "lr_0": Options(lr=0.0),
    # a power of two: as an fp32 tensor it is the same number
    "scalars_as_tensors": Options(lr=2.0**-5, grad_scale=8.0, amsgrad=True, as_tensors=True),
    "masters": Options(masters=True),
    "masters_amsgrad_scaled": Options(masters=True, amsgrad=True, grad_scale=64.0),
}

# views of a flat tensor; no two elements share a place
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x,
    "step_2": lambda x: x[1::2],
    "matrix": lambda x: x[:1440].view(36, 40),
    "transposed": lambda x: x[:1440].view(36, 40).t(),
    "narrow_columns": lambda x: x[:1440].view(36, 40)[:, 3:20],
    "channels_last": lambda x: x[:1440].view(6, 5, 6, 8).permute(0, 3, 1, 2),
    "permuted": lambda x: x[:1440].view(6, 5, 6, 8)[1:, :, ::2].permute(2, 0, 3, 1),
    "zero_dim": lambda x: x[7],
}
LAYOUT_NUMEL = 1_500


def reversed_dims(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(range(tensor.dim()))[::-1])


def lay_out_grad(backend: Backend, layout: str, dense: Tensor, index: Tensor | None, param: Tensor) -> Tensor:
    """A gradient with the values `dense` (on the CPU, contiguous), in one of the forms an op has to take."""
    if layout == "contiguous":
        return backend.to(dense)
    if layout == "like_param":
        return torch.empty_like(param, dtype=dense.dtype).copy_(backend.to(dense))
    if layout == "reversed":
        return reversed_dims(backend.to(reversed_dims(dense).contiguous()))
    if layout == "every_other":
        return backend.to(torch.stack([dense, torch.full_like(dense, torch.nan)], -1))[..., 0]
    compact = dense.reshape(-1) if index is None else dense.reshape(-1)[index.long().cpu()]
    if layout == "compact":
        return backend.to(compact)
    assert layout == "compact_every_other"
    return backend.to(torch.stack([compact, compact], -1))[:, 0]


GRAD_LAYOUTS = ["contiguous", "like_param", "reversed", "every_other", "compact", "compact_every_other"]


@dataclass
class Problem:
    """One parameter, and everything `sparse_adamw_` wants to know of it."""

    backend: Backend
    dtype: torch.dtype
    options: Options = field(default_factory=Options)
    layout: str = "flat"
    numel: int = LAYOUT_NUMEL
    selected: str = "some"  # "some", "all" (as indices), or "whole" (indices None)
    index_dtype: torch.dtype = torch.int64
    state_like_param: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        values = torch.from_numpy(self.rng.standard_normal(self.numel)).to(self.dtype)
        self.base = self.backend.to(values)
        self.param = LAYOUTS[self.layout](self.base)
        numel = self.param.numel()
        count = {"some": -(-numel // 3), "all": numel, "whole": numel}[self.selected]
        flat = torch.from_numpy(np.sort(self.rng.permutation(numel)[:count]))
        self.index = None if self.selected == "whole" else self.backend.to(flat.to(self.index_dtype))
        self.mask = torch.zeros(numel, dtype=torch.bool).index_fill_(0, flat, True)
        self.before = bits(self.base).view(self.numel, -1)
        self.step_number = 0
        state_dtype = opmath(self.dtype)
        if self.index is not None:
            like = torch.empty(count, dtype=state_dtype, device=self.param.device)
        elif self.state_like_param:
            like = torch.empty_like(self.param, dtype=state_dtype)
        else:
            like = torch.empty(self.param.shape, dtype=state_dtype, device=self.param.device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(like), torch.zeros_like(like)
        self.max_exp_avg_sq = torch.zeros_like(like) if self.options.amsgrad else None
        self.master = None
        if self.options.masters and self.dtype.itemsize == 2:
            self.master = torch.zeros_like(like).copy_(self.chosen(self.param).view_as(like))

        # the oracle: the dense parameter in opmath
        self.shadow = torch.nn.Parameter(self.param.detach().cpu().to(state_dtype).contiguous().clone())
        o = self.options
        self.oracle = torch.optim.AdamW(
            [self.shadow],
            lr=o.lr,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            amsgrad=o.amsgrad,
            maximize=o.maximize,
            foreach=False,
        )

    def chosen(self, tensor: Tensor) -> Tensor:
        """Selected values of a tensor of the parameter's shape, in order."""
        flat = tensor.detach().reshape(-1)
        return flat if self.index is None else flat[self.index.long().to(flat.device)]

    def grad_values(self) -> Tensor:
        """A gradient of mixed scales; where nothing is selected it is NaN and infinite, and must not matter."""
        numel = self.param.numel()
        scale = np.exp(2 * self.rng.standard_normal(numel))
        values = torch.from_numpy(self.rng.standard_normal(numel) * np.minimum(scale, 9)).mul(self.options.grad_scale)
        values[~self.mask] = torch.tensor([torch.nan, torch.inf, -torch.inf]).double().repeat(numel)[:numel][~self.mask]
        return values.to(self.dtype).view(self.param.shape)

    def step(self, grad_layout: str = "contiguous", grad_dtype: torch.dtype | None = None) -> None:
        """One step of the op and one of the oracle."""
        self.step_number += 1
        dense = self.grad_values().to(grad_dtype or self.dtype)
        grad = lay_out_grad(self.backend, grad_layout, dense, self.index, self.param)
        grad_bits, version = bits(grad), self.param._version
        self.backend.sparse_adamw_(
            [self.param],
            [grad],
            [self.exp_avg],
            [self.exp_avg_sq],
            [self.index],
            max_exp_avg_sqs=None if self.max_exp_avg_sq is None else [self.max_exp_avg_sq],
            masters=None if self.master is None else [self.master],
            **self.options.scalars_of_step(self.step_number, self.backend),
        )
        assert torch.equal(bits(grad), grad_bits)
        assert self.param._version > version
        masked = torch.where(self.mask.view(dense.shape), dense, torch.zeros_like(dense))
        self.shadow.grad = masked.to(self.shadow.dtype) / self.options.grad_scale
        self.oracle.step()
        if self.master is None:  # what the next step starts from is what was stored
            self.shadow.data = self.shadow.data.to(self.dtype).to(self.shadow.dtype)

    def check(self) -> None:
        """The selected elements against the oracle; all others, those between the strides included, have their bits."""
        assert_close(self.chosen(self.param), self.chosen(self.shadow).to(self.dtype))
        state = self.oracle.state[self.shadow]
        assert_close(self.exp_avg, self.chosen(state["exp_avg"]))
        assert_close(self.exp_avg_sq, self.chosen(state["exp_avg_sq"]))
        if self.max_exp_avg_sq is not None:
            assert_close(self.max_exp_avg_sq, self.chosen(state["max_exp_avg_sq"]))
        if self.master is not None:
            assert_close(self.master, self.chosen(self.shadow))
            rounded = self.master.reshape(-1).to(self.dtype)  # NaN compares as NaN: torch itself makes several
            assert torch.equal(rounded.isnan(), self.chosen(self.param).isnan())
            assert_same_bits(self.chosen(self.param).nan_to_num(0.0), rounded.nan_to_num(0.0))
        places = LAYOUTS[self.layout](torch.arange(self.numel)).reshape(-1)
        untouched = torch.ones(self.numel, dtype=torch.bool).index_fill_(0, places[self.mask], False)
        assert torch.equal(bits(self.base).view(self.numel, -1)[untouched], self.before[untouched])

    def state(self) -> list[Tensor]:
        tensors = [self.base, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq, self.master]
        return [t for t in tensors if t is not None]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance of the dtype; 16-bit values are the same but for a few."""
    assert actual.dtype == expected.dtype
    actual, expected = actual.detach().cpu().reshape(-1), expected.detach().reshape(-1)
    if actual.dtype in TOLERANCE:
        torch.testing.assert_close(actual, expected, **TOLERANCE[actual.dtype], equal_nan=True)
        return
    spacing = SPACING[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=spacing, atol=spacing, equal_nan=True)
    tight = TOLERANCE[torch.float32]
    apart = ~actual.double().isclose(expected.double(), rtol=0, atol=tight["atol"], equal_nan=True)
    assert int(apart.sum()) <= max(1, SHARE_ONE_SPACING_APART * actual.numel())


# ---- against torch.optim.AdamW ----


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("selected", ["some", "whole"])
@all_dtypes
def test_options(backend: Backend, dtype: torch.dtype, selected: str, options: str) -> None:
    problem = Problem(backend, dtype, OPTIONS[options], selected=selected)
    for _ in range(5):
        problem.step()
    problem.check()
    assert not torch.equal(bits(problem.base), problem.before.reshape(-1)) or options == "lr_0"


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selected", ["some", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layouts(backend: Backend, dtype: torch.dtype, selected: str, layout: str, grad_layout: str) -> None:
    problem = Problem(backend, dtype, OPTIONS["masters_amsgrad_scaled"], layout=layout, selected=selected)
    for _ in range(2):
        problem.step(grad_layout)
    problem.check()


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_wholly_selected_with_state_in_memory_order(
    backend: Backend, dtype: torch.dtype, layout: str, grad_layout: str
) -> None:
    """What torch.zeros_like(param) gives; the gradient need not be laid out like it."""
    options = OPTIONS["masters_amsgrad_scaled"]
    problem = Problem(backend, dtype, options, layout=layout, selected="whole", state_like_param=True)
    assert not problem.exp_avg.is_contiguous()
    for _ in range(2):
        problem.step(grad_layout)
    problem.check()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("selected", ["some", "all", "whole"])
@all_dtypes
def test_index_dtypes_and_chunks(backend: Backend, dtype: torch.dtype, selected: str, index_dtype: torch.dtype) -> None:
    """More coordinates than the cpu backend gives to one thread at once."""
    problem = Problem(backend, dtype, numel=20_011, selected=selected, index_dtype=index_dtype)
    problem.step()
    problem.step("compact")
    problem.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("selected", ["some", "whole"])
def test_float32_gradients_of_16_bit_parameters(
    backend: Backend, selected: str, grad_layout: str, dtype: torch.dtype
) -> None:
    problem = Problem(backend, dtype, OPTIONS["masters"], layout="transposed", selected=selected)
    for _ in range(3):
        problem.step(grad_layout, grad_dtype=torch.float32)
    problem.check()


@pytest.mark.parametrize("selected", ["some", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_found_inf_writes_nothing(backend: Backend, dtype: torch.dtype, selected: str) -> None:
    problem = Problem(backend, dtype, OPTIONS["masters_amsgrad_scaled"], selected=selected)
    problem.step()
    before = [bits(tensor) for tensor in problem.state()]
    optional = {"max_exp_avg_sqs": [problem.max_exp_avg_sq], "masters": [problem.master]}
    for found_inf, unchanged in ((1.0, True), (0.0, False)):
        backend.sparse_adamw_(
            [problem.param],
            [backend.to(torch.full_like(problem.param, 3.0))],
            [problem.exp_avg],
            [problem.exp_avg_sq],
            [problem.index],
            **optional if dtype.itemsize == 2 else {"max_exp_avg_sqs": [problem.max_exp_avg_sq]},
            **problem.options.scalars,
            step=2,
            found_inf=backend.to(torch.tensor(found_inf)),
        )
        after = [bits(tensor) for tensor in problem.state()]
        assert all(map(torch.equal, before, after)) == unchanged


def test_expanded_gradients(backend: Backend) -> None:
    """What sum().backward() leaves: one value, stride 0."""
    param = backend.to(torch.linspace(-1, 1, 12)).view(3, 4)
    index = backend.to(torch.tensor([0, 5, 11]))
    results = []
    for grad in (backend.to(torch.tensor(0.5)).expand(3, 4), backend.to(torch.full((3, 4), 0.5))):
        p, m, v = (
            param.clone(),
            torch.zeros_like(index, dtype=torch.float32),
            torch.zeros_like(index, dtype=torch.float32),
        )
        backend.sparse_adamw_([p], [grad], [m], [v], [index], step=1, **Options().scalars)
        results.append((p, m, v))
    for expanded, plain in zip(*results, strict=True):
        assert_same_bits(expanded, plain)
    assert not torch.equal(results[0][0], param)


def test_100_steps_of_float32_agree_to_1e_6(backend: Backend) -> None:
    """The contract of SparseAdamW at density 1, here for the op."""
    problem = Problem(backend, torch.float32, OPTIONS["torch_defaults"], selected="whole")
    for _ in range(100):
        problem.step()
    torch.testing.assert_close(problem.param.cpu(), problem.shadow.data, rtol=1e-6, atol=1e-6)


# ---- against fp64 ----


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("selected", ["some", "whole"])
@all_dtypes
def test_one_step_against_float64(backend: Backend, dtype: torch.dtype, selected: str, options: str) -> None:
    """The formula of the docstring in numpy, from a state in mid-training."""
    o, step = OPTIONS[options], 7
    problem = Problem(backend, dtype, o, selected=selected)
    shape = problem.exp_avg.shape
    problem.exp_avg.copy_(torch.from_numpy(problem.rng.standard_normal(shape)))
    problem.exp_avg_sq.copy_(torch.from_numpy(problem.rng.random(shape)))
    if problem.max_exp_avg_sq is not None:
        problem.max_exp_avg_sq.copy_(torch.from_numpy(problem.rng.random(shape)))
    dense = problem.grad_values()

    def double(tensor: Tensor) -> np.ndarray:
        return tensor.detach().cpu().double().reshape(-1).numpy()

    p, m, v = double(problem.chosen(problem.param)), double(problem.exp_avg), double(problem.exp_avg_sq)
    g = double(problem.chosen(dense)) / o.grad_scale * (-1 if o.maximize else 1)
    p = p * (1 - o.lr * o.weight_decay)
    m = o.beta1 * m + (1 - o.beta1) * g
    v = o.beta2 * v + (1 - o.beta2) * g * g
    largest = v if problem.max_exp_avg_sq is None else np.maximum(v, double(problem.max_exp_avg_sq))
    p = p - o.lr / (1 - o.beta1**step) * m / (np.sqrt(largest) / np.sqrt(1 - o.beta2**step) + o.eps)

    backend.sparse_adamw_(
        [problem.param],
        [backend.to(dense)],
        [problem.exp_avg],
        [problem.exp_avg_sq],
        [problem.index],
        max_exp_avg_sqs=None if problem.max_exp_avg_sq is None else [problem.max_exp_avg_sq],
        masters=None if problem.master is None else [problem.master],
        step=step,
        **o.scalars,
    )
    state_tolerance = TOLERANCE[opmath(dtype)]
    np.testing.assert_allclose(double(problem.exp_avg), m, **state_tolerance)
    np.testing.assert_allclose(double(problem.exp_avg_sq), v, **state_tolerance)
    if problem.max_exp_avg_sq is not None:
        np.testing.assert_allclose(double(problem.max_exp_avg_sq), largest, **state_tolerance)
    if problem.master is not None:
        np.testing.assert_allclose(double(problem.master), p, **state_tolerance)
    tolerance = dict(state_tolerance)
    if dtype in SPACING:  # rounded once, on store: within half a spacing
        tolerance["rtol"] += SPACING[dtype] / 2
        tolerance["atol"] += LEAST_DENORMAL[dtype] / 2
    np.testing.assert_allclose(double(problem.chosen(problem.param)), p, **tolerance)


# ---- what stays, what propagates ----


@all_dtypes
def test_unselected_elements_keep_any_bits(backend: Backend, dtype: torch.dtype) -> None:
    """NaN payloads, infinities and -0 in unselected elements survive; weight decay does not reach them."""
    problem = Problem(backend, dtype, layout="narrow_columns")
    raw = problem.rng.integers(0, 256, (problem.numel, dtype.itemsize), dtype=np.uint8)
    places = LAYOUTS["narrow_columns"](torch.arange(problem.numel)).reshape(-1)[problem.mask]
    noise = torch.from_numpy(raw).view(dtype).reshape(-1)
    noise[places] = problem.base.cpu()[places]
    problem.base.copy_(backend.to(noise))
    problem.before = bits(problem.base).view(problem.numel, -1)
    for _ in range(2):
        problem.step()
    problem.check()


@pytest.mark.parametrize("options", ["default", "amsgrad", "masters"])
@all_dtypes
def test_nonfinite_selected_gradients_reach_their_own_element_alone(
    backend: Backend, dtype: torch.dtype, options: str
) -> None:
    """As in torch.optim.AdamW: the element becomes NaN, and its neighbours go on."""
    problem = Problem(backend, dtype, OPTIONS[options])
    values = problem.grad_values

    def with_nonfinite() -> Tensor:
        dense = values()
        at = problem.mask.nonzero().flatten()
        dense.view(-1)[at[3]] = torch.nan
        dense.view(-1)[at[300]] = -torch.inf
        return dense

    problem.grad_values = with_nonfinite  # type: ignore[method-assign]
    problem.step()
    problem.grad_values = values  # type: ignore[method-assign]
    problem.step()
    problem.check()
    assert problem.chosen(problem.param).cpu().isnan().nonzero().flatten().tolist() == [3, 300]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_stores_round_to_nearest_even(backend: Backend, dtype: torch.dtype) -> None:
    """Every step before the store is exact here, so the stored value is the rounding of one known fp32 value: random
    ones, ties and their neighbours, fp16 denormals, and what overflows to inf."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(90 << 23, 144 << 23, 20_000)  # 2^-37 to 2^17
    drop = 16 if dtype == torch.bfloat16 else 13
    ties = (patterns >> drop << drop) + (1 << (drop - 1))
    denormal_ties = (np.arange(1, 2_050) - 0.5) * 2.0**-24
    x = torch.from_numpy(np.concatenate([patterns, ties - 1, ties, ties + 1]).astype(np.int32)).view(torch.float32)
    x = torch.cat(
        [x, torch.from_numpy(denormal_ties).float(), torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 0.0])]
    )
    x[::2] *= -1
    param = backend.to(torch.zeros(len(x), dtype=dtype))
    exp_avg, exp_avg_sq = (backend.to(torch.zeros(len(x))) for _ in range(2))
    # param - lr * grad / sqrt(max), with powers of two
    backend.sparse_adamw_(
        [param],
        [backend.to(x)],
        [exp_avg],
        [exp_avg_sq],
        [None],
        max_exp_avg_sqs=[backend.to(torch.full((len(x),), 2.0**40))],
        step=1,
        **Options(lr=2.0**20, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0).scalars,
    )
    assert_same_bits(param, (0 - x).to(dtype))


# ---- masters ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("selected", ["some", "whole"])
def test_masters_keep_updates_too_small_for_the_parameter(backend: Backend, selected: str, dtype: torch.dtype) -> None:
    """50 steps of 1e-4 near 1: without masters bf16 never moves; with them it ends where fp32 ends."""
    options = replace(Options(), lr=1e-4, weight_decay=0.0, masters=True)
    for masters in (True, False):
        problem = Problem(backend, dtype, replace(options, masters=masters), selected=selected)
        problem.base.fill_(1.0)
        problem.shadow.data.fill_(1.0)
        if problem.master is not None:
            problem.master.fill_(1.0)
        ones = torch.ones(problem.param.shape, dtype=dtype)
        problem.grad_values = lambda ones=ones: ones  # type: ignore[method-assign]
        for _ in range(50):
            problem.step()
        end = set(problem.chosen(problem.param).tolist())
        if masters:
            assert end == {float(torch.tensor(1 - 50e-4).to(dtype))}
            assert_close(problem.master, problem.chosen(problem.shadow))
        elif dtype == torch.bfloat16:
            assert end == {1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("selected", ["some", "whole"])
def test_the_parameter_wins_over_its_master(backend: Backend, selected: str, dtype: torch.dtype) -> None:
    """Outside edits count: open_clip clamps logit_scale after each step. Elements not edited keep their master."""
    problem = Problem(backend, dtype, OPTIONS["masters"], selected=selected)
    problem.step()
    master_before = problem.master.clone()
    edited = problem.param.cpu().abs() > 1
    assert 0 < int(edited.sum()) < edited.numel()
    problem.param.clamp_(-1, 1)
    problem.before = bits(problem.base).view(problem.numel, -1)
    problem.shadow.data[edited] = problem.param.cpu()[edited].to(torch.float32)
    assert_same_bits(problem.master, master_before)
    problem.step()
    problem.check()


def test_a_master_within_the_rounding_of_its_parameter_is_kept(backend: Backend) -> None:
    """At the very edges of the interval that rounds to the parameter, and one step outside it."""
    param = torch.tensor([1.0], dtype=torch.bfloat16)
    edges = torch.tensor([1 - 2.0**-9, 1 + 2.0**-8, 1 - 2.0**-9 - 2.0**-20, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-10])
    kept = edges.to(torch.bfloat16) == param
    assert kept.tolist() == [True, True, False, False, True]
    n = len(edges)
    params, masters = backend.to(param.expand(n).clone()), backend.to(edges)
    zeros = [backend.to(torch.zeros(n)) for _ in range(2)]
    # lr 0: the element comes back as it was read
    options = replace(Options(), lr=0.0)
    grad = torch.zeros_like(params)
    backend.sparse_adamw_([params], [grad], zeros[:1], zeros[1:], [None], masters=[masters], step=1, **options.scalars)
    assert_same_bits(masters, torch.where(kept, edges, torch.ones(n)))
    assert_same_bits(params, param.expand(n))


# ---- many parameters ----


def mixed_problems(backend: Backend) -> list[Problem]:
    """Every dtype, index dtype, layout and form of gradient, from one element to several chunks."""
    names = list(LAYOUTS)
    return [
        Problem(
            backend,
            DTYPES[i % 4],
            Options(masters=True),
            layout=names[i // 2 % len(names)],
            numel=9_001 if i % 5 == 0 else LAYOUT_NUMEL,
            selected=("some", "all", "whole")[i % 3],
            index_dtype=(torch.int32, torch.int64)[i % 2],
            seed=i,
        )
        for i in range(26)
    ]


def step_together(
    problems: Sequence[Problem], around: contextlib.AbstractContextManager[None] | None = None, **more: Any
) -> None:
    """One call for all of them, inside of `around`; then each one's oracle."""
    denses = [p.grad_values() for p in problems]
    grads = [
        lay_out_grad(p.backend, GRAD_LAYOUTS[i % len(GRAD_LAYOUTS)], dense, p.index, p.param)
        for i, (p, dense) in enumerate(zip(problems, denses, strict=True))
    ]
    for problem in problems:
        problem.step_number += 1
    with around or contextlib.nullcontext():
        problems[0].backend.sparse_adamw_(
            [p.param for p in problems],
            grads,
            [p.exp_avg for p in problems],
            [p.exp_avg_sq for p in problems],
            [p.index for p in problems],
            masters=[p.master for p in problems],
            step=problems[0].step_number,
            **problems[0].options.scalars,
            **more,
        )
    for problem, dense in zip(problems, denses, strict=True):
        masked = torch.where(problem.mask.view(dense.shape), dense, torch.zeros_like(dense))
        problem.shadow.grad = masked.to(problem.shadow.dtype)
        problem.oracle.step()


def test_many_parameters_in_one_call(backend: Backend) -> None:
    problems = mixed_problems(backend)
    for _ in range(3):
        step_together(problems)
    for problem in problems:
        problem.check()


def test_nothing_selected_and_nothing_at_all(backend: Backend) -> None:
    scalars = Options().scalars
    assert backend.sparse_adamw_([], [], [], [], [], step=1, **scalars) is None

    def zeros(*shape: int, **kwargs: Any) -> Tensor:
        return backend.to(torch.zeros(*shape, **kwargs))

    params = [zeros(5) + 1, zeros(0, 3), zeros(0), zeros(2, 2) + 2]
    grads = [zeros(5) + torch.nan, zeros(0, 3), zeros(0), zeros(0)]  # the last one compact
    indices = [zeros(0, dtype=torch.int64), None, zeros(0, dtype=torch.int32), zeros(0, dtype=torch.int32)]
    state = [zeros(0), zeros(0, 3), zeros(0), zeros(0)]
    backend.sparse_adamw_(params, grads, state, [s.clone() for s in state], indices, step=1, **scalars)
    assert params[0].tolist() == [1] * 5
    assert params[3].tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("whole", [False, True])
@all_dtypes
def test_zero_dimensional_parameter(backend: Backend, dtype: torch.dtype, whole: bool) -> None:
    """logit_scale."""
    problem = Problem(backend, dtype, Options(masters=True), layout="zero_dim", selected="whole" if whole else "all")
    assert problem.param.shape == ()
    for _ in range(3):
        problem.step()
    problem.check()


def test_leaf_parameters_need_no_no_grad(backend: Backend) -> None:
    param = torch.nn.Parameter(backend.to(torch.ones(4)))
    (param * param).sum().backward()
    state = [backend.to(torch.zeros(2)) for _ in range(2)]
    index = backend.to(torch.tensor([1, 2]))
    version = param._version
    backend.sparse_adamw_([param], [param.grad], state[:1], state[1:], [index], step=1, **Options().scalars)
    assert param.requires_grad
    assert param.is_leaf
    assert param._version > version
    assert param[0] == param[3] == 1
    assert param[1] < 1


def test_flat_indices_above_2_31(backend: Backend) -> None:
    """The parameter and its gradient take the memory of a few pages."""
    if backend.device != "cpu":
        pytest.skip("memory that is not there is a CPU's privilege")
    positions = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 4_000])
    huge = [sparse_memory(2**31 + 4_001, torch.bfloat16) for _ in range(2)]
    values = torch.tensor([[1.0, 2, 3, 4, 5], [1, -1, 2, -2, 3]], dtype=torch.bfloat16)
    for tensor, row in zip(huge, values, strict=True):
        tensor[positions] = row
    # the same five elements side by side
    small = list(values.clone())
    results = []
    for (param, grad), index in ((huge, positions), (small, None)):
        state = [torch.zeros(5) for _ in range(2)]
        backend.sparse_adamw_([param], [grad], state[:1], state[1:], [index], step=1, **Options().scalars)
        results.append([param[positions] if index is not None else param, *state])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert not torch.equal(small[0], values[0])
    assert huge[0][2**31 + 2 : 2**31 + 4_000].count_nonzero() == 0


# ---- the same bits ----


def run_mixed(backend: Backend) -> list[Tensor]:
    problems = mixed_problems(backend)
    for _ in range(2):
        step_together(problems)
    return [t for p in problems for t in p.state()]


def test_same_bits_from_run_to_run_and_for_any_number_of_threads(
    backend: Backend, num_threads: Callable[[int], None]
) -> None:
    num_threads(1)
    expected = run_mixed(backend)
    for threads in (1, 2, 3, 8, 2):
        num_threads(threads)
        for a, b in zip(run_mixed(backend), expected, strict=True):
            assert_same_bits(a, b, f"{threads} threads")


def test_cpu_instruction_sets_give_the_same_bits() -> None:
    """-ffp-contract=off: no level fuses a multiply and an add. Any bits as input, NaN compared as NaN."""
    available = [b for b in BACKENDS if b.name == "cpu" and b.why_unavailable() is None]
    if len(available) < 2:
        pytest.skip("one instruction set only")
    rng = np.random.default_rng(0)
    numel = 70_001
    for dtype in DTYPES:
        patterns = torch.from_numpy(rng.integers(0, 256, (2, numel * dtype.itemsize), dtype=np.uint8)).view(dtype)
        normal = torch.from_numpy(rng.standard_normal((2, numel))).to(dtype)
        for source in (patterns, normal):
            index = torch.from_numpy(rng.permutation(numel)[: numel // 2]).int()
            results = []
            for backend in available:
                param, grad = source.clone()
                state = [torch.zeros(len(index), dtype=opmath(dtype)) for _ in range(3)]
                for step in (1, 2, 3):
                    backend.sparse_adamw_(
                        [param],
                        [grad],
                        state[:1],
                        state[1:2],
                        [index],
                        max_exp_avg_sqs=state[2:] if source is normal else None,
                        step=step,
                        **Options(grad_scale=3.0).scalars,
                    )
                results.append([param, *state])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert torch.equal(a.isnan(), b.isnan())
                    assert_same_bits(a.nan_to_num(0.0), b.nan_to_num(0.0), f"{dtype}")


def test_flush_denormal_holds_on_every_thread(backend: Backend, num_threads: Callable[[int], None]) -> None:
    """torch sets it for the calling thread; the result must not depend on which thread takes an element."""
    if backend.name == "reference":
        pytest.skip("torch's own kernels flush by thread")
    numel = 100_003
    grad = backend.to((torch.arange(numel, dtype=torch.int32) % 9_000 + 1).view(torch.float32))
    results = []
    for threads in (1, 2, 8):
        num_threads(threads)
        param, m, v = (torch.zeros_like(grad) for _ in range(3))
        with flushed_denormals():
            backend.sparse_adamw_([param], [grad], [m], [v], [None], step=1, **Options().scalars)
        results.append((param, m, v))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_of_torch_do_not_matter(backend: Backend, default: str) -> None:
    """All dtypes, index dtypes, layouts and forms of gradient."""
    results = []
    for is_other in (False, True):
        problems = mixed_problems(backend)
        found_inf = backend.to(torch.zeros(1))
        for _ in range(2):
            around = other_default(default) if is_other else contextlib.nullcontext()
            step_together(problems, around, found_inf=found_inf)
        results.append([t for p in problems for t in p.state()])
    for actual, expected in zip(*results, strict=True):
        assert actual.device == expected.device
        assert_same_bits(actual, expected)


# ---- properties ----


@settings(max_examples=50)
@given(data=st.data())
def test_property_how_the_coordinates_are_presented_does_not_matter(backend: Backend, data: st.DataObject) -> None:
    """One call, one call per half, shuffled indices, a compact gradient, or None for all: the same bits."""
    dtype = data.draw(st.sampled_from(DTYPES))
    numel = data.draw(st.integers(1, 700))
    seed = data.draw(st.integers(0, 999))
    options = OPTIONS[data.draw(st.sampled_from(sorted(OPTIONS)))]
    rng = np.random.default_rng(seed)
    count = data.draw(st.sampled_from([numel, data.draw(st.integers(0, numel))]))
    chosen = np.sort(rng.permutation(numel)[:count])
    param, grad = (torch.from_numpy(rng.standard_normal(numel)).to(dtype) for _ in range(2))
    state = torch.from_numpy(rng.random((2, numel))).to(opmath(dtype))

    def run(*parts: np.ndarray, compact: bool = False, whole: bool = False) -> list[Tensor]:
        p, m, v = backend.to(param), backend.to(state[0]), backend.to(state[1])
        for part in parts:
            at = backend.to(torch.from_numpy(part))
            g = backend.to(grad)
            part_m, part_v = m[at], v[at]
            backend.sparse_adamw_(
                [p],
                [g[at] if compact else g],
                [part_m],
                [part_v],
                [None if whole else at],
                step=4,
                **options.scalars,
            )
            m[at], v[at] = part_m, part_v
        return [p, m, v]

    expected = run(chosen)
    ways = [run(chosen[::2], chosen[1::2]), run(rng.permutation(chosen))]
    if count < numel:  # with all of them, shape (numel,) is the dense gradient
        ways.append(run(rng.permutation(chosen), compact=True))
    else:
        ways.append(run(chosen, whole=True))
    for way in ways:
        for a, b in zip(way, expected, strict=True):
            assert_same_bits(a, b)
    left = np.setdiff1d(np.arange(numel), chosen)
    assert_same_bits(expected[0].cpu()[left], param[left])


# ---- a prepared plan, used again and again ----


@dataclass
class Planned:
    """A plan, and the same step made anew by the public op."""

    backend: Backend
    param: Tensor
    index: Tensor | None

    def __post_init__(self) -> None:
        shape = self.param.shape if self.index is None else self.index.shape
        self.state = [torch.zeros(shape, device=self.param.device) for _ in range(2)]
        segment = AdamWSegment(self.param, *self.state, self.index)
        self.plan = prepare_sparse_adamw([segment], backend=self.backend.name)
        self.expected_param = self.param.clone()
        self.expected_state = [s.clone() for s in self.state]
        self.steps = 0

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        o = Options()
        with self.backend.forced():
            self.plan.step([grad], [AdamWHyper(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, self.steps)])
        m, v = self.expected_state
        self.backend.sparse_adamw_([self.expected_param], [grad], [m], [v], [self.index], step=self.steps, **o.scalars)
        assert_same_bits(self.param, self.expected_param)
        for a, b in zip(self.state, self.expected_state, strict=True):
            assert_same_bits(a, b)


def test_plan_follows_gradients_that_move_and_change_form(backend: Backend) -> None:
    """zero_grad() frees gradients; the next one may come at the same address with another form."""
    index = backend.to(torch.tensor([90, 3, 40]))
    planned = Planned(backend, backend.to(torch.linspace(0, 1, 100)), index)
    memory = backend.to(torch.linspace(-1, 1, 100))
    planned.step(memory)
    planned.step(memory)
    planned.step(memory[:3])  # compact, where the dense one was
    planned.step(memory[:3])
    planned.step(memory)
    planned.step(memory.clone())
    planned.step(backend.to(torch.randn(100, 2))[:, 1])
    planned.step(memory[:3] * 2)
    planned.step(memory[:6:2])


def test_plan_whose_gradients_come_back_to_where_they_were(backend: Backend) -> None:
    """An allocator hands out the same few blocks in turn, while the layout of another gradient changes."""
    params = [backend.to(torch.linspace(-1, 1, 60)).view(6, 10) for _ in range(2)]
    expected = [p.clone() for p in params]
    states, expected_states = ([[torch.zeros_like(p) for _ in range(2)] for p in params] for _ in range(2))
    plan = prepare_sparse_adamw(
        [AdamWSegment(p, *s) for p, s in zip(params, states, strict=True)], backend=backend.name
    )
    blocks = [backend.to(torch.linspace(low, low + 1, 60)).view(6, 10) for low in (-3, 0, 2)]
    transposed = backend.to(torch.linspace(1, -1, 60)).view(10, 6).t()
    o = Options()
    orders = [(0, 1), (1, 0), (2, 1), (0, transposed), (2, 1), (1, 2), (0, transposed), (0, 1), (1, transposed)]
    for step, order in enumerate(orders, 1):
        grads = [blocks[block] if isinstance(block, int) else block for block in order]
        with backend.forced():
            plan.step(grads, [AdamWHyper(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, step)])
        m, v = zip(*expected_states, strict=True)
        backend.sparse_adamw_(expected, grads, list(m), list(v), [None, None], step=step, **o.scalars)
        for param, want in zip(params, expected, strict=True):
            assert_same_bits(param, want, f"step {step}")


def test_plan_of_a_wholly_selected_parameter(backend: Backend) -> None:
    planned = Planned(backend, backend.to(torch.linspace(0, 1, 12)).view(4, 3).t(), None)
    grad = backend.to(torch.linspace(-1, 1, 12))
    planned.step(grad.view(3, 4))
    planned.step(grad.view(4, 3).t())
    planned.step(grad)
    planned.step(grad.view(3, 4))


def test_plan_follows_a_parameter_whose_memory_moves(backend: Backend) -> None:
    """`param.data = ...`, as accelerate and deepspeed do."""
    index = backend.to(torch.tensor([1, 5]))
    planned = Planned(backend, backend.to(torch.ones(8)), index)
    grad = backend.to(torch.linspace(1, 2, 8))
    planned.step(grad)
    old = planned.param.clone()
    planned.param.data = planned.param.clone().repeat_interleave(2)[::2]
    planned.step(grad)
    assert not torch.equal(planned.param, old)


def test_plan_with_several_rows_of_hyperparameters(backend: Backend) -> None:
    """Two groups in one launch, each with its own scalars and step count."""
    o = Options()
    hypers = [AdamWHyper(0.1, 0.9, 0.99, 1e-8, 0.0, 3), AdamWHyper(0.01, 0.5, 0.9, 1e-4, 0.3, 8, True, 2.0)]
    params = [backend.to(torch.linspace(-1, 1, 300)) for _ in range(4)]
    expected = [p.clone() for p in params]
    grads = [backend.to(torch.linspace(2, -1, 300)) for _ in params]
    states = [[torch.zeros_like(p) for _ in range(2)] for p in params]
    rows = [0, 1, 1, 0]
    segments = [AdamWSegment(p, *s, None, hyper=row) for p, s, row in zip(params, states, rows, strict=True)]
    plan = prepare_sparse_adamw(segments, backend=backend.name)
    with backend.forced():
        plan.step(grads, hypers)
    for param, want, grad, row in zip(params, expected, grads, rows, strict=True):
        h = hypers[row]
        scalars = dict(o.scalars, lr=h.lr, beta1=h.beta1, beta2=h.beta2, eps=h.eps, weight_decay=h.weight_decay)
        scalars.update(maximize=h.maximize, grad_scale=h.grad_scale)
        state = [torch.zeros_like(want) for _ in range(2)]
        backend.sparse_adamw_([want], [grad], state[:1], state[1:], [None], step=int(h.step), **scalars)
        assert_same_bits(param, want)
    assert not torch.equal(params[0], params[1])


# ---- what a step may read, whatever happened since the plan was made ----

EARLIER = {"first": 0, "later": 2}  # steps before it happens
SPOILED_GRADS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "shorter": (lambda g: g.reshape(-1)[:10].clone(), ["(40, 50)", "(3,)", "(10,)"]),
    "longer": (lambda g: g.repeat(2, 1), ["(40, 50)", "(3,)", "(80, 50)"]),
    "as_many": (lambda g: g.t(), ["(40, 50)", "(50, 40)"]),
    "scalar": (lambda g: g[0, 0], ["(40, 50)", "()"]),
    "compact_of_another": (lambda g: g[0, :4].clone(), ["(3,)", "(4,)"]),
    "float64": (lambda g: g.double(), ["float32", "float64"]),
    "bfloat16": (lambda g: g.bfloat16(), ["float32", "bfloat16"]),
    "int32": (lambda g: g.int(), ["float32", "int32"]),
    "meta": (lambda g: g.to("meta"), ["device", "meta"]),
}


@dataclass
class Watched:
    """A plan for two parameters, and all they are made of."""

    backend: Backend

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.params = [self.backend.to(torch.randn(40, 50)), self.backend.to(torch.randn(6))]
        self.index = self.backend.to(torch.tensor([5, 77, 1_999]))
        self.state = [[torch.zeros(3, device=p.device), torch.zeros(6, device=p.device)] for p in self.params]
        self.grads = [torch.ones_like(p) for p in self.params]

    def prepare(self) -> None:
        (m, whole_m), (v, whole_v) = self.state
        segments = [AdamWSegment(self.params[0], m, v, self.index), AdamWSegment(self.params[1], whole_m, whole_v)]
        self.plan = prepare_sparse_adamw(segments, backend=self.backend.name)
        self.steps = 0

    def prepare_and_step(self) -> None:
        self.prepare()
        self.step()

    def step(self) -> None:
        self.steps += 1
        with self.backend.forced():
            self.plan.step(self.grads, [AdamWHyper(0.1, 0.9, 0.95, 1e-8, 0.1, self.steps)])

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.state[0], *self.state[1]]


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("case", SPOILED_GRADS)
@pytest.mark.parametrize("how", ["another tensor", "the tensor's data"])
def test_a_gradient_that_the_step_may_not_read(backend: Backend, how: str, case: str, earlier: str) -> None:
    """In the step that would read it, before anything is written; the next step has what it needs again."""
    watched = Watched(backend)
    watched.prepare()
    for _ in range(EARLIER[earlier]):
        watched.step()
    spoil, parts = SPOILED_GRADS[case]
    good = watched.grads[0]
    spoiled = spoil(good)
    if how == "another tensor":
        watched.grads[0] = spoiled
    else:
        watched.grads[0] = good.clone()
        if spoiled.is_meta:  # torch does not let data change its device
            torch.utils.swap_tensors(watched.grads[0], spoiled)
        else:
            watched.grads[0].data = spoiled
    before = [bits(t) for t in watched.tensors()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^`grads\[0\]`") as caught:
            watched.step()
        assert_message(caught, parts)
    assert all(torch.equal(bits(t), b) for t, b in zip(watched.tensors(), before, strict=True))
    watched.grads[0] = good
    watched.step()
    assert not any(torch.equal(bits(t), b) for t, b in zip(watched.tensors(), before, strict=True))


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["params", "grads"])
def test_memory_that_was_freed_since_the_plan_was_made(backend: Backend, what: str, which: int, earlier: str) -> None:
    watched = Watched(backend)
    watched.prepare()
    for _ in range(EARLIER[earlier]):
        watched.step()
    tensor = getattr(watched, what)[which]
    numel = tensor.untyped_storage().nbytes()
    others = [t for t in watched.tensors() if t is not tensor]
    before = [bits(t) for t in others]
    tensor.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^`{what}\[{which}\]`") as caught:
            watched.step()
        assert_message(caught, [f"{numel} bytes", "got 0", "freed"])
    assert all(torch.equal(bits(t), b) for t, b in zip(others, before, strict=True))
    tensor.untyped_storage().resize_(numel)
    tensor.fill_(1.0)
    watched.step()


@pytest.mark.parametrize("what", ["params", "exp_avgs", "exp_avg_sqs", "indices"])
def test_memory_that_was_freed_before_the_plan_was_made(backend: Backend, what: str) -> None:
    """A view that begins in the middle of what is gone; and one that reaches beyond what is left."""
    for left in (0, 20):
        watched = Watched(backend)
        whole = torch.ones(16_000, device=watched.params[0].device)
        if what == "indices":
            whole = whole.long()
            watched.index = whole[5_000:5_003]
        elif what == "params":
            watched.params[0] = whole[5_000:7_000].view(40, 50)
        else:
            watched.state[what == "exp_avg_sqs"][0] = whole[5_000:5_003]
        whole.untyped_storage().resize_(left)
        with pytest.raises(ValueError, match=rf"^`{what}\[0\]`") as caught:
            watched.prepare_and_step()
        assert_message(caught, [f"got {left}", "freed"])


@pytest.mark.parametrize("bad", [-1, -7, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_negative_indices_of_a_wide_parameter(backend: Backend, dtype: torch.dtype, bad: int) -> None:
    """Of more than 2^32 elements: every negative int32 would be a position, were it unsigned."""
    if backend.device != "cpu":
        pytest.skip("memory that is not there is a CPU's privilege")
    param = sparse_memory(2**32 + 2**20, torch.bfloat16)
    index = torch.tensor([4, bad], dtype=dtype)
    state = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(IndexError) as caught:
        backend.sparse_adamw_(
            [param], [torch.ones(2).bfloat16()], state[:1], state[1:], [index], step=1, **Options().scalars
        )
    assert_message(caught, ["`indices[0]`", f"[0, {param.numel()})", f"{bad} to 4"])
    assert not state[0].any()
    assert not param[[4, bad % 2**32]].any()


@pytest.mark.skipif(ops.why_unavailable("cpu") is not None, reason=f"cpu: {ops.why_unavailable('cpu')}")
@pytest.mark.parametrize("bad", [-1, 2_000, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("at", [0, 300, 999])
@pytest.mark.parametrize("name", ["", "encoder.weight"])
def test_an_index_that_is_wrong_by_the_time_of_the_step(name: str, at: int, bad: int) -> None:
    """The cpu backend looks at what it uses. A GPU is not waited for."""
    base, other = torch.ones(6_000), torch.ones(5)
    param, index = base[2_000:4_000], torch.arange(1_000, dtype=torch.int32)
    state = [torch.zeros(n) for n in (1_000, 1_000, 5, 5)]
    segments = [AdamWSegment(param, *state[:2], index, name=name), AdamWSegment(other, *state[2:])]
    plan = prepare_sparse_adamw(segments, backend="cpu")
    grads = [torch.ones_like(param), torch.ones(5)]
    index[at] = bad
    with pytest.raises(IndexError) as caught:
        plan.step(grads, [AdamWHyper(0.1, 0.9, 0.95, 1e-8, 0.1, 1)])
    assert_message(caught, [f"parameter {name!r}" if name else "`indices[0]`", "[0, 2000)", str(bad)])
    assert bool((base[:2_000] == 1).all())
    assert bool((base[3_000:] == 1).all())
    assert bool((other == 1).all())  # what comes after it is left alone
    index[at] = at
    plan.step(grads, [AdamWHyper(0.1, 0.9, 0.95, 1e-8, 0.1, 2)])
    assert bool((param[:1_000] != 1).all())


@pytest.mark.parametrize("change", ["size", "dtype", "device"])
def test_a_parameter_that_changed_is_a_stale_plan(backend: Backend, change: str) -> None:
    """Its optimizer prepares another."""
    watched = Watched(backend)
    watched.prepare()
    watched.step()
    param, before = watched.params[1], [bits(t) for t in watched.tensors()]
    if change == "device":
        torch.utils.swap_tensors(param, torch.zeros(6, device="meta"))
    else:
        param.data = backend.to({"size": torch.zeros(7), "dtype": torch.zeros(6).double()}[change])
    watched.grads[1] = torch.ones_like(param)
    with pytest.raises(StalePlan, match=r"^`params\[1\]`: expected 6 elements of float32") as caught:
        watched.step()
    assert_message(caught, ["prepare another step"])
    others = [t for t in watched.tensors() if t is not param]
    assert all(torch.equal(bits(t), b) for t, b in zip(others, before[:1] + before[2:], strict=True))


# ---- errors: nothing has been written ----


def call(**changes: Any) -> None:
    """A call that is right but for `changes`."""
    arguments: dict[str, Any] = {
        "params": [PARAM],
        "grads": [torch.ones(2, 3)],
        "exp_avgs": [torch.zeros(2)],
        "exp_avg_sqs": [torch.zeros(2)],
        "indices": [torch.tensor([1, 4])],
        "step": 1,
        **Options().scalars,
    }
    sparse_adamw_(**{**arguments, **changes})


PARAM = torch.zeros(2, 3)
HALF = torch.zeros(2, 3, dtype=torch.bfloat16)
META = torch.zeros(2, device="meta")

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "params_tensor": ({"params": PARAM}, TypeError, ["`params`", "list or tuple", "Tensor"]),
    "params_int": ({"params": [PARAM.long()]}, TypeError, ["`params[0]`", "float32", "int64"]),
    "params_complex": ({"params": [PARAM * 1j]}, TypeError, ["`params[0]`", "complex64", "view_as_real"]),
    "params_sparse": ({"params": [PARAM.to_sparse()]}, TypeError, ["`params[0]`", "strided", "to_dense"]),
    "params_expanded": (
        {"params": [torch.zeros(3).expand(2, 3)]},
        ValueError,
        ["`params[0]`", "one memory location", "(0, 1)"],
    ),
    "grads_tensor": ({"grads": torch.ones(1, 2, 3)}, TypeError, ["`grads`", "list or tuple", "Tensor"]),
    "grads_none": ({"grads": [None]}, TypeError, ["`grads[0]`", "a tensor", "NoneType"]),
    "grads_sparse": ({"grads": [PARAM.to_sparse()]}, TypeError, ["`grads[0]`", "strided", "to_dense"]),
    "grads_too_few": ({"grads": []}, ValueError, ["`grads`", "1", "`params`", "got 0"]),
    "grads_shape": ({"grads": [torch.ones(3, 2)]}, ValueError, ["`grads[0]`", "(2, 3)", "(2,)", "(3, 2)"]),
    "grads_compact_length": ({"grads": [torch.ones(3)]}, ValueError, ["`grads[0]`", "(2,)", "(3,)"]),
    "grads_dtype": ({"grads": [PARAM.double()]}, ValueError, ["`grads[0]`", "float32", "`params[0]`", "float64"]),
    "grads_int_of_16_bit": (
        {"params": [HALF], "grads": [PARAM.int()]},
        ValueError,
        ["`grads[0]`", "bfloat16", "int32"],
    ),
    "grads_other_16_bit": (
        {"params": [HALF], "grads": [PARAM.half()]},
        ValueError,
        ["`grads[0]`", "bfloat16", "float16"],
    ),
    "grads_device": (
        {"grads": [PARAM.to("meta")]},
        ValueError,
        ["`grads[0]`", "cpu", "`params[0]`", "meta", "move the model"],
    ),
    "exp_avgs_too_many": ({"exp_avgs": [torch.zeros(2)] * 2}, ValueError, ["`exp_avgs`", "1", "got 2"]),
    "exp_avgs_tensor": ({"exp_avgs": torch.zeros(1, 2)}, TypeError, ["`exp_avgs`", "list or tuple", "Tensor"]),
    "exp_avgs_none": ({"exp_avgs": [None]}, TypeError, ["`exp_avgs[0]`", "a tensor", "NoneType"]),
    "exp_avgs_shape": ({"exp_avgs": [torch.zeros(3)]}, ValueError, ["`exp_avgs[0]`", "(2,)", "(3,)"]),
    "exp_avgs_dtype": ({"exp_avgs": [torch.zeros(2).bfloat16()]}, ValueError, ["`exp_avgs[0]`", "float32", "bfloat16"]),
    "exp_avgs_strided": ({"exp_avgs": [torch.zeros(4)[::2]]}, ValueError, ["`exp_avg_sqs[0]`", "strides", "(2,)"]),
    "state_strided": (
        {"exp_avgs": [torch.zeros(4)[::2]], "exp_avg_sqs": [torch.zeros(4)[::2]]},
        ValueError,
        ["`exp_avgs[0]`", "contiguous", "(2,)"],
    ),
    "whole_state_shape": ({"indices": [None]}, ValueError, ["`exp_avgs[0]`", "(2, 3)", "(2,)"]),
    "whole_state_strides": (
        {"indices": [None], "exp_avgs": [torch.zeros(3, 2).t()], "exp_avg_sqs": [torch.zeros(3, 2).t()]},
        ValueError,
        ["`exp_avgs[0]`", "(3, 1)", "contiguous", "(1, 2)"],
    ),
    "exp_avg_sqs_dtype": ({"exp_avg_sqs": [torch.zeros(2).double()]}, ValueError, ["`exp_avg_sqs[0]`", "float64"]),
    "exp_avg_sqs_device": ({"exp_avg_sqs": [META]}, ValueError, ["`exp_avg_sqs[0]`", "cpu", "meta"]),
    "max_exp_avg_sqs_length": ({"max_exp_avg_sqs": []}, ValueError, ["`max_exp_avg_sqs`", "1", "got 0"]),
    "max_exp_avg_sqs_none": ({"max_exp_avg_sqs": [None]}, TypeError, ["`max_exp_avg_sqs[0]`", "a tensor", "NoneType"]),
    "max_exp_avg_sqs_shape": ({"max_exp_avg_sqs": [PARAM]}, ValueError, ["`max_exp_avg_sqs[0]`", "(2,)", "(2, 3)"]),
    "masters_of_float32": ({"masters": [torch.zeros(2)]}, ValueError, ["`masters[0]`", "None", "float32", "16-bit"]),
    "masters_dtype": (
        {"params": [HALF], "grads": [HALF], "masters": [torch.zeros(2).bfloat16()]},
        ValueError,
        ["`masters[0]`", "float32", "bfloat16"],
    ),
    "indices_tensor": ({"indices": torch.tensor([[1, 4]])}, TypeError, ["`indices`", "list or tuple", "Tensor"]),
    "indices_list": ({"indices": [[1, 4]]}, TypeError, ["`indices[0]`", "int32 or int64", "[1, 4]"]),
    "indices_float": ({"indices": [torch.zeros(2)]}, TypeError, ["`indices[0]`", "int32 or int64", "float32"]),
    "indices_matrix": ({"indices": [torch.tensor([[1], [4]])]}, TypeError, ["one-dimensional", "(2, 1)"]),
    "indices_range": ({"indices": [torch.tensor([1, 6])]}, IndexError, ["`indices[0]`", "[0, 6)", "1 to 6"]),
    "indices_negative": ({"indices": [torch.tensor([-1, 3])]}, IndexError, ["`indices[0]`", "[0, 6)", "-1 to 3"]),
    "indices_device": ({"indices": [META.long()]}, ValueError, ["`indices[0]`", "cpu", "meta"]),
    "step_0": ({"step": 0}, ValueError, ["`step`", "counted from 1", "0"]),
    "beta1": ({"beta1": 1.0}, ValueError, ["`beta1`", "[0, 1)", "1.0"]),
    "beta2": ({"beta2": -0.1}, ValueError, ["`beta2`", "[0, 1)", "-0.1"]),
    "step_0_tensor": ({"step": torch.tensor(0.0)}, ValueError, ["`step`", "counted from 1", "0"]),
    "lr_of_two": ({"lr": torch.tensor([0.1, 0.2])}, ValueError, ["`lr`", "one element", "(2,)"]),
    "found_inf_of_two": ({"found_inf": torch.zeros(2)}, ValueError, ["`found_inf`", "one element", "(2,)"]),
    "grad_scale": ({"grad_scale": 0.0}, ValueError, ["`grad_scale`", "0", "1.0"]),
    "second_of_two": (
        {
            "params": [PARAM, torch.zeros(4)],
            "grads": [torch.ones(2, 3), torch.ones(4)],
            "exp_avgs": [torch.zeros(2), torch.zeros(1)],
            "exp_avg_sqs": [torch.zeros(2), torch.zeros(1)],
            "indices": [torch.tensor([1, 4]), torch.tensor([4])],
        },
        IndexError,
        ["`indices[1]`", "[0, 4)", "`params[1]`", "4 to 4"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_write_nothing(case: str) -> None:
    changes, error, parts = ERRORS[case]
    with pytest.raises(error) as caught:
        call(**changes)
    assert_message(caught, parts)
    assert not PARAM.any()
    assert not HALF.any()


def test_the_call_of_the_error_cases_is_right_without_a_change() -> None:
    param = torch.zeros(2, 3)
    call(params=[param])
    assert param.count_nonzero() == 2


def test_public_name() -> None:
    assert saft_kernels.sparse_adamw_ is sparse_adamw_
