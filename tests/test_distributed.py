"""all_reduce_grads() on two ranks: what DistributedDataParallel gives, to the bit, from the selected values alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_message
from processes import run_ranks
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from training import backward, batches, loss_fn, two_towers

from saft_kernels import SparseAdamW, SparseMask, select, sparse_grad
from saft_kernels.optim.release import SelectedGrad

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

RANKS = 2


def make_mask(model: nn.Module, seed: int = 7) -> SparseMask:
    return select(model, batches(2, seed), loss_fn, density=0.1, progress=False)


def selected(model: nn.Module, optimizer: SparseAdamW) -> dict[str, Tensor]:
    """Copies of the selected values of all gradients."""
    return {name: optimizer.selected_grad(p).clone() for name, p in model.named_parameters()}


def train(
    rank: int,
    ours: bool,
    *,
    masked: bool = True,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[nn.Module, SparseAdamW], object] = lambda model, optimizer: None,
    dense_head: bool = False,
    passes: int = 1,
    torch_clips: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor], SparseAdamW]:
    """Five steps on this rank's share of the data, with a clipped norm; with DistributedDataParallel or without."""
    model = two_towers(dtype=dtype)
    if masked:
        options["mask"] = make_mask(two_towers())
    params: Any = list(model.named_parameters())
    if dense_head:
        head = [(name, p) for name, p in params if name.startswith("text.")]
        params = [{"params": [item for item in params if item not in head]}, {"params": head, "density": 1.0}]
    optimizer = SparseAdamW(params, 0.01, **options)
    prepare(model, optimizer)
    wrapped = model if ours else DistributedDataParallel(model, find_unused_parameters=True)
    share = batches(5 * passes * RANKS, dtype=dtype)[rank::RANKS]
    for step in range(5):
        optimizer.zero_grad()
        *first, last = share[step * passes : (step + 1) * passes]
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext():
            for batch in first:
                backward(wrapped, batch)
        backward(wrapped, last)
        if ours:
            optimizer.all_reduce_grads()
        if torch_clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        else:
            optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, optimizer


# ---- on each rank; what they return is compared below ----


def as_distributed_data_parallel(rank: int) -> dict[str, Any]:
    """Pairs of runs that have to be equal."""
    options: dict[str, dict[str, Any]] = {
        "mask": {},
        "selects_itself": {"masked": False, "density": 0.1},
        "selects_from_three_steps": {"masked": False, "density": 0.1, "selection_steps": 3},
        "dense_head": {"masked": False, "density": 0.1, "dense_head": True},
        "dense": {"masked": False, "density": 1.0},
        "accumulated": {"passes": 3},
    }
    expected, _ = train(rank, False, dtype=torch.bfloat16)
    results = {"bfloat16": [expected, train(rank, True, dtype=torch.bfloat16)[0]]}
    for name, more in options.items():
        expected, _ = train(rank, False, **more)
        results[name] = [expected, *(train(rank, True, release_grads=release, **more)[0] for release in (False, True))]
    return results


def of_both_ranks(rank: int) -> dict[str, Any]:
    """Runs that have to be equal on both ranks."""
    return {
        "sparse_grad": train(rank, True, release_grads=True, prepare=sparse_grad)[0],
        "torch_clips_dense": train(rank, True, torch_clips=True)[0],
        "inf_of_one_rank": steps_of_a_scaler(rank),
        "bfloat16": train(rank, True, release_grads=True, dtype=torch.bfloat16)[0],
    }


def steps_of_a_scaler(rank: int) -> dict[str, Tensor]:
    """Rank 0 has an inf where nothing is selected: no reason to skip, on either."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), 0.01, mask=make_mask(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = model.visual[3].weight
    assert optimizer.mask is not None
    free = int((~optimizer.mask.to_dense()["visual.3.weight"].view(-1)).nonzero()[0])
    for i, batch in enumerate(batches(6)[rank::RANKS]):
        optimizer.zero_grad()
        scaler.scale(loss_fn(model, batch)).backward()
        if rank == 0 and i == 1:
            weight.grad.view(-1)[free] = float("inf")
        optimizer.all_reduce_grads()
        scaler.step(optimizer)
        scaler.update()
    return {"scale": torch.tensor(scaler.get_scale()), **{n: p.detach() for n, p in model.named_parameters()}}


def sixteen_bits(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of two bf16 gradients, in fp32, before and after."""
    model = two_towers(dtype=torch.bfloat16)
    optimizer = SparseAdamW(model.named_parameters(), mask=make_mask(two_towers()), release_grads=True)
    for batch in batches(4, dtype=torch.bfloat16)[rank::RANKS]:
        backward(model, batch)
    before = selected(model, optimizer)
    optimizer.all_reduce_grads()
    return before, selected(model, optimizer)


