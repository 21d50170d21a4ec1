"""release_grads=True: p.grad keeps the selected values alone, and all that loops do to gradients still works."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_message, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Batch, backward, batches, clones, loss_fn, parameters, set_gradients, states, train, two_towers

from saft_kernels import SparseAdamW, SparseMask, select, topk_magnitude
from saft_kernels.optim import release as gradient_release
from saft_kernels.optim.release import SelectedGrad

LR = 1e-2


@pytest.fixture(autouse=True, params=[0, 1 << 20], ids=["at once", "waiting"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of gradients that wait, as they do on a GPU."""
    if request.param:
        monkeypatch.setitem(gradient_release._MOST_WAITING, "cpu", request.param)
    return int(request.param)


def make_mask(model: nn.Module, density: float = 0.1) -> SparseMask:
    dtype = next(model.parameters()).dtype
    return select(model, batches(2, seed=9, dtype=dtype), loss_fn, density=density, progress=False)


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> list[tuple[nn.Module, SparseAdamW]]:
    """The same model twice, without and with release."""
    pairs = []
    for release in (False, True):
        model = two_towers(dtype=dtype)
        mask = make_mask(model)
        pairs.append((model, SparseAdamW(model.named_parameters(), LR, mask=mask, release_grads=release, **options)))
    return pairs


def assert_same_models(a: nn.Module, b: nn.Module) -> None:
    for (name, actual), expected in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_same_bits(actual.detach(), expected.detach(), name)


def released(optimizer: SparseAdamW) -> dict[nn.Parameter, None]:
    """In order."""
    return {p: None for group in optimizer.param_groups for p in group["params"] if type(p.grad) is SelectedGrad}


def sparse_names(model: nn.Module, mask: SparseMask) -> set[str]:
    return {name for name, p in model.named_parameters() if 0 < mask[name].numel() < p.numel()}


# ---- the same training ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_bit_equal_to_dense_gradients(dtype: torch.dtype, amsgrad: bool) -> None:
    """One backward pass per step: in every dtype the same values reach the same kernel."""
    (dense, a), (model, b) = pair(dtype, amsgrad=amsgrad)
    for batch in batches(5, dtype=dtype):
        for m, optimizer in ((dense, a), (model, b)):
            optimizer.zero_grad()
            backward(m, batch)
        for name, parameter in model.named_parameters():
            if name in sparse_names(model, b.mask):
                assert type(parameter.grad) is SelectedGrad
                assert b.selected_grad(parameter).dtype == (dtype if dtype == torch.float64 else torch.float32)
                expected = a.selected_grad(dict(dense.named_parameters())[name])
                assert torch.equal(b.selected_grad(parameter).to(dtype), expected)
            elif not b.mask[name].numel():
                assert parameter.grad is None
            else:
                assert type(parameter.grad) is Tensor  # wholly selected
        a.step()
        b.step()
    assert_same_models(model, dense)
    for (_, actual), (_, expected) in zip(states(b), states(a), strict=True):
        for key in expected:
            assert_same_bits(actual[key], expected[key], key)


def test_selection_by_the_first_steps() -> None:
    """Gradients stay dense until there is a selection, and whenever it is to be made anew."""
    runs = []
    for release in (False, True):
        model = two_towers()
        optimizer = SparseAdamW(model.named_parameters(), LR, density=0.1, selection_steps=2, release_grads=release)
        for step, batch in enumerate(batches(8)):
            backward(model, batch)
            assert bool(released(optimizer)) == (release and step not in (0, 1, 5, 6))
            optimizer.step()
            optimizer.zero_grad()
            if step == 4:
                optimizer.reselect()
        runs.append(model)
    assert_same_models(*runs)


