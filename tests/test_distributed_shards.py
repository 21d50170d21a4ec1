"""A model split over ranks, as by fully_shard: one process's selection to the bit, and its weights."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map
from training import TwoTowers, backward, batches, loss_fn

from saft_kernels import OptimizerState, Originals, SparseAdamW, SparseDelta, SparseMask, select
from saft_kernels.optim import sparse_adamw
from saft_kernels.optim.release import SelectedGrad
from saft_kernels.selection import ranks as ranks_module
from saft_kernels.selection import shards
from saft_kernels.selection.budget import select_indices as of_one_process
from saft_kernels.selection.parts import gather_whole, is_distributed, local, part_of

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
        placements = [placement] if mesh.ndim == 1 else [Replicate(), placement]  # and copies
        found.append(distribute_tensor(tensor, mesh, placements, src_data_rank=None))
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


def make(whole: Sequence[Tensor], mesh: Any, seed: int, dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in split([tensor.to(dtype) for tensor in whole], mesh, seed)]


def alike(whole: Tensor, parameter: Tensor) -> Tensor:
    """What a rank has of a whole tensor, where it is split as a parameter is."""
    from torch.distributed.tensor import distribute_tensor

    if not is_distributed(parameter):
        return whole.clone()
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """As one process has it."""
    return tree_map(lambda v: v.full_tensor() if isinstance(v, Tensor) and is_distributed(v) else v, state)


def training(rank: int, mesh: Any, seed: int) -> list[str]:
    """Runs that differ from those of one process: seven steps with the same gradients, of which a part is a rank's."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(7, 9), (3,), (), (5, 2, 6), (40,), (1, 11), (4, 30), (30, 4)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    mask = torch.Generator().manual_seed(6)
    some = {f"p{i}": torch.rand(shape, generator=mask) < 0.2 for i, shape in enumerate(shapes)}
    some["p7"][:] = True
    head = {"head": {"density": 1.0}}
    cases: dict[str, dict[str, Any]] = {
        "density": {"density": 0.1},
        "bfloat16": {"density": 0.1, "dtype": torch.bfloat16},
        "float64": {"k": 33, "dtype": torch.float64, "amsgrad": True},
        "tensor": {"density": 0.1, "scope": "tensor", "late": True},
        "row": {"density": 0.3, "scope": "row"},
        "steps": {"density": 0.1, "selection_steps": 3},
        "reselect": {"density": 0.1, "reselect": 4},
        "resume": {"density": 0.1, "resume": 4, "amsgrad": True, "dtype": torch.bfloat16},
        "resume_dense": {"density": 1.0, "resume": 4},
        "resume_steps": {"density": 0.1, "selection_steps": 4, "resume": 2},
        "dense": {"density": 1.0, "weight_decay": 0.1},
        "dense_head": {"density": 0.05, "groups": True, **head},
        "own_budget": {"density": 0.05, "groups": True, "head": {"k": 7}},
        "mask": {"mask": SparseMask.from_dense(some)},
    }
    wrong = []
    for case, options in cases.items():
        options = dict(options)
        dtype = options.pop("dtype", torch.float32)
        groups, late = options.pop("groups", False), options.pop("late", False)
        at, resumes_at = options.pop("reselect", -1), options.pop("resume", -1)
        own = options.pop("head", {})
        runs: list[Any] = []
        restart: dict[int, Callable[[], SparseAdamW]] = {}
        for parameters in (
            [nn.Parameter(tensor.to(dtype)) for tensor in start],
            make(start, mesh, seed, dtype),
        ):
            named: Any = [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]
            if groups:
                named = [{"params": named[:5]}, {"params": named[5:], **own}]
            runs.append((parameters, SparseAdamW(named, 0.1, **options)))
            restart[len(runs) - 1] = lambda named=named, options=options: SparseAdamW(named, 0.1, **options)
        gradients = torch.Generator().manual_seed(8)
        for step in range(7):
            for (i, one), other in zip(enumerate(runs[0][0]), runs[1][0], strict=True):
                gradient = torch.randn(one.shape, generator=gradients).mul_(4).round_().to(dtype)
                if late and (i == 3 or step == 0):  # no gradient, and a first step of none at all
                    continue
                one.grad, other.grad = gradient, alike(gradient, other)
            if step == resumes_at:  # each from the state of the other
                saved = [whole_state(optimizer.state_dict()) for _, optimizer in runs]
                runs = [(parameters, restart[i]()) for i, (parameters, _) in enumerate(runs)]
                runs[0][1].load_state_dict(saved[1])
                runs[1][1].load_state_dict(saved[0])
            for _, optimizer in runs:
                if step == at:
                    optimizer.reselect()
                optimizer.step()
        for i, (one, other) in enumerate(zip(*(parameters for parameters, _ in runs), strict=True)):
            if not torch.equal(local(alike(one.detach(), other)), local(other.detach())):
                wrong.append(f"{case}: weights {i}")
        masks = [optimizer.mask for _, optimizer in runs]  # which all ranks have to ask for
        if masks[0] != masks[1]:
            wrong.append(f"{case}: mask")
        state = sum(v.numel() for s in runs[1][1].state.values() for v in s.values())
        most = sum(v.numel() for s in runs[0][1].state.values() for v in s.values())
        assert state <= most
    return wrong


