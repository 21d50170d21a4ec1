"""select() against its definition: |mean gradient|, a stable sort, the first k. Selections are compared exactly."""

from __future__ import annotations

import copy
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Backend, assert_message, assert_same_bits, flushed_denormals
from torch import Tensor, nn
from training import Batch, batches, largest, loss_fn, two_towers

from saft_kernels import SparseAdamW, SparseMask, select
from saft_kernels.ops import reference
from saft_kernels.selection import budget


def mean_gradients(model: nn.Module, data: list[Batch]) -> dict[str, Tensor]:
    """In plain autograd: per batch, then added in order; zero where the loss does not reach."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in named.items()}
    for batch in data:
        gradients = torch.autograd.grad(loss_fn(model, batch), list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient
    return {name: total / len(data) for name, total in sums.items()}


def chosen(mask: SparseMask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.items()}


def expected_of(scores: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    return {name: i.tolist() for name, i in zip(scores, largest(list(scores.values()), k), strict=True)}


# ---- the definition ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_largest_mean_gradient(backend: Backend, dtype: torch.dtype) -> None:
    if backend.device != "cpu":
        pytest.skip("gradients computed twice on a GPU differ by rounding")
    model = two_towers(dtype=dtype)
    data = batches(4, dtype=dtype)
    with backend.forced():
        mask = select(model, data, loss_fn, density=0.1, progress=False, backend=backend.name)
    k = round(0.1 * sum(p.numel() for p in model.parameters()))
    assert mask.k == k
    assert chosen(mask) == expected_of(mean_gradients(model, data), k)
    assert list(mask) == [name for name, _ in model.named_parameters()]
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == mask.shapes


def test_it_is_the_mean_and_not_the_mean_magnitude() -> None:
    """Gradients that cancel over the batches do not count, however large they are."""
    model = nn.Linear(3, 1, bias=False)
    data = [torch.tensor([100.0, 1.0, 0.0]), torch.tensor([-100.0, 1.0, 0.5])]
    mask = select(model, data, lambda m, x: m(x).squeeze(), k=1, progress=False)
    assert mask["weight"].tolist() == [1]


@pytest.mark.parametrize("k", [1, 17, 2000])
def test_k(k: int) -> None:
    model = two_towers()
    mask = select(model, batches(2), loss_fn, k=k, progress=False)
    assert mask.k == k
    assert chosen(mask) == expected_of(mean_gradients(model, batches(2)), k)


def test_everything() -> None:
    model = two_towers()
    mask = select(model, batches(1), loss_fn, density=1.0, progress=False)
    assert mask.density == 1.0
    assert mask["logit_scale"].tolist() == [0]


def test_scope_tensor() -> None:
    model = two_towers()
    mask = select(model, batches(2), loss_fn, density=0.1, scope="tensor", progress=False)
    for name, score in mean_gradients(model, batches(2)).items():
        k = max(1, round(0.1 * score.numel()))
        assert mask[name].tolist() == largest([score], k)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scope_row(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A row is one output unit; a vector is one row. In chunks of rows as in one."""
    model = two_towers(dtype=dtype)
    data = batches(2, dtype=dtype)
    mask = select(model, data, loss_fn, density=0.1, scope="row", progress=False)
    for name, score in mean_gradients(model, data).items():
        rows = score.reshape(score.shape[0] if score.dim() > 1 else 1, -1)
        k = max(1, round(0.1 * rows.shape[1]))
        expected = [i * rows.shape[1] + j for i, row in enumerate(rows) for j in largest([row], k)[0].tolist()]
        assert mask[name].tolist() == expected
    monkeypatch.setattr(reference, "_ROWS_AT_ONCE", 40)
    assert select(model, data, loss_fn, density=0.1, scope="row", progress=False, backend="reference") == mask


