"""Masks and deltas that versions before have written: they are read, and mean the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import assert_same_bits
from safetensors import safe_open

from saft_kernels import SparseDelta, SparseMask

DATA = Path(__file__).parent / "data"
_spec = importlib.util.spec_from_file_location("make_files", DATA / "make_files.py")
assert _spec is not None
assert _spec.loader is not None
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def test_mask() -> None:
    mask = SparseMask.load(DATA / "mask.safetensors")
    assert mask.shapes == made.SHAPES
    assert {name: index.tolist() for name, index in mask.items()} == made.INDICES


@pytest.mark.parametrize("file", ["delta.safetensors", "delta_with_originals.safetensors"])
def test_delta(file: str) -> None:
    delta = SparseDelta.load(DATA / file)
    model, base, tuned = made.base(), made.base(), made.tuned()
    delta.apply_(model)
    for name, value in tuned.items():
        assert_same_bits(model[name], value, name)
    delta.revert_(model)
    for name, value in base.items():
        assert_same_bits(model[name], value, name)


def test_originals_are_in_the_file() -> None:
    """A new process takes the tuned model back to its base."""
    model, base = made.tuned(), made.base()
    SparseDelta.load(DATA / "delta_with_originals.safetensors").revert_(model)
    for name, value in base.items():
        assert_same_bits(model[name], value, name)


def test_those_versions_read_the_deltas_of_this_one(tmp_path: Path) -> None:
    """They hold the same. Another version of a format needs a file of it beside these."""
    delta = SparseDelta.diff(made.base(), made.tuned())
    delta.save(tmp_path / "delta.safetensors")
    delta.save(tmp_path / "delta_with_originals.safetensors", include_original=True)
    for path in tmp_path.iterdir():
        with safe_open(path, "pt") as ours, safe_open(DATA / path.name, "pt") as theirs:
            assert ours.metadata() == theirs.metadata()
            assert set(ours.keys()) == set(theirs.keys())
            for key in ours.keys():  # noqa: SIM118
                assert_same_bits(ours.get_tensor(key), theirs.get_tensor(key), key)
