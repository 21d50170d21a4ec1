"""SparseAdamW at density 1.0 on what PyTorch tests its own AdamW with: its OptimizerInfo."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from training import FP32_ROUNDINGS, relative_error

from saft_kernels import SparseAdamW

common_optimizers = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="PyTorch's own tests need expecttest"
)
# importing it froze the global flags of torch.backends for every other test of this process
torch.backends.__allow_nonbracketed_mutation_flag = True
hypothesis.settings.load_profile("saft")  # it loaded a profile of its own

INFO = next(info for info in common_optimizers.optim_db if info.optim_cls is torch.optim.AdamW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", INFO.optim_inputs_func(device="cpu", dtype=torch.float32), ids=lambda case: case.desc)
def test_pytorch_optimizer_inputs(case: Any, dtype: torch.dtype) -> None:
    """The model and the loop of PyTorch's TestOptimRenewed, on its inputs for AdamW."""
    losses, weights = [], []
    for build in (torch.optim.AdamW, lambda params, **kwargs: SparseAdamW(params, density=1.0, **kwargs)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
        inputs = torch.randn(8, 4, dtype=dtype)
        optimizer = build(model.parameters(), **case.kwargs)

        def closure(model: nn.Module = model, inputs: Tensor = inputs, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            return loss

        losses.append([float(optimizer.step(closure).detach()) for _ in range(20)])
        weights.append(list(model.parameters()))
    assert losses[0] == pytest.approx(losses[1], rel=FP32_ROUNDINGS)
    for a, b in zip(*weights, strict=True):
        # gradients follow the weights here: a rounding grows a little from step to step
        assert relative_error(a, b) <= (10 * FP32_ROUNDINGS if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(
    "case",
    INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32),
    ids=lambda case: case.optimizer_error_input.desc,
)
def test_pytorch_error_inputs(case: Any) -> None:
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    if params is None:
        params = [nn.Parameter(torch.ones(1))]
    if issubclass(case.error_type, Warning):
        # the duplicate that AdamW warns of, and updates twice, is an error here
        with pytest.warns(case.error_type, match=case.error_regex), pytest.raises(ValueError, match="one twice"):
            SparseAdamW(params, **kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            SparseAdamW(params, **kwargs)


# ---- what torch's functional steps ----

FLAGGED = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)


def twins(parameters: list[Tensor], **kwargs: Any) -> list[tuple[list[Tensor], torch.optim.Optimizer]]:
    """The same parameters under torch.optim.AdamW and under SparseAdamW."""
    others: list[Tensor] = []
    for i, parameter in enumerate(parameters):  # what stands there twice does so in the copy
        first = next(j for j, earlier in enumerate(parameters) if earlier is parameter)
        others.append(others[first] if first < i else parameter.detach().clone().requires_grad_())
    return [
        (parameters, torch.optim.AdamW(parameters, **kwargs)),
        (others, SparseAdamW(others, density=1.0, **kwargs)),
    ]


def step_alike(pair: list[tuple[list[Tensor], torch.optim.Optimizer]], steps: int) -> None:
    """Equal gradients and steps; asserts equal parameters and state after each, to roundings of values near 1."""
    (ours, sparse), (theirs, dense) = pair[1], pair[0]
    for _ in range(steps):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a.detach())
            b.grad = a.grad.clone()
        dense.step()
        sparse.step()
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(b, a, rtol=FP32_ROUNDINGS, atol=FP32_ROUNDINGS)
            assert list(sparse.state[b]) == list(dense.state[a])
            for key, value in dense.state[a].items():
                torch.testing.assert_close(sparse.state[b][key], value, rtol=FP32_ROUNDINGS, atol=FP32_ROUNDINGS)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "case",
    [c for c in FLAGGED if not (c.kwargs.get("differentiable") or c.kwargs.get("fused"))],
    ids=lambda case: case.desc,
)
def test_complex_parameters_beside_real_ones(case: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(10, 5, dtype=dtype), torch.randn(4, 3, dtype=dtype).t(), torch.randn(6, 2)]
    pair = twins([nn.Parameter(p) for p in parameters], **case.kwargs)
    step_alike(pair, 3)
    for (_, source), (_, target) in (pair, pair[::-1]):  # a state goes both ways
        target.load_state_dict(deepcopy(source.state_dict()))  # torch shares what it loads
    step_alike(pair, 3)


@pytest.mark.parametrize("case", FLAGGED, ids=lambda case: f"{case.desc}{case.kwargs}")
def test_every_flag_saves_and_resumes(case: Any) -> None:
    torch.manual_seed(0)
    pair = twins([nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3))], **case.kwargs)
    if case.kwargs.get("differentiable"):  # autograd forbids a step on a leaf
        for parameters, optimizer in pair:
            optimizer.param_groups[0]["params"][:] = parameters[:] = [p.clone() for p in parameters]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        step_alike(pair, 2)
        theirs, ours = (optimizer.state_dict()["param_groups"][0] for _, optimizer in pair)
        assert {key: ours[key] for key in theirs} == theirs
        ours = pair[1][1]
        ours.load_state_dict(ours.state_dict())
        repr(ours)
        step_alike(pair, 2)


