"""Ranks that loaded something else, or come for something else: an error on all of them, within seconds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from saft_kernels import SparseAdamW, SparseMask
from saft_kernels.selection import ranks as ranks_module

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

RANKS = 2
SECONDS = 8.0
"""More than any error may take; less than what ranks wait for those that may train alone."""
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
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        assert time.monotonic() - start < SECONDS, error
        return f"{type(error).__name__}: {error}"
    assert time.monotonic() - start < SECONDS
    return "ok"


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


SCENARIOS = (loads,)


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(minutes=2)  # ranks that wait for each other
    distributed.init_process_group("gloo", f"file://{folder}/ranks", limit, RANKS, rank)
    results = {scenario.__name__: scenario(rank) for scenario in SCENARIOS}
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_run, (os.fspath(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


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
