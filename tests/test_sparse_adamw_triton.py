"""sparse_adamw on Triton: the op's own tests on small tiles, the plan's tables, and the kernels compiled ahead of time.

See triton_tools for the processes in which they run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

pytest.importorskip("triton", reason="triton is not installed")

import test_sparse_adamw as op_tests
import triton
from conftest import Backend, assert_message, assert_same_bits, bits
from test_sparse_adamw import Options, mixed_problems, step_together
from triton_tools import (
    ARCHS,
    DEVICE,
    INTERPRETED,
    archs_to_compile_for,
    compile_facts,
    divide_tests,
    printed_facts,
    recording,
    run_interpreted,
    start_script,
)

from saft_kernels.ops.adamw import AdamWHyper, AdamWSegment

triton_adamw = importlib.import_module("saft_kernels.ops.triton.sparse_adamw")
coordinates = importlib.import_module("saft_kernels.ops.triton.coordinates")

OP = "prepare_sparse_adamw"
BACKEND = Backend("triton", "triton", device=DEVICE)
CPU = Backend("cpu", "cpu")
SMALL = triton_adamw.Tuning(block=1024, direct_block=512, direct_tile=1024)
gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_adamw, "TUNING", SMALL)


@pytest.fixture
def backend() -> Backend:
    return BACKEND


if INTERPRETED:
    # the op's tests, with this file's `backend`; on a GPU they run where they are
    elsewhere = {
        # about threads
        *("test_same_bits_from_run_to_run_and_for_any_number_of_threads", "test_flush_denormal_holds_on_every_thread"),
        # about the formula: the bits are the cpu backend's, see below
        *("test_one_step_against_float64", "test_masters_keep_updates_too_small_for_the_parameter"),
    }
    for name, function in vars(op_tests).items():
        if name.startswith("test_") and name not in elsewhere and "backend" in inspect.signature(function).parameters:
            globals()[name] = function


def make_plan(params: Sequence[Tensor], indices: Sequence[Tensor | None], **more: Any) -> tuple[Any, list[Tensor]]:
    """A plan over zero moments, and the moments."""
    state = [
        torch.zeros(p.shape if i is None else i.shape, dtype=op_tests.opmath(p.dtype), device=DEVICE)
        for p, i in zip(params, indices, strict=True)
        for _ in range(2)
    ]
    segments = [
        AdamWSegment(p, m, v, i, **more) for p, m, v, i in zip(params, state[::2], state[1::2], indices, strict=True)
    ]
    return triton_adamw.prepare_sparse_adamw(segments), state


def hyper(step: float | Tensor = 1, **changes: Any) -> AdamWHyper:
    return replace(AdamWHyper(0.1, 0.9, 0.95, 1e-8, 0.1, step), **changes)


def on_device(value: float, dtype: torch.dtype = FP32, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=DEVICE)


# ---- the same bits as the cpu backend ----


@pytest.mark.parametrize(
    "options",
    [Options(masters=True), Options(masters=True, amsgrad=True, maximize=True, grad_scale=3.0, weight_decay=0.0)],
    ids=["plain", "amsgrad_maximize_scaled"],
)
def test_same_bits_as_the_cpu_backend(options: Options) -> None:
    """All dtypes, index dtypes, layouts and forms of gradient in one call. The arithmetic is IEEE's on both."""
    results = []
    for backend in (BACKEND, CPU):
        problems = [replace(p, options=options) for p in mixed_problems(backend)]
        for _ in range(2):
            step_together(problems)
        results.append([t for p in problems for t in p.state()])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_tails_and_alignment(dtype: torch.dtype, offset: int) -> None:
    """Wholly selected, around the sizes of blocks and tiles, with vectors and, from the second element on, without."""
    torch.manual_seed(0)
    sizes = [n + d for n in (SMALL.direct_block, SMALL.block, SMALL.direct_tile) for d in (-1, 0, 1)]
    wholes = [torch.randn(n + offset).to(dtype) for n in (1, *sizes, 2 * SMALL.direct_tile + 300)]
    grads = [torch.randn(len(whole)).to(dtype) for whole in wholes]
    results = []
    for backend in (BACKEND, CPU):
        params = [backend.to(whole) for whole in wholes]
        state = [torch.zeros(len(p) - offset, dtype=op_tests.opmath(dtype), device=backend.device) for p in params * 2]
        backend.sparse_adamw_(
            [p[offset:] for p in params],
            [backend.to(g)[offset:] for g in grads],
            state[: len(params)],
            state[len(params) :],
            [None] * len(params),
            step=3,
            **Options().scalars,
        )
        results.append(params + state)
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual.cpu(), expected)


