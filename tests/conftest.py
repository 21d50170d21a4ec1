"""The backends every op's test runs on, and how a test makes tensors for one of them."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# before torch loads OpenMP: on a shared machine, threads that spin at a barrier make small cases 100 times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# before any library that would look for files to download
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from torch import Tensor

from saft_kernels import ops
from saft_kernels.ops import cpu

hypothesis.settings.register_profile(
    "saft",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("saft")

CPU_ISAS = ("baseline", "avx2", "avx512")  # by the number that csrc/cpu/isa.h gives them


@dataclass(frozen=True)
class Backend:
    """One way to run the ops: `backend.topk_magnitude(...)` is `ops.topk_magnitude(..., backend=backend.name)`."""

    id: str
    name: str
    device: str = "cpu"
    isa: int = -1  # of the cpu backend: a position in CPU_ISAS

    def why_unavailable(self, op: str | None = None) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no GPU that torch can use"
        reason = ops.why_unavailable(self.name, op, self.device)
        if reason is None and self.isa >= len(cpu._C.isas() if self.name == "cpu" else ()):
            return f"this processor has no {CPU_ISAS[self.isa]}"
        return reason

    def to(self, tensor: Tensor) -> Tensor:
        """A copy on this backend's device. Make a view (slice, transpose, expand) after it, not before."""
        return tensor.to(self.device, copy=True)

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """The cpu backend uses this instruction set; nothing to do for the others."""
        before, cpu.ISA = cpu.ISA, self.isa
        try:
            yield
        finally:
            cpu.ISA = before

    def __getattr__(self, op: str) -> Callable[..., Any]:
        function = getattr(ops, op)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.forced():
                return function(*args, backend=self.name, **kwargs)

        return run


# Adding a backend is one entry here. `-k "cpu and not reference"` selects the compiled one (tests/sanitize.sh).
BACKENDS = [
    Backend("reference", "reference"),
    *(Backend(f"cpu-{isa}", "cpu", isa=number) for number, isa in enumerate(CPU_ISAS)),
    Backend("triton", "triton", device="cuda"),  # through its interpreter: test_<op>_triton.py, on small tiles
    Backend("cuda", "cuda", device="cuda"),
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes, or gigabytes; runs with SAFT_SLOW_TESTS=1")


# what other modules run beside, where pytest has several processes: else one of them would end long after the others
LONG = (
    "test_distributed_shards",
    "test_topk_magnitude_triton",
    "test_sparse_adamw_triton",
    "test_finetune_large",
    "test_ranks_that_differ",
    "test_integrations_fsdp",
    "test_fsdp2_train",
    "test_topk_magnitude_cuda",
    "test_sparse_ops_cuda",
    "test_study",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long modules come first. In the middle of one, pytest-xdist would give half of it, and its fixture, away."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """A million objects that stay: neither Python's collector nor optimizers that look for wrapped models need them."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips here rather than in fixtures, so that `-ra` folds them into one line per reason."""
    if item.get_closest_marker("slow") and os.environ.get("SAFT_SLOW_TESTS") != "1":
        pytest.skip("slow: set SAFT_SLOW_TESTS=1 to run it")
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    op = getattr(item.module, "OP", None)  # the op a test module is about, by its name in the backends' modules
    if isinstance(backend, Backend) and (reason := backend.why_unavailable(op)) is not None:
        pytest.skip(f"{backend.id}: {reason}")


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.id)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; those that cannot run here are skipped."""
    return request.param


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """`torch.set_flush_denormal(True)`. Inputs and expected values with denormals are made before."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


DEFAULTS = {
    "default_device": lambda: torch.set_default_device("meta"),
    "device_context": lambda: torch.device("meta"),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
}


@contextlib.contextmanager
def other_default(name: str) -> Iterator[None]:
    """Torch makes tensors elsewhere, or of another dtype, where neither is said: the ops say both."""
    dtype = torch.get_default_dtype()
    context = DEFAULTS[name]()
    try:
        with context or contextlib.nullcontext():
            assert torch.empty(1).is_meta or torch.empty(1).dtype != torch.float32
            yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def sparse_memory(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros (numel,) of which only the pages written to take memory: indices above 2^31 for the price of a few."""
    if sys.platform != "linux":
        pytest.skip("only Linux maps memory without reserving it")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python has no name for yet
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


def bits(tensor: Tensor) -> Tensor:
    """A copy of the tensor's bytes in logical order, on the CPU. They tell NaN payloads and -0 apart."""
    flat = tensor.detach().reshape(-1)
    return torch.empty(flat.shape, dtype=flat.dtype).copy_(flat).view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    assert torch.equal(bits(actual), bits(expected)), what


def assert_message(error: pytest.ExceptionInfo[BaseException], parts: Sequence[str]) -> None:
    """An error names the argument, what was expected, what came, and the remedy (after the semicolon), on one line."""
    message = str(error.value)
    for part in parts:
        assert part in message
    assert "expected" in message
    assert "got" in message
    assert "; " in message
    assert "\n" not in message