def errors(rank: int, mesh: Any) -> dict[str, list[str]]:
    """What each call says, on this rank."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    me, last = mesh.get_local_rank(), mesh.size() - 1

    def attempt(call: Callable[[], object]) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "ok"

    def optimizer(shape: Sequence[int] = (8, 3), count: int = 2, **options: Any) -> SparseAdamW:
        start = [torch.ones(tuple(shape)) for _ in range(count)]
        return SparseAdamW([(f"p{i}", p) for i, p in enumerate(make(start, mesh, 0, torch.float32))], **options)

    def step(optimizer: SparseAdamW, value: float = 1.0, where: int = last) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = alike(torch.ones(parameter.shape), parameter)
            if me == where and local(parameter).numel():
                local(parameter.grad).view(-1)[0] = value
        optimizer.step()

    def mask(at: int) -> SparseMask:
        return SparseMask({f"p{i}": torch.tensor([at]) for i in range(2)}, {f"p{i}": (8, 3) for i in range(2)})

    def moved() -> None:
        other = optimizer()
        if me == last:
            for parameter in other.param_groups[0]["params"]:
                parameter.grad = alike(torch.ones(parameter.shape), parameter)
                parameter.grad._local_tensor = torch.ones(99)
            other.step()
        else:
            step(other)

    def placed(*placements: Any) -> None:
        whole = torch.distributed.device_mesh.DeviceMesh("cpu", mesh.mesh.view(1, -1))
        SparseAdamW([("odd", nn.Parameter(DTensor.from_local(torch.ones(4, 4), whole, placements)))])

    def on_meta() -> None:
        parameters = [nn.Parameter(tensor) for tensor in split([torch.empty(8, 3, device="meta")], mesh, 0)]
        SparseAdamW([("p0", *parameters)], mask=SparseMask({"p0": torch.tensor([1])}, {"p0": (8, 3)}))

    def random() -> None:
        torch.manual_seed(int(me == last))
        model = towers(mesh)
        torch.manual_seed(int(me == last))
        select(model, score="random", progress=False)

    odd = DTensor.from_local(torch.ones(1), mesh, [Shard(0)], shape=(2 * mesh.size(),), stride=(1,))
    calls: dict[str, Callable[[], object]] = {
        "k": lambda: step(optimizer(k=3 + (me == last))),
        "number": lambda: step(optimizer(count=2 + (me == last))),
        "shapes": lambda: step(optimizer((8 + 2 * (me == last), 3))),
        "mask": lambda: step(optimizer(mask=mask(int(me == last)))),
        "mask_or_density": lambda: step(optimizer(**({"mask": mask(0)} if me == last else {"k": 2}))),
        "nonfinite": lambda: step(optimizer(), float("inf")),
        "nonfinite_sum": lambda: step(optimizer(selection_steps=2), float("nan")),
        "moved": moved,
        "partial": lambda: placed(Shard(0), Partial()),
        "twice": lambda: placed(Shard(0), Shard(1)),
        "odd": lambda: SparseAdamW([("odd", nn.Parameter(odd))]),
        "members": lambda: optimizer().members(),
        "apply": lambda: SparseDelta.diff(towers(), towers()).apply_(towers(mesh)),
        "delta": lambda: SparseDelta.from_optimizer(
            optimizer(), {f"p{i}": torch.zeros(8 + (me == last), 3) for i in range(2)}
        ),
        "meta": on_meta,
        "all_reduce_grads": lambda: optimizer().all_reduce_grads(),
        "differentiable": lambda: optimizer(differentiable=True, density=1.0),
        "streaming": lambda: select(towers(mesh), [1], loss_fn, streaming=True, progress=False),
        "random": random,
        "batches": lambda: select(towers(mesh), batches(1 + (me == last)), loss_fn, progress=False),
        "select": lambda: select(towers(mesh), score="weight", k=7 + (me == last), progress=False),
        "fine": lambda: step(optimizer()),
    }
    return {name: attempt(call) for name, call in calls.items()}


def uneven_gradients(rank: int, mesh: Any) -> list[str]:
    """One rank has no gradient, or one of zeros where others have some; or all have parts of a sum."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    me, wrong = mesh.get_local_rank(), []
    whole = torch.zeros(8, 3)
    whole[0] = torch.tensor([3.0, 2.0, 1.0])
    for is_none in (False, True):
        one, (other,) = nn.Parameter(torch.ones(8, 3)), make([torch.ones(8, 3)], mesh, 0, torch.float32)
        expected, optimizer = SparseAdamW([one], k=5), SparseAdamW([other], k=5)
        for _ in range(3):
            one.grad, other.grad = whole.clone(), alike(whole, other)
            if is_none and me:
                other.grad = None
            expected.step()
            optimizer.step()
        if optimizer.mask != expected.mask:
            wrong.append(f"{is_none}: mask")
        if not torch.equal(local(alike(one.detach(), other)), local(other.detach())) and not (is_none and me):
            wrong.append(f"{is_none}: weights")
    # partial sums, as tensor parallelism leaves them to parameters that all ranks have
    one, whole = nn.Parameter(torch.ones(8, 3)), whole + 1
    other = nn.Parameter(DTensor.from_local(torch.ones(8, 3), mesh, [Replicate()]))
    (third,) = make([torch.ones(8, 3)], mesh, 0, torch.float32)
    fourth = nn.Parameter(torch.ones(8, 3))
    expected, optimizer = SparseAdamW([one, fourth], k=5), SparseAdamW([other, third], k=5)
    one.grad, fourth.grad, third.grad = whole.clone(), whole.clone(), alike(whole, third)
    other.grad = DTensor.from_local(whole if me == 0 else torch.zeros(8, 3), mesh, [Partial()])
    expected.step()
    optimizer.step()
    if optimizer.mask != expected.mask or not torch.equal(local(other.detach()), one.detach()):
        wrong.append("partial sums")
    return wrong


