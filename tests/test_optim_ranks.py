"""A selection per rank: refused where a rank has but a share, compared where replicas have to stay together."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from training import backward, batches, loss_fn, two_towers

from saft_kernels import SparseAdamW, SparseMask, select
from saft_kernels.integrations import select_into
from saft_kernels.selection import ranks as ranks_module

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
    ranks_module._LONG = 1.0
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


def flattened(rank: int) -> dict[str, str]:
    """A checkpoint of FullyShardedDataParallel of two ranks, loaded by one; beside torch.optim.AdamW. And select()."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullyShardedDataParallel, StateDictType

    groups = {world: distributed.new_group([*range(world)]) for world in (1, RANKS)}

    def build(world: int, use_orig_params: bool, optimizer_class: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3)),
            process_group=groups[world],
            use_orig_params=use_orig_params,
            device_id="cpu",
        )
        FullyShardedDataParallel.set_state_dict_type(
            model, StateDictType.FULL_STATE_DICT, optim_state_dict_config=FullOptimStateDictConfig(rank0_only=False)
        )
        options = {"density": 1.0} if optimizer_class is SparseAdamW else {}
        return model, optimizer_class(model.parameters(), 0.01, **options)

    def train_on(model: Any, optimizer: Any, first: int, last: int) -> None:
        for seed in range(first, last):
            optimizer.zero_grad()
            model(torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()

    def run(optimizer_class: Any, use_orig_params: bool, how: str) -> list[Tensor]:
        model, optimizer = build(RANKS, use_orig_params, optimizer_class)
        train_on(model, optimizer, 0, 3)
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=how == "flat")
        weights, state = get_state_dict(model, optimizer, options=options)
        if how == "fsdp":
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        if rank:
            return []
        model, optimizer = build(1, use_orig_params, optimizer_class)
        set_model_state_dict(model, weights, options=options)
        if how == "fsdp":
            optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state))
        else:
            set_optimizer_state_dict(model, optimizer, state, options=options)
        train_on(model, optimizer, 3, 6)
        return list(get_model_state_dict(model, options=options).values())

    def same(use_orig_params: bool, how: str) -> None:
        ours, expected = (run(kind, use_orig_params, how) for kind in (SparseAdamW, torch.optim.AdamW))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)

    found = {
        f"{use_orig_params}_{how}": attempt(lambda u=use_orig_params, h=how: same(u, h))
        for use_orig_params in (True, False)
        for how in ("fsdp", "full", "flat")
        if how != "fsdp" or not use_orig_params  # of which torch 2.14 makes a wrong state on a CPU, of AdamW as well
    }
    for use_orig_params in (True, False):
        model, _ = build(RANKS, use_orig_params, torch.optim.AdamW)
        found[f"select_{use_orig_params}"] = attempt(lambda model=model: select(model, score="weight", progress=False))
    return found


def _run(rank: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {scenario.__name__: scenario(rank) for scenario in (parallel, shares, flattened, alone)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    return run_ranks(_run, RANKS, tmp_path_factory.mktemp("ranks"))


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


def test_checkpoints_of_fully_sharded_data_parallel(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        found = dict(result["flattened"])
        for use_orig_params in (True, False):
            text = found.pop(f"select_{use_orig_params}")
            assert text.startswith("TypeError: parameter '_f")
            assert "a flattened one of FullyShardedDataParallel" in text
            assert "use fully_shard" in text
        assert set(found.values()) == {"ok"}, found
