"""What comes upon a step from the process around it: deterministic algorithms, interrupts, other threads."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from optimizer_runs import AFTER, BEFORE, BF16, MODES, Run, differences, snapshot, undisturbed
from processes import isolated
from torch import Tensor, nn
from training import batches, loss_fn, two_towers

import saft_kernels
from saft_kernels import SparseAdamW, ops, select
from saft_kernels.ops.adamw import Watch

# ---- torch.use_deterministic_algorithms ----


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("mode", MODES)
def test_deterministic_algorithms(mode: str) -> None:
    """Indices are distinct, so every write is one: the same bits as without, and no error."""
    assert torch.are_deterministic_algorithms_enabled()
    run = Run(mode)
    run.step(BEFORE)
    run.optimizer.reselect()
    run.step(AFTER)
    torch.use_deterministic_algorithms(False)
    plain = Run(mode)
    plain.step(BEFORE)
    plain.optimizer.reselect()
    plain.step(AFTER)
    assert differences(snapshot(run.optimizer), snapshot(plain.optimizer)) == []


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_deterministic_scatter(backend_name: str) -> None:
    if (reason := ops.why_unavailable(backend_name, "scatter_", "cpu")) is not None:
        pytest.skip(f"{backend_name}: {reason}")
    tensors = [torch.zeros(4, 5), torch.zeros(7, dtype=BF16)]
    indices = [torch.tensor([3, 1, 19]), torch.tensor([6])]
    saft_kernels.scatter_(
        tensors, indices, [torch.tensor([1.0, 2.0, 3.0]), torch.ones(1, dtype=BF16)], backend=backend_name
    )
    assert tensors[0].flatten()[[3, 1, 19]].tolist() == [1.0, 2.0, 3.0]
    assert (tensors[0].count_nonzero(), tensors[1].tolist()) == (3, [0.0] * 6 + [1.0])


@pytest.mark.usefixtures("deterministic")
def test_deterministic_release_onto_a_dense_gradient() -> None:
    """A gradient that was assigned, and a backward pass that adds the selected values to it."""
    run = Run("released")
    run.step()
    run.optimizer.zero_grad()
    for p in run.parameters.values():
        p.grad = torch.zeros_like(p)
    run.backward()
    run.optimizer.step()
    assert differences(snapshot(run.optimizer), undisturbed("released", 2)) == []


def all_reduce_deterministically() -> None:
    from torch import distributed

    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        run = Run("mask")
        for _ in range(2):
            run.optimizer.zero_grad()
            run.backward()
            run.optimizer.all_reduce_grads()
            run.optimizer.step()
            run.steps_done += 1
        assert differences(snapshot(run.optimizer), undisturbed("mask", 2)) == []


def test_deterministic_all_reduce() -> None:
    isolated(all_reduce_deterministically)


# ---- interrupts and threads ----

PACKAGE = str(Path(saft_kernels.__file__).parent)


@contextlib.contextmanager
def traced(trace: Callable[[FrameType, str, Any], Any]) -> Iterator[None]:
    """Python's collector waits: the finalizers of what earlier tests left would run inside of the call."""
    before = sys.gettrace()
    gc.disable()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.enable()


def lines_of(function: Callable[[], object]) -> list[tuple[CodeType, int]]:
    """The lines of this package that a call runs through, each once."""
    seen: dict[tuple[CodeType, int], None] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen[frame.f_code, frame.f_lineno] = None
        return trace

    with traced(trace):
        function()
    return list(seen)


def interrupted_at(line: tuple[CodeType, int], function: Callable[[], object]) -> None:
    """Calls it; Ctrl-C is pressed just before the line runs."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and (frame.f_code, frame.f_lineno) == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace if frame.f_code.co_filename.startswith(PACKAGE) else None

    with traced(trace), pytest.raises(KeyboardInterrupt):
        function()


@pytest.mark.parametrize("mode", ["global", "dense_amsgrad", "capturable", "released", "two_plans", "reference_dense"])
def test_interrupted_in_a_step(mode: str) -> None:
    """Wherever it was: a parameter was stepped, or not, and what follows goes by what the state says.

    The oracle is an optimizer that loads this state, whatever became of the step.
    """

    def ready() -> Run:
        run = Run(mode)
        run.step(BEFORE)
        run.optimizer.zero_grad()
        run.backward()
        return run

    states = [undisturbed(mode, steps) for steps in (BEFORE, BEFORE + 1)]
    lines = lines_of(ready().optimizer.step)
    assert len(lines) > 10
    for line in lines:
        run, fresh = ready(), Run(mode)
        interrupted_at(line, run.optimizer.step)
        found = snapshot(run.optimizer)
        for name, value in found.items():
            assert any(torch.equal(value, state[name]) for state in states), (line, name)
        fresh.optimizer.load_state_dict(run.optimizer.state_dict())
        for name, p in fresh.parameters.items():
            p.data.copy_(found[name])
        for one in (run, fresh):
            one.steps_done = BEFORE + 1
            one.step(2)
        assert differences(snapshot(run.optimizer), snapshot(fresh.optimizer)) == [], line


def interrupt_watch() -> None:
    states = [{"step": torch.zeros(3)} for _ in range(300)]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupts = 0
    for i in range(600):
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 * (i % 60 + 1))
            for _ in range(8):
                Watch(states, {"step"})
        except KeyboardInterrupt:
            interrupts += 1
        with contextlib.suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert interrupts


def test_interrupted_while_a_plan_is_made() -> None:
    """At any instruction, not before a line: inside of what torch does, too, which may end the process."""
    isolated(interrupt_watch)


@pytest.mark.parametrize("mode", ["global", "tensor", "mask", "dense"])
def test_interrupted_in_the_first_step(mode: str) -> None:
    """The step is taken again: the same selection, counted once or twice."""
    Run(mode).step()  # what is looked up once in a process is no line of the others
    first = Run(mode)
    first.backward()
    for line in lines_of(first.optimizer.step):
        run = Run(mode)
        run.backward()
        interrupted_at(line, run.optimizer.step)
        run.optimizer.step()
        assert run.optimizer.mask == first.optimizer.mask, line
        steps = {float(run.state(name)["step"]) for name in run.with_key("step")}
        assert steps in ({1.0}, {2.0}), line


def test_select_in_one_thread_lets_others_release() -> None:
    """Gradients are kept whole of the model that select() reads, and of no other."""
    model, other = two_towers(), two_towers(1)
    mask = select(other, batches(1), loss_fn, density=0.1, progress=False)
    optimizer = SparseAdamW(other.named_parameters(), mask=mask, release_grads=True)
    inside, done = threading.Event(), threading.Event()

    def waiting_loss(model: nn.Module, batch: Any) -> Tensor:
        inside.set()
        assert done.wait(60)
        return loss_fn(model, batch)

    expected = select(two_towers(), batches(1), loss_fn, density=0.1, progress=False)
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(select(model, batches(1), waiting_loss, density=0.1, progress=False))
    )
    thread.start()
    try:
        assert inside.wait(60)
        loss_fn(other, batches(1)[0]).backward()
        whole = [
            name for name, p in other.named_parameters() if type(p.grad) is Tensor and mask[name].numel() < p.numel()
        ]
        assert whole == []
    finally:
        done.set()
        thread.join(60)
    assert found == [expected]
    optimizer.step()