def test_many_tiny_segments() -> None:
    torch.manual_seed(1)
    sizes = torch.randint(0, 4, (400,)).tolist()
    values, gradient = torch.randn(2, sum(sizes))
    results = []
    for backend in (BACKEND, CPU):
        base = backend.to(values)
        params = base.split(sizes)
        indices = [backend.to(torch.randperm(n, generator=torch.Generator().manual_seed(n))[: n - 1]) for n in sizes]
        state = [torch.zeros(len(i), device=backend.device) for i in indices * 2]
        half = len(state) // 2
        grads = list(backend.to(gradient).split(sizes))
        backend.sparse_adamw_(params, grads, state[:half], state[half:], indices, step=1, **Options().scalars)
        results.append(base.cpu())
    assert_same_bits(*results)
    assert not torch.equal(results[0], values)


def test_dense_and_compact_gradients_when_every_element_has_an_index() -> None:
    """Both have all elements, contiguous: only the shape tells which order they are in."""
    index = torch.randperm(12, device=DEVICE)
    param = torch.zeros(3, 4, device=DEVICE)
    plan, _ = make_plan([param], [index])
    dense = torch.arange(1.0, 13, device=DEVICE).view(3, 4)
    for step, sign in enumerate((1.0, -1.0, 1.0)):
        gradient = sign * (dense if step % 2 == 0 else dense.view(-1)[index])
        expected = param.clone()
        fresh, _ = make_plan([expected], [index])
        fresh.segments[0].exp_avg.copy_(plan.segments[0].exp_avg)
        fresh.segments[0].exp_avg_sq.copy_(plan.segments[0].exp_avg_sq)
        fresh.step([gradient], [hyper(step + 1)])
        plan.step([gradient], [hyper(step + 1)])
        assert_same_bits(param, expected)


# ---- scalars on the device ----


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, torch.int64], ids=str)
def test_scalars_of_any_dtype_on_the_device(dtype: torch.dtype) -> None:
    """Two rows: what one has as numbers, the other has as tensors. Powers of two, the same in every dtype."""
    numbers = {"lr": 2.0, "step": 4.0, "grad_scale": 8.0}
    results = []
    for tensors in (False, True):
        params = [torch.linspace(-1, 1, 40, device=DEVICE) for _ in range(2)]
        plan, state = make_plan(params, [None, None])
        plan.segments[1] = replace(plan.segments[1], hyper=1)
        scalars = {name: on_device(value, dtype, (1,)) if tensors else value for name, value in numbers.items()}
        rows = [hyper(**numbers), hyper(**scalars, beta1=0.0, beta2=0.5, maximize=True)]
        plan.step([torch.linspace(2, -1, 40, device=DEVICE)] * 2, rows)
        results.append([*params, *state])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **op_tests.TOLERANCE[FP32])
    assert not torch.equal(params[0], params[1])


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_bias_corrections_on_the_device_are_those_of_the_host(dtype: torch.dtype) -> None:
    """To a few roundings of fp64, over all of training: an fp64 parameter shows them."""
    for step in (1, 2, 10, 1_000, 100_000, 2**24):
        results = []
        for number in (float(step), on_device(step, dtype)):
            param = torch.zeros(3, dtype=FP64, device=DEVICE)
            plan, _ = make_plan([param], [None])
            plan.step([torch.ones(3, dtype=FP64, device=DEVICE)], [hyper(number, beta2=0.999, weight_decay=0.0)])
            results.append(param)
        torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_found_inf_of_one_row_stops_all() -> None:
    for where in (0, 1):
        params = [torch.ones(700, device=DEVICE) for _ in range(2)]
        plan, state = make_plan(params, [None, torch.tensor([5, 2], device=DEVICE)])
        plan.segments[1] = replace(plan.segments[1], hyper=1)
        flags = [on_device(0.0), on_device(0.0)]
        rows = [hyper(found_inf=flags[0]), hyper(found_inf=flags[1])]
        flags[where].fill_(1.0)
        plan.step([torch.full((700,), torch.nan, device=DEVICE)] * 2, rows)
        assert all(bool((p == 1).all()) for p in params)
        assert not any(bool(s.any()) for s in state)
        flags[where].zero_()
        plan.step([torch.ones(700, device=DEVICE)] * 2, rows)
        assert params[0].max() < 1
        assert params[1].min() < 1


