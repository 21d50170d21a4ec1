"""fully_shard in people's scripts: an evaluation in between, accelerate, the Trainer, open_clip, Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_message
from torch import distributed, nn
from training import batches, loss_fn, two_towers

from saft_kernels import SparseAdamW, select

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = two_towers()
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))  # of no dimension it cannot be split
    fully_shard(model.visual)
    return fully_shard(model)


@pytest.mark.usefixtures("one_rank")
def test_after_an_evaluation() -> None:
    """A forward pass without backward leaves whole parameters in the root module, which get no gradient."""
    (batch,) = batches(1)
    expected = select(sharded(), [batch], loss_fn, density=0.1, progress=False)
    model = sharded()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    with torch.no_grad():
        loss_fn(model, batch)
    with pytest.raises(ValueError, match="gathered for a forward pass") as error:
        SparseAdamW(model.named_parameters(), density=0.1)
    assert_message(error, ["param_groups[0]['params'][", "DTensor", "reshard()"])
    assert select(model, [batch], loss_fn, density=0.1, progress=False) == expected
    with torch.no_grad():
        loss_fn(model, batch)
    loss_fn(model, batch).backward()
    optimizer.step()
    assert optimizer.mask == expected
