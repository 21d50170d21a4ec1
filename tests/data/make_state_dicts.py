"""Writes state_dicts.pt.gz: state_dicts of SparseAdamW as commit ec6e920 saved them, and how training went on.

Run it with that commit's package, and never with a later one: later ones have to load what it wrote.

    git worktree add /tmp/ec6e920 ec6e920
    (cd /tmp/ec6e920 && SAFT_BUILD_CUDA=0 python setup.py build_ext --inplace)
    PYTHONPATH=/tmp/ec6e920 python tests/data/make_state_dicts.py
"""

from __future__ import annotations

import copy
import gzip
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saft_kernels import SparseAdamW, SparseMask

FILE = Path(__file__).with_name("state_dicts.pt.gz")
STEPS_BEFORE, STEPS_AFTER = 3, 3
SHAPES = {"a": (9, 5), "b": (11,), "c": (4, 3), "d": ()}
MASK = {"a": [0, 7, 8, 21, 44], "b": [3, 10], "c": [], "d": [0]}

CASES: dict[str, dict[str, Any]] = {
    "mask": {"mask": True},
    "global": {"density": 0.2},
    "tensor": {"density": 0.2, "scope": "tensor"},
    "row": {"density": 0.2, "scope": "row"},
    "dense": {"density": 1.0},
    "amsgrad": {"density": 0.2, "amsgrad": True},
    "dense_amsgrad": {"density": 1.0, "amsgrad": True},
    "bf16": {"dtype": "bfloat16", "density": 0.2},
    "bf16_dense": {"dtype": "bfloat16", "density": 1.0},
    "fp16_amsgrad": {"dtype": "float16", "mask": True, "amsgrad": True},
    "fp64": {"dtype": "float64", "density": 0.2},
    "capturable": {"density": 0.2, "capturable": True},
    "summing": {"density": 0.2, "selection_steps": 5},
    "groups": {"k": 9, "head": {"density": 0.5, "lr": 0.1, "betas": (0.8, 0.9)}},
    "dense_head": {"density": 0.1, "head": {"density": 1.0, "weight_decay": 0.5}},
    "reselecting": {"density": 0.2, "reselect": True},
}


def build(case: str) -> tuple[dict[str, nn.Parameter], Any]:
    """Parameters as they start, "c" transposed, and their optimizer."""
    options = {"lr": 0.05, **CASES[case]}
    options.pop("reselect", None)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    values["c"] = values["c"].t()
    parameters = {name: nn.Parameter(value) for name, value in values.items()}
    if options.pop("mask", False):
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        options["mask"] = SparseMask({n: torch.tensor(i, dtype=torch.int64) for n, i in MASK.items()}, shapes)
    head = options.pop("head", None)
    groups: list[dict[str, Any]] = [{"params": list(parameters.items())}]
    if head is not None:
        groups = [{"params": groups[0]["params"][1:]}, {"params": groups[0]["params"][:1], **head}]
    return parameters, SparseAdamW(groups, **options)


def train(parameters: dict[str, nn.Parameter], optimizer: Any, first: int, count: int) -> None:
    """Steps whose gradients depend on their number alone."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        for p in parameters.values():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()


def flat(parameters: dict[str, nn.Parameter]) -> Tensor:
    """All values in one tensor, in logical order."""
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()])


def main() -> None:
    """Writes the file."""
    saved = {}
    for case in CASES:
        parameters, optimizer = build(case)
        train(parameters, optimizer, 0, STEPS_BEFORE)
        if CASES[case].get("reselect"):
            optimizer.reselect()
        before, state_dict = flat(parameters), copy.deepcopy(optimizer.state_dict())
        train(parameters, optimizer, STEPS_BEFORE, STEPS_AFTER)
        saved[case] = {"parameters": before, "state_dict": state_dict, "expected": flat(parameters)}
    content = io.BytesIO()
    torch.save(saved, content)
    FILE.write_bytes(gzip.compress(content.getvalue(), mtime=0))
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(saved)} state_dicts")


def load() -> dict[str, dict[str, Any]]:
    """Per case, "parameters", "state_dict" and the parameters "expected" after further steps."""
    content = io.BytesIO(gzip.decompress(FILE.read_bytes()))
    saved: dict[str, dict[str, Any]] = torch.load(content, weights_only=True)
    return saved


if __name__ == "__main__":
    main()