def test_scalars_on_a_third_device() -> None:
    param = torch.ones(4, device=DEVICE)
    plan, _ = make_plan([param], [None])
    for name in ("lr", "step", "grad_scale"):
        with pytest.raises(ValueError, match=f"`{name}`") as caught:
            plan.step([param.clone()], [hyper(**{name: torch.ones(1, device="meta")})])
        assert_message(caught, ["meta", "the CPU", "move it"])
    assert bool((param == 1).all())


# ---- launches, copies, compilation ----


def test_launches() -> None:
    """One for all parameters; fp64 beside others and tensors on the device take one more each."""

    def launched(dtypes: list[torch.dtype], row: AdamWHyper) -> list[str]:
        params = [torch.ones(2_000, dtype=dtype, device=DEVICE) for dtype in dtypes]
        plan, _ = make_plan(params, [None if i % 2 else torch.arange(7, device=DEVICE) for i in range(len(dtypes))])
        with recording(triton_adamw, run=True) as (names, _):
            plan.step([p.clone() for p in params], [row])
        assert all(bool((p < 1).any()) for p in params)
        return names

    step = "sparse_adamw_kernel"
    assert launched([FP32, BF16, FP16, BF16], hyper()) == [step]
    assert launched([FP64, FP64], hyper()) == [step]
    assert launched([FP64, BF16, FP32], hyper()) == [step, step]
    assert launched([FP32], hyper(on_device(2.0))) == ["scalars_kernel", step]
    assert launched([FP32, FP64], hyper(lr=on_device(0.1))) == ["scalars_kernel", step, step]
    empty = torch.ones(0, device=DEVICE)
    plan, _ = make_plan([empty, torch.ones(3, device=DEVICE)], [None, torch.zeros(0, dtype=torch.int32, device=DEVICE)])
    with recording(triton_adamw, run=True) as (names, _):
        plan.step([empty, torch.ones(3, device=DEVICE)], [hyper()])
    assert names == []


