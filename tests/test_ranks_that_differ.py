"""Ranks that loaded something else, or come for something else: an error on all of them, within seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from saft_kernels import OptimizerState, SparseAdamW, SparseMask, select, sparse_grad
from saft_kernels.integrations import select_into
from saft_kernels.selection import ranks as ranks_module

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

RANKS = 2
SECONDS = 30.0
"""More than an error takes on a busy machine; less than what ranks wait for those that may train alone."""
SHAPE = (6, 4)


def mask(at: int) -> SparseMask:
    return SparseMask({"p": torch.tensor([at, 20])}, {"p": SHAPE})


def distribute(tensor: Tensor, how: str) -> Tensor:
    """As DistributedDataParallel, fully_shard or HSDP leave a parameter."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if how in ("parallel", "all_reduce"):
        return tensor
    size, placements = ((RANKS,), [Shard(0)]) if how == "split" else ((RANKS, 1), [Replicate(), Shard(0)])
    mesh = distributed.init_device_mesh("cpu", size)
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


class Run:
    """An optimizer of one parameter, and what stands around it."""

    def __init__(self, how: str, **options: Any) -> None:
        self.how = how
        self.model = nn.Module()
        self.model.p = nn.Parameter(distribute(torch.ones(SHAPE), how))
        self.optimizer = SparseAdamW(self.model.named_parameters(), 0.1, **{"mask": mask(1), **options})
        # must live: by it the ranks know of each other
        self.wrapped = DistributedDataParallel(self.model) if how == "parallel" else None

    def step(self) -> None:
        p = self.model.p
        p.grad = distribute(torch.arange(24.0).view(SHAPE), self.how)
        if self.how == "all_reduce":
            self.optimizer.all_reduce_grads()
        self.optimizer.step()

    def loading(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self.step()


def saved(at: int, steps: int, **options: Any) -> dict[str, Any]:
    """Of one process."""
    optimizer = SparseAdamW([("p", p := nn.Parameter(torch.ones(SHAPE)))], 0.1, **{"mask": mask(at), **options})
    for _ in range(steps):
        p.grad = torch.ones(SHAPE)
        optimizer.step()
    return optimizer.state_dict()


def attempt(call: Callable[[], object]) -> str:
    """What it says, within seconds."""
    start, found = time.monotonic(), "ok"
    try:
        call()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    return found if seconds < SECONDS else f"{found}, after {seconds:.0f} s"


def loads(rank: int) -> dict[str, str]:
    """Of the same checkpoint, or of others; at first, and into what trains."""
    found = {}
    for how in ("parallel", "split", "hybrid", "all_reduce"):
        for begun in (False, True):
            states = {
                "same": saved(1, 2),
                "mask": saved(1 + rank, 2),
                "steps": saved(1, 2 + rank),
                "lr": saved(1, 2) | {"param_groups": [saved(1, 2)["param_groups"][0] | {"lr": 0.1 + rank}]},
            }
            for name, state in states.items():
                run = Run(how)
                if begun:
                    run.step()
                found[f"{how} {name} {begun}"] = attempt(lambda run=run, state=state: run.loading(state))
                run.optimizer.load_state_dict(saved(1, 5))  # they go on together
                assert attempt(run.step) == "ok"
        run = Run(how)
        run.step()
        run.optimizer.use_mask(mask(2 + rank))
        found[f"{how} use_mask"] = attempt(run.step)
    return found


def others(rank: int) -> dict[str, str]:
    """Optimizers of other parameters; each rank waits for the other to compare."""
    found = {}
    for what in ("name", "dtype", "number"):
        model = nn.Module()
        model.p, model.q = nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(SHAPE))
        wrapped = DistributedDataParallel(model)
        named: list[Any] = [("p", model.p), ("q", model.q)]
        if rank and what == "dtype":
            model.q.data = model.q.data.bfloat16()
        if rank:
            named = {"name": [("p", model.p), ("r", model.q)], "number": named[:1], "dtype": named}[what]
        optimizer = SparseAdamW(named, density=1.0)
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        found[what] = attempt(optimizer.step)
        del wrapped
    return found


