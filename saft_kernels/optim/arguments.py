"""What SparseAdamW is given: hyperparameters, groups, a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.names import short
from ..mask import SparseMask
from ..ops.dtypes import FLOAT_DTYPES
from ..selection.budget import DEFAULT_DENSITY, budget, check_budget
from .members import ParamGroups

COMPLEX_DTYPES = (torch.complex64, torch.complex128)


def check_hyperparameters(group: dict[str, Any]) -> None:
    """The checks of torch.optim.AdamW, in its words; and what SparseAdamW does not support."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if group["foreach"] and not group["capturable"]:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True; leave `foreach` unset"
            )
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}; one group has one lr")
    kinds = {Tensor if isinstance(beta, Tensor) else type(beta) for beta in betas}
    if kinds not in ({float}, {Tensor}):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor) and group["foreach"] and not group["capturable"]:
            raise ValueError(
                f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True; leave `foreach` unset"
            )
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element, got shape {tuple(beta.shape)}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}; expected [0, 1)")
    for name, value in (("learning rate", lr), ("epsilon", group["eps"]), ("weight_decay", group["weight_decay"])):
        if not 0.0 <= value:
            what = name if name == "learning rate" else f"{name} value"
            raise ValueError(f"Invalid {what}: {value}; expected 0 or more")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together; drop one")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`; drop one")


def check_group(where: str, group: dict[str, Any], is_dense: bool) -> None:
    """The parameters and the budget of a group; numbers become plain ones. `is_dense`: it is torch.optim.AdamW's."""
    check_hyperparameters(group)
    if group["differentiable"] and not is_dense:
        raise ValueError(
            f"`differentiable`: expected False, got {group['differentiable']!r}; SparseAdamW supports it with "
            "density=1.0 alone"
        )
    if own := [key for key in ("scope", "selection_steps", "mask", "release_grads") if key in group]:
        raise ValueError(
            f"{where}: expected 'density' or 'k' as its own, got {own[0]!r}, which holds for all groups; pass it "
            "to SparseAdamW"
        )
    if len(set(group["params"])) < len(group["params"]) and not is_dense:  # else torch has warned
        raise ValueError(
            f"{where}['params']: expected distinct parameters, got one twice; it would be updated twice in a step"
        )
    for i, parameter in enumerate(group["params"]):
        if parameter.dtype not in FLOAT_DTYPES and not (is_dense and parameter.dtype in COMPLEX_DTYPES):
            remedy = (
                "give it to another optimizer, or to a group with density=1.0"
                if parameter.is_complex()
                else "freeze it or cast it"
            )
            raise TypeError(
                f"{where}['params'][{i}]: expected float32, bfloat16, float16 or float64, got "
                f"{short(parameter.dtype)}; {remedy}"
            )
        if group["differentiable"] and parameter.itemsize == 2:
            raise TypeError(
                f"{where}['params'][{i}]: expected float32 or float64 with differentiable=True, got "
                f"{short(parameter.dtype)}; cast it"
            )
        if parameter.layout != torch.strided:
            raise TypeError(
                f"{where}['params'][{i}]: expected a strided parameter, got {parameter.layout}; call .to_dense()"
            )
    density, k = group["density"], group["k"]
    if density is not None and k is not None:
        raise ValueError(f"{where}: expected 'density' or 'k', got both: {density!r} and {k!r}; drop one")
    if density is not None or k is not None:
        check_budget(density, k)
        budget(density, k, sum(p.numel() for p in group["params"]), where)
        # numpy's numbers do not pass torch.load(weights_only=True)
        group["density"], group["k"] = density and float(density), k and int(k)


def check_fused(param_groups: ParamGroups) -> None:
    """Raises RuntimeError for gradients without memory in a group that torch.optim.AdamW would not step either."""
    for i, group in enumerate(param_groups):
        for j, parameter in enumerate(group["params"] if group["fused"] else ()):
            if parameter.is_meta and parameter.grad is not None:
                raise RuntimeError(
                    "`fused=True` requires all the params to be floating point Tensors of devices with memory, got "
                    f"param_groups[{i}]['params'][{j}] on meta; call model.to_empty(device=...) first"
                )


def check_mask_alone(mask: SparseMask, density: float, k: int | None, scope: str) -> None:
    """A mask is a budget: there is no other beside it."""
    if not isinstance(mask, SparseMask):
        raise TypeError(
            f"`mask`: expected a SparseMask, got {type(mask).__name__}; SparseMask.load reads a file, "
            "SparseMask.from_dense takes bool tensors"
        )
    if density != DEFAULT_DENSITY or k is not None or scope != "global":
        raise ValueError(
            f"expected `mask` alone, got density={density!r}, k={k!r}, scope={scope!r} beside it; drop them: the mask "
            f"selects {mask.k}"
        )
    if not mask.k:
        raise ValueError("`mask`: expected selected elements, got none; nothing would be trained")