def test_scope_row_with_ties_and_denormals() -> None:
    """Smaller index first, by integer keys, whatever torch.set_flush_denormal says."""
    rows = torch.tensor([[1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1e-41, -1e-40, 1e-42]])
    with flushed_denormals():
        (index,) = budget.select_indices(["w"], [rows], 0.5, None, "row", None)
    assert index.tolist() == [0, 1, 4, 5, 9, 10]


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        ("visual.*", None),
        (["visual.*", "norm.*"], None),
        (None, "*.bias"),
        (None, ["token_embedding.*", "logit_scale"]),
        ("*.weight", ["visual.0.*"]),
        ("VISUAL.*", None),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any) -> None:
    def matches(name: str, globs: Any) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in ([globs] if isinstance(globs, str) else globs))

    model = two_towers()
    arguments: dict[str, Any] = {"include": include, "exclude": exclude, "density": 0.1, "progress": False}
    if include == "VISUAL.*":
        with pytest.raises(ValueError, match="`include`") as error:
            select(model, batches(1), loss_fn, **arguments)
        assert_message(error, ["'VISUAL.*'", "matches none of 11"])
        return
    scores = {
        name: score
        for name, score in mean_gradients(model, batches(2)).items()
        if (include is None or matches(name, include)) and (exclude is None or not matches(name, exclude))
    }
    assert 0 < len(scores) < 11
    mask = select(model, batches(2), loss_fn, **arguments)
    k = round(0.1 * sum(score.numel() for score in scores.values()))
    assert {name: index for name, index in chosen(mask).items() if name in scores} == expected_of(scores, k)
    assert mask.k == k
    assert len(mask) == 11


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """1 + 100 * 2^-9 is 1 in bf16, where every single addition rounds away; 1.1 of another element then wins."""
    model = nn.Linear(2, 1, bias=False).bfloat16()
    data = [torch.tensor([1.0, 1.1]), *[torch.tensor([2.0**-8, 0.0])] * 100]

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x.bfloat16()).squeeze()

    mask = select(model, data, loss, k=1, progress=False)
    assert mask["weight"].tolist() == [0]
    # what torch accumulates into a bf16 .grad would have selected the other
    for x in data:
        loss(model, x).backward()
    assert model.weight.grad.abs().argmax().item() == 1


def scores_by_definition(model: nn.Module, data: list[Batch], score: str) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    dtype = torch.promote_types(next(iter(named.values())).dtype, torch.float32)
    weights = {name: p.detach().to(dtype) for name, p in named.items()}
    if score == "weight":
        return weights
    if score in ("mean_abs_grad", "fisher"):
        of_batches = [mean_gradients(model, [batch]) for batch in data]
        power = 1 if score == "mean_abs_grad" else 2
        return {name: sum(gradients[name].abs() ** power for gradients in of_batches) for name in named}
    sums = {name: mean * len(data) for name, mean in mean_gradients(model, data).items()}
    if score == "relative_grad":
        return {name: sums[name] / (weights[name].abs() + 1e-8) for name in named}
    assert score == "grad_times_weight"
    return {name: sums[name] * weights[name] for name in named}


@pytest.mark.parametrize("score", ["mean_abs_grad", "fisher", "relative_grad", "grad_times_weight", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_other_scores(score: str, dtype: torch.dtype) -> None:
    model = two_towers(dtype=dtype)
    data = batches(4, dtype=dtype)  # a power of two: mean and sum are the same but for the exponent
    before = [p.detach().clone() for p in model.parameters()]
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    arguments = () if score == "weight" else (data, loss_fn)
    mask = select(model, *arguments, density=0.1, score=score, progress=False)
    assert chosen(mask) == expected_of(scores_by_definition(model, data, score), mask.k)
    assert mask != select(model, data, loss_fn, density=0.1, progress=False)
    for a, b in zip(model.parameters(), before, strict=True):
        assert_same_bits(a.detach(), b)
    assert torch.equal(model.norm.weight.grad, torch.ones_like(model.norm.weight))


def test_random_score() -> None:
    """Uniform: the k of 20 masks cover a tensor as its share of all elements; one seed makes one mask."""
    model = two_towers()
    torch.manual_seed(3)
    masks = [select(model, density=0.1, score="random") for _ in range(20)]
    torch.manual_seed(3)
    assert select(model, density=0.1, score="random") == masks[0]
    assert masks[0] != masks[1]
    numel = masks[0].shapes["visual.3.weight"][0] * masks[0].shapes["visual.3.weight"][1]
    got = sum(mask["visual.3.weight"].numel() for mask in masks)
    expected = 20 * masks[0].k * numel / masks[0].numel
    assert abs(got - expected) < 4 * (expected * 0.9) ** 0.5  # binomial, 4 sigma; the seed is fixed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": loss_fn}, "`batches`: expected one for score='fisher', got None"),
        ({"batches": []}, "`loss_fn`: expected one for score='fisher', got None"),
        ({"batches": loss_fn, "loss_fn": []}, "`loss_fn`: expected a function of model and batch, got list"),
        (
            {"batches": [None], "loss_fn": lambda model: None},
            "`loss_fn`: expected a function of model and batch, got <function <lambda> at",
        ),
        (
            {"batches": [None], "loss_fn": nn.Linear(2, 2)},
            "`loss_fn`: expected a function of model and batch, got Linear(",
        ),
        ({"batches": [], "score": "weight"}, "`batches`: expected None for score='weight', got list"),
    ],
)
def test_scores_say_what_they_need(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match="expected") as error:
        select(two_towers(), **{"score": "fisher", **arguments})
    assert_message(error, [message])


