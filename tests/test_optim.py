"""SparseAdamW against torch.optim.AdamW: dense at density 1.0, masked below. Frozen elements are compared by bits."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import Backend, assert_message, assert_same_bits
from torch import nn
from training import (
    FP32_ROUNDINGS,
    batches,
    clones,
    dense_masks,
    first_steps,
    loss_fn,
    parameters,
    relative_error,
    set_gradients,
    states,
    step_masked_adamw,
    two_towers,
)

from saft_kernels import SparseAdamW, SparseMask, ops, select


@pytest.fixture
def step_backend(backend: Backend) -> Backend:
    """Each backend that can select and step."""
    for op in ("topk_magnitude", "prepare_sparse_adamw"):
        if (reason := ops.why_unavailable(backend.name, op, backend.device)) is not None:
            pytest.skip(f"{backend.id}: {reason}")
    return backend


VARIANTS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no_decay": {"weight_decay": 0.0},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
}


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Three groups, one of them empty, that differ in what they can."""
    return [
        {"params": params[:3], "lr": 3e-3, "weight_decay": 0.3},
        {"params": []},
        {"params": params[3:], "betas": (0.8, 0.95)},
    ]


def warm_up_and_cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [10])


# ---- density 1.0 is torch.optim.AdamW ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_density_one_is_adamw(step_backend: Backend, variant: str) -> None:
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, **VARIANTS[variant]}
    theirs, ours = parameters(), parameters(device=step_backend.device)
    expected = torch.optim.AdamW(groups_of(theirs), **kwargs)
    actual = SparseAdamW(groups_of(ours), density=1.0, backend=step_backend.name, **kwargs)
    schedules = [warm_up_and_cosine(expected), warm_up_and_cosine(actual)]
    with step_backend.forced():
        for step in range(100):
            for params, optimizer, schedule in zip((theirs, ours), (expected, actual), schedules, strict=True):
                set_gradients(params, step)
                optimizer.step()
                schedule.step()
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS
    for (i, state), (j, reference) in zip(states(actual), states(expected), strict=True):
        assert i == j
        assert state.keys() == reference.keys()
        for key, value in reference.items():
            assert state[key].dtype == value.dtype
            assert state[key].shape == value.shape
            assert state[key].stride() == value.stride()
            assert relative_error(state[key], value) <= FP32_ROUNDINGS


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_layouts(density: float, dtype: torch.dtype) -> None:
    """16-bit parameters follow AdamW on fp32 copies, rounded once: the masters are those copies."""
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-13 if dtype == torch.float64 else FP32_ROUNDINGS
    ours = parameters(dtype=dtype)
    theirs = [nn.Parameter(p.detach().to(opmath)) for p in ours]
    expected = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    actual = SparseAdamW(ours, lr=1e-2, weight_decay=0.1, density=density)
    strides = [p.stride() for p in ours]
    for step in range(20):
        set_gradients(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.to(opmath)
        actual.step()
        step_masked_adamw(expected, dense_masks(actual))
    masks = dense_masks(actual)
    assert [p.stride() for p in ours] == strides
    for i, state in states(actual):
        assert all(state[key].dtype == opmath for key in state.keys() - {"step", "indices"})
        parameter, reference = ours[i], theirs[i].detach()
        if dtype.itemsize == 2:
            selected = reference[masks[i]] if density < 1 else reference
            assert relative_error(state["master"], selected) <= FP32_ROUNDINGS
            rounded = torch.where(masks[i], reference, parameter.detach().to(opmath)).to(dtype)
            # equal, but where the two lie on either side of a rounding border: then neighbours
            assert relative_error(parameter, rounded) <= torch.finfo(dtype).eps
        else:
            assert relative_error(parameter, reference) <= tolerance


# ---- density below 1 ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_is_masked_adamw(step_backend: Backend, variant: str) -> None:
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, **VARIANTS[variant]}
    theirs, ours = parameters(), parameters(device=step_backend.device)
    before = clones(theirs)
    expected = torch.optim.AdamW(groups_of(theirs), **kwargs)
    actual = SparseAdamW(groups_of(ours), density=0.1, backend=step_backend.name, **kwargs)
    schedules = [warm_up_and_cosine(expected), warm_up_and_cosine(actual)]
    with step_backend.forced():
        for step in range(100):
            set_gradients(theirs, step)
            set_gradients(ours, step)
            actual.step()
            step_masked_adamw(expected, dense_masks(actual))
            for schedule in schedules:
                schedule.step()
    masks = dense_masks(actual)
    assert sum(int(mask.sum()) for mask in masks) == round(0.1 * sum(p.numel() for p in ours))
    for a, b, mask, old in zip(ours, theirs, masks, before, strict=True):
        assert relative_error(a, b) <= FP32_ROUNDINGS
        now = a.detach().cpu()
        assert_same_bits(now[~mask], old[~mask])
        assert not torch.any(now[mask] == old[mask])
    for i, state in states(actual):
        selected = masks[i]
        reference = expected.state[theirs[i]]
        assert int(state["step"]) == 100
        assert state["indices"].dtype == torch.int32
        for key in state.keys() - {"step", "indices"}:
            assert state[key].shape == (int(selected.sum()),)
            if selected.any():
                assert relative_error(state[key], reference[key][selected]) <= FP32_ROUNDINGS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frozen_elements_keep_their_bits(step_backend: Backend, dtype: torch.dtype) -> None:
    """Whatever weight decay, NaN or inf stands in the gradients of frozen elements, and -0 or NaN in them."""
    params = parameters(dtype=dtype, device=step_backend.device)
    set_gradients(params, 0)
    optimizer = SparseAdamW(params, lr=0.1, weight_decay=10.0, density=0.1, backend=step_backend.name)
    with step_backend.forced():
        optimizer.step()
        masks = [mask.to(step_backend.device) for mask in dense_masks(optimizer)]
        with torch.no_grad():
            for parameter, mask in zip(params, masks, strict=True):
                odd = torch.tensor([-0.0, math.nan, math.inf, 5.0]).to(step_backend.device, dtype)
                frozen = int((~mask).sum())
                parameter[~mask] = odd.repeat(frozen // 4 + 1)[:frozen]
        before = clones(params)
        pointers = [p.data_ptr() for p in params]
        for step in range(3):
            set_gradients(params, step + 1)
            for parameter, mask in zip(params, masks, strict=True):
                parameter.grad[~mask] = math.nan if step % 2 else -math.inf
            gradients = [p.grad for p in params]
            copies = clones(gradients)
            optimizer.step()
            for parameter, gradient, copied in zip(params, gradients, copies, strict=True):
                assert parameter.grad is gradient
                assert_same_bits(gradient, copied)
    assert [p.data_ptr() for p in params] == pointers
    for parameter, mask, old in zip(params, masks, before, strict=True):
        assert_same_bits(parameter.detach()[~mask], old[~mask])
        assert bool(parameter.detach()[mask].isfinite().all())
        assert not torch.any(parameter.detach()[mask] == old[mask])


def test_two_runs_are_bit_equal() -> None:
    runs = []
    for _ in range(2):
        params = parameters()
        first_steps(params, SparseAdamW(params, lr=1e-2, density=0.3), 10)
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a.detach(), b.detach())