def trainings(rank: int, mesh: Any) -> list[str]:
    return training(rank, mesh, seed=mesh.size())


class Towers(TwoTowers):
    """With a temperature that fully_shard can split: of one element, on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))


def towers(mesh: Any = None, dtype: torch.dtype = torch.float32) -> Towers:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Towers().to(dtype)
    if mesh is not None:
        fully_shard(model.visual, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def fully_sharded(rank: int, mesh: Any) -> dict[str, Any]:
    """What a script with fully_shard gets, and one process from the same gradients."""
    model = towers(mesh)
    share = [batches(4, seed)[mesh.get_local_rank()] for seed in range(7)]
    mask = select(model, [share[0]], loss_fn, density=0.1, progress=False)
    backward(model, share[0])
    whole = [torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for p in model.parameters()]
    assert all(map(torch.equal, mask.values(), of_one_process([""] * len(whole), whole, 0.1, None, "global", None)))
    found = {}
    for name, options in {"density": {"density": 0.1}, "mask": {"mask": mask}}.items():
        whole, model = towers(), towers(mesh)
        optimizer = SparseAdamW(model.named_parameters(), 0.01, **options)
        expected = SparseAdamW(whole.named_parameters(), 0.01, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        norms = []
        for step, batch in enumerate(share):
            optimizer.zero_grad()
            scaler.scale(loss_fn(model, batch)).backward()
            if step == 3 and mesh.get_local_rank() == mesh.size() - 1:
                local(model.text.weight.grad).fill_(float("inf"))
            scaler.unscale_(optimizer)
            for one, other in zip(whole.parameters(), model.parameters(), strict=True):
                one.grad = None if other.grad is None else other.grad.full_tensor().clone()
            norms.append((expected.clip_grad_norm_(0.1), optimizer.clip_grad_norm_(0.1)))
            scaler.step(optimizer)
            scaler.update()
            if step != 3:
                expected.step()
        found[name] = (
            {n: p.detach() for n, p in whole.named_parameters()},
            {n: p.full_tensor().detach() for n, p in model.named_parameters()},
            [dict(o.mask) for o in (expected, optimizer)],
            norms,
        )
    return found


def released(rank: int, mesh: Any) -> list[str]:
    """Runs with release_grads that differ from one without: accumulation, an inf of one rank, torch's clipping."""
    mask = select(towers(), batches(1), loss_fn, density=0.1, progress=False)
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for release, torch_clips in ((False, False), (True, False), (True, True)):
            model = towers(mesh, dtype)
            optimizer = SparseAdamW(model.named_parameters(), 0.01, mask=mask, release_grads=release)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            norms = []
            for step in range(5):
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                for seed in range(1 + (step > 1)):
                    batch = batches(4, 10 * step + seed, dtype)[mesh.get_local_rank()]
                    scaler.scale(loss_fn(model, batch)).backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                assert any(type(local(g)) is SelectedGrad for g in gradients) == release
                if step == 3 and mesh.get_local_rank() == mesh.size() - 1:
                    if release:
                        optimizer.selected_grad(model.visual[3].weight).fill_(float("inf"))
                    else:
                        local(model.visual[3].weight.grad).fill_(float("inf"))
                scaler.unscale_(optimizer)
                if torch_clips:
                    norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).full_tensor().float())
                else:
                    norms.append(optimizer.clip_grad_norm_(0.1))
                scaler.step(optimizer)
                scaler.update()
            assert scaler.get_scale() == 4
            runs.append([*norms, *(local(p.detach()) for p in model.parameters())])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # fp32 sums, and norms in 16 bits
        for name, run in {"ours": runs[1], "torch": runs[2]}.items():
            for i, (value, expected) in enumerate(zip(run, runs[0], strict=True)):
                if not torch.allclose(value, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
                    wrong.append(f"{dtype} {name} {i}")
    return wrong


class Block(nn.Module):
    """What parallelize_module splits in every way; `scale` stays a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 5)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norms[0](self.embedding(tokens))
        hidden = self.norms[1](hidden + self.down(self.up(hidden).relu()))
        return self.head(hidden) * self.scale


def parallel(mesh: Any) -> Block:
    """With tensor and sequence parallelism."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    sequence = {"output_layouts": Shard(1), "use_local_output": False}
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), **sequence),
        "norms.0": SequenceParallel(),
        "norms.1": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(**sequence),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    block = Block()
    parallelize_module(block, mesh, plan)
    return block


