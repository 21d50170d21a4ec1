"""select(streaming=...): the same mask, without the dense gradient of the model."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_message, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import backward, batches, clones, loss_fn, train, two_towers

import saft_kernels
from saft_kernels import SparseAdamW, select, topk_magnitude
from saft_kernels.common import memory
from saft_kernels.selection.streaming import Candidates, _split

MODES = [True, "host", "blocks"]


def data_for(mode: bool | str, **options: Any) -> list[Any]:
    return batches(1 if mode is True else 3, **options)


# ---- the same mask ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("mode", MODES)
def test_same_mask(mode: bool | str, scope: str, dtype: torch.dtype) -> None:
    model, data = two_towers(dtype=dtype), data_for(mode, dtype=dtype)
    for density in (1e-3, 0.05, 0.5, 1.0):
        options = {"density": density, "scope": scope, "progress": False}
        assert select(model, data, loss_fn, streaming=mode, **options) == select(model, data, loss_fn, **options)


@pytest.mark.parametrize("mode", MODES)
def test_same_mask_of_some_parameters(mode: bool | str) -> None:
    model, data = two_towers(), data_for(mode)
    model.norm.weight.requires_grad_(False)
    options = {"k": 77, "exclude": ["visual.*"], "progress": False}
    assert select(model, data, loss_fn, streaming=mode, **options) == select(model, data, loss_fn, **options)


@pytest.mark.parametrize("mode", MODES)
def test_same_mask_by_tie_break(mode: bool | str) -> None:
    """Equal gradients come in another order than that of the tensors, which decides."""

    class Equal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.zeros(n) for n in (3, 50, 0, 7, 200, 1))

        def forward(self, scale: float) -> Tensor:
            x = torch.tensor(0.0)
            for weight in self.weights:
                x = x + scale * weight.sum()
            return x + 5 * self.weights[3][2]

    for k in (1, 2, 40, 61, 261):
        options = {"k": k, "progress": False}
        args = (Equal(), [1.0], lambda model, scale: model(scale))
        assert select(*args, streaming=mode, **options) == select(*args, **options)


class Unreached(nn.Module):
    """More to select than the loss reaches: zeros are candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.used, self.last = (nn.Parameter(torch.ones(10)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.used * x).sum()


@pytest.mark.parametrize("mode", MODES)
def test_parameters_without_a_gradient(mode: bool | str) -> None:
    args = (Unreached(), [torch.arange(10.0)], lambda model, x: model(x))
    for k in (5, 9, 12, 25, 30):
        mask = select(*args, k=k, streaming=mode, progress=False)
        assert mask == select(*args, k=k, progress=False)


def test_any_tensors_in_any_order() -> None:
    """Sizes around k, one value that repeats, any density: against the definition over all together."""
    rng = random.Random(0)
    for _ in range(15):
        tensors = {
            str(i): torch.randn(rng.choice([0, 1, 5, 64, 1000]))
            .mul(rng.choice([1, 4]))
            .round(decimals=rng.choice([0, 1, 6]))
            for i in range(rng.randint(1, 9))
        }
        numel = sum(t.numel() for t in tensors.values())
        if not numel:
            continue
        k = rng.randint(1, numel)
        top = Candidates({n: t.numel() for n, t in tensors.items()}, 1e-3, k, "global", None)
        for name in rng.sample(list(tensors), len(tensors)):
            top.offer(name, tensors[name])
            assert sum(v.numel() for v in top._values.values()) <= 2 * k
        for index, expected in zip(
            (top.indices()[n] for n in tensors), topk_magnitude(list(tensors.values()), k).indices, strict=True
        ):
            assert index.tolist() == expected.tolist()


class Checkpointed(nn.Module):
    """One layer twice, in reentrant checkpoints: its gradient comes in two parts. Dropout draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            x = checkpoint(self.twice, x, use_reentrant=True)
        return nn.functional.cross_entropy(x @ self.embedding.weight.T, tokens)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_come_in_parts(mode: bool | str) -> None:
    masks = []
    for streaming in (False, mode):
        torch.manual_seed(0)
        model = Checkpointed()
        tokens = [torch.arange(20)] * (1 if mode is True else 2)
        masks.append(select(model, tokens, lambda m, b: m(b), density=0.3, streaming=streaming, progress=False))
    assert masks[0] == masks[1]


def test_blocks_see_the_same_random_numbers() -> None:
    """Of dropout and of a shuffling loader, in every pass."""

    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Linear(16, 1))
        return model, torch.utils.data.DataLoader(torch.randn(12, 8), batch_size=4, shuffle=True)

    masks = [
        select(*make(), lambda m, x: m(x).square().mean(), density=0.2, streaming=mode, progress=False)
        for mode in (False, "blocks")
    ]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("blocks", [1, 2, 3, 100])
def test_blocks_are_even(blocks: int) -> None:
    model, data = two_towers(), batches(2)
    named = dict(model.named_parameters())
    split = list(_split(named, blocks))
    assert [name for block in split for name in block] == list(named)
    assert len(split) <= blocks
    share, most = sum(p.numel() for p in named.values()) / blocks, max(p.numel() for p in named.values())
    assert max(sum(p.numel() for p in block.values()) for block in split) <= share + most
    expected = select(model, data, loss_fn, progress=False)
    assert select(model, data, loss_fn, streaming="blocks", blocks=blocks, progress=False) == expected


# ---- what is left behind ----


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_changed(mode: bool | str) -> None:
    model = two_towers()
    backward(model, batches(1, seed=5)[0])
    before, grads = clones(list(model.parameters())), [p.grad for p in model.parameters()]
    select(model, data_for(mode), loss_fn, streaming=mode, progress=False)
    for parameter, old, grad in zip(model.parameters(), before, grads, strict=True):
        assert_same_bits(parameter.detach(), old)
        assert parameter.grad is grad
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.parametrize("mode", MODES)
def test_with_an_optimizer_that_releases(mode: bool | str) -> None:
    model = two_towers()
    expected = select(model, data_for(mode), loss_fn, progress=False)
    optimizer = SparseAdamW(model.named_parameters(), mask=expected, release_grads=True)
    assert select(model, data_for(mode), loss_fn, streaming=mode, progress=False) == expected
    backward(model, batches(1)[0])
    optimizer.step()


def peak_gradients(mode: bool | str, model: nn.Module, **options: Any) -> int:
    """The most gradient bytes alive at any arrival of one."""
    alive: list[weakref.ref[Tensor]] = []
    peak = 0

    def watch(parameter: Tensor) -> None:
        nonlocal peak
        alive.append(weakref.ref(parameter.grad))
        peak = max(peak, sum(g.untyped_storage().nbytes() for ref in alive if (g := ref()) is not None))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    handles = [p.register_post_accumulate_grad_hook(watch) for p in model.parameters()]
    x = torch.ones(2, 64, dtype=next(model.parameters()).dtype)
    select(model, [x], loss, k=5, streaming=mode, progress=False, **options)
    for handle in handles:
        handle.remove()
    return peak


def test_peak_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    one = 64 * 64 * 4
    assert peak_gradients(False, model) == 8 * one
    assert peak_gradients(True, model) == one
    for blocks in (2, 4, 8):  # the block, and one more at a time
        assert peak_gradients("blocks", model, blocks=blocks) == 8 * one // blocks + one * (blocks > 1)
    # in fp32 on a CPU the gradient itself is the sum
    assert peak_gradients("host", model.bfloat16()) == one // 2


# ---- errors ----


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_nonfinite_gradients(mode: bool | str, bad: float) -> None:
    """The same error, of the same tensor, though another one came first."""
    model, data = two_towers(), data_for(mode)
    for name in ("text.weight", "token_embedding.weight"):
        parameter = dict(model.named_parameters())[name]
        parameter.register_hook(lambda grad: grad.index_fill(1, torch.tensor([2]), bad))
    messages = []
    for streaming in (False, mode):
        with pytest.raises(ValueError, match="at selection") as error:
            select(model, data, loss_fn, streaming=streaming, progress=False)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "token_embedding.weight" in messages[0]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_only_zeros(mode: bool | str) -> None:
    with pytest.raises(ValueError, match="`loss_fn`: expected a loss that depends"):
        select(Unreached(), [torch.zeros(10)], lambda model, x: model(x), streaming=mode, progress=False)


@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradients(mode: bool | str) -> None:
    model = nn.Embedding(10, 4, sparse=True)
    with pytest.raises(TypeError, match="sparse=False"):
        select(model, [torch.tensor([1])], lambda m, x: m(x).sum(), streaming=mode, progress=False)


@pytest.mark.parametrize("mode", MODES)
def test_no_batches(mode: bool | str) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        select(two_towers(), [], loss_fn, streaming=mode, progress=False)


def generator() -> Iterator[Any]:
    yield from batches(2)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"streaming": "disk"}, ["`streaming`", "'disk'"]),
        ({"streaming": 1}, ["`streaming`", "1"]),
        ({"streaming": "blocks", "blocks": 0}, ["`blocks`", "0"]),
        ({"streaming": "blocks", "batches": generator()}, ["`batches`", "4 times", "generator"]),
        ({"streaming": True, "batches": batches(2)}, ["`batches`", "one batch", "'host'"]),
    ],
)
def test_errors(options: dict[str, Any], parts: list[str]) -> None:
    data = options.pop("batches", batches(1))
    with pytest.raises(ValueError, match="expected") as error:
        select(two_towers(), data, loss_fn, progress=False, **options)
    assert_message(error, parts)


# ---- out of memory ----


def allocate_too_much() -> Tensor:
    return torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [
        (False, "streaming=True"),
        (True, "smaller batches"),
        ("host", "smaller batches"),
        ("blocks", "more blocks than 4"),
    ],
)
def test_out_of_memory_while_selecting(mode: bool | str, remedy: str) -> None:
    model = two_towers()
    backward(model, batches(1, seed=5)[0])
    grads = [p.grad for p in model.parameters()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = loss_fn(model, batch)
        model.text.weight.register_hook(lambda grad: allocate_too_much())
        return value

    with pytest.raises(torch.OutOfMemoryError) as error:
        select(model, data_for(mode), loss, streaming=mode, progress=False)
    assert_message(error, ["select()", remedy])
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."),
        MemoryError,
    ],
)
def test_out_of_memory_of_every_kind(make: Callable[[], Exception]) -> None:
    with pytest.raises(torch.OutOfMemoryError) as error, memory.out_of_memory_says("x", "do y"):
        raise make()
    assert_message(error, ["x: ", "do y"])


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^other$") as error, memory.out_of_memory_says("x", "do y"):
        raise RuntimeError("other")
    assert type(error.value) is RuntimeError


@pytest.mark.parametrize("where", ["new_states", "carry_over"])
def test_out_of_memory_in_a_step(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is selected or stepped; with memory it goes on."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), density=0.1)
    if where == "carry_over":
        train(model, optimizer, batches(1))
        optimizer.reselect()
    backward(model, batches(1, seed=1)[0])
    mask = optimizer.mask
    before = clones(list(model.parameters()))
    with monkeypatch.context() as patch:
        patch.setattr(saft_kernels.optim.sparse_adamw, where, lambda *_: allocate_too_much())
        with pytest.raises(torch.OutOfMemoryError) as error:
            optimizer.step()
    assert_message(error, ["step()", "select("])
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.detach(), old)
    if where == "carry_over":
        assert optimizer.mask == mask
    optimizer.step()
    assert optimizer.mask is not None
    assert optimizer.mask != mask
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
