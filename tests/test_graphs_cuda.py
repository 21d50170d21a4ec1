"""Whole training steps as one CUDA graph: examples/cuda_graph_loop.py, and that nothing in a step waits for its device.

- any machine: the example's loop; the operations of a step, none of which a capture would refuse.
- gpu: each way to get gradients, with each backend that has kernels there, against the loop without a graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from cuda_kernels import needs_gpu
from scripts import load_example
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import saft_kernels
from saft_kernels import ops
from saft_kernels.ops import cpu

example: Any = load_example("cuda_graph_loop")
CPU = torch.device("cpu")
LEARNS = ("--steps", "27", "--batch", "16", "--density", "0.1")


def arguments(*more: str) -> argparse.Namespace:
    return example.parse_args(["--steps", "4", "--batch", "4", "--size", "32", "--width", "16", "--layers", "1", *more])


def assert_same_runs(actual: Any, expected: Any) -> None:
    """Losses and weights, bit by bit."""
    for a, b in zip(actual[0], expected[0], strict=True):
        assert_same_bits(a, b)
    for name, weight in expected[1].items():
        assert_same_bits(actual[1][name], weight, name)


# ---- any machine ----


@pytest.mark.parametrize("way", example.WAYS)
def test_loop(way: str) -> None:
    """It learns, and released gradients give the bits of dense ones."""
    losses, weights, _ = example.train(way, arguments(*LEARNS), CPU, graphed=False)
    assert sum(losses[-5:]) < sum(losses[:5])
    if way == "release_grads":
        assert_same_runs((losses, weights), example.train("dense", arguments(*LEARNS), CPU, graphed=False))


def test_graphed_loop_warms_up_and_captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the graph goes; what stands in for it runs the step."""
    calls: list[str] = []

    def stand_in(name: str) -> Callable[[Callable[[], Tensor]], Callable[[], Tensor]]:
        def wrap(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                calls.append(name)
                return step()

            calls.append(f"make {name}")
            return run

        return wrap

    monkeypatch.setattr(example, "on_side_stream", stand_in("warm up"))
    monkeypatch.setattr(example, "capture", stand_in("replay"))
    graphed = example.train("release_grads", arguments(), CPU, graphed=True)
    assert calls == ["make warm up", *["warm up"] * 3, "make replay", *["replay"] * 4]
    assert_same_runs(graphed, example.train("release_grads", arguments(), CPU, graphed=False))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.compare(arguments("--eager", "--ways", "dense", "sparse_grad"))
    lines = capsys.readouterr().out.splitlines()
    assert torch.cuda.is_available() or lines.pop(0).startswith("No GPU, so no CUDA graph")
    assert [line.split()[0] for line in lines] == ["gradients", "dense", "sparse_grad"]


# what reads values on the host
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}


@pytest.mark.parametrize("way", example.WAYS)
def test_a_step_asks_its_device_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture would refuse it. Seen on a CPU, without its kernels, which read scalars on the host."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    batch = torch.randn(4, 8)
    mask = saft_kernels.select(model, [batch], lambda m, b: m(b).square().mean(), density=0.1, progress=False)
    optimizer = saft_kernels.SparseAdamW(
        model.named_parameters(), torch.tensor(0.1), mask=mask, capturable=True, release_grads=way != "dense"
    )
    if way == "sparse_grad":
        saft_kernels.sparse_grad(model, optimizer)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    monkeypatch.setattr(cpu.Plan, "step", lambda *_: None)
    with Recorder():
        step()
    assert "_foreach_add_" in names  # the step counts
    assert not names & WAITS


# ---- gpu ----


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("way", example.WAYS)
def test_gpu_whole_steps(way: str, backend: str) -> None:
    if why := ops.why_unavailable(backend, "prepare_sparse_adamw", "cuda"):
        pytest.skip(why)
    device = torch.device("cuda")
    args = arguments(*LEARNS)
    eager, graph = (example.train(way, args, device, graphed=graphed, backend=backend) for graphed in (False, True))
    assert_same_runs(graph, eager)
    assert sum(eager[0][-5:]) < sum(eager[0][:5])


@needs_gpu
def test_gpu_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.compare(arguments())
    assert capsys.readouterr().out.count("yes") == len(example.WAYS)
