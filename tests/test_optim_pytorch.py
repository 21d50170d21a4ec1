"""SparseAdamW at density 1.0 on what PyTorch tests its own AdamW with: its OptimizerInfo."""

from __future__ import annotations

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