def test_duplicate_parameters_step_twice_at_density_1() -> None:
    torch.manual_seed(0)
    parameter, other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    with pytest.warns(UserWarning, match="with duplicate parameters") as warned:
        pair = twins([parameter, other, parameter])
    assert len(warned) == 2  # torch's, once for each
    step_alike(pair, 3)
    assert float(pair[1][1].state[pair[1][0][0]]["step"]) == 6
    pair[1][1].load_state_dict(pair[1][1].state_dict())
    step_alike(pair, 3)


def test_meta_parameters() -> None:
    for fused in (None, True):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        optimizer = SparseAdamW(model.parameters(), density=1.0, fused=fused, backend="reference")
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        if fused:
            with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.to_empty(device="cpu")
        optimizer.step()  # without gradients: none


DIFFERENTIABLE: dict[str, dict[str, Any]] = {
    "lr": {"lr": torch.tensor(1e-3)},
    "weight_decay": {"weight_decay": torch.tensor(0.9)},
    "betas": {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    "amsgrad": {"lr": 0.9, "amsgrad": True},
    "maximize": {"lr": 0.9, "weight_decay": 0.1, "maximize": True},
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_through_a_step(name: str) -> None:
    """Of the parameter, the gradient, the state and the hyperparameters that are tensors, by finite differences."""
    kwargs = DIFFERENTIABLE[name]
    torch.manual_seed(0)
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * kwargs.get("amsgrad", False)
    tensors = [torch.rand(6, dtype=torch.float64, requires_grad=True) for _ in range(2 + len(names))]
    is_pair = isinstance(kwargs.get(name), tuple)
    scalars = kwargs[name] if is_pair else [kwargs[name]] if isinstance(kwargs.get(name), Tensor) else []
    scalars = [scalar.double().requires_grad_() for scalar in scalars]

    def step(build: Any, parameter: Tensor, gradient: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, hypers = rest[: len(names)], [scalar.clone() for scalar in rest[len(names) :]]
        given = {**kwargs, **({name: tuple(hypers) if is_pair else hypers[0]} if hypers else {})}
        parameter = parameter.clone()
        parameter.retain_grad()
        parameter.grad = gradient
        optimizer = build([parameter], differentiable=True, **given)
        optimizer.state[parameter].update({"step": torch.tensor(10.0)})
        optimizer.state[parameter].update({key: value.clone() for key, value in zip(names, state, strict=True)})
        optimizer.step()
        return parameter, *(optimizer.state[parameter][key] for key in names)

    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        return step(lambda params, **given: SparseAdamW(params, density=1.0, **given), *tensors)

    assert torch.autograd.gradcheck(ours, (*tensors, *scalars))
    for a, b in zip(ours(*tensors, *scalars), step(torch.optim.AdamW, *tensors, *scalars), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_gradients_through_several_steps_from_none() -> None:
    """The state that the first step makes is part of the graph: of the learning rate, as hypergradients need it."""
    found = []
    for build in (torch.optim.AdamW, lambda params, **kwargs: SparseAdamW(params, density=1.0, **kwargs)):
        torch.manual_seed(0)
        lr = torch.tensor(0.1, requires_grad=True)
        start = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
        parameters = [p.clone() for p in start]
        optimizer = build(parameters, lr=lr, differentiable=True)
        for _ in range(3):
            gradients = torch.autograd.grad(
                sum(p.clone().pow(4).sum() for p in parameters), parameters, create_graph=True
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.retain_grad()
                parameter.grad = gradient
            optimizer.step()
        found.append(torch.autograd.grad(sum(p.square().sum() for p in parameters), [lr, *start]))
    for a, b in zip(*found, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(b, a, rtol=FP32_ROUNDINGS, atol=0)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "differentiable": ({"differentiable": True}, ValueError, "density=1.0 alone"),
    "differentiable_half": ({"differentiable": True, "density": 1.0}, TypeError, "got bfloat16; cast it"),
    "differentiable_fused": (
        {"differentiable": True, "density": 1.0, "fused": True},
        RuntimeError,
        "`fused` does not support `differentiable`",
    ),
    "complex": ({}, TypeError, "a group with density=1.0"),
    "complex_half": ({"density": 1.0}, TypeError, "got complex32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_torchs_alone_is_refused(name: str) -> None:
    kwargs, error, message = REFUSED[name]
    dtype = {"differentiable_half": torch.bfloat16, "complex": torch.complex64, "complex_half": torch.complex32}
    with pytest.raises(error, match=message):
        SparseAdamW([nn.Parameter(torch.zeros(3, dtype=dtype.get(name, torch.float32)))], **kwargs)


def test_a_dense_group_of_a_sparse_optimizer_is_torchs() -> None:
    torch.manual_seed(0)
    phase, weight = nn.Parameter(torch.randn(3, dtype=torch.complex64)), nn.Parameter(torch.randn(100))
    alone = nn.Parameter(phase.detach().clone())
    optimizer = SparseAdamW([{"params": [phase], "density": 1.0}, {"params": [weight]}], density=0.1)
    dense = torch.optim.AdamW([alone])
    before = weight.detach().clone()
    for _ in range(3):
        phase.grad, weight.grad = torch.randn_like(phase), torch.randn_like(weight)
        alone.grad = phase.grad.clone()
        optimizer.step()
        dense.step()
    assert torch.equal(phase, alone)
    assert int((weight != before).sum()) == 10
