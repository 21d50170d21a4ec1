"""What a user of a release has: run by the Python of an environment that the wheel was installed into.

Usage: installed.py backend, the one that is to serve CPU tensors: cpu or reference.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import saft_kernels
from saft_kernels import SparseAdamW, ops
from saft_kernels.cli.main import main

backend = sys.argv[1]
assert saft_kernels.__file__.startswith(sys.prefix), saft_kernels.__file__

wheel = metadata.distribution("saft_kernels")
assert wheel.version == saft_kernels.__version__, wheel.version
needs = [re.split(r"\W", need)[0] for need in wheel.requires or [] if "extra ==" not in need]
assert needs == ["torch", "numpy"], needs
folders = {file.parts[0] for file in wheel.files or []} - {".."}  # "..": the command, in bin
assert folders == {"saft_kernels", f"saft_kernels-{wheel.version}.dist-info"}, folders

parameter = torch.nn.Parameter(torch.ones(1000))
optimizer = SparseAdamW([parameter], density=0.01)
parameter.grad = torch.arange(1000.0)
optimizer.step()
changed = (parameter != 1).nonzero().flatten().tolist()
assert changed == list(range(990, 1000)), changed

with tempfile.TemporaryDirectory() as folder:  # the examples come along, and run from anywhere
    scripts = Path(folder, "scripts")
    assert main(["examples", str(scripts)]) == 0
    shown = subprocess.run([sys.executable, "frontier.py", "--help"], cwd=scripts, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert {"finetune_clip.py", "finetuning.py", "frontier.py"} <= {file.name for file in scripts.iterdir()}

assert (ops.why_unavailable("cpu") is None) == (backend == "cpu"), ops.why_unavailable("cpu")
if sys.platform == "linux":  # a second OpenMP would have threads of its own, which wait beside torch's
    openmp = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(openmp) <= 1, openmp
print(f"{Path(sys.prefix).name}: saft_kernels {wheel.version}, one step, on the {backend} backend")