def group_of_the_first(rank: int) -> bool:
    """Whether rank 0 keeps its gradient, and rank 1 has an error and keeps it, too."""
    group = distributed.new_group([0])
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), mask=make_mask(model), release_grads=True)
    backward(model, batches(2)[rank])
    before = selected(model, optimizer)
    with contextlib.nullcontext() if rank == 0 else pytest.raises(ValueError, match="without rank 1"):
        optimizer.all_reduce_grads(group)
    return all(torch.equal(before[name], optimizer.selected_grad(p)) for name, p in model.named_parameters())


def gradients_of_one_rank(rank: int) -> dict[str, Any]:
    """Rank 1 has no gradient of the text tower, and none of `unused`, as rank 0."""
    averages = {}
    for release in (False, True):
        model = two_towers()
        optimizer = SparseAdamW(model.named_parameters(), mask=make_mask(model), release_grads=release)
        backward(model, batches(2)[rank])
        local = selected(model, optimizer)
        if rank == 1:
            for p in model.text.parameters():
                p.grad = None
        optimizer.all_reduce_grads()
        average = selected(model, optimizer)
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        averages[release] = (local, average, missing)
    return averages


def first_step_without_a_gradient(rank: int) -> dict[bool, bool]:
    """Rank 1 has gradients of zeros, everywhere: no step by itself. Rank 0 has some, where nothing is selected."""
    stepped = {}
    for release in (False, True):
        model = two_towers()
        nothing = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
        nothing["visual.0.bias"][0] = 1
        mask = SparseMask.from_dense(nothing)
        optimizer = SparseAdamW(model.named_parameters(), mask=mask, release_grads=release)
        weight = model.text.weight if rank == 0 else 0 * model.text.weight
        (weight.sum() + 0 * model.visual[0].bias.sum()).backward()
        optimizer.all_reduce_grads()
        optimizer.step()
        stepped[release] = model.visual[0].bias in optimizer.state
    return stepped


def other_masks(rank: int) -> list[str]:
    """The messages; nothing may change, and the ranks go on together."""

    def chosen(name: str, at: int | slice) -> SparseMask:
        dense = {name: torch.zeros(p.shape) for name, p in two_towers().named_parameters()}
        dense["text.bias"][0] = 1
        dense[name].view(-1)[at] = 1
        return SparseMask.from_dense(dense)

    everything = slice(None)
    masks = [
        [chosen("text.weight", 3), chosen("visual.3.weight", 4)],
        [chosen("text.weight", 3), chosen("text.weight", 4)],
        [chosen("norm.weight", everything), chosen("norm.bias", everything)],  # nothing of one, all of the other
        [chosen("norm.weight", everything), None],  # not selected yet
    ]
    messages = []
    for of_ranks in masks:
        model = two_towers()
        optimizer = SparseAdamW(model.named_parameters(), mask=of_ranks[rank], release_grads=True)
        messages.append(message_of(model, optimizer))
    # another order, and another selection than in the first call
    model = two_towers()
    named = list(model.named_parameters())
    mask = chosen("norm.weight", 3)
    messages.append(message_of(model, SparseAdamW(named if rank == 0 else named[::-1], mask=mask, release_grads=True)))
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), mask=mask, release_grads=True)
    backward(model, batches(1)[0])
    optimizer.all_reduce_grads()
    optimizer.zero_grad()
    if rank == 1:
        optimizer.reselect()
    messages.append(message_of(model, optimizer))
    return messages


def message_of(model: nn.Module, optimizer: SparseAdamW) -> str:
    """Of all_reduce_grads() after backward."""

    def gradients() -> list[Tensor]:
        found = [p.grad for p in model.parameters() if p.grad is not None]
        return [(g.selected.values if isinstance(g, SelectedGrad) else g).clone() for g in found]

    backward(model, batches(1)[0])
    before = gradients()
    with pytest.raises(ValueError, match="same selection on all ranks") as error:
        optimizer.all_reduce_grads()
    assert all(map(torch.equal, before, gradients()))
    return str(error.value)


def bytes_sent(rank: int) -> tuple[int, int]:
    """Per step with a mask, and its k."""
    sent: list[int] = []
    all_reduce = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counting
    try:
        _, optimizer = train(rank, True, release_grads=True)
    finally:
        distributed.all_reduce = all_reduce
    assert optimizer.mask is not None
    return sum(sent) // 5, optimizer.mask.k


