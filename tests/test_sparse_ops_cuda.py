"""The CUDA backend of sparse_adamw_, gather and scatter_: executed on the CPU, compiled by nvcc, and run on a GPU.

- host: saft_kernels/ops/cuda.py as it is, with kernels that g++ built from the same sources (tests/cuda_host). The
  ops' own tests run on it, and it gives the bits of the cpu backend. Kernel arguments are small there, so that a few
  dozen tensors need both of their sizes, and several launches.
- nvcc: registers and local memory of every kernel, as ptxas reports them; no fused multiply-add in the element math.
- gpu: what needs real hardware: CUDA graphs, streams, sizes above 2^31, repeats, compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_gather_scatter
import test_sparse_adamw
import torch
from conftest import Backend, assert_same_bits
from cuda_kernels import (
    ROOT,
    SANITIZED,
    compile_kernels,
    host_library,
    needs_gpu,
    needs_memory,
    run_sanitized,
    run_under_compute_sanitizer,
)
from test_sparse_adamw import DTYPES, OPTIONS, Options, mixed_problems, opmath, step_together
from torch import Tensor

from saft_kernels.ops import cpu, cuda, tables
from saft_kernels.ops.adamw import AdamWHyper, AdamWSegment, HostHyper

CPU = Backend("cpu-baseline", "cpu", isa=0)
HOST = Backend("cuda-host", "cuda", device="cpu")
GPU = Backend("cuda", "cuda", device="cuda")


# ---- host: the kernels on the CPU ----


class HostModule:
    """saft_kernels._C as ops/cuda.py calls it; the kernels run at once, on CPU tensors."""

    has_cuda = True

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for function in (library.sparse_adamw_table_bytes, library.gather_scatter_table_bytes):
            function.restype = ctypes.c_int64

    def _call(self, name: str, segments: int, num_segments: int, *rest: Any) -> Any:
        return getattr(self.library, name)(ctypes.c_void_p(segments), ctypes.c_int64(num_segments), *rest)

    def sparse_adamw_cuda_table_bytes(self, segments: int, num_segments: int) -> int:
        return int(self._call("sparse_adamw_table_bytes", segments, num_segments))

    def sparse_adamw_cuda_table(self, segments: int, num_segments: int, device_table: int, stream: int) -> None:
        self._call("sparse_adamw_table", segments, num_segments, ctypes.c_void_p(device_table))

    def sparse_adamw_cuda(
        self, segments: int, num_segments: int, hypers: bytes, device_table: int, stream: int, max_blocks: int
    ) -> None:
        rows = ctypes.create_string_buffer(hypers, len(hypers))
        self._call("sparse_adamw", segments, num_segments, rows, ctypes.c_void_p(device_table), max_blocks)

    def gather_scatter_cuda_table_bytes(self, segments: int, num_segments: int) -> int:
        return int(self._call("gather_scatter_table_bytes", segments, num_segments))

    def gather_cuda(self, segments: int, num_segments: int, device_table: int, stream: int, max_blocks: int) -> None:
        self._call("gather", segments, num_segments, ctypes.c_void_p(device_table), max_blocks)

    def scatter_cuda(self, segments: int, num_segments: int, device_table: int, stream: int, max_blocks: int) -> None:
        self._call("scatter", segments, num_segments, ctypes.c_void_p(device_table), max_blocks)


@pytest.fixture(scope="session")
def host_module() -> HostModule:
    return HostModule(host_library("sparse_ops"))


@pytest.fixture
def host(host_module: HostModule, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """`backend="cuda"` on CPU tensors."""
    monkeypatch.setattr(cuda, "_C", host_module)
    monkeypatch.setattr(cuda, "why_unavailable", lambda device_type: None)
    monkeypatch.setattr(cuda, "_current_stream", lambda device: contextlib.nullcontext(0))
    monkeypatch.setattr(cuda, "_is_capturing", lambda: False)
    host_module.library.set_seed(ctypes.c_uint64(0))
    return HOST


@pytest.fixture
def backend(host: Backend) -> Backend:
    """What the ops' own tests ask for."""
    return host


def ops_tests() -> dict[str, Callable[..., None]]:
    """The ops' tests that take a backend, under names that say where they run."""
    found = {}
    for module, op in ((test_sparse_adamw, "adamw"), (test_gather_scatter, "gather")):
        for name, function in vars(module).items():
            if name.startswith("test_") and "backend" in inspect.signature(function).parameters:
                found[f"test_host_{op}_{name.removeprefix('test_')}"] = function
    return found