def test_the_first_step_counts_whatever_is_selected_of_it() -> None:
    """Zero gradients make no first step; zeros at the selected places alone do."""
    indices = torch.tensor([20, 21, 23])
    runs = []
    for release_grads in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        shapes = {name: p.shape for name, p in model.named_parameters()}
        mask = SparseMask({"0.weight": indices, **{n: torch.tensor([]).long() for n in list(shapes)[1:]}}, shapes)
        optimizer = SparseAdamW(model.named_parameters(), LR, mask=mask, release_grads=release_grads)
        for tokens in ([1, 2], [5, 2], [1, 3]):
            model(torch.tensor(tokens)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((model, float(optimizer.state[model[0].weight]["step"])))
    assert [step for _, step in runs] == [3.0, 3.0]
    assert_same_models(runs[0][0], runs[1][0])


def test_zero_gradients_make_no_first_step() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
    (0.0 * loss_fn(model, batches(1)[0])).backward()
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0}
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())


def test_parameters_of_every_layout() -> None:
    def losses(params: Sequence[Tensor], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params)

    runs = []
    for release in (False, True):
        params = parameters()
        optimizer = SparseAdamW(params, LR, density=0.3, release_grads=release)
        for seed in range(4):
            losses(params, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a.detach(), b.detach())


class Reused(nn.Module):
    """Tied weights, a layer used twice, and activation checkpointing of either kind."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.use_reentrant = use_reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            if self.use_reentrant is None:
                x = self.twice(x)
            else:
                x = checkpoint(self.twice, x, use_reentrant=self.use_reentrant)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_tied_reused_and_checkpointed(use_reentrant: bool | None) -> None:
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = Reused(use_reentrant)
        optimizer = SparseAdamW(model.named_parameters(), LR, density=0.2, release_grads=release)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randint(20, (3, 5), generator=generator)).backward()
            optimizer.step()
        assert bool(released(optimizer)) == release
        runs.append(model)
    assert_same_models(*runs)


# ---- what loops do to gradients ----


@pytest.mark.parametrize("how", ["autocast", "compiled"])
def test_autocast_and_compiled_models_are_bit_equal(how: str) -> None:
    (dense, dense_optimizer), (sparse, sparse_optimizer) = pair()
    for model, optimizer in ((dense, dense_optimizer), (sparse, sparse_optimizer)):
        called = torch.compile(model, backend="aot_eager") if how == "compiled" else model
        for batch in batches(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                loss = loss_fn(called, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_models(dense, sparse)


def test_accumulation_in_fp32_is_bit_equal() -> None:
    (dense, a), (model, b) = pair()
    data = batches(6)
    for first in (0, 3):
        for m, optimizer in ((dense, a), (model, b)):
            for batch in data[first : first + 3]:
                backward(m, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_models(model, dense)


def test_accumulation_of_16_bit_gradients_is_more_precise() -> None:
    """p.grad adds up in bf16, the buffer in fp32."""
    (dense, a), (model, b) = pair(torch.bfloat16)
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in dense.parameters()]
    for batch in batches(8, dtype=torch.bfloat16):
        backward(dense, batch)
        backward(model, batch)
        probe = copy.deepcopy(dense)
        backward(probe, batch)
        for total, parameter in zip(exact, probe.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad
    errors = {False: 0.0, True: 0.0}
    for ours, theirs, total, index in zip(model.parameters(), dense.parameters(), exact, b.mask.values(), strict=True):
        if type(ours.grad) is SelectedGrad:
            expected = total.take(index.long())
            errors[True] += float((b.selected_grad(ours) - expected).abs().sum())
            errors[False] += float((a.selected_grad(theirs) - expected).abs().sum())
    assert errors[True] < 1e-3 * errors[False]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of", ["optimizer", "model"])
def test_zero_grad(set_to_none: bool, of: str) -> None:
    (dense, a), (model, b) = pair()
    for batch in batches(3):
        for m, optimizer in ((dense, a), (model, b)):
            backward(m, batch)
            optimizer.step()
            (optimizer if of == "optimizer" else m).zero_grad(set_to_none=set_to_none)
    for parameter in model.parameters():
        assert not b.selected_grad(parameter).any()
    a.step()  # without gradients, or with zeros: the moments decay and move the weights
    b.step()
    assert_same_models(model, dense)


def selected_norm(model: nn.Module, mask: SparseMask) -> Tensor:
    values = [p.grad.take(mask[n].long()) for n, p in model.named_parameters() if p.grad is not None]
    return torch.cat(values).norm()


@pytest.mark.parametrize("release", [False, True])
def test_clip_grad_norm(release: bool) -> None:
    """Over selected values; torch's own function agrees where only they exist."""
    dense, model = two_towers(), two_towers()
    mask = make_mask(model)
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=mask, release_grads=release)
    for clip in (optimizer.clip_grad_norm_, lambda bound: nn.utils.clip_grad_norm_(model.parameters(), bound)):
        for m in (dense, model):
            m.zero_grad()
            backward(m, batches(1)[0])
        before = {name: optimizer.selected_grad(p).clone() for name, p in model.named_parameters()}
        expected = selected_norm(dense, mask)
        if release or clip == optimizer.clip_grad_norm_:
            norm = clip(0.5)
            torch.testing.assert_close(norm, expected)  # sums in another order
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(optimizer.selected_grad(parameter), before[name] * 0.5 / norm)
    optimizer.selected_grad(model.text.weight)[:] = math.inf
    if release:
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clipped_norm_is_the_same_bits_dense_and_released(norm_type: float) -> None:
    """Parameters of which nothing is selected have a gradient in one and none in the other."""
    norms = []
    for model, optimizer in pair():
        backward(model, batches(1)[0])
        norms.append(optimizer.clip_grad_norm_(0.1, norm_type))
        assert any(not index.numel() for index in optimizer.mask.values())
    assert_same_bits(*norms, "norm")