def alone(rank: int) -> list[str]:
    """A rank that has loaded alone, and gave up on the other, meets it later."""
    run = Run("parallel")
    found = [attempt(run.step)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "_LONG", 1.0)
        if rank:
            run.loading(saved(1, 5))
    distributed.barrier()
    run.optimizer.load_state_dict(saved(1, 5))
    found.append(attempt(run.step))
    run.optimizer.load_state_dict(saved(1, 5 + rank))
    return [*found, attempt(run.step)]


def asks(rank: int) -> list[str]:
    """One rank asks for the mask while the other is in the collectives of the model; both get what they came for."""
    run = Run("split")
    run.step()
    group = run.model.p.device_mesh.get_group()
    wrong = []
    for _ in range(3):
        if rank == 0:
            wrong += ["mask"] * (run.optimizer.mask != mask(1))
        numbers = torch.full((5,), float(rank + 1))
        work = distributed.all_reduce(numbers, group=group, async_op=True)
        if rank == 1:
            time.sleep(0.1)  # it is pending
            wrong += ["mask"] * (run.optimizer.mask != mask(1))
        work.wait()
        wrong += ["sum"] * (numbers.tolist() != [3.0] * 5)
    return wrong


def refused(rank: int) -> dict[str, str]:
    """What does not take parameters that are split."""
    run = Run("split", release_grads=True)
    run.model.linear = nn.Linear(2, 2)
    dense = {"p": run.model.p.detach() > 0}
    split = SparseAdamW([("p", run.model.p)], k=2)
    return {
        "sparse_grad": attempt(lambda: sparse_grad(run.model, run.optimizer)),
        "select_into": attempt(lambda: select_into(split, run.model, [1], lambda model, _: model.p.sum())),
        "members": attempt(split.members),
        "streaming": attempt(lambda: select(run.model, [1], lambda model, _: model.p.sum(), streaming=True)),
        "from_dense": attempt(lambda: SparseMask.from_dense(dense)),
        "from_dense_of_model": attempt(lambda: SparseMask.from_dense(dense, run.model)),
        "mask": attempt(lambda: SparseMask({"p": distribute(torch.tensor([1, 2]), "split")}, {"p": SHAPE})),
    }


def packed(rank: int, folder: str) -> dict[str, str]:
    """OptimizerState of another model than saved."""

    def build(shape: tuple[int, ...], names: str) -> tuple[nn.Module, SparseAdamW]:
        model = nn.Module()
        for name in names:
            model.register_parameter(name, nn.Parameter(distribute(torch.ones(shape), "split")))
        return model, SparseAdamW(model.named_parameters(), 0.1, k=3)

    def train(model: nn.Module, optimizer: SparseAdamW) -> None:
        for parameter in model.parameters():
            parameter.grad = distribute(torch.arange(24.0).view(tuple(parameter.shape)), "split")
        optimizer.step()

    model, optimizer = build(SHAPE, "pq")
    train(model, optimizer)
    dcp.save({"optimizer": OptimizerState(model, optimizer)}, checkpoint_id=f"{folder}/packed")
    found = {}
    for case, (shape, names) in {
        "same": (SHAPE, "pq"),
        "transposed": ((4, 6), "pq"),
        "name": (SHAPE, "pr"),
        "more": (SHAPE, "pqr"),
        "fewer": (SHAPE, "p"),
    }.items():
        model, optimizer = build(shape, names)
        state = {"optimizer": OptimizerState(model, optimizer)}
        found[case] = attempt(lambda state=state: dcp.load(state, checkpoint_id=f"{folder}/packed"))
        assert case == "same" or (optimizer.mask is None and not optimizer.state)
        train(model, optimizer)
    return found


