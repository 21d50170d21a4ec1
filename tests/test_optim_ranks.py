"""A selection per rank: refused where a rank has but a share, compared where replicas have to stay together."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from training import backward, batches, leave_process_group, loss_fn, two_towers

from saft_kernels import SparseAdamW, SparseMask, select
from saft_kernels.integrations import select_into
from saft_kernels.optim import ranks as ranks_module

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

RANKS = 2


def attempt(run: Any) -> str:
    """The error's type and message, or "ok"."""
    try:
        run()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def own_mask(rank: int) -> SparseMask:
    """From the rank's own batches."""
    return select(two_towers(), batches(2, seed=rank), loss_fn, density=0.1, progress=False)


def steps(rank: int, optimizer: Any, model: nn.Module, number: int = 2) -> None:
    for batch in batches(number * RANKS)[rank::RANKS]:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()


def parallel(rank: int) -> dict[str, str]:
    """Under DistributedDataParallel."""
    found = {}
    for name in ("own_masks", "same_masks", "first_step", "select_into", "one_mask", "own_dense"):
        model = two_towers()
        before = [p.detach().clone() for p in model.parameters()]
        mask = own_mask(rank if name == "own_masks" else 5)
        options: dict[str, Any] = {"mask": mask} if name.endswith("masks") else {"density": 0.1}
        if name == "one_mask" and rank == 0:
            options = {"mask": mask}
        if name == "own_dense":
            options = {"density": 1.0}
        optimizer = SparseAdamW(model.named_parameters(), **options)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        if name == "select_into":
            select_into(optimizer, model, batches(2, seed=rank), loss_fn, progress=False)
        found[name] = attempt(lambda wrapped=wrapped, optimizer=optimizer: steps(rank, optimizer, wrapped))
        same = all(map(torch.equal, before, model.parameters()))
        assert same == (found[name] != "ok")
    return found


def alone(rank: int) -> dict[str, str]:
    """Rank 0 trains, rank 1 does not: nobody may wait long."""
    model = two_towers()
    found = {}
    if rank == 0:
        found["no_parallel"] = attempt(lambda: steps(0, SparseAdamW(model.named_parameters(), density=0.1), model))
    model = two_towers()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    backward(wrapped, batches(1)[0])
    ranks_module._WAIT = timedelta(seconds=1)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("saft_kernels").addHandler(handler)
    if rank == 0:
        found["parallel"] = attempt(optimizer.step)
        found["warning"] = records[0].getMessage()
    distributed.barrier()
    return found


def shares(rank: int) -> dict[str, str]:
    """Of parameters: ZeroRedundancyOptimizer, and FullyShardedDataParallel."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = {}
    for name, options in {
        "mask": {"mask": own_mask(0)},
        "density": {"density": 0.1},
        "dense": {"density": 1.0},
    }.items():
        model = two_towers()
        found[f"zero_{name}"] = attempt(
            lambda model=model, options=options: steps(
                rank, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=SparseAdamW, **options), model
            )
        )
    for use_orig_params in (True, False):
        for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
            model = FullyShardedDataParallel(
                nn.Linear(16, 8), use_orig_params=use_orig_params, sharding_strategy=strategy, device_id="cpu"
            )
            for name, options in {"density": {"density": 0.1}, "dense": {"density": 1.0}}.items():
                found[f"fsdp_{use_orig_params}_{strategy.name}_{name}"] = attempt(
                    lambda model=model, options=options: SparseAdamW(model.parameters(), **options)
                )
    return found


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", f"file://{folder}/ranks", timedelta(seconds=120), RANKS, rank)
    results = {scenario.__name__: scenario(rank) for scenario in (parallel, shares, alone)}
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_run, (os.fspath(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["own_masks", "one_mask"])
def test_selections_that_differ_raise_on_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    for result in ranks:
        message = result["parallel"][name]
        assert message.startswith("ValueError: SparseAdamW under DistributedDataParallel: expected the same selection")
        assert "broadcast_object_list" in message


@pytest.mark.parametrize("name", ["same_masks", "first_step", "select_into", "own_dense"])
def test_selections_that_agree_train(ranks: list[dict[str, Any]], name: str) -> None:
    assert [result["parallel"][name] for result in ranks] == ["ok", "ok"]


def test_a_rank_that_trains_alone_goes_on(ranks: list[dict[str, Any]]) -> None:
    found = ranks[0]["alone"]
    assert found.pop("warning").startswith("SparseAdamW: not all ranks have come to compare")
    assert set(found.values()) == {"ok"}


@pytest.mark.parametrize("name", ["zero_mask", "zero_density"])
def test_zero_redundancy_optimizer(ranks: list[dict[str, Any]], name: str) -> None:
    for result in ranks:
        assert result["shares"][name].startswith("ValueError: SparseAdamW in a ZeroRedundancyOptimizer: expected all")
        assert result["shares"]["zero_dense"] == "ok"


def test_fully_sharded_data_parallel(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        found = {name: text for name, text in result["shares"].items() if name.startswith("fsdp_")}
        assert len(found) == 8
        for name, text in found.items():
            if name.endswith("dense"):
                assert text == "ok"
            else:
                assert "expected a whole parameter, got a flattened one of FullyShardedDataParallel" in text
