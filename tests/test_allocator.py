"""Released gradients leave the process, under the malloc that a user has: without settings in the environment."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saft_kernels import SparseAdamW
from saft_kernels.common import allocator
from saft_kernels.common.allocator import free_gradient
from saft_kernels.optim import release

ROOT = Path(__file__).parents[1]
MIB = 1 << 20

on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")

TRAIN = """
import re
from pathlib import Path
import torch
import saft_kernels

def read(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.manual_seed(0)
torch.set_num_threads(1)
count, width = 24, 1024
layers = [torch.nn.Linear(width, width, bias=False) for _ in range(count)]
model = torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.ReLU())))
x = torch.randn(8, width)
named = dict(model.named_parameters())
indices = {name: torch.randint(p.numel(), (p.numel() // 1000,)).unique() for name, p in named.items()}
mask = saft_kernels.SparseMask(indices, {name: p.shape for name, p in named.items()})
model(x).square().mean().backward()  # libraries load what they load
model.zero_grad()
optimizer = saft_kernels.SparseAdamW(named.items(), mask=mask, release_grads=True) if TRAINS else None
Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
before, files = read("VmRSS"), read("RssFile")
if TRAINS:
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
else:
    saft_kernels.select(model, [x], lambda model, x: model(x).square().mean(), density=1e-3, streaming=True)
print(read("VmHWM") - before - max(0, read("RssFile") - files))
"""


def peak(trains: bool) -> float:
    """MiB above the model, under the malloc that a user has."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    code = TRAIN.replace("TRAINS", str(trains))
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@on_linux
@pytest.mark.parametrize("trains", [True, False])
def test_released_gradients_leave_the_process(trains: bool) -> None:
    # all gradients together are 96 MiB, each is 4: one or two are held at a time, with what is computed beside them
    assert peak(trains) < 32


def resident(tensor: Tensor) -> int:
    """Bytes of a tensor that are in memory."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    in_core = (ctypes.c_ubyte * pages)()
    first = ctypes.c_void_p(-(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(first, ctypes.c_size_t((pages - 1) * mmap.PAGESIZE), in_core) == 0
    return sum(page & 1 for page in in_core) * mmap.PAGESIZE


def parameter_with_gradient(gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty_like(gradient))
    parameter.grad = gradient
    return parameter


def alias_of(gradient: Tensor, kind: str) -> object:
    """Something by which the values of a gradient can be read after it."""
    if kind == "python":
        return gradient
    if kind == "weakref":
        return gradient, weakref.ref(gradient)
    if kind == "view":
        return gradient[10:20].view(-1)
    if kind == "detached":
        return gradient.detach()
    if kind == "numpy":
        return gradient.numpy()
    if kind == "storage":
        return gradient.untyped_storage()
    if kind == "dlpack":
        return torch.utils.dlpack.to_dlpack(gradient)
    if kind == "C++":
        return torch._C.ScriptList([gradient])
    raise AssertionError(kind)


def read(alias: object) -> Tensor:
    if isinstance(alias, tuple):
        return alias[0]
    if isinstance(alias, np.ndarray):
        return torch.from_numpy(alias)
    if isinstance(alias, torch.UntypedStorage):
        return torch.empty(0).set_(alias)
    if isinstance(alias, Tensor):
        return alias
    return alias[0] if isinstance(alias, torch._C.ScriptList) else torch.utils.dlpack.from_dlpack(alias)


@pytest.mark.parametrize("kind", ["python", "weakref", "view", "detached", "numpy", "storage", "dlpack", "C++"])
def test_a_gradient_that_someone_holds_keeps_its_values(kind: str) -> None:
    parameter = parameter_with_gradient(torch.ones(MIB))
    alias = alias_of(parameter.grad, kind)
    free_gradient(parameter)
    assert parameter.grad is None
    values = read(alias)
    assert values.numel()
    assert (values == 1).all()


@pytest.mark.parametrize("owner", ["numpy", "buffer", "base"])
def test_memory_of_another_owner_keeps_its_values(owner: str) -> None:
    memory = np.ones(MIB, dtype=np.float32)
    base = torch.ones(2 * MIB)
    parameter = parameter_with_gradient(
        {
            "numpy": lambda: torch.from_numpy(memory),
            "buffer": lambda: torch.frombuffer(memory, dtype=torch.float32),
            "base": lambda: base[:MIB],
        }[owner]()
    )
    free_gradient(parameter)
    assert (memory == 1).all()
    assert (base == 1).all()


def test_what_is_no_plain_cpu_gradient_is_dropped() -> None:
    parameter = nn.Parameter(torch.ones(MIB))
    free_gradient(parameter)
    parameter.grad = torch.ones(MIB).to_sparse()
    free_gradient(parameter)
    assert parameter.grad is None


@on_linux
def test_the_pages_of_a_gradient_are_returned_before_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = parameter_with_gradient(torch.ones(MIB))
    address, left = parameter.grad.data_ptr(), []

    class Libc:
        def madvise(self, first: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
            assert ctypes.CDLL(None).madvise(first, size, advice) == 0
            assert address <= first.value < first.value + size.value <= address + 4 * MIB
            assert size.value >= 4 * MIB - 2 * mmap.PAGESIZE
            left.append(
                resident(torch.frombuffer((ctypes.c_ubyte * (4 * MIB)).from_address(address), dtype=torch.uint8))
            )
            return 0

    monkeypatch.setattr(allocator, "_libc", Libc)
    free_gradient(parameter)
    assert left
    assert left[0] <= 2 * mmap.PAGESIZE


@on_linux
def test_holes_of_dense_gradients_are_returned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    monkeypatch.setattr(release, "return_holes", lambda: returned.append(True))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = SparseAdamW(model.parameters(), density=0.1, release_grads=True)
    counts = []
    for _ in range(3):
        model(torch.randn(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(len(returned))
    assert counts == [0, 1, 1]
