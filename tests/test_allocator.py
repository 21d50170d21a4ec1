"""Released gradients leave the process, under the malloc that a user has: without settings in the environment."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

# of glibc: what a user may have set
LIMITS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
ROOT = Path(__file__).parents[1]

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's malloc"
)

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
optimizer = saft_kernels.SparseAdamW(named.items(), mask=mask, release_grads=True)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
before, files = read("VmRSS"), read("RssFile")
for _ in range(3):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(read("VmHWM") - before - max(0, read("RssFile") - files))
"""


def run(code: str, **variables: str) -> str:
    """What it prints, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in LIMITS}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_glibc
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_released_gradients_leave_the_process() -> None:
    # all gradients together are 96 MiB, each is 4: one or two are held at a time, with what is computed beside them
    assert float(run(TRAIN)) < 32


CALL = "from saft_kernels.common.allocator import return_large_blocks; print(return_large_blocks())"


@needs_glibc
def test_what_the_user_has_set_stays() -> None:
    assert run(CALL) == "True"
    for name in LIMITS[:-1]:
        assert run(CALL, **{name: "262144"}) == "False"
    assert run(CALL, GLIBC_TUNABLES="glibc.malloc.trim_threshold=262144") == "False"
    assert run(CALL, GLIBC_TUNABLES="glibc.malloc.arena_max=2", MALLOC_ARENA_MAX="2") == "True"