def test_clip_grad_norm_before_selection() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, density=0.1, release_grads=True)
    backward(model, batches(1)[0])
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert optimizer.clip_grad_norm_(1.0) == expected
    with pytest.raises(ValueError, match="expected a selection") as error:
        optimizer.selected_grad(model.text.weight)
    assert_message(error, ["`parameter`", "text.weight"])


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(fused: bool | None, unscale: bool) -> None:
    """It unscales, checks and skips on the selected values."""
    (dense, a), (model, b) = pair(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step, batch in enumerate(batches(6)):
        b.zero_grad()
        scaler.scale(loss_fn(model, batch)).backward()
        if step == 3:
            b.selected_grad(model.text.weight)[0] = math.inf
        else:
            a.zero_grad()
            backward(dense, batch)
            a.step()
        if unscale:
            scaler.unscale_(b)
            if step != 3:
                torch.testing.assert_close(b.clip_grad_norm_(math.inf), a.clip_grad_norm_(math.inf))
        scaler.step(b)
        scaler.update()
    assert scaler.get_scale() == 2.0**10 * 2 / 2 * 2
    assert {float(state["step"]) for _, state in states(b)} == {5.0}
    for actual, expected in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)  # scales are powers of two, but values underflow


def test_values_written_are_stepped_with() -> None:
    (dense, a), (model, b) = pair()
    for m, optimizer in ((dense, a), (model, b)):
        backward(m, batches(1)[0])
        if optimizer is b:
            b.selected_grad(m.text.weight).mul_(3)
        else:
            m.text.weight.grad.mul_(3)
        optimizer.step()
    assert_same_models(model, dense)


