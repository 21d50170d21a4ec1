"""Code between two steps that moves, replaces, shares, copies, edits or frees what a step of SparseAdamW reads.

Memory that is left behind is poisoned, so a step that still reads it shows; where it is really freed, the run has a
process of its own. Runs are equal in every bit to those where nothing happened, or to a freshly built optimizer's.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from optimizer_runs import (
    AFTER,
    BEFORE,
    FP64,
    MODES,
    STATE_KEYS,
    Run,
    differences,
    message_of,
    poison,
    same_as_undisturbed,
    snapshot,
)
from processes import isolated
from torch import Tensor, nn

from saft_kernels import SparseAdamW, SparseDelta, SparseMask

all_modes = pytest.mark.parametrize("mode", MODES)


# ---- memory that moves ----


def by_data(state: dict[str, Tensor], key: str) -> None:
    state[key].data = state[key].data.clone()


def by_data_through_another_dtype(state: dict[str, Tensor], key: str) -> None:
    """As `.to(device)` and back; int32 and fp32 are exact in fp64."""
    state[key].data = state[key].data.to(FP64).clone().to(state[key].dtype).clone()


def by_set(state: dict[str, Tensor], key: str) -> None:
    with torch.no_grad():
        state[key].set_(state[key].detach().clone())


def by_another_object(state: dict[str, Tensor], key: str) -> None:
    state[key] = state[key].clone()


MOVES = [by_data, by_data_through_another_dtype, by_set, by_another_object]


@all_modes
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_state_that_moves(mode: str, move: Callable[..., None]) -> None:
    """Of all parameters, and of one alone."""
    wrong = []
    for key in STATE_KEYS:
        for only in (None, "b"):
            run = Run(mode)
            run.step(BEFORE)
            names = [only] if only else run.with_key(key)
            if not set(names) <= set(run.with_key(key)):
                continue
            old = [run.state(name)[key].data for name in names]
            for name in names:
                move(run.state(name), key)
            if key != "indices" or move is not by_another_object:  # the optimizer may go by those it selected
                poison(old)
            wrong += same_as_undisturbed(run, f"{key} of {only or 'all'}")
    assert wrong == []


@all_modes
def test_everything_moves_before_every_step(mode: str) -> None:
    """Offloading: nothing is where the last step left it, nor where the one before did."""
    run, old = Run(mode), []
    for _ in range(BEFORE + AFTER):
        run.step()
        start = len(old)
        for p in run.parameters.values():
            tensors = [p, *run.optimizer.state.get(p, {}).values()]
            old += [tensor.data for tensor in tensors]
            for tensor in tensors:
                tensor.data = tensor.data.clone()
        poison(old[start:])
    assert same_as_undisturbed(run, "") == []


@all_modes
def test_two_objects_that_take_turns(mode: str) -> None:
    """Double buffering: both are known from steps before, and only one of them is up to date."""
    for key in STATE_KEYS:
        run = Run(mode)
        run.step()
        spare = {name: run.state(name)[key].clone() for name in run.with_key(key)}
        for _ in range(4):
            for name, other in spare.items():
                other.data.copy_(run.state(name)[key].data)
                spare[name], run.state(name)[key] = run.state(name)[key], other
            if key != "indices":
                poison(list(spare.values()))
            run.step()
        assert same_as_undisturbed(run, key) == []


def by_swap(parameters: dict[str, nn.Parameter], name: str) -> None:
    """What module.to() does under torch.__future__.set_swap_module_params_on_conversion."""
    torch.utils.swap_tensors(parameters[name], nn.Parameter(parameters[name].detach().clone()))


@all_modes
@pytest.mark.parametrize("move", [by_data, by_set, by_swap], ids=lambda move: move.__name__)
def test_a_parameter_that_moves(mode: str, move: Callable[..., None]) -> None:
    for only in (None, "b", "c"):
        run = Run(mode)
        run.step(BEFORE)
        moved = run.parameters if only is None else {only: run.parameters[only]}
        old = [p.data for p in moved.values()]
        run.optimizer.zero_grad()
        for name in moved:
            move(run.parameters, name)
        poison(old)
        assert same_as_undisturbed(run, f"{only}") == []


@all_modes
def test_state_that_is_laid_out_anew(mode: str) -> None:
    """`.contiguous()` on the state of a transposed parameter: stepped with, or a named error that changes nothing."""
    for key in STATE_KEYS:
        run = Run(mode)
        run.step(BEFORE)
        if "c" not in run.with_key(key):
            continue
        there, state = run.state("c")[key], run.state("c")
        state[key] = there.contiguous().clone()
        before = snapshot(run.optimizer)
        message = message_of(run.step)
        if message is not None:
            assert all(part in message for part in ("'c'", key)), message
            assert differences(snapshot(run.optimizer), before) == []
            state[key] = there
        assert same_as_undisturbed(run, key) == []


# ---- memory that is freed where it was ----


def share(tensor: Tensor) -> None:
    tensor.share_memory_()


def share_storage(tensor: Tensor) -> None:
    tensor.untyped_storage().share_memory_()


def grow_storage(tensor: Tensor) -> None:
    """All views of the storage move with it."""
    storage = tensor.untyped_storage()
    if storage.resizable():  # .numpy() has fixed others where they are
        storage.resize_(storage.nbytes() + (1 << 20))


def send(tensor: Tensor) -> None:
    """As a multiprocessing queue and the arguments of a process do."""
    ForkingPickler.dumps(tensor)


def move_storages(mode: str) -> None:
    wrong = []
    for move in (share, share_storage, grow_storage, send):
        for key in (*STATE_KEYS, "parameter"):
            for only in (None, "b"):
                run = Run(mode)
                run.step(BEFORE)
                names = list(run.parameters) if key == "parameter" else run.with_key(key)
                for name in [only] if only in names else names:
                    move(run.parameters[name] if key == "parameter" else run.state(name)[key])
                wrong += same_as_undisturbed(run, f"{move.__name__} {key} of {only or 'all'}")
    assert wrong == []


def send_whole(mode: str) -> None:
    for what in ("state_dict", "optimizer"):
        for steps in (0, 1, BEFORE):
            run = Run(mode)
            run.step(steps)
            ForkingPickler.dumps(run.optimizer.state_dict() if what == "state_dict" else run.optimizer)
            assert same_as_undisturbed(run, f"{what} after {steps}") == []


@all_modes
def test_storages_that_move(mode: str) -> None:
    isolated(move_storages, mode)


@all_modes
def test_sent_between_steps(mode: str) -> None:
    isolated(send_whole, mode)


def in_spawned_process(connection: Connection, optimizer: Any, queue: Any) -> None:
    """Steps with a copy of what came, and sends back what was in the queue and what became of the copy."""
    received = queue.get(timeout=60)
    copied = copy.deepcopy(optimizer)
    for group in copied.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    copied.step()
    file = io.BytesIO()
    torch.save((received["state"], snapshot(copied)), file)
    connection.send_bytes(file.getvalue())


def spawn_between_steps(mode: str) -> None:
    run = Run(mode)
    run.step(BEFORE)
    run.optimizer.zero_grad()
    kept = copy.deepcopy(run.optimizer)
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    queue = context.Queue()
    process = context.Process(target=in_spawned_process, args=(theirs, run.optimizer, queue))
    process.start()
    queue.put(run.optimizer.state_dict())
    assert ours.poll(90), "no answer from the other process"
    received, theirs_after = torch.load(io.BytesIO(ours.recv_bytes()), weights_only=True)
    process.join(30)
    assert process.exitcode == 0
    expected = kept.state_dict()["state"]
    assert received.keys() == expected.keys()
    assert all(differences(received[key], expected[key]) == [] for key in expected)
    assert same_as_undisturbed(run, "after a spawned process") == []
    for group in kept.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    kept.step()
    assert differences(theirs_after, snapshot(kept)) == []


def test_passed_to_a_spawned_process() -> None:
    isolated(spawn_between_steps, "bf16", timeout=150)


def is_whole(tensor: Tensor) -> bool:
    """Whether its storage holds all of its elements."""
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= (last + 1) * tensor.itemsize


def free_storages(mode: str) -> None:
    wrong = []
    for key, nbytes in itertools.product((*STATE_KEYS, "parameter", "gradient"), (0, 8)):
        run = Run(mode)
        run.step(BEFORE)
        names = run.with_key(key) if key in STATE_KEYS else ["a", "b"]
        if not names or (key == "gradient" and mode.startswith("released")):
            continue
        if nbytes and key not in STATE_KEYS:
            continue  # no op of torch looks whether a storage is large enough
        run.optimizer.zero_grad()
        run.backward()
        freed = {"parameter": run.parameters[names[0]], "gradient": run.parameters[names[0]].grad}.get(key)
        freed = run.state(names[0])[key] if freed is None else freed
        if freed.untyped_storage().resizable():  # .numpy() fixes one where it is
            freed.untyped_storage().resize_(nbytes)
        if is_whole(freed):
            continue
        tensors = [t for p in run.parameters.values() for t in (p, *run.optimizer.state.get(p, {}).values())]
        before = [(t, t.detach().clone()) for t in tensors if is_whole(t)]
        message = message_of(run.optimizer.step)
        # one buffer may hold the state of all: the first of them is as good a name as any
        if message is None or not any(f"'{name}'" in message for name in names):
            wrong.append(f"{key} of {nbytes} bytes: {message or 'no error'}")
        if not all(torch.equal(now, then) for now, then in before):
            wrong.append(f"{key} of {nbytes} bytes: stepped all the same")
    assert wrong == [], "\n".join(wrong)


@all_modes
def test_freed_storages_are_named(mode: str) -> None:
    """`untyped_storage().resize_(0)`, as offloaders do; of state, a few bytes, too. Nothing is read or changed."""
    isolated(free_storages, mode)


def free_first_gradient(density: float, selection_steps: int) -> None:
    p = nn.Parameter(torch.randn(300))
    optimizer = SparseAdamW([("p", p)], density=density, selection_steps=selection_steps)
    p.grad = torch.randn(300)
    p.grad.untyped_storage().resize_(4)
    message = message_of(optimizer.step)
    assert message is not None
    assert "gradient of 'p'" in message
    assert "was freed" in message


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("selection_steps", [1, 2])
def test_a_freed_gradient_is_not_selected_from(density: float, selection_steps: int) -> None:
    isolated(free_first_gradient, density, selection_steps)


def read_freed(what: str) -> None:
    gone = torch.ones(300)
    gone.untyped_storage().resize_(0)
    read: dict[str, Callable[[], object]] = {
        "base": lambda: SparseDelta.diff({"w": gone}, {"w": torch.ones(300)}),
        "tuned": lambda: SparseDelta.diff({"w": torch.ones(300)}, {"w": gone}),
        "masks": lambda: SparseMask.from_dense({"w": gone}),
    }
    message = message_of(read[what])
    assert message is not None
    assert f"`{what}`['w']" in message
    assert "was freed" in message


@pytest.mark.parametrize("what", ["base", "tuned", "masks"])
def test_freed_tensors_are_no_model_and_no_mask(what: str) -> None:
    isolated(read_freed, what)


def test_moves_amid_selection_steps() -> None:
    """The sums are in state_dict(): a queue that takes it moves them."""
    runs = [Run("global", selection_steps=5) for _ in range(2)]
    for disturbed, run in enumerate(runs):
        for _ in range(7):
            run.step()
            if disturbed and run.steps_done < 5:
                ForkingPickler.dumps(run.optimizer.state_dict())
                for p in run.parameters.values():
                    p.data = p.data.clone()
    assert differences(snapshot(runs[0].optimizer), snapshot(runs[1].optimizer)) == []


# ---- copies ----


def through_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def through_torch_save(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@all_modes
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda way: way.__name__)
@pytest.mark.parametrize("steps", [0, BEFORE])
def test_a_copy_and_its_original_go_on_alike(mode: str, way: Callable[[Any], Any], steps: int) -> None:
    """In turn, so that memory that both had would show."""
    run, other = Run(mode), Run(mode)
    run.step(steps)
    run.optimizer.zero_grad()
    other.optimizer, other.steps_done = way(run.optimizer), steps
    pairs = [
        pair
        for group in other.optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    other.parameters = {name: dict(pairs)[name] for name in run.parameters}
    for _ in range(BEFORE + AFTER - steps):
        run.step()
        other.step()
    assert same_as_undisturbed(run, "original") == []
    assert same_as_undisturbed(other, "copy") == []


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"density": 0.01}),
        (torch.bfloat16, {"density": 0.01, "amsgrad": True}),
        (torch.float32, {"density": 1.0}),
        (torch.float32, {"density": 0.01, "capturable": True}),
    ],
    ids=["sparse", "master_amsgrad", "dense", "capturable"],
)
@pytest.mark.parametrize("way", ["stepped", "loaded", "reselected"])
def test_the_state_of_a_parameter_is_saved_alone(dtype: torch.dtype, options: dict[str, Any], way: str) -> None:
    """torch.save writes whole storages: of the state of one parameter nothing may be another's."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(100, 50, dtype=dtype)) for _ in range(20)]
    optimizer = SparseAdamW(parameters, **options)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    step()
    if way == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    if way == "reselected":
        optimizer.reselect()
        step()
    step()
    for parameter in parameters:
        for key, value in optimizer.state[parameter].items():
            assert value.untyped_storage().nbytes() == value.numel() * value.itemsize, key
        file = io.BytesIO()
        torch.save(optimizer.state[parameter], file)
        size = sum(value.numel() * value.itemsize for value in optimizer.state[parameter].values())
        assert len(file.getvalue()) < size + 6000  # a zip folder, and a page of names per tensor
