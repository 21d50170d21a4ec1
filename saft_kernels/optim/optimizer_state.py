"""`OptimizerState`: what torch.distributed.checkpoint saves and loads of a SparseAdamW, in sizes that k tells."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..common.names import plain_names
from ..selection.budget import budget, budget_of
from ..selection.parts import as_distributed, is_distributed, local
from .sparse_adamw import SparseAdamW
from .state import MOMENTS, new_states

_OF_THE_OPTIMIZER = ("params", "param_names", "param_shapes")
"""Of a group: what is not loaded."""


class OptimizerState:
    """A SparseAdamW for torch.distributed.checkpoint: `dcp.save({"optimizer": OptimizerState(model, optimizer)})`.

    torch.distributed.checkpoint loads into tensors that are there, of the sizes that it will load, and a SparseAdamW
    that selects by itself does not know those of each parameter before its first step. Here they lie one after the
    other, k in all. It resumes before the first step too, and on another number of ranks than saved.

    The parameters of a budget of all elements (`density=1.0`) keep tensors of their own, DTensors where they are.

    Args:
        model: Names the parameters, whatever wraps it.
        optimizer: Of parameters of the model.

    Raises:
        ValueError: A parameter that the model does not have; saving while `selection_steps` adds up gradients; loading
            the state of other parameters. Of another budget, torch.distributed.checkpoint's error for other sizes: of
            `packed`, k elements in all. Nothing is loaded then.
    """

    def __init__(self, model: nn.Module, optimizer: SparseAdamW) -> None:
        self._optimizer = optimizer
        by_name: dict[str, Tensor] = dict(model.named_parameters())
        names = {by_name[name]: plain for plain, name in plain_names(by_name).items()}
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter not in names:
                    raise ValueError(
                        f"`model`: expected all parameters of the optimizer, got none that is param_groups[{i}]"
                        f"['params'][{j}], of shape {tuple(parameter.shape)}; pass the model that it was built for"
                    )
        self._names = names

    def state_dict(self) -> dict[str, Any]:
        """Tensors and hyperparameters; where parameters are split over ranks, all ranks call it."""
        saved = self._optimizer.state_dict()
        if any("grad_sum" in state for state in saved["state"].values()):
            raise ValueError(
                "OptimizerState: expected a selection, or none begun, got one amid selection_steps; save after it"
            )
        packed: dict[str, list[Tensor]] = {key: [] for key in self._keys()}
        whole: dict[str, dict[str, Tensor]] = {}
        lengths: list[int] = []
        steps: list[float] = []
        for key, parameter, group, is_dense in self._rows(saved):
            state = saved["state"].get(key, {})
            steps.append(float(state.get("step", 0.0)))
            lengths.append(-1 if is_dense or "exp_avg" not in state else state["exp_avg"].numel())
            if is_dense and (state or parameter.requires_grad):
                whole[self._names[parameter]] = {
                    k: v for k, v in (state or _fresh(parameter, group)).items() if k in MOMENTS
                }
            elif lengths[-1] >= 0:
                values = {k: _full(v).flatten() for k, v in state.items() if k in packed}
                zeros = torch.zeros_like(values["exp_avg"])
                values.setdefault("indices", torch.arange(len(zeros), device=zeros.device))
                for k, parts in packed.items():
                    parts.append(values.get(k, zeros))
        return {
            "names": self._groups_and_names(),
            "lengths": lengths,  # no tensors, whose sizes would be an error of other words before `names` are read
            "steps": steps,
            "packed": {key: self._padded(key, parts) for key, parts in packed.items()},
            "whole": whole,
            "groups": {
                str(i): {k: v for k, v in group.items() if k not in _OF_THE_OPTIMIZER}
                for i, group in enumerate(saved["param_groups"])
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the optimizer what was saved."""
        for saved, mine in zip_longest(state_dict["names"], self._groups_and_names(), fillvalue="none"):
            if saved != mine:
                raise ValueError(
                    f"OptimizerState: expected the parameters that were saved, in their order, {saved} among them, got "
                    f"{mine} in its place; build the optimizer of the same parameters, in the same groups and order; "
                    "nothing was loaded"
                )
        fresh = self._optimizer.state_dict()
        lengths, steps = state_dict["lengths"], state_dict["steps"]
        states: dict[Any, dict[str, Any]] = {}
        first = 0
        for (key, parameter, _, is_dense), length, step in zip(self._rows(fresh), lengths, steps, strict=True):
            state: dict[str, Any] = {}
            if is_dense and step:
                state = dict(state_dict["whole"][self._names[parameter]])
            elif length >= 0:
                state = {k: values[first : first + length] for k, values in state_dict["packed"].items()}
                first += length
                if parameter.itemsize != 2:
                    state.pop("master", None)
                if 0 < length == parameter.numel():
                    del state["indices"]
                    state = {k: values.view(parameter.shape) for k, values in state.items()}
            if state:
                states[key] = {"step": torch.tensor(step, device="cpu"), **state}
        groups = [
            {**group, **state_dict["groups"][str(i)], **{k: group[k] for k in _OF_THE_OPTIMIZER if k in group}}
            for i, group in enumerate(fresh["param_groups"])
        ]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})

    def _groups_and_names(self) -> list[str]:
        return [
            f"{self._names[parameter]!r} of shape {tuple(parameter.shape)} in group {i}"
            for i, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        ]

    def _rows(self, saved: dict[str, Any]) -> list[tuple[Any, Tensor, dict[str, Any], bool]]:
        """Of each parameter, its key in a state_dict, itself, its group, and whether its budget is all elements."""
        dense = {i for pool in self._optimizer.pools() if pool.is_dense for i in pool.groups}
        return [
            (key, parameter, group, i in dense)
            for i, (group, packed) in enumerate(zip(self._optimizer.param_groups, saved["param_groups"], strict=True))
            for parameter, key in zip(group["params"], packed["params"], strict=True)
        ]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _keys(self) -> list[str]:
        """Of what is packed."""
        has_master = any(parameter.itemsize == 2 for parameter in self._parameters())
        has_max = any(group["amsgrad"] for group in self._optimizer.param_groups)
        return ["indices", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * has_max + ["master"] * has_master

    def _padded(self, key: str, parts: list[Tensor]) -> Tensor:
        """One after the other, in as much room as the budgets may need."""
        is_double = any(parameter.dtype == torch.float64 for parameter in self._parameters())
        dtype = torch.int64 if key == "indices" else torch.float64 if is_double else torch.float32
        found = torch.zeros(self._k(), dtype=dtype, device=local(self._parameters()[0]).device)
        first = 0
        for part in parts:
            found[first : first + len(part)] = part
            first += len(part)
        return found

    def _k(self) -> int:
        """Elements that the budgets of shares select, at most."""
        k = 0
        for pool in self._optimizer.pools():
            groups = [self._optimizer.param_groups[i] for i in pool.groups]
            trained = [p for group in groups for p in group["params"] if p.requires_grad]
            if not pool.is_dense and pool.scope == "global":
                numels = [group["num_candidates"] for group in groups]
                numel = sum(p.numel() for p in trained) if None in numels else sum(numels)
                k += budget(pool.density, pool.k, numel)
            elif not pool.is_dense:
                k += sum(budget_of(p, pool.density, pool.scope) for p in trained)
        return k


def _fresh(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state before the first step of a parameter that is trained wholly, as state_dict() has it."""
    (state,) = new_states([local(parameter)], [None], group)
    if not is_distributed(parameter):
        return state
    return {k: as_distributed(v, parameter) for k, v in state.items() if k in MOMENTS}


def _full(value: Any) -> Tensor:
    found: Tensor = value.full_tensor() if is_distributed(value) else value
    return found
