"""Plain loops: wrapped models and the names of a mask; select_into for an optimizer without names; several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_message
from processes import run_ranks
from scripts import assert_only_selected_changed, assert_same_weights, folder, load_example, run_example, weights  # noqa: F401
from torch import Tensor, distributed, nn
from training import Batch, TwoTowers, batches, loss_fn, two_towers

import saft_kernels
from saft_kernels import SparseAdamW, SparseMask, select
from saft_kernels.integrations import select_into
from saft_kernels.integrations.select_into import name_parameters


def no_decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As most scripts make them: without names, and not in the model's order."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim >= 2]},
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4) -> None:
    for batch in batches(count, seed=1):
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- wrapped models ----


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Any] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile-DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_mask_of_the_bare_model_for_the_wrapped_one(wrapper: str) -> None:
    """And of the wrapped for the bare one: the same training, bit by bit, as without a wrapper."""
    model = two_towers()
    model.unused.requires_grad_(False)  # DistributedDataParallel insists
    before = weights(model)
    mask = saft_kernels.select(model, batches(3), loss_fn, density=0.05, progress=False)
    wrapped = WRAPPERS[wrapper](model)
    assert next(iter(wrapped.named_parameters()))[0].startswith(("module.", "_orig_mod."))
    train(wrapped, SparseAdamW(wrapped.named_parameters(), lr=0.01, mask=mask))
    # `unused` is of the model, not of the budget
    numel = sum(p.numel() for p in model.parameters())
    assert_only_selected_changed(before, weights(model), mask, mask.k / numel)

    bare = two_towers()
    bare.unused.requires_grad_(False)
    mask = saft_kernels.select(WRAPPERS[wrapper](bare), batches(3), loss_fn, density=0.05, progress=False)
    train(bare, SparseAdamW(bare.named_parameters(), lr=0.01, mask=mask))
    assert_same_weights(weights(bare), weights(model))


def test_wise_ft_example(folder: Path) -> None:  # noqa: F811
    """Only the selected move, so only they are interpolated; the loss goes down on the way."""
    ran = run_example("wise_ft_loop")
    tuned, mask = ran["model"].module, ran["mask"]
    assert_only_selected_changed(weights(ran["zeroshot"]), weights(tuned), mask, 0.02)
    between = {alpha: ran["interpolated"](ran["zeroshot"], tuned, alpha) for alpha in (0.0, 0.5, 1.0)}
    losses = {alpha: float(ran["flyp_loss"](model, ran["data"][0])) for alpha, model in between.items()}
    assert losses[1.0] < losses[0.5] < losses[0.0]
    assert_same_weights(weights(between[0.0]), weights(ran["zeroshot"]))
    assert_same_weights(weights(between[1.0]), weights(tuned))


# ---- select_into ----


def test_select_into_is_select_and_mask() -> None:
    """Two groups without names: training goes as with a mask by names, bit by bit."""
    model, named = two_towers(), two_towers()
    optimizer = SparseAdamW(no_decay_groups(model), lr=0.01, density=0.05)
    before = weights(model)
    model.text.weight.grad = torch.full_like(model.text.weight, 5.0)
    mask = select_into(optimizer, model, iter(batches(3)), loss_fn, progress=False)
    assert_same_weights(weights(model), before)
    assert torch.equal(model.text.weight.grad, torch.full_like(model.text.weight, 5.0))
    assert "param_names" not in optimizer.param_groups[0]
    assert mask == saft_kernels.select(named, batches(3), loss_fn, density=0.05, progress=False)
    model.zero_grad()

    groups = no_decay_groups(named)
    names = {p: name for name, p in named.named_parameters()}
    groups = [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups]
    expected = SparseAdamW(groups, lr=0.01, mask=mask)
    train(model, optimizer)
    train(named, expected)
    assert_same_weights(weights(model), weights(named))

    # and it is saved and loaded like any other
    copy = two_towers()
    copy.load_state_dict(model.state_dict())
    loaded = SparseAdamW(no_decay_groups(copy), lr=0.01, density=0.05)
    loaded.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    train(copy, loaded)
    assert_same_weights(weights(copy), weights(model))


def test_select_into_budgets_of_groups() -> None:
    """A head that is always dense, a group with its own k, and the rest: each selects among its own."""
    model = two_towers()
    head, towers = list(model.text.parameters()), list(model.visual.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in head + towers)]
    optimizer = SparseAdamW(
        [{"params": head, "density": 1.0}, {"params": towers, "k": 7}, {"params": rest}], lr=0.01, density=0.1
    )
    mask = select_into(optimizer, model, batches(3), loss_fn, progress=False)
    counts = {row.name: row.k for row in mask.summary().rows}
    visual = [name for name in counts if name.startswith("visual.")]
    others = [name for name in counts if not name.startswith(("visual.", "text."))]
    assert counts["text.weight"] == model.text.weight.numel()
    assert sum(counts[name] for name in visual) == 7
    assert sum(counts[name] for name in others) == round(0.1 * sum(p.numel() for p in rest))
    part = saft_kernels.select(model, batches(3), loss_fn, k=7, include="visual.*", progress=False)
    assert all(torch.equal(mask[name], part[name]) for name in visual)
    before = weights(model)
    train(model, optimizer)
    assert_only_selected_changed(before, weights(model), mask, mask.density)


def test_select_into_again_keeps_the_moments_of_what_stays() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.parameters(), lr=0.01, scope="tensor", density=0.2)
    first = select_into(optimizer, model, batches(2, seed=3), loss_fn, progress=False)
    train(model, optimizer)
    weight = model.text.weight
    old = dict(zip(first["text.weight"].tolist(), optimizer.state[weight]["exp_avg"].tolist(), strict=True))
    second = select_into(optimizer, model, batches(2, seed=4), loss_fn, progress=False)
    new = dict(zip(second["text.weight"].tolist(), optimizer.state[weight]["exp_avg"].tolist(), strict=True))
    assert 0 < len(old.keys() & new.keys()) < len(old)
    assert all(new[i] == old.get(i, 0.0) for i in new)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_select_into_takes_the_optimizers_scope(scope: Any) -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1, scope=scope)
    mask = select_into(optimizer, model, batches(2), loss_fn, progress=False)
    assert mask == select(model, batches(2), loss_fn, density=0.1, scope=scope, progress=False)


def test_select_into_errors_change_nothing() -> None:
    model = two_towers()
    optimizer = SparseAdamW(no_decay_groups(model), lr=0.01, density=0.05)
    select_into(optimizer, model, batches(2), loss_fn, progress=False)
    before = optimizer.mask
    cases: list[tuple[Any, Any, Any, list[str]]] = [
        (optimizer, TwoTowers(), batches(1), ["`model`: expected all parameters of the optimizer", "(group 0"]),
        (optimizer, model, [], ["`batches`: expected at least one batch"]),
        (
            optimizer,
            model,
            [(b[0] * float("inf"), *b[1:]) for b in batches(1)],
            ["gradient of 'logit_scale' at selection"],
        ),
    ]
    for who, where, data, parts in cases:
        with pytest.raises(ValueError, match="expected") as error:
            select_into(who, where, data, loss_fn, progress=False)
        assert_message(error, parts)
        assert "param_names" not in optimizer.param_groups[0]
        assert optimizer.mask == before
        assert None not in [group["num_candidates"] for group in optimizer.param_groups]
    with pytest.raises(TypeError, match="expected a SparseAdamW, got SGD; build it") as type_error:
        select_into(torch.optim.SGD(model.parameters()), model, batches(1), loss_fn)
    assert_message(type_error, ["`optimizer`"])


def test_names_of_the_model() -> None:
    model = two_towers()
    mask = saft_kernels.select(model, batches(2), loss_fn, k=30, progress=False)
    optimizer = SparseAdamW(no_decay_groups(model), lr=0.01)
    name_parameters(optimizer, nn.DataParallel(model))
    optimizer.use_mask(mask)
    assert {name.removeprefix("module.") for name in optimizer.mask} == set(mask)
    before = weights(model)
    train(model, optimizer)
    assert_only_selected_changed(before, weights(model), mask, mask.density)
    with pytest.raises(ValueError, match="got a mask for another one"):
        optimizer.use_mask(SparseMask.from_dense({"w": torch.ones(2)}))


# ---- several ranks ----


def _rank_selects(rank: int, _: str) -> dict[str, Tensor]:
    model = two_towers()
    optimizer = SparseAdamW(no_decay_groups(model), lr=0.01, density=0.05)
    mine: list[Batch] = batches(4)[rank::2]
    mask = select_into(optimizer, model, mine, loss_fn, progress=False)
    return dict(mask)


def test_ranks_select_alike_from_their_own_data(tmp_path: Path) -> None:
    """The model of a callback is the one inside DistributedDataParallel, whose gradients are not averaged."""
    masks: list[dict[str, Tensor]] = run_ranks(_rank_selects, 2, tmp_path)
    expected = saft_kernels.select(two_towers(), batches(4), loss_fn, density=0.05, progress=False)
    for name in expected:
        assert torch.equal(masks[0][name], masks[1][name]), name
    # summed in another order: an element at the threshold may differ
    same = sum(int(torch.isin(masks[0][name], expected[name]).sum()) for name in expected)
    assert same >= expected.k - 1
    alone = saft_kernels.select(two_towers(), batches(4)[::2], loss_fn, density=0.05, progress=False)
    assert alone.iou(expected) < 0.9
