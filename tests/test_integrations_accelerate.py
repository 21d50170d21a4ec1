"""accelerate: a mask, then prepare(); accumulation; save_state and load_state; parameters swapped by prepare()."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import (
    assert_only_selected_changed,
    assert_same_weights,
    folder,  # noqa: F401
    load_example,
    mask_under,
    run_example,
    weights,
)
from torch import nn

pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, TensorDataset

import saft_kernels
from saft_kernels import SparseAdamW
from saft_kernels.integrations import select_into


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """It is a singleton, which refuses another precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def a_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)).to(dtype)


def a_loader(dtype: torch.dtype = torch.float32) -> DataLoader:
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs.to(dtype), inputs[:, :3].argmax(1)), 4)


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def test_example(folder: Path) -> None:  # noqa: F811
    losses = run_example("accelerate_loop")["losses"]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert run_example("accelerate_loop")["losses"] == []  # all epochs are done


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_load_state_goes_on_bit_equal(precision: str, folder: Path) -> None:  # noqa: F811
    example: Any = load_example("accelerate_loop")
    example.STATE = folder / "whole"
    whole, losses = example.train(Accelerator(mixed_precision=precision, gradient_accumulation_steps=2))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    AcceleratorState._reset_state(reset_partial_state=True)
    example.STATE = folder / "interrupted"
    example.train(Accelerator(mixed_precision=precision, gradient_accumulation_steps=2), epochs=2)
    resumed, rest = example.train(Accelerator(mixed_precision=precision, gradient_accumulation_steps=2))
    assert rest == losses[16:]
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_loop_is_the_plain_loop(dtype: torch.dtype) -> None:
    """prepare() loads the optimizer's own state: bits of indices, fp32 moments and masters must survive, and do."""

    def train(accelerator: Accelerator | None) -> tuple[nn.Module, SparseAdamW]:
        model, loader = a_model(dtype), a_loader(dtype)
        mask = saft_kernels.select(model, loader, loss_fn, density=0.1, progress=False)
        optimizer: Any = SparseAdamW(model.named_parameters(), lr=0.02, mask=mask)
        inner = optimizer
        if accelerator is not None:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            assert inner.mask == mask
        for i, batch in enumerate(loader):
            if accelerator is None:
                (loss_fn(model, batch) / 2).backward()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            with accelerator.accumulate(model):
                accelerator.backward(loss_fn(model, batch))
                optimizer.step()
                optimizer.zero_grad()
        return model, inner

    plain, plain_optimizer = train(None)
    prepared, optimizer = train(Accelerator(gradient_accumulation_steps=2))
    assert_same_weights(weights(prepared), weights(plain))
    assert_only_selected_changed(weights(a_model(dtype)), weights(prepared), optimizer.mask, 0.1, 0.8)
    for state, expected in zip(optimizer.state.values(), plain_optimizer.state.values(), strict=True):
        assert_same_weights(state, expected)
        assert float(state["step"]) == (4.0 if state["exp_avg"].numel() else 0.0)


def test_select_into_what_was_prepared() -> None:
    """No names, and accelerate's wrapper around it."""
    accelerator = Accelerator()
    model, loader = a_model(), a_loader()
    optimizer: Any = SparseAdamW(model.parameters(), lr=0.02, k=20)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    mask = select_into(optimizer, model, loader, loss_fn, progress=False)
    assert mask == saft_kernels.select(a_model(), a_loader(), loss_fn, k=20, progress=False)
    for batch in loader:
        accelerator.backward(loss_fn(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert_only_selected_changed(weights(a_model()), weights(model), mask, 20 / mask.numel)


@pytest.mark.parametrize("fused", [None, True])
def test_skipped_step(fused: bool | None) -> None:
    """accelerate sees what GradScaler skips, but with fused=True, where the scaler leaves that to the optimizer."""
    Accelerator()
    model = a_model()
    optimizer = SparseAdamW(model.parameters(), lr=0.02, k=20, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    batch = next(iter(a_loader()))
    for scale in (1.0, float("inf"), 1.0):
        before = weights(model)
        scaler.scale(loss_fn(model, batch) * scale).backward()
        wrapped.step()
        wrapped.zero_grad()
        overflow = scale != 1.0
        assert wrapped.step_was_skipped == (overflow and not fused)
        if overflow:
            assert_same_weights(weights(model), before)
        else:
            assert_only_selected_changed(before, weights(model), mask_under(model, optimizer), 20 / 195)


def test_swapped_parameters() -> None:
    """On XLA, prepare() puts other parameter objects into the groups: what is selected goes by position."""
    model, other = a_model(), a_model()
    optimizer = SparseAdamW(
        model.named_parameters(),
        lr=0.02,
        mask=saft_kernels.select(model, a_loader(), loss_fn, k=20, progress=False),
    )
    mask = optimizer.mask
    wrapped = Accelerator().prepare(optimizer)
    wrapped._switch_parameters(dict(zip(model.parameters(), other.parameters(), strict=True)))
    for batch in a_loader():
        loss_fn(other, batch).backward()
        wrapped.step()
        wrapped.zero_grad()
    assert optimizer.mask == mask
    assert_only_selected_changed(weights(a_model()), weights(other), mask, 20 / mask.numel)
    assert_same_weights(weights(a_model()), weights(model))
