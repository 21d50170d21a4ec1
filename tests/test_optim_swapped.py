"""Groups whose parameters are swapped for others: block-wise training, and frameworks that put in other objects.

What was selected of one block says nothing of another. A step with a new block and no state of it is either right, as
an optimizer built on that block, or an error that names reselect() and changes nothing; after reselect() it is right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from optimizer_runs import differences, draw, message_of, snapshot
from torch import Tensor, nn
from training import FP32_ROUNDINGS, clones, relative_error

from saft_kernels import SparseAdamW, SparseMask

SHAPES = {"w": (8, 6), "v": (10,), "u": (5,)}
OTHER_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "same": SHAPES,
    "smaller": {"w": (5, 4), "v": (7,), "u": (5,)},
    "larger": {"w": (9, 7), "v": (12,), "u": (6,)},
    "transposed": {"w": (6, 8), "v": (10,), "u": (5,)},
    "fewer": {"w": (8, 6), "v": (10,)},
    "more": {**SHAPES, "t": (4,)},
}
MASK = SparseMask({n: torch.arange(s[0])[1::3] for n, s in SHAPES.items()}, SHAPES)

OPTIONS: dict[str, dict[str, Any]] = {
    "global": {"density": 0.3},
    "k": {"k": 12},
    "tensor": {"density": 0.3, "scope": "tensor"},
    "row": {"density": 0.3, "scope": "row"},
    "released": {"density": 0.3, "release_grads": True},
    "mask": {"mask": MASK},
    "released_mask": {"mask": MASK, "release_grads": True},
}
BUDGETS = {name: {k: v for k, v in options.items() if k != "mask"} for name, options in OPTIONS.items()}
BUDGETS["mask"] = {"k": MASK.k}
BUDGETS["released_mask"] = {"k": MASK.k, "release_grads": True}

all_options = pytest.mark.parametrize("options", OPTIONS)
other_shapes = pytest.mark.parametrize("shapes", OTHER_SHAPES)


class Block:
    """Parameters whose gradients are their own: of the block and of how many it has had."""

    def __init__(self, seed: int, shapes: str = "same") -> None:
        self.seed, self.backwards = seed, 0
        self.parameters = [nn.Parameter(value) for value in draw(seed, OTHER_SHAPES[shapes]).values()]

    def copy(self) -> Block:
        """Other objects of the same values, from the first gradient on."""
        other = Block.__new__(Block)
        other.seed, other.backwards = self.seed, 0
        other.parameters = [nn.Parameter(p.detach().clone()) for p in self.parameters]
        return other

    def backward(self) -> None:
        self.backwards += 1
        drawn = draw(1000 * self.seed + self.backwards, {str(i): p.shape for i, p in enumerate(self.parameters)})
        for p in self.parameters:
            p.grad = None
        torch.autograd.backward(self.parameters, list(drawn.values()))

    def train(self, optimizer: Any, steps: int = 3) -> None:
        for _ in range(steps):
            self.backward()
            optimizer.step()

    def named(self) -> list[tuple[str, nn.Parameter]]:
        names = [*SHAPES, "t"]
        return list(zip(names, self.parameters))  # noqa: B905


def put(optimizer: Any, block: Block) -> None:
    """As BAdam does: the group's list is another; the names stay where there are as many."""
    group = optimizer.param_groups[0]
    group["params"] = list(block.parameters)
    group["param_names"] = [name for name, _ in block.named()]


def clear(optimizer: Any) -> None:
    optimizer.state.clear()