# ---- masters ----


def test_masters_keep_what_bf16_would_lose() -> None:
    """Steps of 1e-4 on values of 1: below half a bf16 spacing (2^-8), so each alone rounds away."""
    plain = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    ours = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    expected = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    actual = SparseAdamW([ours], lr=1e-4, weight_decay=0.0, density=0.5)
    for _ in range(100):
        for parameter, optimizer in ((plain, expected), (ours, actual)):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert bool((plain == 1).all())
    # 100 steps of lr * 1 = 1e-2, and bf16 rounds to a multiple of 2^-8 below 1
    assert actual.state[ours]["master"].tolist() == pytest.approx([1 - 1e-2] * 32, rel=1e-5)
    assert ours.detach()[:32].tolist() == [float(torch.tensor(1 - 1e-2).bfloat16())] * 32
    assert bool((ours.detach()[32:] == 1).all())


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_edits_of_the_parameter_win_over_the_master(density: float) -> None:
    """open_clip clamps logit_scale after each step."""
    parameter = nn.Parameter(torch.full((8,), 4.0, dtype=torch.bfloat16))
    optimizer = SparseAdamW([parameter], lr=1e-2, weight_decay=0.0, density=density)
    for _ in range(5):
        parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
        with torch.no_grad():
            parameter.clamp_(max=4.0)
    parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        parameter[0] = 1.0
    optimizer.step()
    master = optimizer.state[parameter]["master"].flatten()
    # both start this step from the parameter, not from where the master was
    assert float(master[0]) == pytest.approx(1.0, abs=1e-2)
    assert float(master[0]) != 1.0
    assert bool((master[1:] <= 4.02).all())