def test_nothing_recompiles_for_another_step_or_size() -> None:
    def specs(numel: int, count: int, row: AdamWHyper) -> set[tuple[Any, ...]]:
        params = [torch.ones(numel, device=DEVICE), torch.ones(numel, 3, device=DEVICE).t()]
        plan, _ = make_plan(params, [None, torch.arange(count, device=DEVICE)])
        with recording(triton_adamw, run=False) as (_, specs):
            plan.step([p.clone() for p in params], [row])
        return set(specs)

    expected = specs(5_000, 16, hyper())
    assert len(expected) == 1
    assert specs(777, 1, hyper(17, lr=1e-5, weight_decay=0.0, maximize=True)) == expected
    assert specs(16, 33, hyper(1_000_000, eps=0.0, grad_scale=2.0)) == expected
    on_the_device = specs(5_000, 16, hyper(on_device(1.0), lr=on_device(0.1)))
    assert specs(300, 5, hyper(on_device(9.0, FP64), grad_scale=on_device(3.0))) == on_the_device


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The words of each copy to the device."""
    sizes: list[int] = []
    for name in ("staged", "to_device"):
        function = getattr(triton_adamw, name)

        def counting(table: Any, device: torch.device, function: Any = function) -> Tensor:
            sizes.append(len(table))
            return function(table, device)

        monkeypatch.setattr(triton_adamw, name, counting)
    return sizes


def test_copies_of_the_steady_state(copies: list[int]) -> None:
    params = [torch.ones(50, device=DEVICE) for _ in range(30)]
    grads = [p.clone() for p in params]
    plan, _ = make_plan(params, [None] * 30)
    plan.step(grads, [hyper(1)])
    assert len(copies) == 2
    copies.clear()
    plan.step(grads, [hyper(2)])
    assert copies == [16]  # the scalars
    copies.clear()
    moved = [g.clone() for g in grads]
    plan.step(moved, [hyper(3)])
    assert copies == [16 + 30]  # and the addresses
    copies.clear()
    step, lr = on_device(4.0), on_device(0.1)
    plan.step(moved, [hyper(step, lr=lr)])
    copies.clear()
    step += 1
    lr *= 0.5
    plan.step(moved, [hyper(step, lr=lr)])
    assert copies == []
    plan.step([moved[0].as_strided((50,), (0,)), *moved[1:]], [hyper(step, lr=lr)])
    assert len(copies) == 1  # the rows: a gradient has other strides, at the same address
    copies.clear()
    old = params[0].clone()
    moved_param, params[0].data = params[0].data, old.clone()
    plan.step(moved, [hyper(step, lr=lr)])
    assert len(copies) == 1  # the rows again
    assert_same_bits(moved_param, old)
    assert not torch.equal(params[0], old)


class OpsRecorder(TorchDispatchMode):
    """The names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", ["nothing", "gradients", "strides", "scalars"])
