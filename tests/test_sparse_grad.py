"""sparse_grad: selected weight gradients that equal the dense ones; everything else as without it, bit by bit."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_message, assert_same_bits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from saft_kernels import SparseAdamW, SparseGrad, SparseMask, sparse_grad
from saft_kernels.layers import weight_gradient
from saft_kernels.optim.release import SelectedGrad

WIDTH, TOKENS, BATCH = 24, 10, 3


class Layers(nn.Module):
    """Every way in which attention projects, linear layers with and without bias, and what is not covered."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(WIDTH, 4)
        self.three_inputs = nn.MultiheadAttention(WIDTH, 2, bias=False)
        self.separate = nn.MultiheadAttention(WIDTH, 4, kdim=16, vdim=8, add_bias_kv=True)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 7)
        self.checkpointed = checkpointed

    def mlp(self, x: Tensor) -> Tensor:
        # the first product reads a transposed input, its result is written in place
        return self.fc2(functional.relu(self.fc1(x.transpose(0, 1)), inplace=True)).transpose(0, 1)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        x = x + self.norm(self.embedding(tokens))
        x = x + self.self_attention(x, x, x, need_weights=False)[0]
        memory = x.transpose(0, 1) * 0.5
        y = x.transpose(0, 1)
        y = y + self.cross_attention(y, memory, memory)[0]
        y = y + self.three_inputs(y, memory, memory.flip(0), need_weights=False)[0]
        y = y + self.separate(y, memory[..., :16], memory[..., 16:])[0]
        x = y.transpose(0, 1)
        x = x + (self.mlp(x) if self.checkpointed is None else checkpoint(self.mlp, x, use_reentrant=self.checkpointed))
        x = x + self.mlp(x)  # weights used twice
        return self.head(x[:, 0])


