"""What the tests of the integrations share: examples as modules, and what a training run changed, bit by bit."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, bits
from torch import Tensor, nn

from saft_kernels import SparseMask

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: the examples write to runs/ in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_example(name: str) -> ModuleType:
    """The example, without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name: str) -> dict[str, Any]:
    """`python examples/name.py`, in this process: what it leaves in its namespace."""
    path = str(EXAMPLES / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path])
        return runpy.run_path(path, run_name="__main__")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool tensors: where the bits differ."""
    differ = {}
    for name, old in before.items():
        assert old.shape == after[name].shape, name
        assert old.dtype == after[name].dtype, name
        old_bits, new_bits = (bits(tensor).view(-1, old.itemsize) for tensor in (old, after[name]))
        differ[name] = (old_bits != new_bits).any(1).view(old.shape)
    return differ


def assert_only_selected_changed(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: SparseMask, density: float, share: float = 0.9
) -> None:
    """Nothing outside the mask, and at least `share` of what is in it; the mask is of the density asked for."""
    assert mask.k == round(density * sum(p.numel() for p in before.values()))
    selected = mask.to_dense()
    moved = changed(before, after)
    for name, where in moved.items():
        assert not (where & ~selected[name]).any(), name
    assert sum(int(where.sum()) for where in moved.values()) >= share * mask.k


def assert_same_weights(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


def mask_under(model: nn.Module, optimizer: torch.optim.Optimizer) -> SparseMask:
    """What an optimizer without names selected, under the model's."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    mask = optimizer.mask  # type: ignore[attr-defined]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of = dict(zip(mask, (names[p] for p in parameters), strict=True))
    return SparseMask({of[n]: mask[n] for n in mask}, {of[n]: mask.shapes[n] for n in mask})