def test_a_dense_gradient_assigned_by_hand() -> None:
    """p.grad is anyone's to set: then it is what the step takes."""
    runs = []
    for release in (False, True):
        params = parameters()
        optimizer = SparseAdamW(params, LR, density=0.3, release_grads=release)
        for seed in range(3):
            set_gradients(params, seed)
            optimizer.step()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_closure_and_dense_head() -> None:
    runs = []
    for release in (False, True):
        model = two_towers()
        head = list(model.text.parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("text.")]
        optimizer = SparseAdamW(
            [{"params": rest}, {"params": head, "density": 1.0}], LR, density=0.1, release_grads=release
        )
        for batch in batches(4):

            def closure(batch: Batch = batch, model: Any = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_fn(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert all(type(p.grad) is Tensor for p in head)
        assert bool(released(optimizer)) == release
        runs.append(model)
    assert_same_models(*runs)


# ---- the buffer ----


def test_add() -> None:
    """For gradients that never were dense."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
    buffer, weight = optimizer._released, model.text.weight
    ones = torch.ones(optimizer.mask["text.weight"].numel())
    buffer.add(weight, ones)
    assert type(weight.grad) is SelectedGrad
    assert torch.equal(optimizer.selected_grad(weight), ones)
    buffer.add(weight, 2 * ones)
    assert torch.equal(optimizer.selected_grad(weight), 3 * ones)
    weight.grad = torch.ones_like(weight)
    buffer.add(weight, ones)
    assert torch.equal(optimizer.selected_grad(weight), 2 * ones)
    optimizer.zero_grad()
    buffer.add(weight, ones)  # nothing is left of what was there
    assert torch.equal(optimizer.selected_grad(weight), ones)
    flat = {optimizer.selected_grad(p).untyped_storage().data_ptr() for p in released(optimizer)}
    assert len(flat) == 1


def test_peak_is_one_gradient(waiting: int) -> None:
    """Live gradient bytes, seen from hooks as each arrives: dense all add up, released the largest."""
    peaks = {}
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)), nn.Linear(64, 128))
        params = list(model.parameters())
        alive: list[weakref.ref[Tensor]] = []
        seen = []

        def watch(parameter: Tensor, alive: list[Any] = alive, seen: list[int] = seen) -> None:
            alive.append(weakref.ref(parameter.grad))
            seen.append(sum(g.untyped_storage().nbytes() for ref in alive if (g := ref()) is not None))

        for parameter in params:
            parameter.register_post_accumulate_grad_hook(watch)  # before the optimizer's: sees the dense gradient
        mask = SparseMask(
            {str(i): torch.arange(4) for i in range(len(params))}, {str(i): p.shape for i, p in enumerate(params)}
        )
        named = [(str(i), p) for i, p in enumerate(params)]
        optimizer = SparseAdamW(named, LR, mask=mask, release_grads=release)
        model(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        peaks[release] = max(seen)
    assert peaks[False] == sum(p.numel() * 4 for p in params)
    largest = max(p.numel() * 4 for p in params)
    assert largest <= peaks[True] <= (2 * largest if waiting else largest)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_peak_on_a_gpu() -> None:
    peaks = {}
    for release in (False, True):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
        named = list(model.named_parameters())
        mask = SparseMask({n: torch.arange(4) for n, _ in named}, {n: p.shape for n, p in named})
        optimizer = SparseAdamW(named, LR, mask=mask, release_grads=release)
        for _ in range(2):
            optimizer.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(torch.randn(2, 1024, device="cuda")).sum().backward()
            optimizer.step()
            peaks[release] = torch.cuda.max_memory_allocated() - before
    weight = 1024 * 1024 * 4
    assert peaks[False] >= 8 * weight
    assert peaks[True] <= 3 * weight  # the one at hand, the next one, and activations


# ---- lifetime, copies, checkpoints, changes of the model ----


def test_hooks_go_with_the_optimizer() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
    del optimizer
    gc.collect()
    backward(model, batches(1)[0])
    assert all(type(p.grad) is Tensor for p in model.parameters() if p is not model.unused)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_two_optimizers_on_one_model() -> None:
    model = two_towers()
    optimizers = [
        SparseAdamW(model.named_parameters(), LR, mask=make_mask(model, density), release_grads=True)
        for density in (0.1, 0.2)
    ]
    backward(model, batches(1)[0])
    optimizers[1].step()  # the one that was built last
    for optimizer in optimizers:  # then whoever steps: gradients are for the other, and the next ones for it
        before = clones(list(model.parameters()))
        with pytest.raises(ValueError, match="another selection") as error:
            optimizer.step()
        assert_message(error, ["gradient of", "zero_grad()"])
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert_same_bits(parameter.detach(), old)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, batches(1)[0])
            optimizer.step()


@pytest.mark.parametrize("ends", ["before", "between", "never"])
@pytest.mark.parametrize("release", [True, False])
def test_an_optimizer_that_was_replaced(release: bool, ends: str) -> None:
    """It may live on, as in a scheduler: the new one gets its gradients, whenever the old one ends."""
    model, expected = two_towers(), two_towers()
    mask, data = make_mask(model), batches(5)
    train(expected, SparseAdamW(expected.named_parameters(), LR, mask=mask), data)
    old = SparseAdamW(model.named_parameters(), LR, mask=mask, release_grads=True)
    train(model, old, data[:3])
    saved = copy.deepcopy(old.state_dict())
    if ends == "before":
        del old
        gc.collect()
    other = SparseMask({**mask, "text.bias": torch.arange(len(mask["text.bias"]))}, mask.shapes)  # of the same k
    assert other != mask
    new = SparseAdamW(model.named_parameters(), LR, mask=other, release_grads=release)
    new.load_state_dict(saved)
    new.zero_grad()
    backward(model, data[3])
    assert (type(model.text.weight.grad) is SelectedGrad) == release
    if ends == "between":
        del old
        gc.collect()
    new.step()
    train(model, new, data[4:])
    assert_same_models(model, expected)


def test_an_optimizer_that_is_not_used() -> None:
    """Gradients are released for the first again once it has stepped, or the other has ended."""
    for steps in (False, True):
        model = two_towers()
        first = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
        other = SparseAdamW(model.named_parameters(), LR, density=1.0)
        backward(model, batches(1)[0])
        assert not any(type(p.grad) is SelectedGrad for p in model.parameters())
        if steps:
            first.step()
        else:
            del other
            gc.collect()
        first.zero_grad()
        backward(model, batches(1)[0])
        assert any(type(p.grad) is SelectedGrad for p in model.parameters())
        first.step()


def duplicate(way: str, model: nn.Module, optimizer: SparseAdamW) -> tuple[nn.Module, SparseAdamW]:
    if way == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if way == "pickle":
        buffer = io.BytesIO()
        torch.save((model, optimizer), buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    other = two_towers(seed=3)
    other.load_state_dict(model.state_dict())
    fresh = SparseAdamW(other.named_parameters(), LR, density=0.1, release_grads=True)
    fresh.load_state_dict(optimizer.state_dict())
    return other, fresh


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load_state_dict"])
def test_copies_release_too(way: str) -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, density=0.1, release_grads=True)
    train(model, optimizer, batches(3))
    other, copied = duplicate(way, model, optimizer)
    copied.zero_grad()
    for m, o in ((model, optimizer), (other, copied)):
        train(m, o, batches(2, seed=5))
        assert released(o)
    assert_same_models(model, other)
    assert not any(a.grad is b.grad for a, b in zip(released(optimizer), released(copied), strict=True))


def test_loading_between_backward_and_step() -> None:
    """The same selection: the gradients stay valid. Another: refused, until backward has run again."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, density=0.1, release_grads=True)
    train(model, optimizer, batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, batches(1)[0])
    optimizer.load_state_dict(saved)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.reselect()
    train(model, optimizer, batches(1, seed=7))
    optimizer.zero_grad()
    backward(model, batches(1)[0])
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="another selection"):
        optimizer.step()
    train(model, optimizer, batches(1))


def test_reselect_needs_dense_gradients() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, density=0.1, release_grads=True)
    train(model, optimizer, batches(2))
    optimizer.reselect()
    before = clones(list(model.parameters()))
    with pytest.raises(ValueError, match="at selection") as error:
        optimizer.step()  # with the gradients of before
    assert_message(error, ["gradient of", "reselect()"])
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.detach(), old)
    train(model, optimizer, batches(1))