def token_loss(block: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(n, (2, 12), generator=generator) for n in (12, 5))
    return nn.functional.cross_entropy(block(tokens).flatten(0, 1), labels.flatten())


def whole(tensor: Tensor) -> Tensor:
    found: Any = tensor.detach()
    return (found.full_tensor() if is_distributed(found) else found).clone()  # type: ignore[no-any-return]


def tensor_parallel(rank: int, mesh: Any) -> list[str]:
    """What differs from one process with the same gradients; the state moves to another optimizer on the way."""
    wrong = []
    block = parallel(mesh)
    mask = select(block, [0], token_loss, density=0.1, progress=False)
    if mask != select(parallel(mesh), [0], token_loss, density=0.1, streaming="host", progress=False):
        wrong.append("host")
    token_loss(block, 0).backward()
    gradients = [whole(p.grad) for p in block.parameters()]
    expected = of_one_process([""] * len(gradients), gradients, 0.1, None, "global", None)
    if not all(map(torch.equal, mask.values(), expected)):
        wrong.append("select")
    for name, options in {"density": {"density": 0.1}, "dense": {"density": 1.0}}.items():
        if name == "dense" and mesh.size() != 2:
            continue  # for time
        one, block = Block(), parallel(mesh)
        runs = [SparseAdamW(model.named_parameters(), 0.01, **options) for model in (one, block)]
        for step in range(4):
            for optimizer in runs:
                optimizer.zero_grad()
            token_loss(block, step).backward()
            for mine, other in zip(one.parameters(), block.parameters(), strict=True):
                mine.grad = whole(other.grad)
            norms = [optimizer.clip_grad_norm_(0.1) for optimizer in runs]
            if not torch.allclose(norms[0], norms[1]):
                wrong.append(f"{name}: norm {step}")
            for optimizer in runs:
                optimizer.step()
            if step == 1:
                saved = runs[1].state_dict()
                runs[1] = SparseAdamW(block.named_parameters(), 0.01, **options)
                runs[1].load_state_dict(saved)
        if runs[0].mask != runs[1].mask:
            wrong.append(f"{name}: mask")
        for (key, mine), other in zip(one.named_parameters(), block.parameters(), strict=True):
            if not torch.allclose(mine, whole(other), atol=1e-6):  # norms are added up in another order
                wrong.append(f"{name}: {key}")
    return wrong