globals().update(ops_tests())


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    """Of all; NaN as NaN: which payload comes of two is the compiler's choice."""
    for a, b in zip(actual, expected, strict=True):
        a, b = a.cpu(), b.cpu()
        assert torch.equal(a.isnan(), b.isnan()), what
        assert_same_bits(a.nan_to_num(0.0), b.nan_to_num(0.0), what)


def step_mixed(backend: Backend, steps: int = 3, **scalars: Any) -> list[Tensor]:
    """All that `mixed_problems` write."""
    problems = mixed_problems(backend)
    for _ in range(steps):
        step_together(problems, **scalars)
    return [tensor for problem in problems for tensor in problem.state()]


def step_problem(backend: Backend, *args: Any, **kwargs: Any) -> list[Tensor]:
    problem = test_sparse_adamw.Problem(backend, *args, **kwargs)
    for _ in range(3):
        problem.step()
    return problem.state()


def test_host_many_tensors_give_the_bits_of_the_cpu_backend(host: Backend) -> None:
    same_bits(step_mixed(host), step_mixed(CPU))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_options_give_the_bits_of_the_cpu_backend(host: Backend, dtype: torch.dtype, options: str) -> None:
    for selected in ("some", "whole"):
        args = (dtype, OPTIONS[options])
        same_bits(step_problem(host, *args, selected=selected), step_problem(CPU, *args, selected=selected))