def test_groups_added_later() -> None:
    runs = []
    for release in (False, True):
        model = two_towers()
        text = list(model.text.parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("text.")]
        optimizer = SparseAdamW(rest, LR, density=0.1, release_grads=release)
        train(model, optimizer, batches(2))
        optimizer.add_param_group({"params": text, "density": 0.5})
        train(model, optimizer, batches(3, seed=1))
        assert (model.text.weight in released(optimizer)) == release
        runs.append(model)
    assert_same_models(*runs)


def test_swapped_parameter_objects() -> None:
    """As accelerate does. The first gradient of a new object is dense, then its hook is there."""
    (dense, a), (model, b) = pair()
    for m, optimizer in ((dense, a), (model, b)):
        train(m, optimizer, batches(1))
        m.text.weight = nn.Parameter(m.text.weight.detach().clone())
        for group in optimizer.param_groups:
            group["params"] = list(m.parameters())
        train(m, optimizer, batches(3, seed=1))
    assert_same_models(model, dense)
    assert model.text.weight in released(b)


def test_frozen_and_thawed() -> None:
    """Hooks are there before a gradient is required."""
    model = two_towers()
    mask = make_mask(model)
    model.text.weight.requires_grad_(False)
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=mask, release_grads=True)
    assert not model.text.weight.requires_grad
    backward(model, batches(1)[0])
    assert model.text.weight.grad is None
    model.text.weight.requires_grad_(True)
    train(model, optimizer, batches(1))
    assert model.text.weight in released(optimizer)