def deltas(rank: int, mesh: Any) -> list[str]:
    """What has changed, from values before that each rank has kept, and from the base: as of whole models."""
    base, wrong = towers(), []
    for dtype in (torch.float32, torch.bfloat16):
        base, model = towers(None, dtype), towers(mesh, dtype)
        optimizer = SparseAdamW(model.named_parameters(), 0.01, density=0.1)
        originals = Originals(optimizer)
        for step in range(3):
            if step == 2:
                optimizer.reselect()
            optimizer.zero_grad()
            backward(model, batches(1, step, dtype)[0])
            optimizer.step()
        tuned = {name: whole(parameter) for name, parameter in model.named_parameters()}
        expected = SparseDelta.diff(base, tuned)
        for name, before in {"originals": originals, "base": base}.items():
            found = SparseDelta.from_optimizer(optimizer, before)
            if found != expected or found.originals is None:
                wrong.append(f"{dtype} {name}")
        expected.apply_(base)
        if not all(map(torch.equal, base.state_dict().values(), tuned.values())):
            wrong.append(f"{dtype} apply_")
    return wrong


def traffic(rank: int, mesh: Any) -> tuple[list[int], int]:
    """Bytes of each collective of a global selection of 2,000 of 200,000, and how many elements this rank offers."""
    sent: list[int] = []
    offered: list[int] = []
    reduce, largest = ranks_module.Ranks._reduce, shards._largest

    def counting(self: Any, numbers: Tensor, op: Any) -> Tensor:
        sent.append(numbers.nbytes)
        return reduce(self, numbers, op)

    def looking(scores: Any, parts: Any, ranks: Any, offers: Sequence[Tensor], *args: Any) -> list[Tensor]:
        offered.append(sum(map(len, offers)))
        return largest(scores, parts, ranks, offers, *args)

    generator = torch.Generator().manual_seed(rank)
    tensors = split([torch.randn(200, 500, generator=generator) for _ in range(2)], mesh, 0)
    ranks_module.Ranks._reduce, shards._largest = counting, looking  # type: ignore[method-assign]
    try:
        here, parts = [*map(local, tensors)], [*map(part_of, tensors)]
        shards.select_indices(["a", "b"], here, parts, None, 2000, "global", None)
    finally:
        ranks_module.Ranks._reduce, shards._largest = reduce, largest  # type: ignore[method-assign]
    return sent, max(offered)


def continued(model: nn.Module, optimizer: SparseAdamW, first: int, last: int) -> None:
    """Steps with the same batches on every rank: as many ranks as are a power of two make the same gradients."""
    for step in range(first, last):
        optimizer.zero_grad()
        backward(model, batches(1, step)[0])
        optimizer.step()