def layers(dtype: torch.dtype = torch.float32, **options: Any) -> Layers:
    torch.manual_seed(0)
    return Layers(**options).to(dtype)


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(30, (BATCH, TOKENS), generator=generator)
    return tokens, torch.randn(BATCH, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()


def random_mask(model: nn.Module, density: float = 0.1, without: tuple[str, ...] = ()) -> SparseMask:
    """`density` of each parameter, and at least one element; none of those named in `without`."""
    generator = torch.Generator().manual_seed(1)
    indices = {}
    for name, p in model.named_parameters():
        count = 0 if name in without else max(1, round(density * p.numel()))
        indices[name] = torch.randperm(p.numel(), generator=generator)[:count].sort().values
    return SparseMask(indices, {name: p.shape for name, p in model.named_parameters()})


def pair(
    dtype: torch.dtype = torch.float32, mask: Callable[[nn.Module], SparseMask] = random_mask, **options: Any
) -> tuple[Layers, Layers, SparseAdamW, SparseGrad]:
    """The model with dense gradients; and with sparse ones, its optimizer and the handle."""
    dense, sparse = layers(dtype, **options), layers(dtype, **options)
    optimizer = SparseAdamW(sparse.named_parameters(), mask=mask(sparse), release_grads=True)
    return dense, sparse, optimizer, sparse_grad(sparse, optimizer)


def backward(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    tokens, x = inputs(dtype, seed)
    output = model(tokens, x)
    functional.cross_entropy(output.float(), torch.arange(BATCH)).backward()
    return output.detach(), x.grad


def assert_gradients(dense: nn.Module, sparse: nn.Module, optimizer: SparseAdamW, roundings: float = 16) -> None:
    """The selected values of `dense`, within `roundings` of its dtype relative to the largest of a parameter.

    Both sum some 30 products in fp32, in different order, on inputs that are the same bits: a few roundings. A dense
    16-bit gradient was rounded to its dtype beside, and rounded anew where a weight is used twice.
    """
    for (name, p), expected in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        index = optimizer.mask[name].long()
        if not index.numel():
            assert p.grad is None, name
            continue
        assert type(p.grad) is SelectedGrad or index.numel() == p.numel(), name
        actual, wanted = optimizer.selected_grad(p).double(), expected.grad.flatten()[index].double()
        bound = roundings * torch.finfo(expected.dtype).eps * float(expected.grad.abs().max())
        assert float((actual - wanted).abs().max()) <= bound, name
        assert float(wanted.abs().max()) > 0, name  # or the test shows nothing


@pytest.fixture(autouse=True)
def one_thread(num_threads: Callable[[int], None]) -> None:
    num_threads(1)


@pytest.fixture(params=["sampled", "rows and columns, in blocks", "whole"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How entries are computed, whatever would be chosen here."""
    gathered = {"sampled": None, "rows and columns, in blocks": (True, True), "whole": (False, False)}[request.param]
    monkeypatch.setattr(weight_gradient, "choose", lambda *_: gathered)
    if "blocks" in request.param:
        monkeypatch.setattr(weight_gradient, "BLOCK_NUMEL", 2)


every_way = pytest.mark.usefixtures("way")
two_ways = pytest.mark.parametrize("way", ["sampled", "rows and columns, in blocks"], indirect=True)
only_sampled = pytest.mark.parametrize("way", ["sampled"], indirect=True)


# ---- the same gradients ----


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    dense, sparse, optimizer, handle = pair(dtype)
    expected, actual = backward(dense, dtype), backward(sparse, dtype)
    assert_same_bits(actual[0], expected[0], "output")
    assert_same_bits(actual[1], expected[1], "gradient of the input")
    assert_gradients(dense, sparse, optimizer)
    weights = [n for n, p in dense.named_parameters() if p.dim() == 2 and "embedding" not in n and "bias" not in n]
    assert sorted(handle.sparse) == sorted(handle.ways) == sorted(weights)
    assert handle.dense == {}


def test_what_is_not_a_weight_gradient_has_the_same_bits() -> None:
    """Norms, embeddings and biases, down to the first layer: what flows back through the layers is the same."""
    dense, sparse, optimizer, _ = pair()
    backward(dense)
    backward(sparse)
    for (name, p), expected in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        if p.dim() == 1 or "embedding" in name:
            selected = expected.grad.flatten()[optimizer.mask[name].long()]
            assert_same_bits(optimizer.selected_grad(p), selected, name)


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    dense, sparse, optimizer, _ = pair()
    with torch.autocast("cpu", dtype):
        expected, actual = backward(dense), backward(sparse)
    assert_same_bits(actual[0], expected[0], "output")
    assert_same_bits(actual[1], expected[1], "gradient of the input")
    # the dense gradient was rounded to 16 bits: half a last place of the largest, once for each use of the weight
    roundings = 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_gradients(dense, sparse, optimizer, roundings)


@every_way
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    dense, sparse, optimizer, _ = pair(checkpointed=use_reentrant)
    expected, actual = backward(dense), backward(sparse)
    assert_same_bits(actual[0], expected[0], "output")
    assert_same_bits(actual[1], expected[1], "gradient of the input")
    assert_gradients(dense, sparse, optimizer)


@every_way
def test_accumulation_over_backward_passes() -> None:
    dense, sparse, optimizer, _ = pair()
    for seed in range(3):
        backward(dense, seed=seed)
        backward(sparse, seed=seed)
    assert_gradients(dense, sparse, optimizer)
    sparse.zero_grad()
    dense.zero_grad()
    backward(dense, seed=4)
    backward(sparse, seed=4)
    assert_gradients(dense, sparse, optimizer)


@two_ways
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_model(way: None, autocast: bool) -> None:
    """In one graph: linear layers, and attention with itself."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
            self.fc2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.fc2(functional.gelu(self.fc1(x)))

    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = Block()
    sparse = copy.deepcopy(dense)
    mask = random_mask(sparse, without=("fc1.bias",))
    optimizer = SparseAdamW(sparse.named_parameters(), mask=mask, release_grads=True)
    sparse_grad(sparse, optimizer)
    x = torch.randn(3, 5, WIDTH)
    for model in (dense, torch.compile(sparse, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        output.float().square().mean().backward()
    # under autocast the dense gradient was rounded to bf16, and what flows back in other places than in eager mode
    assert_gradients(dense, sparse, optimizer, 4 * 2**16 if autocast else 16)
    assert sparse.fc1.bias.grad is None


@two_ways
def test_compiled_attention_to_other_inputs(way: None) -> None:
    """It takes ranges of a weight's rows, at which the graph breaks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(WIDTH, 4)
    sparse = copy.deepcopy(dense)
    optimizer = SparseAdamW(sparse.named_parameters(), mask=random_mask(sparse), release_grads=True)
    sparse_grad(sparse, optimizer)
    x, memory = torch.randn(5, 3, WIDTH), torch.randn(7, 3, WIDTH)
    for model in (dense, torch.compile(sparse, backend="eager")):
        model(x, memory, memory, need_weights=False)[0].square().mean().backward()
    assert_gradients(dense, sparse, optimizer)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers(batch_first: bool) -> None:
    """PyTorch's own, whose fast path reads the weights itself in evaluation."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first))
        models[-1].add_module("encoder", nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first))
    dense, sparse = models
    optimizer = SparseAdamW(sparse.named_parameters(), mask=random_mask(sparse), release_grads=True)
    handle = sparse_grad(sparse, optimizer)
    assert handle.dense == {}
    target, memory = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    outputs = []
    for model in models:
        outputs.append(model(target.transpose(0, 1), model.encoder(memory).transpose(0, 1)[:5]))
        outputs[-1].pow(2).mean().backward()
    assert_same_bits(outputs[1].detach(), outputs[0].detach())
    assert_gradients(dense, sparse, optimizer)
    for model in models:
        model.eval()
    with torch.no_grad():
        assert_same_bits(sparse.encoder(memory), dense.encoder(memory))
    assert_same_bits(sparse.encoder(memory).detach(), dense.encoder(memory).detach())


def test_one_token() -> None:
    linear = nn.Linear(4, 3)
    optimizer = SparseAdamW(linear.named_parameters(), mask=random_mask(linear, 0.17), release_grads=True)
    with sparse_grad(linear, optimizer) as handle:
        assert handle.sparse == ("weight",)
        x = torch.randn(4)
        linear(x)[1].backward()
    expected = torch.zeros(3, 4)
    expected[1] = x
    assert torch.equal(optimizer.selected_grad(linear.weight), expected.flatten()[optimizer.mask["weight"].long()])
    linear(torch.empty(0, 4, requires_grad=True)).sum().backward()


@every_way
def test_a_weight_tied_to_an_embedding_gets_both_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, WIDTH)
            self.head = nn.Linear(WIDTH, 30, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens).tanh())

    torch.manual_seed(0)
    dense = Tied()
    sparse = copy.deepcopy(dense)
    optimizer = SparseAdamW(sparse.named_parameters(), mask=random_mask(sparse), release_grads=True)
    sparse_grad(sparse, optimizer)
    for model in (dense, sparse):
        model(torch.arange(20)).logsumexp(-1).sum().backward()
    assert_gradients(dense, sparse, optimizer)


def test_training() -> None:
    """Ten steps beside release_grads alone."""
    models = layers(), layers()
    # a large eps: the gradient of attention's key bias is 0 but for roundings, which Adam would blow up
    optimizers = [
        SparseAdamW(m.named_parameters(), 1e-2, eps=1e-3, mask=random_mask(m), release_grads=True) for m in models
    ]
    sparse_grad(models[1], optimizers[1])
    for seed in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, seed=seed)
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), expected in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        # a step is at most lr, and a gradient's roundings, 1e-5 of the largest, are that share of it, ten times
        torch.testing.assert_close(p, expected, rtol=0, atol=10 * 1e-2 * 1e-4, msg=name)
        assert not torch.equal(p, dict(layers().named_parameters())[name])


@only_sampled
def test_same_bits_over_runs_and_thread_counts(way: None, num_threads: Callable[[int], None]) -> None:
    def values() -> list[Tensor]:
        linear = nn.Linear(300, 200, dtype=torch.bfloat16)
        optimizer = SparseAdamW(linear.named_parameters(), mask=random_mask(linear), release_grads=True)
        sparse_grad(linear, optimizer)
        generator = torch.Generator().manual_seed(0)
        linear(torch.randn(700, 300, generator=generator).bfloat16()).float().mul(x).sum().backward()
        return [optimizer.selected_grad(linear.weight)]

    x = torch.randn(700, 200)
    expected = values()
    for threads in (1, 2, 3):
        num_threads(threads)
        for actual, wanted in zip(values(), expected, strict=True):
            assert_same_bits(actual, wanted)


# ---- nothing is computed that is not selected ----


class Products(TorchDispatchMode):
    """The shapes that matrix products have made, in eager mode without a custom op, which would cost time."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "saft_kernels"
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.shapes.add(tuple(result.shape))
        return result


@only_sampled
def test_no_dense_weight_gradient_exists(way: None) -> None:
    without = ("fc1.weight", "fc1.bias", "head.weight", "head.bias")
    dense, sparse, optimizer, handle = pair(mask=lambda model: random_mask(model, without=without))
    made = []
    for model in (dense, sparse):
        with Products() as products:
            backward(model)
        made.append(products.shapes)
    # of linear layers, and what attention projects at once: all inputs, two of them, or one of another width
    shapes = {(48, 24), (24, 48), (7, 24), (72, 24), (24, 16), (24, 8), (24, 24)}
    assert made[0] >= shapes
    assert not made[1] & shapes
    assert_gradients(dense, sparse, optimizer)
    assert sparse.fc1.weight.grad is None
    assert sparse.head.bias.grad is None
    assert handle.ways["fc1.weight"] == "nothing is selected"
    assert handle.ways["fc2.weight"] == "sampled by sddmm"


def test_a_model_of_which_only_the_last_layer_is_selected() -> None:
    names = [name for name, _ in layers().named_parameters() if not name.startswith("head")]
    dense, sparse, optimizer, _ = pair(mask=lambda model: random_mask(model, without=tuple(names)))
    backward(dense)
    backward(sparse)
    assert_gradients(dense, sparse, optimizer)


def test_backward_passes_that_do_not_go_on_to_the_weights() -> None:
    dense, sparse, optimizer, _ = pair()
    expected, actual = (
        torch.autograd.grad(model(tokens, x).sum(), x)[0]
        for model, (tokens, x) in ((dense, inputs()), (sparse, inputs()))
    )
    assert_same_bits(actual, expected)
    tokens, x = inputs()
    sparse(tokens, x).sum().backward(inputs=[x, sparse.norm.weight])
    assert [name for name, p in sparse.named_parameters() if p.grad is not None] == ["norm.weight"]
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(sparse(*inputs()).sum(), sparse.fc1.weight)
    sparse.zero_grad()
    for model in (dense, sparse):
        weights = [model.fc1.weight, model.self_attention.in_proj_weight]
        model(*inputs())[0, 1].backward(inputs=weights)
    assert [name for name, p in sparse.named_parameters() if p.grad is not None] == [
        "self_attention.in_proj_weight",
        "fc1.weight",
    ]
    index = optimizer.mask["fc1.weight"].long()
    expected = dense.fc1.weight.grad.flatten()[index]
    torch.testing.assert_close(optimizer.selected_grad(sparse.fc1.weight), expected, rtol=1e-4, atol=1e-5)


def test_frozen_weights_and_inputs_without_gradient() -> None:
    dense, sparse, optimizer, _ = pair()
    for model in (dense, sparse):
        model.fc1.weight.requires_grad_(False)
        model.self_attention.in_proj_weight.requires_grad_(False)
        tokens, x = inputs()
        model(tokens, x.detach()).square().sum().backward()
    assert dense.fc1.weight.grad is None
    assert sparse.fc1.weight.grad is None
    assert sparse.self_attention.in_proj_weight.grad is None
    index = optimizer.mask["fc2.weight"].long()
    expected = dense.fc2.weight.grad.flatten()[index]
    torch.testing.assert_close(optimizer.selected_grad(sparse.fc2.weight), expected, rtol=1e-4, atol=1e-5)


# ---- which layers ----


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_that_keep_their_dense_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].forward = lambda x, plain=model[2].forward: plain(x)  # as accelerate's hooks do
    nn.utils.parametrizations.weight_norm(model[3])
    indices = {name: torch.arange(6) for name, p in model.named_parameters() if p.numel() > 8}
    indices["4.weight"] = torch.arange(32)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    mask = SparseMask({name: indices.get(name, torch.arange(0)) for name in shapes}, shapes)
    trained = [(name, p) for name, p in model.named_parameters()]
    optimizer = SparseAdamW(trained, mask=mask, release_grads=True)
    handle = sparse_grad(model, optimizer)
    assert handle.sparse == ("0.weight",)
    dense = handle.dense
    assert "50%" in dense.pop("4.weight")
    assert dense == {
        "1.weight": "Doubled has a forward of its own",
        "2.weight": "something else has replaced the module's forward",
    }
    model(torch.randn(5, 8)).square().sum().backward()
    assert all(type(p.grad) is SelectedGrad for name, p in trained if mask[name].numel())


def test_weights_of_another_optimizer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = SparseAdamW(model[0].named_parameters(), mask=random_mask(model[0]), release_grads=True)
    handle = sparse_grad(model, optimizer)
    assert handle.sparse == ("0.weight",)
    assert handle.dense == {"1.weight": "it is not a parameter of the optimizer"}
    model(torch.randn(5, 8)).square().sum().backward()
    assert type(model[1].weight.grad) is Tensor


def test_the_selection_is_followed() -> None:
    dense, sparse, optimizer, handle = pair()
    backward(sparse)
    optimizer.step()
    optimizer.reselect()
    optimizer.zero_grad()
    assert handle.sparse == ()
    assert set(handle.dense.values()) == {"it is wholly selected, or its selection is pending"}
    backward(sparse, seed=1)
    assert type(sparse.fc1.weight.grad) is Tensor
    before = optimizer.mask
    optimizer.step()
    optimizer.zero_grad()
    name = next(name for name in handle.sparse if optimizer.mask[name].numel())
    assert not torch.equal(optimizer.mask[name], before[name])
    dense.load_state_dict(sparse.state_dict())
    backward(dense, seed=2)
    backward(sparse, seed=2)
    expected = dense.get_parameter(name).grad.flatten()[optimizer.mask[name].long()]
    actual = optimizer.selected_grad(sparse.get_parameter(name))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # some 30 products in another order


def test_weights_with_a_hook() -> None:
    """It gets the whole gradient, and what it returns counts; without it the gradient is sparse again."""
    dense, sparse, optimizer, _ = pair()
    hooked = [
        [p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 2]
        for model in (dense, sparse)
    ]
    seen: list[torch.Size] = []

    def times_3(gradient: Tensor) -> Tensor:
        seen.append(gradient.shape)
        return 3 * gradient

    handles = [p.register_hook(times_3) for model in hooked for p in model]
    backward(dense)
    backward(sparse)
    assert_gradients(dense, sparse, optimizer)
    assert sorted(seen) == sorted(p.shape for model in hooked for p in model)
    for handle in handles:
        handle.remove()
    for model in (dense, sparse):
        model.zero_grad()
        backward(model)
    assert_gradients(dense, sparse, optimizer)


def test_another_selection_between_forward_and_backward() -> None:
    _, sparse, optimizer, _ = pair()
    backward(sparse)
    optimizer.step()
    loss = sparse(*inputs()).sum()
    optimizer.reselect()
    with pytest.raises(RuntimeError, match="one selection from forward to backward") as error:
        loss.backward()
    assert_message(error, ["sparse_grad"])


# ---- what it leaves behind ----


def test_model_looks_the_same() -> None:
    plain, sparse, _, handle = pair()
    assert list(sparse.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in sparse.modules()] == [type(m) for m in plain.modules()]
    assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in plain.named_parameters()]
    with torch.no_grad():
        assert_same_bits(sparse(*inputs()), plain(*inputs()))
    handle.remove()
    handle.remove()
    assert not any("forward" in m.__dict__ for m in sparse.modules())


def test_removed() -> None:
    dense, sparse, optimizer, handle = pair()
    handle.remove()
    with Products() as products:
        backward(sparse)
    assert (48, 24) in products.shapes
    backward(dense)
    assert_gradients(dense, sparse, optimizer, roundings=0)
    optimizer.zero_grad()
    with sparse_grad(sparse, optimizer) as again:
        assert again.sparse
        with pytest.raises(ValueError, match="already") as error:
            sparse_grad(sparse, optimizer)
        assert_message(error, ["`model`"])
    assert not any("forward" in m.__dict__ for m in sparse.modules())


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies_are_plain(copied: Callable[[nn.Module], nn.Module]) -> None:
    dense, sparse, optimizer, _ = pair()
    other = copied(sparse)
    backward(dense)
    backward(other)
    for (name, p), expected in zip(other.named_parameters(), dense.named_parameters(), strict=True):
        assert type(p.grad) is Tensor
        assert_same_bits(p.grad, expected[1].grad, name)
    assert all(p.grad is None for p in sparse.parameters())
    backward(sparse)
    assert_gradients(dense, sparse, optimizer)


def test_without_its_optimizer_the_model_is_plain() -> None:
    dense, sparse, optimizer, handle = pair()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    backward(dense)
    backward(sparse)
    for p, expected in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert_same_bits(p.grad, expected.grad)
    handle.remove()


def test_model_cast_after_the_optimizer_was_built() -> None:
    dense, sparse, optimizer, _ = pair()
    dense.bfloat16()
    sparse.bfloat16()
    backward(dense, torch.bfloat16)
    backward(sparse, torch.bfloat16)
    assert_gradients(dense, sparse, optimizer)


# ---- errors ----


def test_bad_arguments() -> None:
    model = layers()
    adamw = torch.optim.AdamW(model.parameters())
    keeping = SparseAdamW(model.named_parameters(), mask=random_mask(model))
    waiting = SparseAdamW(model.named_parameters(), release_grads=True)
    for optimizer, kind, parts in (
        (adamw, TypeError, ["`optimizer`", "AdamW"]),
        (keeping, ValueError, ["`optimizer`", "release_grads=True"]),
        (waiting, ValueError, ["`optimizer`", "none yet", "mask"]),
    ):
        with pytest.raises(kind) as error:
            sparse_grad(model, optimizer)
        assert_message(error, parts)
    norm = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"nn\.Linear") as error:
        sparse_grad(norm, SparseAdamW(norm.named_parameters(), mask=random_mask(norm), release_grads=True))
    assert_message(error, ["`model`", "got none"])


def test_double_backward_raises() -> None:
    linear = nn.Linear(4, 3)
    optimizer = SparseAdamW(linear.named_parameters(), mask=random_mask(linear, 0.17), release_grads=True)
    sparse_grad(linear, optimizer)
    x = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_weights_changed_before_backward_raise() -> None:
    _, sparse, _, _ = pair()
    loss = sparse(*inputs()).sum()
    with torch.no_grad():
        sparse.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_raises(process_group: None) -> None:
    _, sparse, optimizer, handle = pair()
    parallel = nn.parallel.DistributedDataParallel(sparse)
    with pytest.raises(RuntimeError, match="DistributedDataParallel") as error:
        backward(parallel)
    assert_message(error, ["all_reduce_grads"])
    handle.remove()
    with pytest.raises(ValueError, match="DistributedDataParallel") as error:
        sparse_grad(parallel, optimizer)
    assert_message(error, ["`model`", "all_reduce_grads"])