def ended(rank: int, folder: str) -> dict[str, Any]:
    """After destroy_process_group(), and where there is another group."""
    run = Run("split")
    run.step()
    saved, whole = run.optimizer.state_dict(), run.model.p.full_tensor()  # type: ignore[attr-defined]
    some = Run("split", mask=None, density=1.0)
    some.step()
    split, dense = some.optimizer.state_dict(), some.model.p.full_tensor()  # type: ignore[attr-defined]
    gathered = tree_map(lambda v: v.full_tensor() if hasattr(v, "full_tensor") else v, split)
    found: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt), run.optimizer._ranks.together("it"):  # type: ignore[union-attr]
        raise KeyboardInterrupt
    found["parted"] = attempt(lambda: run.optimizer.mask)
    distributed.barrier()
    distributed.destroy_process_group()
    found["mask"] = attempt(lambda: run.optimizer.mask)
    found["state_dict"] = attempt(run.optimizer.state_dict)
    for name, one, weights in (("", run, whole), ("dense ", some, dense)):
        one.how, one.model.p = "parallel", nn.Parameter(weights.detach().clone())
        one.optimizer.param_groups[0]["params"] = [one.model.p]
        found[f"{name}whole"] = attempt(one.step)
    found["split state"] = attempt(lambda: some.optimizer.load_state_dict(split))
    found["dense loaded"] = attempt(lambda: some.loading(gathered))
    found["loaded"] = attempt(lambda: run.loading(saved))
    expected = Run("all_reduce")  # of one process
    expected.how = "parallel"
    expected.step()
    expected.step()
    found["same"] = torch.equal(expected.model.p, run.model.p) and run.optimizer.mask == mask(1)
    distributed.init_process_group("gloo", f"file://{folder}/more", timedelta(minutes=2), RANKS, rank)
    run = Run("split")
    run.step()
    found["again"] = run.optimizer.mask == mask(1)
    return found


SCENARIOS = (loads, others, alone, asks, refused)