def replace(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def state_of(optimizer: Any) -> dict[str, Tensor]:
    """Parameters and state, whatever the selection says of them."""
    values = {}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        values[str(i)] = p.detach().clone()
        values |= {f"{i}.{key}": value.clone() for key, value in optimizer.state.get(p, {}).items()}
    return values


def fresh_run(block: Block, options: dict[str, Any], steps: int = 3) -> dict[str, Tensor]:
    """What an optimizer that was built on this block makes of it."""
    copied = block.copy()
    optimizer = SparseAdamW(copied.named(), lr=0.05, **options)
    copied.train(optimizer, steps)
    return state_of(optimizer)


def same_values(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def error_or_right(optimizer: Any, block: Block, options: dict[str, Any], others: list[Tensor]) -> None:
    """The first step with a block; then, after reselect() where that was asked for, training."""
    expected = fresh_run(block, options)
    before, untouched = clones(block.parameters), clones(others)
    block.backward()
    message = message_of(optimizer.step)
    if message is not None:
        assert "reselect()" in message
        assert "expected" in message
        assert "got" in message
        assert same_values(block.parameters, before)
        assert not any(optimizer.state.get(p) for p in block.parameters)
        optimizer.reselect()
        block.backwards = 0
        block.train(optimizer)
    else:
        block.train(optimizer, 2)
    assert differences(state_of(optimizer), expected) == []
    assert same_values(others, untouched)


# ---- after steps ----


@all_options
@other_shapes
@pytest.mark.parametrize("reset", [clear, replace], ids=lambda reset: reset.__name__)
def test_swapped_after_steps(options: str, shapes: str, reset: Callable[[Any], None]) -> None:
    block, other = Block(1), Block(2, shapes)
    optimizer = SparseAdamW(block.named(), lr=0.05, **OPTIONS[options])
    block.train(optimizer)
    put(optimizer, other)
    reset(optimizer)
    error_or_right(optimizer, other, BUDGETS[options], block.parameters)


@all_options
@other_shapes
@pytest.mark.parametrize("order", ["swap_first", "reselect_first"])
def test_reselect_makes_block_wise_training_right(options: str, shapes: str, order: str) -> None:
    """There and back again: each turn is that of an optimizer built for it, and leaves the other block alone."""
    blocks = [Block(1), Block(2, shapes)]
    optimizer = SparseAdamW(blocks[0].named(), lr=0.05, **OPTIONS[options])
    blocks[0].train(optimizer)
    for block, other in [(blocks[1], blocks[0]), (blocks[0], blocks[1])]:
        if order == "reselect_first":
            optimizer.zero_grad()
            optimizer.reselect()
        put(optimizer, block)
        optimizer.state.clear()
        if order == "swap_first":
            optimizer.reselect()
        block.backwards = 0
        expected, untouched = fresh_run(block, BUDGETS[options]), clones(other.parameters)
        block.train(optimizer)
        assert differences(state_of(optimizer), expected) == []
        assert same_values(other.parameters, untouched)


@pytest.mark.parametrize("options", ["global", "tensor", "released", "mask"])
@pytest.mark.parametrize("shapes", ["same", "smaller", "larger"])
def test_clipping_finds_it_as_well(options: str, shapes: str) -> None:
    """Loops clip before they step: the norm is that of the new block's selection, or the same error."""
    block, other = Block(1), Block(2, shapes)
    optimizer = SparseAdamW(block.named(), lr=0.05, **OPTIONS[options])
    block.train(optimizer)
    put(optimizer, other)
    optimizer.state.clear()
    other.backward()
    gradients = [p.grad for p in other.parameters]
    before = clones(gradients)
    message = message_of(lambda: optimizer.clip_grad_norm_(1e-3))
    if message is not None:
        assert "reselect()" in message
        assert same_values(gradients, before)
    else:  # of all, as before any selection
        torch.testing.assert_close(nn.utils.get_total_norm(gradients), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_one_group_of_two_is_swapped() -> None:
    """An error changes nothing of the other group either: with the old block back, all goes on as undisturbed."""

    def build() -> tuple[Block, Block, Any]:
        stays, block = Block(1), Block(3)
        groups = [{"params": block.parameters, "density": 0.3}, {"params": stays.parameters, "density": 0.5}]
        optimizer = SparseAdamW(groups, lr=0.05)
        for _ in range(3):
            stays.backward()
            block.train(optimizer, 1)
        return stays, block, optimizer

    (stays, block, optimizer), (stays_too, block_too, undisturbed) = build(), build()
    other = Block(2, "smaller")
    kept = {p: optimizer.state.pop(p) for p in block.parameters}
    optimizer.param_groups[0]["params"] = list(other.parameters)
    before = clones([*stays.parameters, *other.parameters])
    other.backward()
    message = message_of(optimizer.step)
    assert message is not None
    assert "reselect()" in message
    assert same_values([*stays.parameters, *other.parameters], before)
    optimizer.param_groups[0]["params"] = list(block.parameters)
    optimizer.state.update(kept)
    for s, b, o in ((stays, block, optimizer), (stays_too, block_too, undisturbed)):
        s.backward()
        b.train(o, 1)
    assert same_values([*stays.parameters, *block.parameters], [*stays_too.parameters, *block_too.parameters])
    assert float(optimizer.state[stays.parameters[0]]["step"]) == 4.0


# ---- before there is any state ----


@pytest.mark.parametrize("options", ["global", "k", "tensor", "row", "released"])
@other_shapes
def test_swapped_before_selection(options: str, shapes: str) -> None:
    """Nothing was selected: the first step selects of what is there."""
    block, other = Block(1), Block(2, shapes)
    optimizer = SparseAdamW(block.named(), lr=0.05, **OPTIONS[options])
    put(optimizer, other)
    expected = fresh_run(other, OPTIONS[options])
    other.train(optimizer)
    assert differences(state_of(optimizer), expected) == []


@pytest.mark.parametrize("options", ["mask", "released_mask"])
def test_a_mask_goes_by_position_until_there_is_state(options: str) -> None:
    """accelerate's prepare() puts other objects in the place of the same parameters."""
    block, other = Block(1), Block(2)
    optimizer = SparseAdamW(block.named(), lr=0.05, **OPTIONS[options])
    put(optimizer, other)
    expected = fresh_run(other, OPTIONS[options])
    other.train(optimizer)
    assert differences(state_of(optimizer), expected) == []


@pytest.mark.parametrize("options", ["mask", "released_mask"])
@pytest.mark.parametrize("shapes", ["smaller", "larger", "transposed", "more"])
def test_a_mask_of_other_shapes_is_no_mask_of_these(options: str, shapes: str) -> None:
    """Also where all positions exist."""
    block, other = Block(1), Block(2, shapes)
    optimizer = SparseAdamW(block.named(), lr=0.05, **OPTIONS[options])
    put(optimizer, other)
    error_or_right(optimizer, other, BUDGETS[options], block.parameters)


@pytest.mark.parametrize("shapes", ["same", "smaller", "more"])
@pytest.mark.parametrize("again", [False, True])
def test_swapped_amid_selection_steps(shapes: str, again: bool) -> None:
    """The sums are of the block before: they do not count for another."""
    options = {"density": 0.3, "selection_steps": 3}
    block, other = Block(1), Block(2, shapes)
    optimizer = SparseAdamW(block.named(), lr=0.05, **options)
    block.train(optimizer, 2)
    put(optimizer, other)
    if again:
        optimizer.reselect()
    expected = fresh_run(other, options, 5)
    other.backward()
    message = message_of(optimizer.step)
    if message is not None:
        assert not again
        assert "reselect()" in message
        optimizer.reselect()
        other.backwards = 0
    other.train(optimizer, 5 - other.backwards)
    assert differences(state_of(optimizer), expected) == []


# ---- with their state, and where all is selected ----


@pytest.mark.parametrize("options", [*OPTIONS, "dense"])
def test_state_carried_over(options: str) -> None:
    """`state[new] = state.pop(old)`: as an optimizer of the new block that has loaded the state."""
    given = {"density": 1.0} if options == "dense" else OPTIONS[options]
    block, other = Block(1), Block(2)
    optimizer = SparseAdamW(block.named(), lr=0.05, **given)
    block.train(optimizer)
    copied = other.copy()
    loaded = SparseAdamW(copied.named(), lr=0.05, **given)
    loaded.load_state_dict(optimizer.state_dict())
    put(optimizer, other)
    for old, new in zip(block.parameters, other.parameters, strict=True):
        optimizer.state[new] = optimizer.state.pop(old)
    untouched = clones(block.parameters)
    other.train(optimizer)
    copied.train(loaded)
    assert differences(snapshot(optimizer), snapshot(loaded)) == []
    assert same_values(block.parameters, untouched)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("reset", [None, clear, replace])
@other_shapes
def test_density_one_is_adamw(shapes: str, reset: Any, steps_before: int, release: bool) -> None:
    """Nothing is selected, so any parameter will do."""
    theirs, ours = Block(1), Block(1)
    expected = torch.optim.AdamW(theirs.parameters, lr=0.05)
    actual = SparseAdamW(ours.parameters, lr=0.05, density=1.0, release_grads=release)
    others = [Block(2, shapes) for _ in range(2)]
    for optimizer, block, other in ((expected, theirs, others[0]), (actual, ours, others[1])):
        block.train(optimizer, steps_before)
        optimizer.param_groups[0]["params"] = list(other.parameters)
        if reset is not None:
            reset(optimizer)
        other.train(optimizer)
    for a, b in zip(others[1].parameters, others[0].parameters, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS
        assert_same_bits(actual.state[a]["step"], expected.state[b]["step"])
        assert actual.state[a].keys() == expected.state[b].keys()


def test_a_dense_head_may_be_swapped() -> None:
    """Beside a body that is sparse and stays."""
    body, head, other = Block(1), Block(2), Block(3, "larger")
    groups = [{"params": body.parameters}, {"params": head.parameters, "density": 1.0}]
    optimizer = SparseAdamW(groups, lr=0.05, density=0.3)
    alone, reference = Block(1), Block(3, "larger")
    body_alone = SparseAdamW(alone.parameters, lr=0.05, density=0.3)
    for _ in range(3):
        body.backward()
        head.train(optimizer, 1)
    for p in head.parameters:
        del optimizer.state[p]
    optimizer.param_groups[1]["params"] = list(other.parameters)
    for _ in range(3):
        body.backward()
        other.train(optimizer, 1)
    alone.train(body_alone, 6)
    reference.train(SparseAdamW(reference.parameters, lr=0.05, density=1.0))
    assert same_values(body.parameters, alone.parameters)
    assert same_values(other.parameters, reference.parameters)