def test_a_captured_step_copies_nothing_from_the_host(
    change: str, copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has changed since the step before: a copy would be a node of the graph."""
    launches: list[Any] = []
    launch = triton_adamw.launch
    results = []
    for is_capturing in (False, True):
        params = [torch.linspace(-1, 1, 60, device=DEVICE), torch.ones(9, 3, device=DEVICE)]
        grads = [p.clone() for p in params]
        moved = [g.repeat_interleave(2, 0)[::2] if change == "strides" else g.clone() for g in grads]
        plan, state = make_plan(params, [None, torch.tensor([20, 1], device=DEVICE)])
        row = hyper(on_device(2.0), lr=on_device(0.1))
        plan.step(grads, [hyper(1)] if change == "scalars" else [row])
        copies.clear()
        with monkeypatch.context() as patch, OpsRecorder() as recorder:
            # later: the interpreter copies, too
            patch.setattr(triton_adamw, "launch", lambda *args, **options: launches.append((args, options)))
            plan._step(moved if change in ("gradients", "strides") else grads, [row], is_capturing=is_capturing)
        while launches:
            args, options = launches.pop(0)
            launch(*args, **options)
        if is_capturing:
            assert copies == []
            assert not recorder.names & {"copy_", "_to_copy", "_pin_memory", "_local_scalar_dense"}, recorder.names
            assert ("_foreach_add_" in recorder.names) == (change != "nothing")
        results.append([*params, *state])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_what_a_graph_holds_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step's tables, as a graph would read them when it is replayed after eager steps."""
    params = [torch.ones(50, device=DEVICE), torch.ones(9, 3, device=DEVICE)]
    plan, _ = make_plan(params, [None, torch.tensor([20, 1], device=DEVICE)])
    grads = [p.clone() for p in params]
    held: list[Tensor] = []
    launch = triton_adamw.launch

    def keep(kernel: Any, num_programs: int, *args: Tensor, **options: Any) -> None:
        held.extend(args)
        launch(kernel, num_programs, *args, **options)

    captured_row = hyper(on_device(2.0), lr=on_device(0.1))
    for before_it in (None, hyper(1), captured_row):
        if before_it is not None:
            plan.step(grads, [before_it])
        never_overwritten = set() if before_it is None else {plan._fixed._copy.untyped_storage().data_ptr()}
        monkeypatch.setattr(triton_adamw, "launch", keep)
        held.clear()
        plan._step(grads, [captured_row], is_capturing=True)
        captured = list(held)
        before = [bits(t) for t in captured]
        storages = {t.untyped_storage().data_ptr() for t in captured}
        assert storages <= {t.untyped_storage().data_ptr() for t in plan._captured}
        held.clear()
        for step in (3, 4):  # other addresses, other forms, other scalars
            moved = [g.clone() if step == 3 else g.repeat_interleave(2, 0)[::2] for g in grads]
            plan.step(moved, [hyper(step)])
            plan.step(moved, [hyper(on_device(float(step)), found_inf=on_device(1.0))])
        assert all(torch.equal(bits(t), b) for t, b in zip(captured, before, strict=True))
        assert {t.untyped_storage().data_ptr() for t in held} & storages <= never_overwritten
        monkeypatch.setattr(triton_adamw, "launch", launch)


def test_tiles_beyond_2_32() -> None:
    """Sizes only."""
    import numpy as np

    cut = coordinates.tiles(np.array([2**33 + 5, 0, 3]), np.array([2**20, 256, 256]))
    assert len(cut) == 2**13 + 2
    assert cut[2**13].tolist() == (0, 2**33, 2**33 + 5)
    assert cut[-1].tolist() == (2, 0, 3)


# ---- ahead of time ----


def compile_all(arch: int, dtypes: list[str]) -> Iterator[dict[str, Any]]:
    """The kernels as they are launched for parameters of these dtypes; "bfloat16/float32": with fp32 gradients."""
    params, grads = [], []
    for name in dtypes:
        param, _, grad = name.partition("/")
        params.append(torch.ones(64, dtype=getattr(torch, param)))
        grads.append(torch.ones(64, dtype=getattr(torch, grad or param)))
    plan = triton_adamw.Plan(
        [AdamWSegment(p, *(torch.zeros(64, dtype=op_tests.opmath(p.dtype)) for _ in range(2))) for p in params]
    )
    tensors = {"step": torch.tensor(1.0)} if dtypes == ["float32"] else {}
    with recording(triton_adamw, run=False) as (_, specs):
        plan.step(
            grads, [AdamWHyper(**{"step": 1, **tensors}, lr=0.1, beta1=0.9, beta2=0.9, eps=0.0, weight_decay=0.0)]
        )
    for spec in specs.values():
        yield compile_facts(arch, *spec)


SINGLE = ["float32", "bfloat16", "float64"]
MIXED = "float32,bfloat16,float16,bfloat16/float32,float16/float32"


def cases(arch: int) -> list[str]:
    return [*SINGLE, MIXED] if arch == 90 else SINGLE


@pytest.fixture(scope="module", autouse=True)
def compilers(request: pytest.FixtureRequest) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """They work while the other tests run."""
    archs = archs_to_compile_for(request.session, __name__)
    processes = {arch: start_script(__file__, arch, *cases(arch)) for arch in archs}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


# registers per thread: 4 warps of 68 are 7 blocks on a multiprocessor, 57 KB in flight from a wholly selected tensor
REGISTERS = {"float32": 72, "bfloat16": 80, "float64": 128, MIXED: 104}
# for sm_100, triton 3.6 writes other PTX, which takes 85 whichever ptxas assembles it: 5 blocks for 6
REGISTERS_BF16_SM100_3_6 = 88
# of each wholly selected vector path: parameter, gradient, two moments, AMSGrad's, and the master of 16-bit parameters
VECTOR_LOADS = {
    "float32": {"ld.global.v4.b32": 5},
    "bfloat16": {"ld.global.v2.b32": 2, "ld.global.v4.b32": 4},
    "float64": {"ld.global.v2.b64": 10},
    MIXED: {"ld.global.v4.b32": 5 + 4 * 2 + 5 * 2, "ld.global.v2.b32": 2 * 2 + 2},
}


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_ahead_of_time(compilers: dict[int, subprocess.Popen[str]], arch: int) -> None:
    facts = printed_facts(compilers[arch])
    scalars = [fact for fact in facts if fact["kernel"] == "scalars_kernel"]
    assert len(scalars) == 1
    steps = [fact for fact in facts if fact["kernel"] == "sparse_adamw_kernel"]
    for case, fact in zip(cases(arch), steps, strict=True):
        assert fact["local_accesses"] == fact["stack"] == fact["local"] == 0, fact  # nothing spilled
        assert fact["shared"] == 0, fact  # nothing moves between threads
        assert fact["fused"] == fact["flushes"] == 0, fact
        roots = set(fact["roots_and_quotients"])
        wide = {"div.rn.f64", "sqrt.rn.f64"}
        assert roots == (wide if case == "float64" else {"div.rn.f32", "sqrt.rn.f32"}), fact
        is_other = (case, arch) == ("bfloat16", 100) and triton.__version__.startswith("3.6.")
        assert fact["reg"] <= (REGISTERS_BF16_SM100_3_6 if is_other else REGISTERS[case]), fact
        for load, number in VECTOR_LOADS[case].items():
            assert fact["loads"].count(load) == number, fact


def test_interpreted() -> None:
    run_interpreted(__file__)


# ---- on a GPU ----


def train(plan: Any, grads: list[list[Tensor]], rows: Sequence[AdamWHyper]) -> None:
    for gradients, row in zip(grads, rows, strict=True):
        plan.step(gradients, [row])


@gpu_only
def test_repeats_are_bit_equal_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_adamw, "TUNING", triton_adamw.Tuning())
    results = []
    for _ in range(3):
        problems = mixed_problems(BACKEND)
        for _ in range(2):
            step_together(problems)
        results.append([t for p in problems for t in p.state()])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)