def _run(rank: int, folder: str) -> dict[str, Any]:
    results = {scenario.__name__: scenario(rank) for scenario in SCENARIOS}
    return {**results, "packed": packed(rank, folder), "ended": ended(rank, folder)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    return run_ranks(_run, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("how", "what", "texts"),
    [
        ("parallel", "mask", ["'p', float32 (6, 4): 2 elements with digest", "on rank 0, and"]),
        ("parallel", "steps", ["2 steps made on rank 0", "3 steps made on rank 1"]),
        ("parallel", "lr", ["lr=0.1,", "lr=1.1,"]),
        ("hybrid", "mask", ["'p', float32 (6, 4): 2 elements with digest", "on rank 0, and"]),
        ("hybrid", "steps", ["2 steps made on rank 0", "3 steps made on rank 1"]),
        ("hybrid", "lr", ["lr=0.1,", "lr=1.1,"]),
        ("split", "mask", ["state of 'p': float32 (6, 4) 2 elements with digest"]),
        ("split", "steps", ["2 steps made on rank 0", "3 steps made on rank 1"]),
        ("split", "lr", ["'lr': 0.1,", "'lr': 1.1,"]),
        ("all_reduce", "mask", ["expected the same selection on all ranks"]),
        ("all_reduce", "steps", ["expected the same number of steps made on all ranks, got 2 to 3"]),
    ],
)
def test_other_checkpoints(ranks: list[dict[str, Any]], how: str, what: str, texts: list[str], begun: bool) -> None:
    for result in ranks:
        message = result["loads"][f"{how} {what} {begun}"]
        assert message.startswith("ValueError: ")
        assert all(text in message for text in texts), message


@pytest.mark.parametrize("how", ["parallel", "hybrid", "split", "all_reduce"])
def test_one_checkpoint(ranks: list[dict[str, Any]], how: str) -> None:
    for result in ranks:
        assert [result["loads"][f"{how} same {begun}"] for begun in (False, True)] == ["ok", "ok"]


@pytest.mark.parametrize("how", ["parallel", "hybrid", "split", "all_reduce"])
def test_other_masks_later(ranks: list[dict[str, Any]], how: str) -> None:
    for result in ranks:
        assert "expected the same" in result["loads"][f"{how} use_mask"], result["loads"]


@pytest.mark.parametrize(
    ("what", "texts"),
    {
        "name": ["'q', float32 (6, 4)", "'r', float32 (6, 4)"],
        "dtype": ["'q', float32 (6, 4)", "'q', bfloat16 (6, 4)"],
        "number": ["'q', float32 (6, 4)"],
    }.items(),
)
def test_other_parameters(ranks: list[dict[str, Any]], what: str, texts: list[str]) -> None:
    for rank, result in enumerate(ranks):
        message = result["others"][what]
        assert message.startswith("ValueError: SparseAdamW under DistributedDataParallel: expected the same selection")
        assert all(text in message for text in texts), message
        assert message.endswith("which averages"), f"rank {rank}: {message}"  # and not so many seconds


def test_a_rank_that_loads_alone(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        *fine, message = result["alone"]
        assert fine == ["ok", "ok"]
        assert "5 steps made on rank 0" in message
        assert "6 steps made on rank 1" in message


def test_a_rank_that_asks_alone(ranks: list[dict[str, Any]]) -> None:
    assert [result["asks"] for result in ranks] == [[]] * RANKS


@pytest.mark.parametrize(
    ("what", "texts"),
    {
        "sparse_grad": ["NotImplementedError: sparse_grad()", "param_groups[0]['params'][0]", "release_grads=True"],
        "select_into": ["NotImplementedError: select_into()", "SelectionCallback", "optimizer.use_mask("],
        "members": ["NotImplementedError: members()", "optimizer.mask"],
        "streaming": ["NotImplementedError: select()", "streaming=True", "pass 'host'"],
        "from_dense": ["TypeError: `masks`['p']", "got a DTensor; call full_tensor() on all ranks"],
        "from_dense_of_model": ["TypeError: `masks`['p']", "got a DTensor; call full_tensor() on all ranks"],
        "mask": ["TypeError: indices of 'p'", "got a DTensor; call full_tensor() on all ranks"],
    }.items(),
)
def test_refuses_what_is_split(ranks: list[dict[str, Any]], what: str, texts: list[str]) -> None:
    for result in ranks:
        message = result["refused"][what]
        assert all(text in message for text in texts), message


@pytest.mark.parametrize(
    ("what", "texts"),
    {
        "transposed": ["'p' of shape (6, 4) in group 0 among them, got 'p' of shape (4, 6) in group 0 in its place"],
        "name": ["'q' of shape (6, 4) in group 0 among them, got 'r' of shape (6, 4) in group 0 in its place"],
        "more": ["none among them, got 'r' of shape (6, 4) in group 0"],
        "fewer": ["'q' of shape (6, 4) in group 0 among them, got none"],
    }.items(),
)
def test_optimizer_state_of_another_model(ranks: list[dict[str, Any]], what: str, texts: list[str]) -> None:
    for result in ranks:
        message = result["packed"][what]
        assert message.startswith("ValueError: OptimizerState: expected the parameters that were saved")
        assert all(text in message for text in texts), message
        assert result["packed"]["same"] == "ok"


@pytest.mark.parametrize(
    ("what", "texts"),
    {
        "parted": ["RuntimeError: it: rank ", "failed: KeyboardInterrupt"],
        "mask": ["RuntimeError: parameters that are split over ranks [0, 1]", "destroy_process_group()"],
        "state_dict": ["RuntimeError: parameters that are split over ranks [0, 1]", "destroy_process_group()"],
        "whole": [
            "ValueError: param_groups[0]['params'][0], 'p'",
            "got one that is whole; take optimizer.state_dict()",
        ],
        "dense whole": ["ok"],
        "split state": ["ValueError: `state_dict`: exp_avg of 'p'", "got a DTensor", "nothing was loaded"],
        "dense loaded": ["ok"],
        "loaded": ["ok"],
    }.items(),
)
def test_after_the_group_has_ended(ranks: list[dict[str, Any]], what: str, texts: list[str]) -> None:
    for result in ranks:
        message = result["ended"][what]
        assert all(text in message for text in texts), message
        assert result["ended"]["same"]
        assert result["ended"]["again"]
