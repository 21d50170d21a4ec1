"""Gradients that are not what the last step saw, parameters whose elements share memory, the first moment's rounding.

Where torch.optim.AdamW raises, so does SparseAdamW; where it steps, SparseAdamW steps with the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend, assert_same_bits
from optimizer_runs import (
    AFTER,
    BEFORE,
    BF16,
    FP16,
    FP64,
    MODES,
    Run,
    differences,
    draw,
    message_of,
    same_as_undisturbed,
    snapshot,
    undisturbed,
)
from processes import isolated
from torch import Tensor, nn
from training import clones

from saft_kernels import SparseAdamW

OP = "prepare_sparse_adamw"
DENSE_MODES = [mode for mode in MODES if not mode.startswith("released")]

# ---- the gradient's form ----

GRADIENTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "larger": lambda g, k: torch.zeros(g.numel() + 1000, dtype=g.dtype),
    "smaller": lambda g, k: torch.zeros(3, dtype=g.dtype),
    "empty": lambda g, k: torch.zeros(0, dtype=g.dtype),
    # "a" is (12, 10): a read of it as it is would stay inside
    "transposed": lambda g, k: g.t().contiguous(),
    "flat": lambda g, k: g.reshape(-1).clone(),
    # as many as are selected: what the op takes as the values alone
    "compact": lambda g, k: torch.ones(k, dtype=g.dtype),
    "wider": lambda g, k: g.to(FP64 if g.dtype != FP64 else torch.float32),
    "integer": lambda g, k: g.long(),
    "other_16_bit": lambda g, k: g.to(FP16 if g.dtype == BF16 else BF16),
}


def place_gradients(mode: str) -> None:
    wrong = []
    for name, make in GRADIENTS.items():
        for before in (0, BEFORE):
            run = Run(mode)
            run.step(before)
            run.optimizer.zero_grad()
            run.backward()
            p = run.parameters["a"]
            assert p.grad is not None
            right, k = p.grad.data, run.state("a")["exp_avg"].numel() if before else 24
            if k == p.numel() and name == "compact":
                continue
            values = clones(list(run.parameters.values()))
            p.grad.data = make(right, k)
            message = message_of(run.optimizer.step)
            what = f"{name} after {before}"
            if message is None or "'a'" not in message:
                wrong.append(f"{what}: {message or 'no error'}")
            if not all(map(torch.equal, run.parameters.values(), values)):
                wrong.append(f"{what}: stepped all the same")
            elif before:
                p.grad.data = right
                run.optimizer.step()
                run.steps_done += 1
                wrong += same_as_undisturbed(run, what)
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("mode", DENSE_MODES)
def test_gradients_of_another_form_are_named(mode: str) -> None:
    """`p.grad.data = x` asks nobody. torch raises as well, in each of these cases. Nothing is read, nothing changed."""
    isolated(place_gradients, mode)


@pytest.mark.parametrize("mode", DENSE_MODES)
def test_gradients_of_another_layout_are_used(mode: str) -> None:
    """Same shape and dtype, other memory: strided, of another order, expanded where all values are one."""
    for make in (
        lambda g: torch.stack([g, torch.full_like(g, float("nan"))], -1)[..., 0],
        lambda g: g.t().contiguous().t(),
        lambda g: g.clone(),
    ):
        run = Run(mode)
        for _ in range(BEFORE + AFTER):
            run.optimizer.zero_grad()
            run.backward()
            for p in run.parameters.values():
                p.grad.data = make(p.grad.data) if p.dim() == 2 else p.grad.data.clone()  # type: ignore[union-attr]
            run.optimizer.step()
            run.steps_done += 1
        assert same_as_undisturbed(run, "") == []
    runs = [Run(mode) for _ in range(2)]
    for expand, run in enumerate(runs):
        run.step(BEFORE)
        for p in run.parameters.values():
            p.grad = torch.ones_like(p)
            if expand and p.dim():
                p.grad.data = torch.ones((), dtype=p.dtype).expand(p.shape)
        run.optimizer.step()
    assert differences(snapshot(runs[1].optimizer), snapshot(runs[0].optimizer)) == []


# ---- released gradients ----


def written_by(mode: str, write: Callable[[Tensor], object], **changes: Any) -> tuple[str | None, dict[str, Tensor]]:
    """A run in which something was done to the gradients of its fourth step; the error that it met there."""
    run = Run(mode, **changes)
    run.step(BEFORE)
    run.optimizer.zero_grad()
    run.backward()

    def step() -> None:
        for p in run.parameters.values():
            if p.grad is not None:
                write(p.grad)
        run.optimizer.step()

    return message_of(step), snapshot(run.optimizer)


def set_data(gradient: Tensor) -> None:
    gradient.data = torch.linspace(-1, 1, gradient.numel()).to(gradient.dtype).view(gradient.shape)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data_set": set_data,
    "data_scaled": lambda g: g.data.mul_(2),
    "data_zeroed": lambda g: g.data.zero_(),
    "data_clamped": lambda g: g.data.clamp_(-0.5, 0.5),
    "detached": lambda g: g.detach().mul_(4),  # exact in bf16
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", ["released", "released_bf16"])
def test_what_is_written_to_released_gradients(mode: str, write: str) -> None:
    """It is stepped with, as a dense gradient's is, or it is an error and nothing changes: never silence."""
    message, released = written_by(mode, WRITES[write])
    if message is not None:
        assert "release_grads" in message or "selected_grad" in message
        assert differences(released, undisturbed(mode, BEFORE)) == []
        return
    _, dense = written_by(mode, WRITES[write], release_grads=False)
    assert differences(released, dense) == []
    assert differences(released, undisturbed(mode, BEFORE + 1)) != []


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
def test_released_gradients_of_another_grad_dtype() -> None:
    """`p.grad_dtype = torch.float32` on bf16 parameters: gradients that add up in fp32."""
    runs = [Run("released_bf16", release_grads=release) for release in (False, True)]
    for run in runs:
        for p in run.parameters.values():
            p.grad_dtype = torch.float32
        for _ in range(3):
            run.optimizer.zero_grad()
            ps = run.parameters
            scales = draw(run.steps_done, {name: p.shape for name, p in ps.items()})
            sum((p * scales[name]).float().sum() for name, p in ps.items()).backward()  # type: ignore[union-attr]
            run.optimizer.step()
            run.steps_done += 1
    assert differences(snapshot(runs[1].optimizer), snapshot(runs[0].optimizer)) == []