SCENARIOS = (
    as_distributed_data_parallel,
    of_both_ranks,
    sixteen_bits,
    group_of_the_first,
    gradients_of_one_rank,
    first_step_without_a_gradient,
    other_masks,
    bytes_sent,
)


def _run(rank: int, folder: str) -> dict[str, Any]:
    return {scenario.__name__: scenario(rank) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    return run_ranks(_run, RANKS, tmp_path_factory.mktemp("ranks"))


# ---- what has to hold ----


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "how", ["mask", "selects_itself", "selects_from_three_steps", "dense_head", "dense", "accumulated", "bfloat16"]
)
def test_bit_equal_to_distributed_data_parallel(ranks: list[dict[str, Any]], how: str) -> None:
    start = {name: p.detach() for name, p in two_towers().named_parameters()}
    for result in ranks:
        parallel, *ours = result["as_distributed_data_parallel"][how]
        for weights in ours:
            assert_same(weights, parallel)
        assert not all(torch.equal(start[name], parallel[name]) for name in start)


@pytest.mark.parametrize("how", ["sparse_grad", "torch_clips_dense", "inf_of_one_rank", "bfloat16"])
def test_ranks_stay_together(ranks: list[dict[str, Any]], how: str) -> None:
    first, second = (result["of_both_ranks"][how] for result in ranks)
    assert_same(first, second)


def test_sparse_grad_is_close_to_the_dense_one(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        expected = result["as_distributed_data_parallel"]["mask"][0]
        for name, value in result["of_both_ranks"]["sparse_grad"].items():
            torch.testing.assert_close(value, expected[name])  # sddmm and norms add up in another order


def test_an_inf_that_is_not_selected_skips_nothing(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["of_both_ranks"]["inf_of_one_rank"]["scale"] == 8


def test_sixteen_bit_gradients_are_averaged_in_fp32(ranks: list[dict[str, Any]]) -> None:
    (first, average), (second, other) = (result["sixteen_bits"] for result in ranks)
    assert_same(average, other)
    assert_same(average, {name: value / 2 + second[name] / 2 for name, value in first.items()})
    values = torch.cat(list(average.values()))
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_group(ranks: list[dict[str, Any]]) -> None:
    assert [result["group_of_the_first"] for result in ranks] == [True, True]


@pytest.mark.parametrize("release", [False, True])
def test_a_missing_gradient_counts_as_zeros(ranks: list[dict[str, Any]], release: bool) -> None:
    (first, average, missing), (second, other, also_missing) = (r["gradients_of_one_rank"][release] for r in ranks)
    assert missing == also_missing
    assert "unused" in missing
    assert all(not average[name].any() for name in missing)
    assert_same(average, other)
    for name, value in average.items():
        share = 0 if name.startswith("text.") else second[name] / 2
        assert torch.equal(value, first[name] / 2 + share), name
    assert any(value.any() for name, value in average.items() if name.startswith("text."))


def test_all_ranks_take_the_first_step(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["first_step_without_a_gradient"] == {False: True, True: True}


def test_another_selection_raises_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert len(result["other_masks"]) == 6
        for message in result["other_masks"]:
            assert "broadcast_object_list" in message


def test_sends_the_selected_values(ranks: list[dict[str, Any]]) -> None:
    """And a number per parameter."""
    names = len(list(two_towers().parameters()))
    for result in ranks:
        sent, k = result["bytes_sent"]
        assert sent == 4 * k + 8 * (names + 5)


def test_needs_a_process_group() -> None:
    optimizer = SparseAdamW(two_towers().parameters())
    with pytest.raises(RuntimeError, match="init_process_group") as error:
        optimizer.all_reduce_grads()
    assert_message(error, ["torchrun"])


def test_one_rank_changes_nothing(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = two_towers()
        optimizer = SparseAdamW(model.named_parameters(), mask=make_mask(model), release_grads=True)
        backward(model, batches(1)[0])
        before = selected(model, optimizer)
        optimizer.all_reduce_grads()
        assert_same(before, selected(model, optimizer))
        optimizer.reselect()
        with pytest.raises(ValueError, match="of another selection") as error:
            optimizer.all_reduce_grads()
        assert_message(error, ["gradient of", "zero_grad()"])
        for name, p in model.named_parameters():
            if isinstance(p.grad, SelectedGrad):
                assert torch.equal(p.grad.selected.values, before[name]), name
    finally:
        distributed.destroy_process_group()