def test_model_cast_after_the_optimizer_was_built() -> None:
    (dense, a), (model, b) = pair()
    for m, optimizer in ((dense, a), (model, b)):
        m.to(torch.float64)
        train(m, optimizer, batches(3, dtype=torch.float64))
    assert b.selected_grad(model.text.weight).dtype == torch.float64
    assert_same_models(model, dense)


def test_selecting_on_a_model_in_training() -> None:
    model = two_towers()
    expected = make_mask(model)
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model, 0.05), release_grads=True)
    backward(model, batches(1)[0])
    before = optimizer.selected_grad(model.text.weight).clone()
    assert make_mask(model) == expected
    assert torch.equal(optimizer.selected_grad(model.text.weight), before)  # set aside, and back
    optimizer.step()


# ---- p.grad as a tensor ----


def test_ops_do_not_read_memory_that_is_not_there() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
    backward(model, batches(1)[0])
    assert optimizer.mask is not None
    with pytest.raises(TypeError, match="a tensor with memory") as error:
        topk_magnitude([model.text.weight.grad], 1)
    assert_message(error, ["`tensors[0]`", "SelectedGrad"])


def test_selected_grad_is_a_tensor_of_the_parameters_kind() -> None:
    for parameter in (p for p in parameters() if p.numel() > 1):
        mask = SparseMask({"p": torch.tensor([1, 3])}, {"p": parameter.shape})
        optimizer = SparseAdamW([("p", parameter)], LR, mask=mask, release_grads=True)
        parameter.sum().backward()
        grad = parameter.grad
        assert (grad.shape, grad.dtype, grad.device) == (parameter.shape, parameter.dtype, parameter.device)
        assert repr(grad).startswith("SelectedGrad(2 values")
        grad.detach().mul_(3)
        assert optimizer.selected_grad(parameter).tolist() == [3.0, 3.0]
        assert float(grad.sum()) == 6.0
        assert bool(grad.any())
        optimizer.zero_grad(set_to_none=False)
        assert not grad.any()


