"""A model split over ranks, as by fully_shard: one process's selection to the bit, and its weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from training import leave_process_group

from saft_kernels.selection import shards
from saft_kernels.selection.budget import select_indices as of_one_process
from saft_kernels.selection.parts import gather_whole, local, part_of

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

RANKS = 4
WORLDS = (1, 2, 3, 4)


def split(tensors: Sequence[Tensor], mesh: Any, seed: int) -> list[Tensor]:
    """Some along one dimension or another, some whole, as DTensors or not."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found = []
    for i, tensor in enumerate(tensors):
        kind = (seed + i) % 5
        if kind == 4:
            found.append(tensor)
            continue
        placement = Replicate() if kind == 3 or not tensor.dim() else Shard(kind % tensor.dim())
        found.append(distribute_tensor(tensor, mesh, [placement]))
    return found


def scores(dtype: torch.dtype, kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 9), (3,), (), (0, 4), (5, 2, 6), (40,), (1, 11), (4, 300), (300, 4)]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    if kind == "ties":
        found = [tensor.round() for tensor in found]
    if kind == "on_one_rank":
        found = [tensor * (30 if i == 8 else 1) for i, tensor in enumerate(found)]
        found[8][:40] *= 30
    return [tensor.to(dtype) for tensor in found]


def selections(rank: int, mesh: Any) -> list[str]:
    """What differs from one process."""
    wrong = []
    budgets = [("global", 0.001), ("global", 0.1), ("global", 0.9), ("tensor", 0.1), ("row", 0.2)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for seed, (dtype, kind) in enumerate(itertools.product(dtypes, ("random", "ties", "on_one_rank"))):
        whole = scores(dtype, kind)
        if dtype == torch.float64:
            whole[0] = whole[0].float()
        shards._MARGIN, shards._SLACK = (0.5, 0) if seed % 2 else (1.25, 64)  # first guesses that fail
        names = [str(i) for i in range(len(whole))]
        tensors = split(whole, mesh, seed)
        parts, here = [*map(part_of, tensors)], [*map(local, tensors)]
        for scope, density in budgets:
            expected = of_one_process(names, whole, density, None, scope, None)
            mine = shards.select_indices(names, here, parts, density, None, scope, None)
            values = [tensor.take(index) for tensor, index in zip(here, mine, strict=True)]
            found, values = gather_whole(parts, mine, values)
            same = all(map(torch.equal, found, expected))
            same &= all(torch.equal(t.take(i), v) for t, i, v in zip(whole, found, values, strict=True))
            if not same:
                wrong.append(f"{dtype} {kind} {seed} {scope} {density}")
    shards._MARGIN, shards._SLACK = 1.25, 64
    return wrong


SCENARIOS = (selections,)


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)  # ranks that wait for each other
    distributed.init_process_group("gloo", f"file://{folder}/ranks", limit, RANKS, rank)
    results: dict[str, dict[int, Any]] = {scenario.__name__: {} for scenario in SCENARIOS}
    for world in WORLDS:
        mesh = distributed.device_mesh.DeviceMesh("cpu", [*range(world)])
        for scenario in SCENARIOS if rank < world else ():
            results[scenario.__name__][world] = scenario(rank, mesh)
        distributed.barrier()
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[int, Any]]]:
    """What each rank found, by the number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_run, (os.fspath(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("world", WORLDS)
def test_selects_what_one_process_does(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    assert [result["selections"][world] for result in ranks[:world]] == [[]] * world
