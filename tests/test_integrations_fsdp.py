"""fully_shard in people's scripts: an evaluation in between, accelerate, the Trainer of transformers, Lightning."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_message
from processes import run_ranks
from torch import distributed, nn
from training import batches, loss_fn, two_towers

from saft_kernels import SparseAdamW, SparseMask, select

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

RANKS = 2


def towers() -> nn.Module:
    """With a temperature that fully_shard can split: of one element."""
    model = two_towers()
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    model.unused.requires_grad_(False)
    return model


# ---- a plain script ----


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = towers()
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


def layouts(rank: int) -> list[str]:
    """What differs from one process, from the same batches, by how a script splits the model."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def split(how: str) -> nn.Module:
        if how == "tensor parallel":
            mesh = distributed.init_device_mesh("cpu", (RANKS,))
            return parallelize_module(net(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        sizes = {"fully_shard": (RANKS,), "hybrid": (1, RANKS), "copies": (RANKS, 1)}[how]
        names = ("copies", "shards")[-len(sizes) :]
        return fully_shard(net(), mesh=distributed.init_device_mesh("cpu", sizes, mesh_dim_names=names))

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - batch).square().mean()

    data = [torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    wrong = []
    for how in ("tensor parallel", "fully_shard", "hybrid", "copies"):
        mask = select(split(how), data, loss, density=0.05, progress=False)
        if mask != select(net(), data, loss, density=0.05, progress=False):
            wrong.append(f"{how}: select")
        for name, options in {"mask": {"mask": mask, "release_grads": True}, "density": {"density": 0.05}}.items():
            ends = []
            for model in (net(), split(how)):
                optimizer = SparseAdamW(model.named_parameters(), 0.01, **options)
                for batch in data:
                    loss(model, batch).backward()
                    optimizer.clip_grad_norm_(0.1)
                    optimizer.step()
                    optimizer.zero_grad()
                ends.append([getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()])
            # products of tensor parallelism are added up in another order
            if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(*ends, strict=True)):
                wrong.append(f"{how}: {name}")
    return wrong


# ---- accelerate, transformers, Lightning ----


def as_on_gpus() -> None:
    """accelerate shards on accelerators alone, and takes ranks of CPUs for those of DistributedDataParallel."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerator(**options: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    as_on_gpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=500, **options
    )
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    type(made.state)._shared_state["distributed_type"] = DistributedType.FSDP
    assert made.is_fsdp2
    return made


def prepared(rank: int, folder: str) -> list[str]:
    """What differs from one process, with what accelerate has split after the optimizer was built."""
    mask = select(towers(), batches(1), loss_fn, density=0.1, progress=False)
    cases: dict[str, dict[str, Any]] = {
        "mask": {"mask": mask},
        "released": {"mask": mask, "release_grads": True},
        "density": {"density": 0.1},
        "steps": {"density": 0.1, "selection_steps": 2},
        "dense": {"density": 1.0},
    }
    wrong = []
    for name, options in cases.items():
        with_state = name in ("mask", "released", "dense")
        ends: list[list[torch.Tensor]] = []
        masks: list[SparseMask | None] = []
        for run in ("plain", "prepared", "resumed")[: 3 if with_state else 2]:
            model = towers()
            optimizer: Any = SparseAdamW(model.named_parameters(), lr=0.02, **options)
            inner = optimizer
            if run != "plain":
                ours = accelerator(state_dict_type="FULL_STATE_DICT" if name == "mask" else "SHARDED_STATE_DICT")
                model, optimizer = ours.prepare(model, optimizer)
            first = 0
            if run == "resumed":
                first = 2
                ours.load_state(f"{folder}/{name}")
            for step, batch in enumerate(batches(4)[first:], first):
                if run == "plain":
                    loss_fn(model, batch).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1e3)
                else:
                    ours.backward(loss_fn(model, batch))
                    ours.clip_grad_norm_(model.parameters(), 1e3)
                optimizer.step()
                optimizer.zero_grad()
                if run == "prepared" and step == 1 and with_state:
                    ours.save_state(f"{folder}/{name}")
            ends.append([getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()])
            masks.append(inner.mask)
        for run, end, found in zip(("prepared", "resumed"), ends[1:], masks[1:], strict=False):
            if not all(map(torch.equal, end, ends[0])):
                wrong.append(f"{name} {run}: weights")
            if found != masks[0]:
                wrong.append(f"{name} {run}: mask")
    return wrong


def refused(rank: int, folder: str) -> dict[str, str]:
    """What each call says."""
    from saft_kernels.integrations import select_into

    found = {}
    model = towers()
    optimizer: Any = SparseAdamW(model.named_parameters(), density=0.1)
    ours = accelerator(state_dict_type="SHARDED_STATE_DICT")
    model, optimizer = ours.prepare(model, optimizer)
    try:
        select_into(optimizer, model, batches(1), loss_fn, progress=False)
    except NotImplementedError as error:
        found["select_into"] = str(error)
    loss_fn(model, batches(1)[0]).backward()
    optimizer.step()
    ours.save_state(f"{folder}/refused")
    model = towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    ours = accelerator(state_dict_type="SHARDED_STATE_DICT")
    model, optimizer = ours.prepare(model, optimizer)
    try:
        ours.load_state(f"{folder}/refused")
    except Exception as error:
        found["load_state"] = f"{type(error).__name__}: {error}"
    model = towers()
    mask = select(towers(), batches(1, seed=rank), loss_fn, density=0.1, progress=False)
    optimizer = SparseAdamW(model.named_parameters(), mask=mask)
    model, optimizer = accelerator().prepare(model, optimizer)
    loss_fn(model, batches(1)[0]).backward()
    try:
        optimizer.step()
    except ValueError as error:
        found["masks"] = str(error)
    return found


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, max_position_embeddings=16, **sizes))


def trained(rank: int, folder: str) -> list[str]:
    """Runs of the Trainer that differ: with fully_shard from the plain loop, resumed from whole."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    row = torch.arange(8)  # whoever takes whatever of it, every batch is the same
    data = [{"input_ids": row, "labels": row}] * 16

    def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    mask = select(llama(), [row[None]], loss_of, density=0.05, progress=False)

    class WithMask(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = SparseAdamW(self.model.named_parameters(), lr=1e-2, weight_decay=0.0, mask=mask)
            return self.optimizer

    def trainer(name: str, options: dict[str, Any], kind: str, resume: str | None = None) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        sharding = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": kind}
        arguments = TrainingArguments(
            f"{folder}/{name}",
            use_cpu=True,
            fsdp=True,
            fsdp_config={**sharding, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            max_grad_norm=0.5,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
        )
        as_on_gpus()
        how: dict[str, Any] = {"optimizer_cls_and_kwargs": (SparseAdamW, {"lr": 1e-2, **options})}
        kind_of_trainer, how = (WithMask, {}) if "mask" in options else (Trainer, how)
        made = kind_of_trainer(llama(), arguments, train_dataset=data, **how)
        made.train(resume_from_checkpoint=resume)
        return made

    wrong = []
    cases = {"mask": {"mask": mask}, "density": {"density": 0.05}, "dense": {"density": 1.0}}
    for name, options in cases.items():
        kind = "FULL_STATE_DICT" if name == "dense" else "SHARDED_STATE_DICT"
        whole = trainer(name, options, kind)
        weights = [p.full_tensor().detach() for p in whole.model.parameters()]
        plain = llama()
        optimizer = SparseAdamW(plain.named_parameters(), lr=1e-2, **{"weight_decay": 0.0, **options})
        for _ in range(4):
            loss_of(plain, row[None]).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        for (key, expected), weight in zip(plain.named_parameters(), weights, strict=True):
            # means over ranks in another order; of a tiny gradient, which dense training has, AdamW steps by its sign
            if name != "dense" and not torch.allclose(weight, expected, rtol=1e-4, atol=1e-5):
                wrong.append(f"{name}: {key}, {(weight - expected).abs().max().item()}")
        if name != "density":
            again = trainer(f"{name}_resumed", options, kind, f"{folder}/{name}/checkpoint-2")
            if not all(map(torch.equal, weights, (p.full_tensor() for p in again.model.parameters()))):
                wrong.append(f"{name}: resumed")
    return wrong


def fitted(rank: int, folder: str) -> list[str]:
    """Runs of Lightning's ModelParallelStrategy that differ: from the plain loop, resumed from whole."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}  # the ranks are there: it starts none
    inputs = torch.randn(16, generator=torch.Generator().manual_seed(0)).expand(32, 16)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, torch.ones(32, dtype=torch.long)), 4)

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    mask = select(net(), list(loader)[:1], loss, density=0.05, progress=False)

    class Module(pl.LightningModule):
        def __init__(self, options: dict[str, Any]) -> None:
            super().__init__()
            self.net, self.options = net(), options

        def configure_model(self) -> None:
            if not hasattr(self.net, "reshard"):
                fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loss(self.net, batch)

        def configure_optimizers(self) -> Any:
            return SparseAdamW(self.net.named_parameters(), 0.02, **self.options)

    def fit(options: dict[str, Any], steps: int, resume: str | None = None) -> Any:
        strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            accelerator="cpu", devices=RANKS, strategy=strategy, max_steps=steps, enable_checkpointing=False, **quiet
        )
        module = Module(options)
        trainer.fit(module, loader, ckpt_path=resume)
        return trainer, [p.full_tensor().detach() for p in module.parameters()]

    wrong = []
    cases = {"mask": {"mask": mask, "release_grads": True}, "density": {"density": 0.05}}
    for name, options in cases.items():
        _, weights = fit(options, 4)
        plain = net()
        optimizer = SparseAdamW(plain.named_parameters(), 0.02, **options)
        for batch in list(loader)[:4]:
            loss(plain, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        for (key, expected), weight in zip(plain.named_parameters(), weights, strict=True):
            if not torch.allclose(weight, expected, rtol=1e-4, atol=1e-5):
                wrong.append(f"{name}: {key}")
        if name == "mask":
            trainer, _ = fit(options, 2)
            trainer.save_checkpoint(f"{folder}/lightning")
            _, resumed = fit(options, 4, f"{folder}/lightning")
            if not all(map(torch.equal, resumed, weights)):
                wrong.append(f"{name}: resumed")
    return wrong


def _run(rank: int, folder: str) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "HF_HUB_OFFLINE": "1"}
    # accelerate wants an address, though the ranks have met already, and takes two threads where it is told nothing
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    os.chdir(folder)
    results: dict[str, Any] = {"layouts": layouts(rank)}
    if find_spec("accelerate"):
        results |= {"prepared": prepared(rank, folder), "refused": refused(rank, folder)}
    if find_spec("accelerate") and find_spec("transformers"):
        results["trained"] = trained(rank, folder)
    if find_spec("lightning"):
        results["fitted"] = fitted(rank, folder)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run_ranks(_run, RANKS, tmp_path_factory.mktemp("ranks"))


def test_layouts(ranks: list[dict[str, Any]]) -> None:
    assert [result["layouts"] for result in ranks] == [[]] * RANKS


def test_accelerate(ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    assert [result["prepared"] for result in ranks] == [[]] * RANKS


@pytest.mark.parametrize(
    ("what", "texts"),
    {
        "select_into": ["select_into", "does not work yet"],
        "load_state": ["OptimizerState"],
        "masks": ["same on all ranks", "mask "],
    }.items(),
)
def test_refused(ranks: list[dict[str, Any]], what: str, texts: list[str]) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    for result in ranks:
        assert all(text in result["refused"][what] for text in texts), result["refused"]


def test_trainer(ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    assert [result["trained"] for result in ranks] == [[]] * RANKS


def test_lightning(ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("lightning", reason="needs lightning: pip install lightning")
    assert [result["fitted"] for result in ranks] == [[]] * RANKS