# ---- parameters whose elements share memory ----

OVERLAPPING: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.randn(3).expand(4, 3),
    "expanded_columns": lambda: torch.randn(4, 1).expand(4, 3),
    "windows": lambda: torch.randn(6).as_strided((4, 3), (1, 1)),
}


@pytest.mark.parametrize("layout", OVERLAPPING)
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("when", ["built", "later"])
def test_overlapping_parameters_are_named(layout: str, density: float, when: str) -> None:
    """An element would be stepped several times, in an order of the threads' own. torch refuses the expanded."""
    other = nn.Parameter(torch.ones(5))
    p = nn.Parameter(OVERLAPPING[layout]() if when == "built" else torch.randn(4, 3))

    def build_and_step() -> Any:
        optimizer = SparseAdamW([("other", other), ("p", p)], density=density)
        for step in range(2):
            other.grad, p.grad = torch.ones(5), torch.ones(4, 3)
            if step and when == "later":
                p.data = OVERLAPPING[layout]()
                values.extend(clones([other, p]))
            optimizer.step()

    values = clones([other, p]) if when == "built" else []
    message = message_of(build_and_step)
    assert message is not None
    assert "'p'" in message
    assert all(map(torch.equal, [other, p], values))


def test_sizes_of_one_may_have_any_stride() -> None:
    p, plain = nn.Parameter(torch.ones(1, 3).expand(1, 3).as_strided((1, 3), (0, 1))), nn.Parameter(torch.ones(1, 3))
    for parameter in (p, plain):
        optimizer = SparseAdamW([parameter], density=1.0)
        for _ in range(2):
            parameter.grad = torch.tensor([[1.0, -2.0, 3.0]])
            optimizer.step()
    assert_same_bits(p.detach(), plain.detach())


# ---- the first moment as torch computes it ----


@pytest.mark.parametrize("density", [1.0, 0.6])
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.1, 0.5), (0.3, 0.9), (0.49, 0.999), (0.5, 0.9), (0.9, 0.999)])
def test_small_gradients_after_large_ones(backend: Backend, betas: tuple[float, float], density: float) -> None:
    """torch.lerp goes from the end where the weight is 0.5 or more: m + (g - m) loses a g that is small beside m.

    Gradients are positive, so nothing cancels: the moments agree to 4 roundings whatever their size.
    """
    scales = torch.logspace(0, -8, 60, device=backend.device)
    theirs, ours = (nn.Parameter(torch.ones(60, device=backend.device)) for _ in range(2))
    expected = torch.optim.AdamW([theirs], lr=0.1, betas=betas, foreach=False)
    actual = SparseAdamW([ours], lr=0.1, betas=betas, density=density, backend=backend.name)
    for step in range(6):
        gradient = scales if step % 2 == 0 else scales.flip(0)
        for parameter, optimizer in ((theirs, expected), (ours, actual)):
            parameter.grad = gradient.clone()
            with backend.forced():
                optimizer.step()
        index = actual.state[ours].get("indices", torch.arange(60)).long()
        close = {"rtol": 4 * 2.0**-23, "atol": 0.0}
        torch.testing.assert_close(actual.state[ours]["exp_avg"], expected.state[theirs]["exp_avg"][index], **close)
        torch.testing.assert_close(ours[index], theirs[index], rtol=0, atol=(step + 1) * 2.0**-23)


def test_the_case_of_one_and_a_hundred_millionth() -> None:
    """At betas (0, 0) the moment is the gradient: half of lr, as eps is as large as the second gradient."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = SparseAdamW([p], lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, density=1.0)
    for gradient, after in ((1.0, -1.0), (1e-8, -1.5)):
        p.grad = torch.tensor([gradient])
        optimizer.step()
        assert float(p.detach()) == pytest.approx(after, rel=1e-6)