def test_loss_functions_that_wrap_others() -> None:
    """What a decorator calls is its own business."""

    def of_three(model: nn.Module, batch: Any, weight: float) -> Tensor:
        return weight * loss_fn(model, batch)

    @functools.wraps(of_three)
    def of_any(*args: Any) -> Tensor:
        return of_three(*args, weight=1.0)

    class Loss(nn.Module):
        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return loss_fn(model, batch)

    masks = [
        select(two_towers(), batches(1), loss, density=0.1, progress=False)
        for loss in (loss_fn, of_any, functools.partial(of_three, weight=1.0), Loss())
    ]
    assert all(mask == masks[0] for mask in masks)


@pytest.mark.parametrize("score", ["fisher", "relative_grad"])
def test_other_scores_refuse_gradients_that_are_not_finite(score: str) -> None:
    model = two_towers()
    model.text.weight.register_hook(lambda g: g / 0)
    with pytest.raises(ValueError, match=r"gradient of 'text.weight' at selection: expected finite"):
        select(model, batches(2), loss_fn, score=score, progress=False)


def test_batches_count_equally_and_may_be_a_generator() -> None:
    def generator() -> Iterator[Batch]:
        yield from batches(3)

    model = two_towers()
    assert select(model, generator(), loss_fn, k=50, progress=False) == select(
        model, batches(3), loss_fn, k=50, progress=False
    )


def test_parameters_the_loss_does_not_reach() -> None:
    model = two_towers()
    assert select(model, batches(1), loss_fn, k=2000, progress=False)["unused"].numel() == 0


def test_tied_weights_are_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(12, 6)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    model = Tied()
    tokens = torch.tensor([[1, 2, 3]])
    mask = select(model, [tokens], lambda m, x: m(x).square().mean(), k=10, progress=False)
    assert list(mask) == ["embedding.weight"]
    (gradient,) = torch.autograd.grad(model(tokens).square().mean(), [model.embedding.weight])
    assert mask["embedding.weight"].tolist() == largest([gradient], 10)[0].tolist()


def test_frozen_parameters_are_no_candidates() -> None:
    model = two_towers()
    model.visual.requires_grad_(False)
    mask = select(model, batches(1), loss_fn, density=0.1, progress=False)
    assert all(mask[name].numel() == 0 for name in mask if name.startswith("visual."))
    assert mask.k == round(0.1 * sum(p.numel() for p in model.parameters() if p.requires_grad))


def test_transposed_and_channels_last_parameters() -> None:
    """Indices are those of the logical tensor."""
    model = two_towers()
    plain = select(model, batches(1), loss_fn, k=60, progress=False)
    model = model.to(memory_format=torch.channels_last)
    model.text.weight = nn.Parameter(model.text.weight.detach().t().contiguous().t())
    assert not model.visual[0].weight.is_contiguous()
    mask = select(model, batches(1), loss_fn, k=60, progress=False)
    # the convolution runs another kernel on this layout, whose rounding may swap neighbours in rank
    assert mask.iou(plain) > 0.95
    assert chosen(mask) == expected_of(mean_gradients(model, batches(1)), 60)


def test_autocast_belongs_in_loss_fn() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    model = two_towers()
    assert select(model, batches(2), loss, k=40, progress=False).k == 40


# ---- what it leaves alone ----


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        name: (p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad)
        for name, p in model.named_parameters()
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        value, grad, grad_value, requires_grad = before[name]
        assert_same_bits(parameter.detach(), value, name)
        assert parameter.grad is grad, name
        if grad is not None:
            assert_same_bits(parameter.grad, grad_value, name)
        assert parameter.requires_grad is requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, dtype: torch.dtype) -> None:
    """Parameters, .grad and requires_grad; of candidates, of excluded and of frozen parameters; also after an error."""
    model = two_towers(dtype=dtype)
    model.norm.requires_grad_(False)
    model.text.weight.grad = torch.full_like(model.text.weight, 7.0)
    model.visual[0].bias.grad = torch.full_like(model.visual[0].bias, 7.0)  # excluded below
    before = snapshot(model)
    calls = []

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        calls.append(batch)
        if fails and len(calls) == 2:
            raise RuntimeError("no such image")
        return loss_fn(m, batch)

    def run() -> SparseMask:
        return select(model, batches(3, dtype=dtype), loss, k=20, exclude="visual.*", progress=False)

    if fails:
        with pytest.raises(RuntimeError, match="no such image"):
            run()
    else:
        mask = run()
        clean = two_towers(dtype=dtype)
        clean.norm.requires_grad_(False)
        assert mask == select(clean, batches(3, dtype=dtype), loss_fn, k=20, exclude="visual.*", progress=False)
    assert_untouched(model, before)