@pytest.mark.parametrize(
    "operation",
    [
        lambda grad: grad + 1,
        lambda grad: grad.mean(),
        lambda grad: grad.flatten(),
        lambda grad: torch.zeros_like(grad).mul_(grad),
        lambda grad: torch.ones(grad.shape).mul_(grad),
        lambda grad: torch.zeros(grad.shape).add_(grad, alpha=-0.1),
        lambda grad: torch.zeros(grad.shape).copy_(grad),
        lambda grad: torch._foreach_mul_([torch.ones(grad.shape), grad], [grad, torch.ones(grad.shape)]),
        lambda grad: grad.sum(0),
        lambda grad: grad.sum(dim=(0, 1), keepdim=True),
        lambda grad: grad.norm(p=2, dim=1),
        lambda grad: torch.linalg.vector_norm(grad, dim=1),
        lambda grad: grad.any(dim=0),
        lambda grad: grad.count_nonzero(dim=0),
        lambda grad: grad.mul_(torch.ones(grad.shape[-1])),
    ],
)
def test_unknown_operations_raise(operation: Callable[[Tensor], object]) -> None:
    """Also what would go wrong silently elsewhere: DistributedDataParallel copies p.grad to average it."""
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
    backward(model, batches(1)[0])
    with pytest.raises(RuntimeError, match="release_grads=True") as error:
        operation(model.text.weight.grad)
    assert_message(error, ["selected_grad(p)"])
    assert optimizer.selected_grad(model.text.weight).isfinite().all()


def test_a_model_converted_while_it_has_gradients() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
    backward(model, batches(1)[0])
    with pytest.raises(RuntimeError, match=r"got _to_copy; .*or zero_grad\(\) before the model is moved or converted"):
        model.bfloat16()
    optimizer.zero_grad()
    model.bfloat16().float()
    backward(model, batches(1)[0])
    optimizer.step()


def test_one_selected_value_does_not_spread_over_a_plain_tensor() -> None:
    """It would broadcast: all elements of a parameter, moved by the gradient of one."""
    parameter = nn.Parameter(torch.zeros(4, 3))
    mask = SparseMask({"p": torch.tensor([5])}, {"p": (4, 3)})
    optimizer = SparseAdamW([("p", parameter)], LR, mask=mask, release_grads=True)
    (parameter * torch.arange(12.0).view(4, 3)).sum().backward()
    for write in (
        lambda: parameter.detach().add_(parameter.grad, alpha=-0.1),
        lambda: torch._foreach_add_([parameter.detach()], [parameter.grad]),
        lambda: parameter.detach().copy_(parameter.grad),
    ):
        with pytest.raises(RuntimeError, match="release_grads=True"):
            write()
    assert not parameter.any()
    assert optimizer.selected_grad(parameter).tolist() == [5.0]
    assert [float(f(parameter.grad)) for f in (torch.sum, torch.norm, torch.any, torch.count_nonzero)] == [5, 5, 1, 1]


def test_errors_name_the_parameter() -> None:
    model = two_towers()
    optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
    with pytest.raises(ValueError, match="one of this optimizer") as error:
        optimizer.selected_grad(nn.Parameter(torch.zeros(3)))
    assert_message(error, ["`parameter`", "(3,)"])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("gradient_as_bucket_view", [False, True])