def checkpoints(rank: int, folder: str) -> list[str]:
    """Trained by one process, then by two ranks, by four, and by one process: as one process trains."""
    mask = select(towers(), batches(1), loss_fn, density=0.3, progress=False)
    cases: dict[str, dict[str, Any]] = {"mask": {"mask": mask}, "dense": {"density": 1.0}}
    cases |= {"flat_mask": cases["mask"], "flat_dense": cases["dense"]}
    cases |= {"packed": {"density": 0.3}, "packed_dense": {"density": 1.0, "amsgrad": True}}
    meshes = {world: distributed.device_mesh.DeviceMesh("cpu", [*range(world)]) for world in (2, 4)}
    wrong = []

    def build(world: int, options: dict[str, Any]) -> tuple[Towers, SparseAdamW]:
        """One process has no DTensors."""
        model = towers(meshes[world] if world > 1 else None)
        model.unused.requires_grad_(False)
        return model, SparseAdamW(model.named_parameters(), 0.01, **options)

    def state_of(name: str, model: Towers, optimizer: SparseAdamW, how: StateDictOptions) -> dict[str, Any]:
        if name.startswith("packed"):
            return {"model": get_model_state_dict(model), "optimizer": OptimizerState(model, optimizer)}
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=how), strict=True))

    for name, options in cases.items():
        how = StateDictOptions(flatten_optimizer_state_dict=name.startswith("flat"))
        for stage, world in enumerate((1, 2, 4, 1)):
            if rank < world:
                alone: dict[str, Any] = {"no_dist": True}
                if world > 1:
                    alone = {"process_group": meshes[world].get_group()}
                model, optimizer = build(world, options)
                if stage:
                    found = state_of(name, model, optimizer, how)
                    dcp.load(found, checkpoint_id=f"{folder}/{name}_{stage - 1}", **alone)
                    set_model_state_dict(model, found["model"])
                    if not name.startswith("packed"):
                        set_optimizer_state_dict(model, optimizer, found["optimizer"], options=how)
                continued(model, optimizer, 2 * stage, 2 * stage + 2)
                dcp.save(state_of(name, model, optimizer, how), checkpoint_id=f"{folder}/{name}_{stage}", **alone)
            distributed.barrier()
        if rank == 0:
            expected, optimizer = build(1, options)
            continued(expected, optimizer, 0, 8)
            for (key, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
                if not torch.equal(value, other):
                    wrong.append(f"{name} {key}")
    return wrong


def failures(rank: int) -> dict[str, str]:
    """What each rank is told when the last one fails, or comes for something else; none waits long."""
    last = rank == RANKS - 1
    found = {}
    # two, since those whose ranks have parted are of no use any more
    mesh, some = (distributed.device_mesh.DeviceMesh("cpu", [*range(first, RANKS)]) for first in (0, 1))

    def optimizer(**options: Any) -> SparseAdamW:
        found = SparseAdamW([("p", *make([torch.ones(8, 3)], mesh, 0, torch.float32))], **options)
        parameter = found.param_groups[0]["params"][0]
        parameter.grad = alike(torch.arange(24.0).view(8, 3), parameter)
        return found

    def breaking(module: Any, name: str, error: BaseException, call: Callable[[], object]) -> None:
        """One rank fails there; then all try once more."""

        def fail(*args: Any, **options: Any) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            if last:
                patch.setattr(module, name, fail)
            call()

    def stepping(module: Any, name: str, error: BaseException, **options: Any) -> None:
        one = optimizer(**options)
        try:
            breaking(module, name, error, one.step)
        finally:
            assert one.state_dict()["state"] == {}
            one.step()
            assert one.mask.k == (8 if "scope" in options else 2)

    def waiting() -> None:
        one = optimizer(k=2)
        one.step()
        if rank:
            time.sleep(2.5)
        else:
            ranks_module._PATIENCE = 2.0
        assert one.mask.k == 2

    def other_call() -> None:
        one = optimizer(k=2)
        one.step()
        _ = one.mask if last else one.state_dict()

    def selecting() -> None:
        def data() -> Iterator[Any]:
            yield batches(1)[0]
            if last:
                raise OSError("no more data")

        if rank:
            select(towers(some), data(), loss_fn, progress=False)

    out_of_memory, interrupt = torch.OutOfMemoryError("no room"), KeyboardInterrupt("by hand")
    cases: dict[str, Callable[[], object]] = {
        "data": selecting,
        "topk": lambda: stepping(shards.ops, "topk_magnitude", out_of_memory, k=2),
        "row": lambda: stepping(shards.ops, "topk_magnitude_rows", out_of_memory, density=0.1, scope="row"),
        "counts": lambda: stepping(shards, "_kth", out_of_memory, k=2),
        "states": lambda: breaking(sparse_adamw, "new_states", out_of_memory, optimizer(k=2).step),
        "other_call": other_call,
        "waiting": waiting,
        "interrupt": lambda: breaking(shards.ops, "topk_magnitude", interrupt, optimizer(k=2).step),
        "after": lambda: optimizer(k=2).step(),
    }
    patience, warned = ranks_module._PATIENCE, list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("saft_kernels").addHandler(handler)
    for name, call in cases.items():
        start = time.monotonic()
        try:
            call()
            found[name] = "ok"
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {error}"
        ranks_module._PATIENCE = patience
        assert time.monotonic() - start < 20, name
    return {**found, "warned": "".join(warned)}


def other_copies(rank: int, mesh: Any) -> str:
    """What is selected of a copy differs in one shard."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def of(tensor: Tensor) -> Any:
        return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)], src_data_rank=None)

    parameter = nn.Parameter(of(torch.arange(8.0)))
    parameter.grad = of(torch.ones(8))
    optimizer = SparseAdamW([("p", parameter)], mask=SparseMask({"p": torch.tensor([rank // 2, 5])}, {"p": (8,)}))
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "ok"


def pending_group(rank: int, mesh: Any) -> list[str]:
    """One that is to be selected, and has no gradient, does not keep the others from their step."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def of(tensor: Tensor, whole: bool) -> Any:
        return tensor if whole else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    def trained(whole: bool) -> Tensor:
        a, b = (nn.Parameter(of(torch.arange(8.0), whole)) for _ in range(2))
        optimizer = SparseAdamW([("a", a)], 0.1, k=3, selection_steps=2)
        for step in range(5):
            if step == 2:
                optimizer.add_param_group({"params": [("b", b)], "k": 1})
            a.grad = of(torch.arange(1.0, 9), whole)
            b.grad = of(torch.arange(1.0, 9), whole) if step == 2 else None
            optimizer.step()
        return a.detach() if whole else a.detach().full_tensor()

    return [] if torch.equal(trained(True), trained(False)) else ["the others did not step"]


def one_element(rank: int, mesh: Any) -> list[str]:
    """Accumulation of released gradients where a shard is one element: it is no factor."""
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.ones(RANKS, 1), mesh, [Shard(0)], src_data_rank=None))
    mask = SparseMask({"p": torch.tensor([1])}, {"p": (RANKS, 1)})
    optimizer = SparseAdamW([("p", p)], 0.1, mask=mask, release_grads=True)
    for factor in (2.0, 3.0):
        (factor * p).sum().full_tensor().backward()
    found = optimizer.selected_grad(p).tolist()
    expected = [5.0] if rank == 1 else []
    return [] if found == expected else [f"{found} for {expected}"]