# ---- sizes and errors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_size(dtype: torch.dtype, amsgrad: bool) -> None:
    """16 B per selected element (20 B with masters) and 64 KB for 300 tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(128, 128), (128,), (512,)] * 100
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    optimizer = SparseAdamW(params, density=0.01, amsgrad=amsgrad)
    optimizer.step()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, state in states(optimizer)
        for tensor in state.values()
    }
    k = optimizer.mask.k
    assert k == round(0.01 * sum(p.numel() for p in params))
    per_element = 16 + 4 * (dtype == torch.bfloat16)
    assert sum(storages.values()) <= per_element * k + 64 * 1024
    file = io.BytesIO()
    torch.save(optimizer.state_dict()["state"], file)
    values = sum(t.numel() * t.itemsize for _, state in states(optimizer) for t in state.values())
    # pickled names and views: under 2 KB per tensor
    assert file.tell() <= values + 2048 * len(params)


BAD_ARGUMENTS = {
    "empty": (lambda p: ([], {}), ValueError, "empty parameter list"),
    "density_zero": (lambda p: (p, {"density": 0.0}), ValueError, "`density`: expected a number in (0, 1], got 0.0;"),
    "density_two": (lambda p: (p, {"density": 2}), ValueError, "`density`: expected a number in (0, 1], got 2;"),
    "density_nan": (lambda p: (p, {"density": math.nan}), ValueError, "got nan;"),
    "density_text": (lambda p: (p, {"density": "0.1"}), ValueError, "got '0.1';"),
    "both": (lambda p: (p, {"density": 0.5, "k": 3}), ValueError, "expected `density` or `k`, got both"),
    "k_zero": (lambda p: (p, {"k": 0}), ValueError, "`k`: expected a positive int, got 0;"),
    "k_float": (lambda p: (p, {"k": 3.0}), ValueError, "`k`: expected a positive int, got 3.0;"),
    "k_large": (lambda p: (p, {"k": 10_000}), ValueError, "`k`: expected at most 374, the number of elements"),
    "scope": (
        lambda p: (p, {"scope": "layer"}),
        ValueError,
        "`scope`: expected one of global, tensor, row, got 'layer'",
    ),
    "k_per_tensor": (lambda p: (p, {"scope": "tensor", "k": 3}), ValueError, "`k`: expected None with scope='tensor'"),
    "selection_steps": (
        lambda p: (p, {"selection_steps": 0}),
        ValueError,
        "`selection_steps`: expected a positive int",
    ),
    "differentiable": (lambda p: (p, {"differentiable": True}), ValueError, "`differentiable`: expected False"),
    "group_differentiable": (lambda p: ([{"params": p, "differentiable": True}], {}), ValueError, "`differentiable`"),
    "group_both": (
        lambda p: ([{"params": p, "density": 0.5, "k": 3}], {}),
        ValueError,
        "param_groups[0]: expected 'density' or 'k', got both: 0.5 and 3; drop one",
    ),
    "group_scope": (
        lambda p: ([{"params": p, "scope": "row"}], {}),
        ValueError,
        "param_groups[0]: expected 'density' or 'k' as its own, got 'scope', which holds for all groups; pass it",
    ),
    "group_k": (
        lambda p: ([{"params": p[:1]}, {"params": p[1:2], "k": 99}], {}),
        ValueError,
        "`k`: expected at most 16, the number of elements of param_groups[1], got 99",
    ),
    "module": (lambda p: (nn.Linear(2, 2), {}), TypeError, "`params`: expected parameters, got Linear; pass its named"),
    "mask_type": (lambda p: (p, {"mask": {"a": torch.ones(3)}}), TypeError, "`mask`: expected a SparseMask, got dict;"),
    "backend": (
        lambda p: (p, {"backend": "gpu"}),
        ValueError,
        "`backend`: expected one of cuda, triton, cpu, reference, got 'gpu'",
    ),
    "lr": (lambda p: (p, {"lr": -1.0}), ValueError, "Invalid learning rate: -1.0"),
    "complex": (
        lambda p: ([nn.Parameter(torch.ones(2, dtype=torch.complex64))], {}),
        TypeError,
        "param_groups[0]['params'][0]: expected float32, bfloat16, float16 or float64, got complex64;",
    ),
    "sparse_parameter": (
        lambda p: ([torch.eye(3).to_sparse().requires_grad_()], {}),
        TypeError,
        "param_groups[0]['params'][0]: expected a strided parameter, got torch.sparse_coo",
    ),
}


def test_tensor_hyperparameters_with_foreach_take_capturable() -> None:
    """As in torch.optim.AdamW."""
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    for kind in (torch.optim.AdamW, SparseAdamW):
        kind(parameters(), lr=torch.tensor(1e-3), betas=betas, foreach=True, capturable=True)
        for kwargs in ({"lr": torch.tensor(1e-3)}, {"betas": betas}):
            with pytest.raises(ValueError, match="as a Tensor is not supported for capturable=False and foreach=True"):
                kind(parameters(), foreach=True, **kwargs)


def test_a_list_of_parameters_is_no_model() -> None:
    """As in torch.optim.AdamW, though it is a module."""
    listed = nn.ParameterList([torch.ones(3)])
    assert SparseAdamW(listed, density=1.0).param_groups[0]["params"] == list(listed)


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str) -> None:
    arguments, kind, message = BAD_ARGUMENTS[case]
    params, kwargs = arguments(parameters())
    with pytest.raises(kind) as error:
        SparseAdamW(params, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def mask_of(model: nn.Module, k: int = 20) -> SparseMask:
    return select(model, batches(1), loss_fn, k=k, progress=False)


def test_bad_masks() -> None:
    model = two_towers()
    named = list(model.named_parameters())
    mask = mask_of(model)
    with pytest.raises(ValueError, match=r"'param\.0', 'param\.1', 'param\.2' and 8 more not in the mask") as error:
        SparseAdamW(model.parameters(), mask=mask)
    assert_message(error, ["`mask`", "pass model.named_parameters()"])
    with pytest.raises(ValueError, match=r"not in the model; pass model\.named_parameters\(\)"):
        SparseAdamW([(name, p) for name, p in named if name != "text.weight"], mask=mask)
    wider = type(model)(width=24)
    with pytest.raises(ValueError, match=r"`mask`: expected shape \(24, 3, 4, 4\) for 'visual\.0\.weight'"):
        SparseAdamW(wider.named_parameters(), mask=mask)
    with pytest.raises(ValueError, match=r"expected `mask` alone, got density=0\.5") as error:
        SparseAdamW(named, mask=mask, density=0.5)
    assert_message(error, ["the mask selects 20"])
    with pytest.raises(ValueError, match="expected groups without a density or k of their own"):
        SparseAdamW([{"params": named, "density": 1.0}], mask=mask)
    empty = SparseMask.from_dense({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in named})
    with pytest.raises(ValueError, match="`mask`: expected selected elements, got none"):
        SparseAdamW(named, mask=empty)


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("backend_name", ["reference", None])
def test_sparse_gradients(when: str, backend_name: str | None) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SparseAdamW(embedding.named_parameters(), density=0.5, backend=backend_name)
    if when == "later":
        embedding.weight.grad = torch.rand(10, 4)
        optimizer.step()
    embedding.zero_grad()
    embedding(torch.tensor([1, 3])).sum().backward()
    before = clones([embedding.weight])[0]
    with pytest.raises(TypeError, match=r"gradient of 'weight': expected a dense tensor, got layout") as error:
        optimizer.step()
    assert_message(error, ["build the embedding with sparse=False"])
    assert_same_bits(embedding.weight.detach(), before)
    assert {float(state["step"]) for _, state in states(optimizer)} == ({1.0} if when == "later" else set())


def test_too_few_gradients_for_the_budget() -> None:
    params = parameters()
    optimizer = SparseAdamW(params, k=300)
    set_gradients(params[:2], 0)
    with pytest.raises(ValueError, match=r"selection of 300 elements: .* got 160; run backward over the whole model"):
        optimizer.step()
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.mask.k == 300


def test_arguments_are_those_of_adamw() -> None:
    """The positional arguments, and their defaults, are those of torch.optim.AdamW."""
    parameter = nn.Parameter(torch.ones(3))
    theirs, ours = torch.optim.AdamW([parameter]), SparseAdamW([parameter])
    assert {key: ours.defaults[key] for key in theirs.defaults} == theirs.defaults
    positional = SparseAdamW([parameter], 1e-2, (0.5, 0.6), 1e-3, 0.2, True)
    expected = {"lr": 1e-2, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True}
    assert {key: positional.param_groups[0][key] for key in expected} == expected
    assert "SparseAdamW" in repr(ours)


@pytest.mark.parametrize("way", ["first_step", "mask", "reselect"])
def test_says_what_it_selected(way: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    named = [("body", nn.Parameter(torch.randn(90))), ("head", nn.Parameter(torch.randn(10)))]
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    named[0][1].grad[:1], named[1][1].grad[:3] = 1, 1
    optimizer = SparseAdamW(named, density=0.04)
    optimizer.step()
    with caplog.at_level("INFO", logger="saft_kernels"):
        if way == "first_step":
            optimizer = SparseAdamW(named, density=0.04)
        if way == "mask":
            optimizer = SparseAdamW(named, mask=optimizer.mask)
        if way == "reselect":
            optimizer.reselect()
        for _ in range(3):
            optimizer.step()
    assert [record.getMessage() for record in caplog.records] == [
        "SparseAdamW: selected 4 of 100 elements (4 %), in 2 of 2 tensors; most in head (75 %), body (25 %)"
    ]


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("", True),
        ("logging.getLogger().setLevel(logging.INFO)", True),  # nobody handles it: Python shows warnings alone
        ("logging.basicConfig(level=logging.INFO)", True),
        ("logging.disable(logging.INFO)", False),
        ("logging.getLogger('saft_kernels').setLevel(logging.WARNING)", False),
    ],
)
def test_where_lines_go(setup: str, shown: bool) -> None:
    script = f"import logging; {setup}\nfrom saft_kernels.common.log import say\nsay('a line', show=True)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr.count("a line") == shown


def test_repr_has_the_budget_in_force() -> None:
    a, b = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(100))
    default = repr(SparseAdamW([a]))
    assert "    density: 0.001\n" in default
    assert "    k: None\n" in default
    of_k, mask = repr(SparseAdamW([a], k=7)), SparseMask({"a": torch.arange(3)}, {"a": a.shape})
    assert "    density: 0.07\n" in of_k
    assert "    k: 7\n" in of_k
    masked = SparseAdamW([("a", a)], mask=mask)
    assert "    density: 0.03\n" in repr(masked)
    # what open_clip logs
    for optimizer, density, k in ((SparseAdamW([a]), 1e-3, None), (SparseAdamW([a], k=7), None, 7), (masked, 0.03, 3)):
        assert (optimizer.defaults["density"], optimizer.defaults["k"]) == (density, k)
        assert optimizer.param_groups[0]["density"] is optimizer.param_groups[0]["k"] is None
    groups = repr(SparseAdamW([{"params": [a]}, {"params": [b], "density": 1.0}], density=0.5))
    assert groups.index("density: 0.5") < groups.index("density: 1.0")
