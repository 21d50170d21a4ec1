"""SparseAdamW: torch.optim.AdamW on the selected elements alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from .ops._adamw import AdamWHyper, AdamWPlan, AdamWSegment, opmath_dtype, same_memory_order
from .selection import SparseMask, budget, check_budget, index_dtype, select_indices

__all__ = ["SparseAdamW"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")
_STATE_KEYS = ("step", *_MOMENTS, "indices")
_DEFAULT_DENSITY = 1e-3


@dataclass
class _Selection:
    """What is selected and what is still to be: all that `torch.optim` does not keep for us.

    `indices[p]` is None for a wholly selected parameter; a parameter that is absent belongs to a pending group.
    """

    density: float
    k: int | None
    scope: str
    steps: int
    indices: dict[Tensor, Tensor | None] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)  # positions in param_groups
    selected_once: bool = False
    sums: dict[Tensor, Tensor] = field(default_factory=dict)  # gradient sums while selection_steps > 1
    num_sums: int = 0


@dataclass
class _Prepared:
    """A plan and the parameters it is for."""

    key: list[int]
    params: list[Tensor]
    groups: list[int]  # group per hyperparameter row
    steps: list[Tensor]  # a step tensor per hyperparameter row
    counters: list[Tensor]  # step tensors to increment
    plan: AdamWPlan


class _Uncast:
    """Carries a state tensor past Optimizer.load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SparseAdamW(Optimizer):
    r"""AdamW that updates only the parameters whose gradient is largest in magnitude, and keeps state only for them.

    The positional arguments are those of torch.optim.AdamW. At the first step() the k elements of largest |gradient|
    over all parameters together are selected; from then on they follow AdamW exactly, with decoupled weight decay on
    them alone, and every other element of every parameter keeps its bits. Pass `mask` to select beforehand, from the
    mean gradient over the data, as the paper does (`saft_kernels.select`).

    Args:
        params: Parameters, (name, parameter) pairs such as `model.named_parameters()`, or groups of either. A group
            may have its own "density" or "k": it is then a budget of its own (`density=1.0`: an always-dense head).
        lr: Learning rate; a float or a scalar tensor.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, on selected elements alone.
        amsgrad: Use the running maximum of the second moment.
        density: Selected share of the elements, in (0, 1]. 1.0 is torch.optim.AdamW.
        k: Number of selected elements, in place of `density`.
        mask: A SparseMask of this model; `params` must then carry names, unless it came from an optimizer without.
        scope: "global", one budget over all groups, or "tensor", `density` of each tensor.
        selection_steps: Select from the mean gradient of that many step() calls; the calls before the last do not
            update. Costs one fp32 sum per element (fp64 for fp64 parameters) until then.
        maximize: Ascend instead.
        foreach: Accepted for compatibility; there is one implementation per backend.
        capturable: Not supported yet: must be False.
        differentiable: Not supported: must be False.
        fused: True lets torch.amp.GradScaler pass its scale and its inf check to step() instead of skipping it.
        backend: See `saft_kernels.ops`.

    State per parameter with selected elements: `step`; `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`), (k_p,) fp32
    (fp64 for fp64 parameters); `indices` (k_p,) int32 (int64 from 2^31 elements); `master` (k_p,) fp32 for bf16 and
    fp16 parameters. A wholly selected parameter has no `indices`, and state of its own shape, as in torch.optim.AdamW.

    Raises:
        ValueError: An argument out of range, an empty parameter list, a mask of another model; at the first step,
            non-finite gradients.
        TypeError: A parameter or gradient of unsupported dtype or layout.

    Source: SAFT, ECCV 2024, arXiv 2407.03036; AdamW, ICLR 2019, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        density: float = _DEFAULT_DENSITY,
        k: int | None = None,
        mask: SparseMask | None = None,
        scope: str = "global",
        selection_steps: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
    ) -> None:
        _check_scalars(lr, betas, eps, weight_decay)
        if density != _DEFAULT_DENSITY and k is not None:
            raise ValueError(f"expected `density` or `k`, got both: density={density!r}, k={k!r}; drop one")
        check_budget(density, k, scope)
        if not isinstance(selection_steps, int) or selection_steps < 1:
            raise ValueError(f"`selection_steps`: expected a positive int, got {selection_steps!r}")
        for name, value in (("capturable", capturable), ("differentiable", differentiable)):
            if value:
                raise ValueError(f"`{name}`: expected False, got {value!r}; SparseAdamW does not support it")
        if mask is not None and not isinstance(mask, SparseMask):
            raise TypeError(
                f"`mask`: expected a SparseMask, got {type(mask).__name__}; SparseMask.from_dense takes bool tensors"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
            "density": None,
            "k": None,
        }
        self.backend = backend
        self._selection = _Selection(density, k, scope, selection_steps)
        self._prepared: _Prepared | None = None
        super().__init__(params, defaults)
        # With it on, Lightning refuses clipping and accelerate misses skipped steps: only on request.
        self._step_supports_amp_scaling = bool(fused)
        if mask is None:
            numel = sum(p.numel() for i in self._shared_groups() for p in self._params(i))
            if self._shared_groups():
                budget(density, k, numel)
        else:
            if any(group["density"] is not None or group["k"] is not None for group in self.param_groups):
                raise ValueError("`mask`: expected groups without a density or k of their own; the mask covers them")
            self._use_mask(mask)

    # ---- groups and names ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, before or after selection.

        Before, it shares the global budget unless it has its own "density" or "k". After, its parameters are a pool
        of their own, selected at the next step() by the group's or the optimizer's density.
        """
        position = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[position]
        try:
            self._check_group(position, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._selection.pending.add(position)
        self._prepared = None

    def _check_group(self, position: int, group: dict[str, Any]) -> None:
        where = f"param_groups[{position}]"
        _check_scalars(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        for i, parameter in enumerate(group["params"]):
            if parameter.dtype not in ops._checks.FLOAT_DTYPES:
                remedy = "give it to another optimizer" if parameter.is_complex() else "freeze it or cast it"
                raise TypeError(
                    f"{where}['params'][{i}]: expected float32, bfloat16, float16 or float64, got "
                    f"{ops._checks.short(parameter.dtype)}; {remedy}"
                )
            if parameter.layout != torch.strided:
                raise TypeError(f"{where}['params'][{i}]: expected a strided parameter, got {parameter.layout}")
        numel = sum(p.numel() for p in group["params"])
        if group["density"] is not None and group["k"] is not None:
            raise ValueError(f"{where}: expected 'density' or 'k', got both; drop one")
        if group["density"] is not None or group["k"] is not None:
            check_budget(group["density"], group["k"], "global")
            budget(group["density"], group["k"], numel, where)
        elif self._selection.selected_once and self._selection.k is not None:
            raise ValueError(
                f"{where}: expected its own 'density' or 'k', got neither: the optimizer's k is already spent"
            )

    def _params(self, group: int) -> list[Tensor]:
        params: list[Tensor] = self.param_groups[group]["params"]
        return params

    def _shared_groups(self) -> list[int]:
        """Groups under the global budget that are not selected yet."""
        return [i for i in sorted(self._selection.pending) if not self._has_own_budget(i)]

    def _has_own_budget(self, group: int) -> bool:
        return self.param_groups[group]["density"] is not None or self.param_groups[group]["k"] is not None

    def _named(self) -> list[tuple[str, Tensor]]:
        """All parameters with their names; by position where they have none."""
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            names = group.get("param_names") or [f"param.{len(named) + i}" for i in range(len(group["params"]))]
            named += list(zip(names, group["params"], strict=True))
        return named

    def _is_dense(self, group: int) -> bool:
        """Whether the group's budget is all of its elements, whatever their gradients."""
        if self._has_own_budget(group):
            density, k, groups = self.param_groups[group]["density"], self.param_groups[group]["k"], [group]
        else:
            density, k = self._selection.density, self._selection.k
            groups = [i for i in range(len(self.param_groups)) if not self._has_own_budget(i)]
        if k is None:
            return bool(density == 1.0)
        return bool(k == sum(p.numel() for i in groups for p in self._params(i)))

    # ---- selection ----

    @property
    def mask(self) -> SparseMask | None:
        """What is trained, once selected; None before. Parameters without names are "param.0", "param.1", ..."""
        selection = self._selection
        if not selection.indices:
            return None
        indices = {}
        for name, parameter in self._named():
            index = selection.indices.get(parameter, torch.empty(0, dtype=torch.int32))
            indices[name] = torch.arange(parameter.numel()) if index is None else index
        return SparseMask(indices, {name: parameter.shape for name, parameter in self._named()})

    def reselect(self) -> None:
        """Selects anew at the next step() that has gradients, with the same budgets.

        Moments of elements that stay selected are kept; newly selected ones start from zero, under the step count of
        their parameter.
        """
        selection = self._selection
        selection.pending = set(range(len(self.param_groups)))
        selection.sums.clear()
        selection.num_sums = 0

    def _use_mask(self, mask: SparseMask) -> None:
        named = self._named()
        for (_, parameter), index in zip(named, mask.bind(named), strict=True):
            whole = index.numel() == parameter.numel()
            self._selection.indices[parameter] = None if whole else index
        self._selection.k = mask.k
        self._selection.scope = "global"
        self._finish_selection()

    def _finish_selection(self) -> None:
        self._selection.pending.clear()
        self._selection.sums.clear()
        self._selection.num_sums = 0
        self._selection.selected_once = True
        self._prepared = None

    def _select(self) -> bool:
        """Selects for the pending groups from the gradients; False while `selection_steps` wants more of them."""
        selection = self._selection
        pools: list[tuple[list[int], float | None, int | None]] = []
        if shared := self._shared_groups():
            pools.append((shared, selection.density, selection.k))
        for i in sorted(selection.pending):
            if self._has_own_budget(i):
                pools.append(([i], self.param_groups[i]["density"], self.param_groups[i]["k"]))
        names = {parameter: name for name, parameter in self._named()}
        picked: dict[Tensor, Tensor | None] = {}
        sparse_pools = []
        for groups, density, k in pools:
            if all(self._is_dense(i) for i in groups):
                picked.update(dict.fromkeys(p for i in groups for p in self._params(i)))
            elif params := [p for i in groups for p in self._params(i) if p.requires_grad]:
                sparse_pools.append((params, density, k))
        if sparse_pools and selection.steps > 1 and not self._sum_gradients(sparse_pools):
            return False
        for params, density, k in sparse_pools:
            k = None if selection.scope == "tensor" else budget(density, k, sum(p.numel() for p in params))
            scored = [p for p in params if p.grad is not None or p in selection.sums]
            available = sum(p.numel() for p in scored)
            if k is not None and k > available:
                raise ValueError(
                    f"`k`: expected at most {available}, the elements that have a gradient, got {k}; run backward over "
                    "the whole model before the first step, or freeze what the loss does not reach"
                )
            scores = [score for p in scored if (score := selection.sums.get(p, p.grad)) is not None]
            indices = select_indices([names[p] for p in scored], scores, density, k, selection.scope, self.backend)
            picked.update(dict.fromkeys(params, torch.empty(0, dtype=torch.int64)))
            for parameter, index in zip(scored, indices, strict=True):
                whole = index.numel() == parameter.numel()
                picked[parameter] = None if whole else index.to(index_dtype(parameter.numel()), copy=True)
        self._replace_indices(picked)
        self._finish_selection()
        return True

    def _sum_gradients(self, pools: Sequence[tuple[list[Tensor], float | None, int | None]]) -> bool:
        """Adds this step's gradients to the sums; True once there are enough of them."""
        selection = self._selection
        for parameter in (p for params, _, _ in pools for p in params):
            if parameter.grad is not None:
                total = selection.sums.get(parameter)
                if total is None:
                    total = torch.zeros_like(parameter, dtype=opmath_dtype(parameter.dtype))
                    selection.sums[parameter] = total
                total += parameter.grad
        selection.num_sums += 1
        return selection.num_sums >= selection.steps

    def _replace_indices(self, picked: dict[Tensor, Tensor | None]) -> None:
        """New indices per parameter; state of coordinates that stay selected moves over."""
        old_indices = dict(self._selection.indices)
        self._selection.indices.update(picked)
        for parameter, index in picked.items():
            state = self.state.get(parameter)
            if not state:
                continue
            old = old_indices.get(parameter)
            if index is not None and not index.numel():
                del self.state[parameter]
                continue
            self.state[parameter] = {"step": state["step"].clone()}
            fresh = self._new_state([parameter], self._group_of(parameter))[parameter]
            old_flat = torch.arange(parameter.numel()) if old is None else old.long()
            new_flat = torch.arange(parameter.numel()) if index is None else index.long()
            if new_flat.device != old_flat.device:
                old_flat, new_flat = old_flat.to(parameter.device), new_flat.to(parameter.device)
            stays = torch.isin(new_flat, old_flat, assume_unique=True)
            source = torch.searchsorted(old_flat, new_flat[stays])
            for key in _MOMENTS:
                if key in fresh:
                    fresh[key].put_(stays.nonzero().flatten(), state[key].take(source))
            fresh["step"] = state["step"]
            self.state[parameter] = fresh

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    # ---- state ----

    def _new_state(self, params: Sequence[Tensor], group: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """Zero state for parameters of one group, as views of one buffer per device, dtype and kind."""
        states: dict[Tensor, dict[str, Tensor]] = {}
        steps = torch.zeros(len(params), dtype=torch.float32)
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for row, parameter in enumerate(params):
            states[parameter] = {"step": steps[row]}
            by_kind.setdefault((parameter.device, opmath_dtype(parameter.dtype)), []).append(parameter)
        keys = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
        for (device, dtype), members in by_kind.items():
            counts = [self._count(p) for p in members]
            for key in keys:
                for parameter, part in zip(
                    members, torch.zeros(sum(counts), dtype=dtype, device=device).split(counts), strict=True
                ):
                    states[parameter][key] = self._shaped(parameter, part)
            low = [p for p in members if p.itemsize == 2]
            masters = torch.empty(sum(self._count(p) for p in low), dtype=dtype, device=device)
            for parameter, part in zip(low, masters.split([self._count(p) for p in low]), strict=True):
                states[parameter]["master"] = self._shaped(parameter, part)
        for parameter, state in states.items():
            index = self._selection.indices[parameter]
            if index is not None:
                state["indices"] = index
            if "master" in state:
                source = parameter.detach()
                state["master"].copy_(source if index is None else source.take(index.long()))
        return states

    def _count(self, parameter: Tensor) -> int:
        index = self._selection.indices[parameter]
        return parameter.numel() if index is None else index.numel()

    def _shaped(self, parameter: Tensor, flat: Tensor) -> Tensor:
        """State of a wholly selected parameter has its shape, and its memory order where that is dense."""
        if self._selection.indices[parameter] is not None:
            return flat
        if same_memory_order(parameter):
            return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
        return flat.view(parameter.shape)

    # ---- step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the first one selects.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            ValueError: At selection, a gradient that is not finite; nothing was changed.
            TypeError: A sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # GradScaler's, with fused=True
        if found_inf is not None and bool(found_inf):
            return loss
        scale = getattr(self, "grad_scale", None)
        selection = self._selection
        if selection.pending or not self.state:
            grads = self._checked_gradients()
            if not any(bool(grad.any()) for grad in grads):
                return loss  # no gradients, or the fake step of torch.distributed.checkpoint
            if selection.pending and not self._select():
                return loss
        prepared = self._prepare()
        if prepared is None:
            return loss
        torch._foreach_add_(prepared.counters, 1)
        hypers = [
            _hyper(self.param_groups[group], float(step), 1.0 if scale is None else float(scale))
            for group, step in zip(prepared.groups, prepared.steps, strict=True)
        ]
        prepared.plan.step([p.grad for p in prepared.params if p.grad is not None], hypers)
        return loss

    def _checked_gradients(self) -> list[Tensor]:
        grads = []
        for name, parameter in self._named():
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise TypeError(
                    f"gradient of {name!r}: expected a dense one, got layout {grad.layout}; build the embedding with "
                    "sparse=False"
                )
            grads.append(grad)
        return grads

    def _prepare(self) -> _Prepared | None:
        """The plan for the parameters that have a gradient now; None when there are none."""
        indices = self._selection.indices
        active = [
            (i, parameter)
            for i, group in enumerate(self.param_groups)
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        key = [id(parameter) for _, parameter in active]
        if self._prepared is not None and self._prepared.key == key:
            return self._prepared
        self._checked_gradients()
        trained = [(i, p) for i, p in active if p in indices and (indices[p] is None or self._count(p))]
        for i, group in enumerate(self.param_groups):
            fresh = [p for j, p in trained if j == i and not self.state.get(p)]
            if fresh:
                self.state.update(self._new_state(fresh, group))
        if not trained:
            return None
        rows: dict[tuple[int, float], int] = {}
        segments: list[AdamWSegment] = []
        steps: list[Tensor] = []
        for i, parameter in trained:
            state = self.state[parameter]
            row = rows.setdefault((i, float(state["step"])), len(rows))
            if row == len(steps):
                steps.append(state["step"])
            segments.append(
                AdamWSegment(
                    parameter.detach(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("indices"),
                    state.get("max_exp_avg_sq"),
                    state.get("master"),
                    row,
                )
            )
        self._prepared = _Prepared(
            key,
            [p for _, p in trained],
            [group for group, _ in rows],
            steps,
            [self.state[p]["step"] for _, p in trained],
            ops.prepare_sparse_adamw(segments, backend=self.backend),
        )
        return self._prepared

    # ---- checkpoints ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this optimizer, or of torch.optim.AdamW at density 1.0; indices and moments keep dtype.

        Raises:
            ValueError: A state of another density, shape or model; nothing has been loaded.
        """
        # runs after the user's pre-hooks: sees what they made of the state
        handle = self.register_load_state_dict_pre_hook(_shield_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        keep = ("backend", "_selection", "_step_supports_amp_scaling")
        return {**state, **{name: getattr(self, name) for name in keep}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = None
        for group in self.param_groups:
            for name, default in (("density", None), ("k", None), ("maximize", False), ("amsgrad", False)):
                group.setdefault(name, default)
        loaded = [p for p, values in self.state.items() if any(isinstance(v, _Uncast) for v in values.values())]
        for parameter in loaded:
            values = self.state[parameter]
            for key, value in values.items():
                if isinstance(value, _Uncast):
                    values[key] = _unshield(key, value.tensor, parameter)
            indices = self._selection.indices[parameter] = values.get("indices")
            if parameter.itemsize == 2 and "master" not in values:  # a state of torch.optim.AdamW
                values["master"] = torch.empty_like(values["exp_avg"])
                source = parameter.detach()
                values["master"].copy_(source if indices is None else source.take(indices.long()))
        if loaded:
            # what the state names is selected; all else is frozen, or dense and yet to get a gradient
            for i in range(len(self.param_groups)):
                rest = None if self._is_dense(i) else torch.empty(0, dtype=torch.int32)
                for parameter in self._params(i):
                    self._selection.indices.setdefault(parameter, rest)
            self._finish_selection()


def _unshield(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    """A loaded state tensor, copied to where and what it should be."""
    if key == "step":
        return value.to(dtype=torch.float32, device="cpu", copy=True)
    dtype = index_dtype(parameter.numel()) if key == "indices" else opmath_dtype(parameter.dtype)
    value = value.to(dtype=dtype, device=parameter.device, copy=True)
    return value if same_memory_order(parameter, value) else value.contiguous()


def _hyper(group: dict[str, Any], step: float, grad_scale: float) -> AdamWHyper:
    beta1, beta2 = group["betas"]
    return AdamWHyper(
        float(group["lr"]),
        float(beta1),
        float(beta2),
        group["eps"],
        group["weight_decay"],
        step,
        group["maximize"],
        grad_scale,
    )


def _check_scalars(lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """The checks, and the messages, of torch.optim.AdamW."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i in range(2):
        if not 0.0 <= betas[i] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
    if not 0.0 <= weight_decay:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def _shield_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook: checks the state against the optimizer and shields its tensors from the cast."""
    assert isinstance(optimizer, SparseAdamW)
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    named = optimizer._named()
    if len(ids) != len(named):
        return state_dict  # torch says what differs
    parameters = dict(zip(ids, named, strict=True))
    states: dict[Any, Any] = {}
    for i, values in state_dict["state"].items():
        if i not in parameters:
            states[i] = values
            continue
        name, parameter = parameters[i]
        _check_loaded(name, parameter, values)
        states[i] = {
            key: _Uncast(torch.as_tensor(value)) if key in _STATE_KEYS else value for key, value in values.items()
        }
    if states:
        _check_loaded_budget(optimizer, state_dict["state"])
    return {**state_dict, "state": states}


def _check_loaded(name: str, parameter: Tensor, values: dict[str, Any]) -> None:
    """State tensors of one parameter have the shapes that its indices say."""
    indices = values.get("indices")
    shape = tuple(parameter.shape) if indices is None else tuple(indices.shape)
    for key in _MOMENTS:
        if key in values and tuple(values[key].shape) != shape:
            raise ValueError(
                f"`state_dict`: {key} of {name!r}: expected shape {shape}, got {tuple(values[key].shape)}: the state "
                "of another model or density; nothing was loaded"
            )
    if indices is not None and indices.numel() and int(indices.max()) >= parameter.numel():
        raise ValueError(
            f"`state_dict`: indices of {name!r}: expected positions in [0, {parameter.numel()}), got "
            f"{int(indices.max())}: the state of another model; nothing was loaded"
        )


def _check_loaded_budget(optimizer: SparseAdamW, states: dict[Any, dict[str, Any]]) -> None:
    """The state has as many elements as this optimizer selects. Budgets per group or tensor are not compared."""
    selection = optimizer._selection
    groups = range(len(optimizer.param_groups))
    if selection.scope == "tensor" or any(optimizer._has_own_budget(i) or optimizer._is_dense(i) for i in groups):
        return
    loaded = sum(values["exp_avg"].numel() for values in states.values() if "exp_avg" in values)
    numel = sum(p.numel() for i in groups for p in optimizer._params(i) if p.requires_grad)
    expected = budget(selection.density, selection.k, numel)
    if loaded != expected:
        raise ValueError(
            f"`state_dict`: expected {expected} selected elements ({expected / numel:.4%} of {numel}), as this "
            f"optimizer selects, got {loaded} ({loaded / numel:.4%}); build it with the density, k or mask of the run "
            "that saved the state. Nothing was loaded"
        )