@gpu_only
@pytest.mark.parametrize("makes_gradients", [False, True], ids=["static_gradients", "gradients_of_the_graph"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_graph_replays_with_step_and_lr_on_the_device_gpu(dtype: torch.dtype, makes_gradients: bool) -> None:
    """Captured once, replayed between eager steps of the same plan: the bits of eager steps alone."""
    torch.manual_seed(0)
    start = [torch.randn(5_000), torch.randn(64, 96)]
    index = torch.randperm(64 * 96)[:700].int().to(DEVICE)
    all_grads = [[torch.randn_like(p).to(DEVICE, dtype) for p in start] for _ in range(6)]

    def fresh() -> tuple[Any, list[Tensor]]:
        params = [p.to(DEVICE, dtype) for p in start]
        plan, state = make_plan(params, [None, index])
        return plan, params + state

    expected_plan, expected = fresh()
    step, lr, found_inf = on_device(0.0), on_device(0.1), on_device(0.0)
    row = hyper(step, lr=lr, found_inf=found_inf)
    for grads in all_grads:
        step += 1
        lr *= 0.9
        expected_plan.step(grads, [row])

    plan, actual = fresh()
    step.zero_()
    lr.fill_(0.1)
    static = [torch.empty_like(g) for g in all_grads[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        found_inf.fill_(1.0)
        plan.step(static, [row])
        found_inf.zero_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step += 1
        lr *= 0.9
        plan.step([g.clone() for g in static] if makes_gradients else static, [row])
    for i, grads in enumerate(all_grads):
        if i % 3 == 2:  # eager, from elsewhere
            step += 1
            lr *= 0.9
            plan.step(grads, [row])
        else:
            for target, gradient in zip(static, grads, strict=True):
                target.copy_(gradient)
            graph.replay()
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("sparse_adamw_kernel" in name for name in names)
    assert not any("HtoD" in name for name in names), names


@gpu_only
def test_no_step_waits_for_the_device_gpu() -> None:
    params = [torch.ones(3_000, device=DEVICE) for _ in range(3)]
    plan, _ = make_plan(params, [None, torch.arange(9, device=DEVICE), None])
    rows = [hyper(1), hyper(on_device(2.0), lr=on_device(0.1), grad_scale=on_device(2.0), found_inf=on_device(0.0))]
    grads = [[p.clone() for p in params] for _ in rows]
    train(plan, grads, rows)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(plan, grads, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


divide_tests(globals(), ("test_interpreted", "test_compiles_ahead_of_time"))

if __name__ == "__main__":
    for case in sys.argv[2:]:
        for fact in compile_all(int(sys.argv[1]), case.split(",")):
            print(json.dumps(fact), flush=True)