def test_distributed_data_parallel_raises(gradient_as_bucket_view: bool, tmp_path: Path) -> None:
    """It averages p.grad after the hooks: the ranks would part ways in silence."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = two_towers()
        optimizer = SparseAdamW(model.named_parameters(), LR, mask=make_mask(model), release_grads=True)
        parallel = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=gradient_as_bucket_view, find_unused_parameters=True
        )
        with pytest.raises(RuntimeError, match=r"release_grads=True.*all_reduce_grads\(\) in place of Distributed"):
            backward(parallel, batches(1)[0])
        assert optimizer.mask is not None
    finally:
        torch.distributed.destroy_process_group()


# ---- gradients that wait ----


def stack(count: int = 12, width: int = 16) -> tuple[nn.Sequential, SparseAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    indices = {name: torch.randperm(p.numel())[:7].sort().values for name, p in model.named_parameters()}
    mask = SparseMask(indices, {name: p.shape for name, p in model.named_parameters()})
    return model, SparseAdamW(model.named_parameters(), mask=mask, release_grads=True)


@pytest.mark.parametrize("layers_at_once", [1, 3, 12, 100])
def test_one_gather_for_many(layers_at_once: int, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stack()
    sizes: list[int] = []
    one, many = gradient_release._take_one, gradient_release._take_many
    monkeypatch.setattr(gradient_release, "_take_one", lambda s, g: (sizes.append(1), one(s, g)))
    monkeypatch.setattr(gradient_release, "_take_many", lambda s, g: (sizes.append(len(g)), many(s, g)))
    x, size = torch.randn(3, 16), 16 * 16 * 4
    for queue in range(2):
        for selected in optimizer.released._selected.values():  # as if a larger gradient had been there
            if selected.queue is not None:
                selected.queue._largest = layers_at_once * size
        model(x).square().sum().backward()
        if queue == 0:
            optimizer.zero_grad()
            sizes.clear()
    assert sum(sizes) == 12
    assert max(sizes) == (min(layers_at_once, 12) if waiting else 1)


def test_nothing_waits_after_backward(waiting: int) -> None:
    model, optimizer = stack()
    gradients: list[weakref.ref[Tensor]] = []
    for p in model.parameters():
        p.register_hook(lambda g: gradients.append(weakref.ref(g)))
    for selected in optimizer.released._selected.values():
        selected.queue = None
    for _ in range(2):
        model(torch.randn(3, 16)).square().sum().backward()
        assert not any(selected.is_waiting for selected in optimizer.released._selected.values())
        assert all(gradient() is None for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()


def test_values_are_there_for_whoever_reads_them_first(waiting: int) -> None:
    """In hooks of the same backward pass, of the same parameter and of later ones."""
    model, optimizer = stack()
    plain = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}
    last = list(model.named_parameters())[-1]

    def look(parameter: Tensor, name: str) -> None:
        seen[name] = optimizer.selected_grad(parameter).clone()
        seen[f"{name}, last"] = optimizer.selected_grad(last[1]).clone()
        parameter.grad.mul_(2)

    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: look(p, name))
    x = torch.randn(3, 16)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, p in plain.named_parameters():
        expected = p.grad.flatten()[optimizer.mask[name]]
        assert_same_bits(seen[name], expected, name)
        assert_same_bits(optimizer.selected_grad(model.get_parameter(name)), 2 * expected, name)
        doubled = 2 - (name == last[0])
        assert_same_bits(
            seen[f"{name}, last"], doubled * plain.get_parameter(last[0]).grad.flatten()[optimizer.mask[last[0]]]
        )


def test_backward_that_fails(waiting: int) -> None:
    """What it has computed before counts, as it does for dense gradients."""
    model, optimizer = stack()
    plain = copy.deepcopy(model)
    other = SparseAdamW(plain.named_parameters(), mask=optimizer.mask)

    def fail(_: Tensor) -> None:
        raise ArithmeticError

    x = torch.randn(3, 16)
    for m, o in ((model, optimizer), (plain, other)):
        handle = m[4].weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            m(x).square().sum().backward()
        handle.remove()
        o.step()
        m(x).square().sum().backward()
        o.step()
    assert_same_models(model, plain)


def test_gradients_of_several_dtypes_wait_together(waiting: int) -> None:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16] * 3
    params = {str(i): nn.Parameter(torch.randn(9, 8).to(dtype)) for i, dtype in enumerate(dtypes)}
    plain = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    mask = SparseMask({name: torch.arange(0, 72, 5) for name in params}, {name: p.shape for name, p in params.items()})
    optimizer = SparseAdamW(params.items(), mask=mask, release_grads=True)
    for named in (params, plain):
        sum((p.t().double() ** 2 + p.double().sum()).sum() for p in named.values()).backward()
    for name, p in params.items():
        expected = plain[name].grad.flatten()[mask[name]]
        assert torch.equal(optimizer.selected_grad(p).to(p.dtype), expected)