def test_excluded_parameters_hold_no_gradient_between_batches() -> None:
    """The memory it promises is one gradient per candidate."""
    seen = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.append({name for name, p in model.named_parameters() if p.grad is not None})
        return loss_fn(model, batch)

    select(two_towers(), batches(2), loss, k=20, include="text.*", progress=False)
    assert seen == [set(), {"text.weight", "text.bias"}]


def test_it_works_under_no_grad_and_keeps_the_mode() -> None:
    model = two_towers().eval()
    with torch.no_grad():
        mask = select(model, batches(1), loss_fn, k=20, progress=False)
        assert not torch.is_grad_enabled()
    assert mask.k == 20
    assert not model.training


# ---- what a person sees ----


@pytest.mark.parametrize("has_tqdm", [True, False])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress(
    is_terminal: bool, has_tqdm: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar on a terminal alone; elsewhere, or without tqdm, a line that says what begins; then what was selected."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    mask = select(two_towers(), iter(batches(2)), loss_fn, k=20)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("selecting: " in captured.err) is ("\r" in captured.err) is (is_terminal and has_tqdm)
    lines = captured.err.rpartition("\r")[2].splitlines()
    assert lines[:-1] == ([] if is_terminal and has_tqdm else ["select(): reads 2 batches"])
    assert lines[-1] == f"select(): {mask.summary().headline}"


@pytest.mark.parametrize("streaming", [False, True, "host", "blocks"])
def test_silence(streaming: Any, capsys: pytest.CaptureFixture[str]) -> None:
    select(two_towers(), batches(1), loss_fn, k=20, streaming=streaming, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("score", ["mean_grad", "weight"])
def test_what_was_selected_is_logged_once(
    score: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By select(), and not again by the optimizer that takes the mask; a mask of a file is said by that optimizer."""
    model = two_towers()
    data = (batches(1), loss_fn) if score == "mean_grad" else (None, None)
    with caplog.at_level("INFO", logger="saft_kernels"):
        mask = select(model, *data, score=score, k=20, progress=False)
        for _ in range(2):
            SparseAdamW(model.named_parameters(), mask=mask)
        assert [r.getMessage() for r in caplog.records] == [f"select(): {mask.summary().headline}"]
        mask.save(tmp_path / "mask.safetensors")
        SparseAdamW(model.named_parameters(), mask=SparseMask.load(tmp_path / "mask.safetensors"))
    assert [r.getMessage() for r in caplog.records][1:] == [f"SparseAdamW: {mask.summary().headline}"]
    assert capsys.readouterr().err == ""


def test_what_was_silent_is_said_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    model = two_towers()
    mask = select(model, batches(1), loss_fn, k=20, progress=False)
    with caplog.at_level("INFO", logger="saft_kernels"):
        SparseAdamW(model.named_parameters(), mask=mask)
    assert len(caplog.records) == 1


# ---- errors ----


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "density_zero": ({"density": 0}, "`density`: expected a number in (0, 1], got 0;"),
    "density_above": ({"density": 1.5}, "`density`: expected a number in (0, 1], got 1.5;"),
    "both": ({"density": 0.5, "k": 3}, "expected `density` or `k`, got both: density=0.5, k=3; drop one"),
    "k_zero": ({"k": 0}, "`k`: expected a positive int, got 0;"),
    "k_large": (
        {"k": 3000},
        "`k`: expected at most 2932, the number of elements of the candidate parameters, got 3000",
    ),
    "k_large_after_exclude": ({"k": 300, "include": "text.*"}, "`k`: expected at most 272"),
    "k_per_tensor": ({"k": 3, "scope": "tensor"}, "`k`: expected None with scope='tensor', got 3;"),
    "k_per_row": ({"k": 3, "scope": "row"}, "`k`: expected None with scope='row', got 3;"),
    "scope": ({"scope": "layer"}, "`scope`: expected one of global, tensor, row, got 'layer'"),
    "exclude": (
        {"exclude": "visaul.*"},
        "`exclude`: expected globs over parameter names, got 'visaul.*', which",
    ),
    "backend": ({"backend": "gpu"}, "`backend`: expected one of cuda, triton, cpu, reference, got 'gpu'"),
    "score": ({"score": "hessian"}, "`score`: expected one of mean_grad, mean_abs_grad, fisher,"),
    "no_candidates": ({"include": "text.*", "exclude": "*"}, "got none of 11;"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str) -> None:
    kwargs, message = BAD_ARGUMENTS[case]

    def never(model: nn.Module, batch: Batch) -> Tensor:
        raise AssertionError("arguments are checked before any work")

    with pytest.raises(ValueError, match="expected") as error:
        select(two_towers(), batches(1), never, progress=False, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def nan_gradient(model: nn.Module, batch: Batch) -> Tensor:
    return loss_fn(model, batch) + torch.nan * model.text.weight[2, 3]


BAD_LOSSES: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "vector": (lambda m, b: m(b[0], b[1]), TypeError, "expected a scalar tensor, got shape (6, 5); return the mean"),
    "float": (lambda m, b: 1.0, TypeError, "expected a scalar tensor, got float;"),
    "tuple": (lambda m, b: (loss_fn(m, b), 1), TypeError, "expected a scalar tensor, got tuple;"),
    "detached": (lambda m, b: loss_fn(m, b).detach(), ValueError, "got one without requires_grad; drop no_grad()"),
    "elsewhere": (
        lambda m, b: torch.ones((), requires_grad=True) * 2,
        ValueError,
        "expected a loss that depends on the candidate parameters, got no gradient but zeros for all 11",
    ),
    "constant": (lambda m, b: loss_fn(m, b) * 0.0, ValueError, "got no gradient but zeros for all 11"),
    "nan": (
        nan_gradient,
        ValueError,
        "gradient of 'text.weight' at selection: expected finite values, got 1 inf or NaN",
    ),
}


def test_a_backend_that_cannot_run_here_is_found_out_before_any_batch() -> None:
    def never(model: nn.Module, batch: Batch) -> Tensor:
        raise AssertionError("arguments are checked before any work")

    with pytest.raises(RuntimeError, match="`backend`: backend 'cuda' cannot run topk_magnitude here"):
        select(two_towers(), batches(1), never, progress=False, backend="cuda")


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses(case: str) -> None:
    loss, kind, message = BAD_LOSSES[case]
    model = two_towers()
    before = snapshot(model)
    with pytest.raises(kind) as error:
        select(model, batches(2), loss, k=20, progress=False)
    assert_message(error, [message])
    assert_untouched(model, before)


def test_no_batches() -> None:
    generator = iter(batches(2))
    select(two_towers(), generator, loss_fn, k=20, progress=False)
    for nothing in ([], generator):
        with pytest.raises(ValueError, match="`batches`") as error:
            select(two_towers(), nothing, loss_fn, k=20, progress=False)
        assert_message(error, ["at least one batch, got none", "empty after its first use"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_gradients(dtype: torch.dtype) -> None:
    embedding = nn.Embedding(10, 4, sparse=True, dtype=dtype)
    with pytest.raises(TypeError) as error:
        select(embedding, [torch.tensor([1, 3])], lambda m, x: m(x).sum(), k=3, progress=False)
    assert_message(error, ["gradient of 'weight'", "got layout torch.sparse_coo", "sparse=False"])
    assert embedding.weight.grad is None


def test_complex_parameters() -> None:
    model = two_towers()
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(TypeError) as error:
        select(model, batches(1), loss_fn, k=3, progress=False)
    assert_message(error, ["parameter 'phase'", "got complex64; exclude it"])
    mask = select(model, batches(1), loss_fn, k=3, exclude="phase", progress=False)
    assert mask.k == 3
    assert mask["phase"].numel() == 0


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="expected parameters with requires_grad") as error:
        select(nn.GELU(), [torch.ones(1)], lambda m, x: m(x).sum(), progress=False)
    assert_message(error, ["got none of 0"])


def test_two_runs_are_equal() -> None:
    model = two_towers()
    other = copy.deepcopy(model)
    assert select(model, batches(3), loss_fn, progress=False) == select(other, batches(3), loss_fn, progress=False)