SCENARIOS = (selections, trainings, fully_sharded, released, uneven_gradients, tensor_parallel, deltas, traffic)


def _run(rank: int, folder: str) -> dict[str, dict[int, Any]]:
    results: dict[str, dict[int, Any]] = {scenario.__name__: {} for scenario in SCENARIOS}
    for world in WORLDS:
        mesh = distributed.device_mesh.DeviceMesh("cpu", [*range(world)])
        for scenario in SCENARIOS if rank < world else ():
            results[scenario.__name__][world] = scenario(rank, mesh)
        distributed.barrier()
    mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    results["hybrid"] = {RANKS: training(rank, mesh, 0)}
    results["other_copies"] = {RANKS: other_copies(rank, mesh)}
    results["pending_group"] = {RANKS: pending_group(rank, distributed.init_device_mesh("cpu", (RANKS,)))}
    results["one_element"] = {RANKS: one_element(rank, distributed.init_device_mesh("cpu", (RANKS,)))}
    results["errors"] = {RANKS: errors(rank, distributed.init_device_mesh("cpu", (RANKS,)))}
    results["checkpoints"] = {RANKS: checkpoints(rank, folder)}
    distributed.barrier()
    results["failures"] = {RANKS: failures(rank)}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[int, Any]]]:
    """What each rank found, by the number of ranks."""
    return run_ranks(_run, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", WORLDS)
def test_selects_what_one_process_does(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    assert [result["selections"][world] for result in ranks[:world]] == [[]] * world


@pytest.mark.parametrize("world", WORLDS)
def test_trains_as_one_process_does(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    assert [result["trainings"][world] for result in ranks[:world]] == [[]] * world


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("how", ["density", "mask"])
def test_fully_shard(ranks: list[dict[str, dict[int, Any]]], world: int, how: str) -> None:
    for result in ranks[:world]:
        expected, weights, (mask, own_mask), norms = result["fully_sharded"][world][how]
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name])  # norms are added up in another order
            assert torch.equal(mask[name], own_mask[name]), name
        for norm, own_norm in norms:
            torch.testing.assert_close(own_norm, norm)


@pytest.mark.parametrize("world", WORLDS)
def test_release_grads(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    assert [result["released"][world] for result in ranks[:world]] == [[]] * world


@pytest.mark.parametrize("world", WORLDS)
def test_tensor_parallel(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    assert [result["tensor_parallel"][world] for result in ranks[:world]] == [[]] * world


@pytest.mark.parametrize("world", WORLDS)
def test_deltas(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    assert [result["deltas"][world] for result in ranks[:world]] == [[]] * world


@pytest.mark.parametrize("world", WORLDS)
def test_traffic(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    """Three histograms and two flags; no more offers than an equal share, and some."""
    for result in ranks[:world]:
        sent, offered = result["traffic"][world]
        assert sent == [2048 * 8] * 3 + [2 * 8]
        assert offered == min(2000, 2000 * 1.25 // world + 64)


def test_checkpoints_between_numbers_of_ranks(ranks: list[dict[str, dict[int, Any]]]) -> None:
    assert [result["checkpoints"][RANKS] for result in ranks] == [[]] * RANKS


def test_copies_of_shards(ranks: list[dict[str, dict[int, Any]]]) -> None:
    assert [result["hybrid"][RANKS] for result in ranks] == [[]] * RANKS


def test_copies_that_differ_raise_on_every_rank(ranks: list[dict[str, dict[int, Any]]]) -> None:
    messages = [result["other_copies"][RANKS] for result in ranks]
    assert all("of parameters with copies: expected the same selection" in message for message in messages), messages


def test_a_pending_group(ranks: list[dict[str, dict[int, Any]]]) -> None:
    assert [result["pending_group"][RANKS] for result in ranks] == [[]] * RANKS


def test_accumulation_in_one_element(ranks: list[dict[str, dict[int, Any]]]) -> None:
    assert [result["one_element"][RANKS] for result in ranks] == [[]] * RANKS


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_of_some_ranks(ranks: list[dict[str, dict[int, Any]]], world: int) -> None:
    assert [result["uneven_gradients"][world] for result in ranks[:world]] == [[]] * world


@pytest.mark.parametrize(
    ("what", "texts"),
    {
        "k": ["ValueError: SparseAdamW: expected the same on all ranks", "got k 3 on rank 0, and k 4 on rank 3"],
        "number": ["ValueError", "number of parameters 2", "number of parameters 3 on rank 3"],
        "shapes": ["ValueError", "shapes [(8, 3), (8, 3)]", "shapes [(10, 3), (10, 3)]"],
        "mask": ["ValueError", "mask "],
        "mask_or_density": ["ValueError", "mask none on rank 0, and mask "],
        "nonfinite": ["ValueError: gradient of 'p0' at selection", "1 inf or NaN of 24"],
        "nonfinite_sum": ["ValueError: gradient of 'p0' at selection", "1 inf or NaN of 24"],
        "partial": ["TypeError: param_groups[0]['params'][0] odd:", "Partial(sum)"],
        "twice": ["TypeError: param_groups[0]['params'][0] odd:", "Shard(dim=1)"],
        "odd": ["TypeError: param_groups[0]['params'][0] odd: expected the shard of torch.chunk"],
        "members": ["NotImplementedError: members()"],
        "apply": ["TypeError: `model`", "got a DTensor; gather the full state dict first"],
        "delta": ["ValueError: `tuned`: expected shape", "for 'p0'"],
        "meta": ["ValueError: 'p0': expected memory, got a DTensor on meta; call model.to_empty"],
        "all_reduce_grads": ["NotImplementedError: all_reduce_grads()"],
        "differentiable": ["NotImplementedError: differentiable=True"],
        "streaming": ["NotImplementedError: select()", "streaming=True"],
        "random": ["ValueError: select(): expected the same on all ranks", "random numbers ["],
        "batches": ["ValueError: select(): expected the same on all ranks", "number of batches 2 on rank 3"],
        "select": ["ValueError: select(): expected the same on all ranks", "k 7", "k 8"],
        "fine": ["ok"],
    }.items(),
)
def test_errors_of_all_ranks(ranks: list[dict[str, dict[int, Any]]], what: str, texts: list[str]) -> None:
    for result in ranks:
        message = result["errors"][RANKS][what]
        assert all(text in message for text in texts), message


def test_an_error_of_one_rank(ranks: list[dict[str, dict[int, Any]]]) -> None:
    *others, last = (result["errors"][RANKS]["moved"] for result in ranks)
    assert last.startswith("ValueError: gradient of 'p0': expected float32 of shape")
    assert {*others} == {f"RuntimeError: step(): rank 3 failed: {last}"}


_NO_ROOM = "OutOfMemoryError: selection in step(): expected it to fit in memory, got: no room"


@pytest.mark.parametrize(
    ("what", "call", "error"),
    [
        ("topk", "step()", _NO_ROOM),
        ("row", "step()", _NO_ROOM),
        ("counts", "step()", _NO_ROOM),
        ("states", "step()", _NO_ROOM),
        ("data", "select()", "OSError: no more data"),
        ("interrupt", "step()", "KeyboardInterrupt: by hand"),
    ],
)
def test_a_failure_of_one_rank(ranks: list[dict[str, dict[int, Any]]], what: str, call: str, error: str) -> None:
    """It raises its own error, all others say which one it was."""
    *others, last = (result["failures"][RANKS][what] for result in ranks)
    assert last.startswith(error)
    others = others[what == "data" :]  # rank 0 takes no part
    assert all(text.startswith(f"RuntimeError: {call}: rank 3 failed: {error}") for text in others), others


def test_ranks_that_have_parted(ranks: list[dict[str, dict[int, Any]]]) -> None:
    for result in ranks:
        text = result["failures"][RANKS]["after"]
        assert text.startswith("RuntimeError: step(): rank 3 failed: KeyboardInterrupt: by hand")


def test_other_calls_of_one_rank(ranks: list[dict[str, dict[int, Any]]]) -> None:
    for result in ranks:
        text = result["failures"][RANKS]["other_call"]
        assert "got state_dict() on rank 0, and optimizer.mask on rank 3" in text


def test_a_rank_that_waits_says_so(ranks: list[dict[str, dict[int, Any]]]) -> None:
    warned = [result["failures"][RANKS]["warned"] for result in ranks]
    assert warned[0].startswith("optimizer.mask: rank 0 has waited 2 s for others of ranks [0, 1, 2, 3], all of which")
    assert warned[1:] == [""] * (RANKS - 1)
    assert [result["failures"][RANKS]["waiting"] for result in ranks] == ["ok"] * RANKS