def test_host_schedule_does_not_matter(host: Backend, host_module: HostModule, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step_mixed(CPU, 1)
    for seed in (0, 1, 2, 3):  # ascending, descending and two random orders of threads and blocks
        for max_blocks in (1, 3, 0):
            host_module.library.set_seed(ctypes.c_uint64(seed))
            monkeypatch.setattr(cuda, "MAX_BLOCKS", max_blocks)
            same_bits(step_mixed(host, 1), expected, f"{seed=} {max_blocks=}")


def slices(numel: int, offset: int, dtype: torch.dtype, count: int, seed: int) -> list[Tensor]:
    """Tensors (numel,) that start `offset` elements after an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(numel + offset, generator=generator).to(dtype)[offset:] for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 31, 33, 127, 129, 1023, 1024, 1025, 5_003])
def test_host_tails_and_alignments_of_wholly_selected_tensors(host: Backend, dtype: torch.dtype, numel: int) -> None:
    """Each array in turn is not aligned, so that vectors do not do."""
    state = opmath(dtype)
    for misaligned in (None, "param", "grad", "exp_avg", "max_exp_avg_sq", "master"):
        results = []
        for backend in (host, CPU):
            offsets = {
                name: int(name == misaligned) for name in ("param", "grad", "exp_avg", "max_exp_avg_sq", "master")
            }
            (param,) = slices(numel, offsets["param"], dtype, 1, 0)
            (grad,) = slices(numel, offsets["grad"], dtype, 1, 1)
            m, v = slices(numel, offsets["exp_avg"], state, 2, 2)
            (largest,) = slices(numel, offsets["max_exp_avg_sq"], state, 1, 3)
            masters = None
            if dtype.itemsize == 2:
                masters = slices(numel, offsets["master"], state, 1, 4)
            backend.sparse_adamw_(
                [param],
                [grad],
                [m],
                [v],
                [None],
                max_exp_avg_sqs=[largest],
                masters=masters,
                step=3,
                **Options().scalars,
            )
            results.append([param, m, v, largest, *(masters or [])])
        same_bits(*results, f"{misaligned=}")


def test_host_one_large_and_many_tiny_tensors_with_their_own_hyperparameters(host: Backend) -> None:
    """Uneven work, and more tensors and rows of hyperparameters than one launch takes."""
    generator = torch.Generator().manual_seed(0)
    numels = [20_000, *(1 + i % 7 for i in range(200)), 0, 3_000]
    results = []
    for backend in (host, CPU):
        generator.manual_seed(0)
        params = [torch.randn(n, generator=generator) for n in numels]
        grads = [torch.randn(n, generator=generator) for n in numels]
        indices = [
            None if i % 3 == 0 else torch.randperm(n, generator=generator)[: -(-n // 2)].sort().values.int()
            for i, n in enumerate(numels)
        ]
        shapes = [n if i is None else i.numel() for n, i in zip(numels, indices, strict=True)]
        states = [[torch.zeros(n) for _ in range(2)] for n in shapes]
        hypers = [AdamWHyper(0.1 / (1 + i), 0.9, 0.99 - 0.01 * i, 1e-8, 0.01 * i, 1 + i) for i in range(11)]
        segments = [
            AdamWSegment(p, *s, i, hyper=row // 20)
            for row, (p, s, i) in enumerate(zip(params, states, indices, strict=True))
        ]
        module = cuda if backend is host else cpu
        plan = module.prepare_sparse_adamw(segments)
        for _ in range(2):
            plan.step(grads, hypers)
        results.append([*params, *itertools.chain(*states)])
    same_bits(*results)


def test_host_indices_out_of_range_are_left_out(host: Backend) -> None:
    test_gather_scatter.check_left_out(cuda.gather, cuda.scatter_, host)


# ---- hyperparameters as tensors ----


def three_steps(backend: Backend, **scalars: Any) -> list[Tensor]:
    """Of a sparse bf16 parameter and a whole fp64 one."""
    o = Options(amsgrad=True)
    params = [backend.to(torch.linspace(-1, 1, 300).bfloat16()), backend.to(torch.linspace(2, -1, 50).double())]
    index = backend.to(torch.arange(3, 300, 2))
    states = [[backend.to(torch.zeros(149)), backend.to(torch.zeros(50, dtype=torch.float64))] for _ in range(3)]
    for step in (1, 2, 3):
        values = {**o.scalars, "step": step, **{name: value(step) for name, value in scalars.items()}}
        grads = [backend.to(torch.full_like(p, step).cos_() * torch.linspace(-9, 9, p.numel()).to(p)) for p in params]
        backend.sparse_adamw_(params, grads, states[0], states[1], [index, None], max_exp_avg_sqs=states[2], **values)
    return [*params, *itertools.chain(*states)]


SCALAR_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]


def check_scalars_of_any_dtype(backend: Backend, dtype: torch.dtype) -> None:
    """Tensors, with the values they hold as numbers. Step counts and powers of two are exact in every dtype."""

    def on_device(value: float) -> Tensor:
        return backend.to(torch.tensor([value]).to(dtype))

    scale = {"grad_scale": lambda step: 4.0}
    rate = 0.0 if dtype == torch.int64 else 2.0**-5
    numbers = three_steps(backend, lr=lambda step: rate * step, **scale)
    for chosen in (("lr",), ("step",), ("grad_scale",), ("lr", "step", "grad_scale")):
        tensors = {"lr": lambda step: rate * step, **scale}
        if "lr" in chosen:
            tensors["lr"] = lambda step: on_device(rate * step)
        if "step" in chosen:
            tensors["step"] = lambda step: on_device(step)
        if "grad_scale" in chosen:
            tensors["grad_scale"] = lambda step: on_device(4.0)
        actual = three_steps(backend, **tensors)
        if "step" not in chosen or backend is HOST:
            same_bits(actual, numbers, str(chosen))
        else:  # pow of a GPU is not that of the host to the last bit
            for a, b in zip(actual, numbers, strict=True):
                torch.testing.assert_close(a, b, rtol=2.0**-7 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", SCALAR_DTYPES, ids=str)
def test_host_scalars_of_any_dtype(host: Backend, dtype: torch.dtype) -> None:
    check_scalars_of_any_dtype(host, dtype)


def two_groups(backend: Backend) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A plan of two parameters with a row of hyperparameters each; the parameters; gradients."""
    params = [backend.to(torch.ones(300)), backend.to(torch.ones(40))]
    segments = [AdamWSegment(p, torch.zeros_like(p), torch.zeros_like(p), hyper=i) for i, p in enumerate(params)]
    return cuda.prepare_sparse_adamw(segments), params, [torch.ones_like(p) for p in params]


def check_found_infs_of_several_groups(backend: Backend) -> None:
    """One that is not 0 stops the whole step, whichever row it comes with."""
    values = (None, 0.0, 1.0, torch.inf)
    for first, second in itertools.product(values, values):
        plan, params, grads = two_groups(backend)
        hypers = [
            AdamWHyper(0.1, 0.9, 0.99, 1e-8, 0.0, 1, found_inf=None if v is None else backend.to(torch.tensor(v)))
            for v in (first, second)
        ]
        plan.step(grads, hypers)
        stopped = bool(first) or bool(second)
        assert all(bool((p == 1).all()) == stopped for p in params), (first, second)


def test_host_found_infs_of_several_groups(host: Backend) -> None:
    check_found_infs_of_several_groups(host)


# ---- the plan: forms, addresses, captures ----


@pytest.fixture
def uploads(host_module: HostModule, host: Backend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of the tables written."""
    written: list[int] = []
    write = host_module.sparse_adamw_cuda_table

    def counting(segments: int, num_segments: int, device_table: int, stream: int) -> None:
        written.append(device_table)
        write(segments, num_segments, device_table, stream)

    monkeypatch.setattr(host_module, "sparse_adamw_cuda_table", counting)
    return written


def test_host_moved_gradients_need_no_table(host: Backend, uploads: list[int]) -> None:
    plan, params, _ = two_groups(host)
    hypers = [AdamWHyper(0.1, 0.9, 0.99, 1e-8, 0.0, 1)] * 2
    kept = []
    for _ in range(3):
        kept.append([torch.ones_like(p) for p in params])  # elsewhere every time
        plan.step(kept[-1], hypers)
    assert len(uploads) == 1
    plan.step([kept[0][0].view(10, 30).t().reshape(-1).view(10, 30).t().reshape(300), torch.ones(80)[::2]], hypers)
    assert len(uploads) == 2, "a gradient has other strides"
    params[1].data = params[1].clone()
    plan.step(kept[0], hypers)
    assert len(uploads) == 3, "a parameter moved"


def test_host_a_capture_keeps_its_table(host: Backend, uploads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that a graph reads is neither written nor freed; one written in a capture serves that capture alone."""
    plan, _, grads = two_groups(host)
    hypers = [AdamWHyper(0.1, 0.9, 0.99, 1e-8, 0.0, 1)] * 2
    capturing = False
    monkeypatch.setattr(cuda, "_is_capturing", lambda: capturing)
    plan.step(grads, hypers)
    capturing = True
    plan.step(grads, hypers)
    assert len(uploads) == 1, "the captured step is the step kernel alone"
    (captured,) = plan._captured_tables
    content = captured.clone()
    capturing = False
    strided = [grads[0], torch.ones(80)[::2]]
    plan.step(strided, hypers)
    plan.step(strided, hypers)
    assert len(set(uploads)) == len(uploads) == 2
    assert torch.equal(captured, content)
    capturing = True
    plan.step(grads, hypers)
    plan.step(grads, hypers)
    assert len(uploads) == 4, "each captured step writes its own table when there is none from before"
    capturing = False
    plan.step(grads, hypers)
    assert len(uploads) == 5
    assert torch.equal(captured, content)


def test_host_gradients_that_are_no_tensors_in_memory(host: Backend) -> None:
    plan, params, grads = two_groups(host)
    hypers = [AdamWHyper(0.1, 0.9, 0.99, 1e-8, 0.0, 1)] * 2
    with pytest.raises((RuntimeError, BufferError)):
        plan.step([grads[0].to_sparse(), grads[1]], hypers)
    assert all(bool((p == 1).all()) for p in params)
    plan.step(grads, hypers)
    assert not any(bool((p == 1).any()) for p in params)


def test_host_what_moved_in_a_step_that_failed_is_not_forgotten(host: Backend) -> None:
    plan, params, grads = two_groups(host)
    hypers = [AdamWHyper(0.1, 0.9, 0.99, 1e-8, 0.0, 1)] * 2
    plan.step(grads, hypers)
    old = params[0].detach()
    params[0].data = torch.ones(300)
    kept = old.clone()
    strided = torch.ones(600)[::2]
    with pytest.raises((RuntimeError, BufferError)):
        plan.step([strided, grads[1].to_sparse()], hypers)
    plan.step([strided, grads[1]], hypers)
    assert torch.equal(old, kept)
    assert not bool((params[0] == 1).any())


def test_host_plan_of_a_parameter_that_shrank(host: Backend) -> None:
    plan, params, grads = two_groups(host)
    params[0].data = params[0][:100].clone()
    with pytest.raises(RuntimeError, match=r"`params\[0\]`: expected 300 elements .* got 100"):
        plan.step(grads, [AdamWHyper(0.1, 0.9, 0.99, 1e-8, 0.0, 1)] * 2)


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_host_under_sanitizers() -> None:
    """With AddressSanitizer and UndefinedBehaviorSanitizer."""
    run_sanitized(
        __file__,
        "host and (many_tensors or tails_and or many_tiny or scalars_of or schedule or moved or scatter) and not flat",
    )


# ---- nvcc ----

REGISTERS = {"sparse_adamw_kernel": 72}  # for the seven blocks per multiprocessor of its launch bounds


@pytest.mark.parametrize(
    ("source", "arch"), [("sparse_adamw/cuda.cu", 80), ("sparse_adamw/cuda.cu", 90), ("gather_scatter/cuda.cu", 90)]
)
def test_nvcc_compiles_without_spills(
    source: str, arch: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kernels = compile_kernels(source, arch, tmp_path)
    # both sizes of arguments, the map of tiles, the upload; gather, scatter, the upload
    assert len(kernels) == (4 if source.startswith("sparse") else 3), kernels
    for name, kernel in kernels.items():
        record_property(f"sm_{arch} {name}", f"{kernel.registers} registers, {kernel.shared} B shared")
        print(f"sm_{arch} {name}: {kernel.registers} registers, {kernel.shared} B shared")
        assert not kernel.local_memory, f"{name} uses local memory"
        assert kernel.registers <= REGISTERS.get(name.split("<")[0], 255), f"{name}: {kernel.registers} registers"
        assert kernel.shared <= 48 << 10


def test_nvcc_fuses_no_multiply_add_of_the_element_math(tmp_path: Path) -> None:
    """With the flag that every build passes; in PTX, division and square root are still one instruction each."""
    for build in ("setup.py", "bench/gpu.sh"):
        assert '"-fmad=false"' in (ROOT / build).read_text(), build
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    ptx = tmp_path / "kernels.ptx"
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=sm_80", "-ptx", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(ROOT / "csrc/sparse_adamw/cuda.cu"), "-o", str(ptx)], check=True)
    text = ptx.read_text()
    assert "fma.rn.f32" not in text
    assert "sqrt.rn.f32" in text
    assert "div.rn.f32" in text
    assert not re.search(r"\.(approx|ftz|full)\S*f32", text)
    # ptx knows of every access that it is to global memory
    assert not re.findall(r"\b(?:ld|st)\.(?!global|shared|param)\S+", text)


# ---- gpu ----


def to_gpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.cuda() for t in tensors]


@needs_gpu
def test_gpu_gives_the_bits_of_the_cpu_backend() -> None:
    same_bits(step_mixed(GPU), step_mixed(CPU))
    for dtype, (name, options) in itertools.product(DTYPES, OPTIONS.items()):
        for selected in ("some", "whole"):
            if options.as_tensors:
                continue  # pow of a GPU is not that of the host to the last bit
            args = (dtype, options)
            actual, expected = (step_problem(b, *args, selected=selected, numel=30_011) for b in (GPU, CPU))
            same_bits(actual, expected, f"{dtype} {name} {selected}")


@needs_gpu
@pytest.mark.parametrize("dtype", SCALAR_DTYPES, ids=str)
def test_gpu_scalars_of_any_dtype(dtype: torch.dtype) -> None:
    check_scalars_of_any_dtype(GPU, dtype)


@needs_gpu
def test_gpu_found_infs_of_several_groups() -> None:
    check_found_infs_of_several_groups(GPU)


@needs_gpu
def test_gpu_scalars_on_the_cpu_are_read_there() -> None:
    numbers = three_steps(GPU, lr=lambda step: 0.5 * step, grad_scale=lambda step: 4.0)
    tensors = three_steps(
        GPU,
        lr=lambda step: torch.tensor(0.5 * step),
        grad_scale=lambda step: torch.tensor(4.0),
        step=lambda step: torch.tensor(float(step)),
        found_inf=lambda step: torch.tensor(0.0),
    )
    same_bits(tensors, numbers)
    stopped = three_steps(GPU, found_inf=lambda step: torch.tensor(1.0))
    assert all(not bool(s.any()) for s in stopped[2:])


class Model:
    """A sparse and a wholly selected parameter with their state on the GPU, and one step of them."""

    def __init__(self, capturable: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = to_gpu([torch.randn(300_000, generator=generator), torch.randn(70, 90, generator=generator)])
        index = torch.randperm(300_000, generator=generator)[:3_000].sort().values.int().cuda()
        self.states = [[torch.zeros(3_000, device="cuda") for _ in range(2)]]
        self.states.append([torch.zeros(70, 90, device="cuda") for _ in range(2)])
        segments = [AdamWSegment(p, *s, i) for p, s, i in zip(self.params, self.states, [index, None], strict=True)]
        self.plan = cuda.prepare_sparse_adamw(segments)
        self.capturable = capturable
        self.lr, self.count = (torch.zeros((), device="cuda") for _ in range(2))
        self.steps = 0

    def gradients(self, seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return [torch.randn(p.shape, generator=generator, device="cuda") for p in self.params]

    def step(self, grads: list[Tensor], lr: float = 0.01) -> None:
        self.steps += 1
        if self.capturable:
            self.lr.fill_(lr)
            self.count.fill_(self.steps)
        self.run(grads, lr)

    def run(self, grads: list[Tensor], lr: float = 0.01) -> None:
        rate, count = (self.lr, self.count) if self.capturable else (lr, self.steps)
        self.plan.step(grads, [AdamWHyper(rate, 0.9, 0.999, 1e-8, 0.01, count)])

    def everything(self) -> list[Tensor]:
        return [*self.params, *itertools.chain(*self.states)]


@needs_gpu
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "first_step_is_captured"])
def test_gpu_graph_replays_with_new_lr_step_and_gradients(warm: bool) -> None:
    """Replays and eager steps in turn, each against the same step without a graph; eager ones use other memory."""
    model, twin = Model(capturable=True), Model(capturable=True)
    static = model.gradients(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        if warm:
            model.step(static)
    torch.cuda.current_stream().wait_stream(side)
    if warm:
        twin.step(model.gradients(0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.run(static)
    same_bits(model.everything(), twin.everything())  # a capture runs nothing
    for round_, lr in enumerate((0.01, 0.1, 0.001, 0.05)):
        new = model.gradients(10 + round_)
        for target, source in zip(static, new, strict=True):
            target.copy_(source)
        model.steps += 1
        model.lr.fill_(lr)
        model.count.fill_(model.steps)
        graph.replay()
        twin.step(new, lr)
        same_bits(model.everything(), twin.everything(), f"replay {round_}")
        other = [g.t().contiguous().t() if g.dim() == 2 else g for g in model.gradients(20 + round_)]
        model.step(other, lr)
        twin.step(other, lr)
        same_bits(model.everything(), twin.everything(), f"eager {round_}")
    assert not torch.equal(model.params[0], Model(capturable=True).params[0])


@needs_gpu
def test_gpu_graph_that_makes_the_gradients() -> None:
    """A whole iteration captured: backward puts the gradients into the graph's own memory."""
    results = []
    for graphed in (False, True):
        model = Model(capturable=True)
        x = torch.ones(300_000, device="cuda")

        def iteration(model: Model = model, x: Tensor = x) -> None:
            grads = [x * model.params[0].cos(), model.params[1].sin()]
            model.count.add_(1)
            model.run(grads)

        model.lr.fill_(0.02)
        iteration()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                iteration()
        for _ in range(5):
            if graphed:
                graph.replay()
            else:
                iteration()
        assert model.count.item() == 6
        results.append(model.everything())
    same_bits(*results)


@needs_gpu
def test_gpu_two_streams_do_not_disturb_each_other() -> None:
    wanted = []
    for seed in (0, 1):
        model = Model(capturable=False, seed=seed)
        for step in range(10):
            model.step(model.gradients(step))
        wanted.append(model.everything())
    models = [Model(capturable=False, seed=seed) for seed in (0, 1)]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    for step in range(10):
        for model, stream in zip(models, streams, strict=True):
            with torch.cuda.stream(stream):
                model.step(model.gradients(step))
    torch.cuda.synchronize()
    for model, want in zip(models, wanted, strict=True):
        same_bits(model.everything(), want)


@needs_gpu
def test_gpu_step_does_not_wait() -> None:
    """The host is back long before a queue that is already full of work, tensors for scalars or not."""
    model = Model(capturable=True)
    grads = model.gradients(0)
    model.step(grads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        model.step([g * 2 for g in grads])
        assert not torch.cuda.current_stream().query(), "the step waited for the stream"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("capturable", [False, True], ids=["numbers", "tensors"])
def test_gpu_repeats_are_bit_equal(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[Tensor] = []
    for repeat in range(100):
        monkeypatch.setattr(cuda, "MAX_BLOCKS", (0, 7, 64)[repeat % 3])
        model = Model(capturable)
        model.step(model.gradients(0))
        expected = expected or model.everything()
        same_bits(model.everything(), expected)


@needs_gpu
def test_gpu_beyond_31_bits() -> None:
    """bf16, numel just above 2^31, by index and wholly selected: as the same few elements side by side."""
    numel = 2**31 + 12_345
    needs_memory(14 * numel / 2**30)
    places = torch.tensor([0, 1, 127, 2**31 - 1, 2**31, 2**31 + 1, numel - 5, numel - 1], device="cuda")
    values = torch.linspace(-2, 3, 16, device="cuda").bfloat16().view(2, 8)
    o = Options()
    small = [values[0].clone(), torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda")]
    GPU.sparse_adamw_([small[0]], [values[1]], [small[1]], [small[2]], [None], step=1, **o.scalars)
    param, grad = (torch.zeros(numel, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for whole in (False, True):
        param.zero_()
        param[places], grad[places] = values[0], values[1]
        state = [torch.zeros(numel if whole else 8, device="cuda") for _ in range(2)]
        index = None if whole else places
        GPU.sparse_adamw_([param], [grad], [state[0]], [state[1]], [index], step=1, **o.scalars)
        found = [param[places], *(s[places] if whole else s for s in state)]
        same_bits(found, small)
        assert int(param.count_nonzero()) == 8
    matrix = param.view(5, -1).t() if numel % 5 == 0 else param[: numel - numel % 5].view(5, -1).t()
    flat = torch.tensor([3, matrix.numel() - 2], device="cuda")
    marks = torch.tensor([5.0, 7.0], device="cuda").bfloat16()
    GPU.scatter_([matrix], [flat], [marks])
    assert torch.equal(GPU.gather([matrix], [flat])[0], marks)
    assert matrix[0, 3] == 5
    assert matrix[-1, 3] == 7


@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_gpu_under_compute_sanitizer(tool: str) -> None:
    run_under_compute_sanitizer(
        tool,
        """
import torch
from saft_kernels import gather, scatter_, sparse_adamw_
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    params = [torch.randn(n + 1, device="cuda").to(dtype)[1:] for n in (30_000, 1, 8192)]
    params += [torch.randn(70, 90, device="cuda").to(dtype).t(), torch.randn(4100, device="cuda").to(dtype)]
    indices = [torch.randperm(p.numel(), device="cuda")[:777].sort().values for p in params[:4]] + [None]
    like = [p if i is None else i for p, i in zip(params, indices)]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    m, v = ([torch.zeros(x.shape, dtype=kind, device="cuda") for x in like] for _ in range(2))
    lr, step, found_inf = (torch.tensor(x, device="cuda") for x in (0.1, 1.0, 0.0))
    sparse_adamw_(params, [p.clone() for p in params], m, v, indices, step=step, lr=lr, beta1=0.9, beta2=0.99,
                  eps=1e-8, weight_decay=0.1, found_inf=found_inf, backend="cuda")
    scatter_(params[:4], indices[:4], gather(params[:4], indices[:4], backend="cuda"), backend="cuda")
torch.cuda.synchronize()
""",
    )


def test_plan_packs_the_numbers_of_the_cpu_backend() -> None:
    """What the plan packs for numbers is what the cpu backend computes."""
    hyper = AdamWHyper(0.1, 0.9, 0.999, 1e-8, 0.01, 7)
    host: HostHyper = hyper.on_host()
    plan = cuda.Plan([AdamWSegment(torch.zeros(1), torch.zeros(1), torch.zeros(1))])
    (packed,) = np.frombuffer(plan._pack(hyper, (0, 0), []), tables.ADAMW_CUDA_HYPER)
    numbers = packed["number"]
    assert numbers["bias_correction1"] == host.bias_correction1
    assert numbers["bias_correction2_sqrt"] == host.bias_correction2_sqrt
