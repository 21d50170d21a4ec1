"""SparseAdamW: torch.optim.AdamW on the selected elements alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from .. import ops
from ..common.memory import out_of_memory_says
from ..mask import SparseMask, log_mask
from ..ops.adamw import StalePlan
from ..selection.budget import DEFAULT_DENSITY, budget, check_budget
from ..selection.gradients import any_nonzero, check_dense
from ..selection.parts import as_distributed, check_parts, gather_whole, is_distributed
from ..selection.ranks import Ranks, together
from .all_reduce import Agreement, all_reduce_grads
from .arguments import check_fused, check_group, check_hyperparameters, check_mask_alone
from .budgets import Picked, Pool, Selection
from .checkpoint import shield, steps_of, unshield, whole_states
from .members import (
    NOTHING,
    STATE_KEYS,
    Member,
    Members,
    Position,
    State,
    check_members,
    has_state,
    local_index,
    log_selected,
    positions,
    same_index,
)
from .ranks import check_same, check_split, check_whole, compare, loaded_facts, norm_over, refuse_split
from .release import GradientBuffer, selected_values, take_over
from .selected_grad import check_selectable
from .state import carry_over, new_states
from .step import PreparedStep, check_state

__all__ = ["SparseAdamW"]

_OUT_OF_MEMORY = (
    "choose beforehand, mask = select(model, batches, loss_fn, streaming='blocks'), and pass mask=mask, "
    "release_grads=True to SparseAdamW; or lower the density"
)


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
        density: Selected share of the elements with `requires_grad`, in (0, 1]. 1.0 is torch.optim.AdamW.
        k: Number of selected elements, in place of `density`.
        mask: A SparseMask of this model, in place of `density`; `params` must then carry names, unless it came from
            an optimizer without.
        scope: "global", one budget over all groups; "tensor", `density` of each tensor; or "row", `density` of each
            slice of its first dimension (an output unit of a weight), at least one element.
        selection_steps: Select from the mean gradient of that many step() calls; the calls before the last do not
            update. Costs one fp32 sum per element (fp64 for fp64 parameters) until then, in state_dict() as well.
        maximize: Ascend instead.
        foreach: Accepted for compatibility; there is one implementation per backend.
        capturable: Keep the step counts on the parameters' device, and let step() run without waiting for it, so that
            it can be captured in a CUDA graph; pass `lr` as a tensor to change it between replays. Step once before.
        differentiable: Let autograd through step(). At density 1.0 alone; torch's own AdamW steps.
        fused: True lets torch.amp.GradScaler pass its scale and its inf check to step() instead of skipping it.
        release_grads: Keep only the selected values of a gradient, from the moment backward has made it: `p.grad`
            becomes a `SelectedGrad` of k_p fp32 values, which adds up over backward passes, and which zero_grad(),
            clip_grad_norm_() and GradScaler know. The peak is the largest gradient of a single parameter. Wholly
            selected parameters keep a dense gradient, as do all before selection: pass a `mask`.
        backend: See `saft_kernels.ops`.

    State per parameter: `step`; `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`), (k_p,) fp32 (fp64 for fp64
    parameters); `indices` (k_p,) int32 (int64 from 2^31 elements); `master` (k_p,) fp32 for bf16 and fp16 parameters.
    A wholly selected parameter has no `indices`, and state of its own shape, as in torch.optim.AdamW. Where nothing is
    selected the state is empty (k_p = 0): so a checkpoint says all that is selected.

    A budget waits until its gradients are not all zero; so does the first step, at any density.

    Parameters may be DTensors that are split along one dimension, as by torch.distributed.fsdp.fully_shard: what is
    selected is then what one process would select of all, and state is of what is selected of this rank's shard. All
    ranks call step(), `mask`, clip_grad_norm_() and state_dict() together; where one of them fails, all raise.

    Raises:
        ValueError: An argument out of range, an empty parameter list, a mask of another model; at the first step,
            non-finite gradients.
        TypeError: A parameter or gradient of unsupported dtype or layout; a DTensor that is split in another way.

    Source: SAFT, ECCV 2024, arXiv 2407.03036; AdamW, ICLR 2019, arXiv 1711.05101.
    """

    # whether anyone else may hold what is in `state`, and move its memory
    _is_state_shared = True

    # of DTensors among the parameters
    _meshes: AbstractSet[Any] = frozenset()

    # whether there is state that was made before the first step
    _has_early_states = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        density: float = DEFAULT_DENSITY,
        k: int | None = None,
        mask: SparseMask | None = None,
        scope: str = "global",
        selection_steps: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        release_grads: bool = False,
        backend: str | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
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
            "density": density if k is None else None,
            "k": k,
        }
        if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
            raise TypeError(f"`params`: expected parameters, got {type(params).__name__}; pass its named_parameters()")
        check_hyperparameters(defaults)
        defaults["betas"] = tuple(betas) if differentiable else tuple(float(beta) for beta in betas)
        check_budget(density, k, scope)
        if not isinstance(selection_steps, int) or selection_steps < 1:
            raise ValueError(f"`selection_steps`: expected a positive int, got {selection_steps!r}; 1 takes one step()")
        if mask is not None:
            check_mask_alone(mask, density, k, scope)
        # whether it runs on the parameters' device shows at the first step: they may move until then
        ops.check_backend(backend)
        self.backend = backend
        self.release_grads = bool(release_grads)
        self._selection = Selection(density, k, scope, selection_steps)
        self._members = Members()
        self._agreement = Agreement()
        self._ranks: Ranks | None = None  # over whom the parameters are split
        self._compared: list[int] = []  # versions of what the ranks last found to be the same; none after a load
        self._loaded: list[str] = []  # what the last load made of the whole of each parameter, not yet compared
        self._prepared: PreparedStep | None = None
        self._captured: list[PreparedStep] = []
        self._released: GradientBuffer | None = None
        self._selection_hooks: list[Callable[[Sequence[Member]], None]] = []  # not pickled
        super().__init__(params, defaults)
        # With it on, Lightning refuses clipping and accelerate misses skipped steps: only on request.
        self._step_supports_amp_scaling = bool(fused)
        if mask is not None:
            self.use_mask(mask)
        else:
            for pool in self._selection.pools(self.param_groups):
                budget(pool.density, pool.k, pool.numel)
        if release_grads:
            self._released = GradientBuffer()
            self._update_released()
        self._is_state_shared = False

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of each parameter.

        Whoever has read it may move what is in it (`.data = other`, `share_memory_()`), now or later, and torch tells
        nobody: from then on every step compares the address and form of all state tensors, some 0.1 us for each.
        """
        states = _state_of(self)
        self._is_state_shared = True
        return states

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._is_state_shared = True
        self.__dict__["state"] = state

    @property
    def _states(self) -> defaultdict[Tensor, Any]:
        """`state`, which stays among the optimizer."""
        return _state_of(self)

    def __repr__(self) -> str:
        """As torch's, with the budgets in force: a group without its own has the optimizer's, a k is a density, too."""
        pools = {i: pool for pool in self.pools() for i in pool.groups}
        lines = super().__repr__().splitlines()
        group = -1
        for at, line in enumerate(lines):
            group += line.startswith("Parameter Group ")
            key = line.strip().split(":")[0]
            if key == "k":
                lines[at] = f"    k: {pools[group].k}"
            elif key == "density":
                density, k, numel = pools[group].density, pools[group].k, pools[group].numel
                lines[at] = f"    density: {density if k is None else k / max(1, numel)}"
        return "\n".join(lines)

    # ---- groups, names, budgets ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, before or after selection.

        Before, it shares the global budget unless it has its own "density" or "k"; amid `selection_steps` the mean
        starts anew, so that it is over the same steps for all. After, its parameters are a pool of their own, selected
        at the next step() by the group's or the optimizer's density.
        """
        if isinstance(param_group, dict):  # without a budget of its own it shares the optimizer's
            param_group.setdefault("density", None)
            param_group.setdefault("k", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(f"param_groups[{len(self.param_groups) - 1}]", group)
        except Exception:
            self.param_groups.pop()
            raise
        # of how many elements the budget was taken; None: not selected yet
        group["num_candidates"] = None
        self._selection.restart()
        self._members.forget(len(self.param_groups) - 1)
        take_over(group["params"], self, self._released)
        self._update_released()

    def _check_group(self, where: str, group: dict[str, Any]) -> None:
        own = self._selection if group["density"] is None and group["k"] is None else None
        density, k = (group["density"], group["k"]) if own is None else (own.density, own.k)
        is_dense = k is None and density == 1.0
        check_whole(where, group["params"], is_dense)
        check_split(where, group["params"])
        check_group(where, group, is_dense)
        ranks = _ranks_of(where, group, self._ranks)
        if group["differentiable"]:
            refuse_split([group], "differentiable=True", "leave it out")
        is_spent = self._selection.k is not None and any(g.get("num_candidates") is not None for g in self.param_groups)
        if is_spent and group["density"] is None and group["k"] is None:
            raise ValueError(
                f"{where}: expected its own 'density' or 'k', got neither; the optimizer's k, {self._selection.k}, "
                "is spent on the groups before"
            )
        self._ranks = ranks

    def _find_ranks(self) -> None:
        self._ranks = None
        for i, group in enumerate(self.param_groups):
            self._ranks = _ranks_of(f"param_groups[{i}]", group, self._ranks)

    # ---- selection ----

    def members(self, *, split: bool = False) -> list[Member]:
        """One record per parameter, in order: its name, what is selected of it, and how far it has come.

        The records are the optimizer's own, and follow it: read them, and keep them no longer than to the next call.

        Args:
            split: Whether the caller knows what a record is where a parameter is split over ranks: of this rank's part.

        Raises:
            ValueError: A parameter took the place of another after selection, without its state.
            NotImplementedError: The parameters are split over ranks, and not `split`.
        """
        self._follow()
        if not split:
            refuse_split(self.param_groups, "members()", "use optimizer.mask, or members(split=True), this rank's part")
        _ = self.state  # their indices are in it: it is shared from now on
        return self._checked_members()

    def _checked_members(self) -> list[Member]:
        members = self._follow()
        check_members(members)
        return members

    def _follow(self) -> list[Member]:
        members = self._members.follow(
            self.param_groups,
            self._states,
            dense_groups=self._selection.dense_groups(self.param_groups),
            summed=self._selection.sums,
            prepared=() if self._prepared is None else self._prepared.positions,
        )
        tensors: list[Any] = [member.parameter for member in members]
        meshes = {tensor.device_mesh for tensor in tensors if is_distributed(tensor)}
        if meshes != self._meshes:
            self._find_ranks()  # they have been split since, or are whole again
            self._meshes = meshes
        return members

    @property
    def released(self) -> GradientBuffer | None:
        """Where the selected values of gradients go with release_grads=True; None without."""
        return self._released

    def pools(self) -> list[Pool]:
        """The budgets, each with the groups that share it."""
        return self._selection.pools(self.param_groups)

    def register_selection_hook(self, hook: Callable[[Sequence[Member]], None]) -> None:
        """Calls `hook(optimizer.members(split=True))` when something was selected, before anything is updated."""
        self._selection_hooks.append(hook)

    @property
    def mask(self) -> SparseMask | None:
        """What is trained, once selected; None before. Parameters without names are "param.0", "param.1", ...

        Of parameters that are split over ranks it is whole, too: the ranks put it together, so all of them have to ask.
        """
        with together(self._ranks, "optimizer.mask"):
            members = self._checked_members()
            if not self._members.is_known:
                return None
            indices = [positions(member) for member in members]
            if self._ranks is not None:
                (indices,) = gather_whole([member.part for member in members], indices)
        return SparseMask(
            {member.name: index for member, index in zip(members, indices, strict=True)},
            {member.name: member.parameter.shape for member in members},
        )

    def reselect(self) -> None:
        """Selects anew at the next step() that has gradients, with the same budgets.

        Moments of elements that stay selected are kept; newly selected ones start from zero, under the step count of
        their parameter. Where parameters are split over ranks, all of them call it.
        """
        for group in self.param_groups:
            group["num_candidates"] = None
        self._selection.restart()
        self._update_released()

    def use_mask(self, mask: SparseMask) -> None:
        """Makes a mask what is selected, in place of the optimizer's budget, as the constructor's `mask` does.

        After a step, moments of elements that stay selected are kept, as by reselect(). Ranks compare at the next step.

        Raises:
            ValueError: A mask of another model, or a group with a budget of its own.
        """
        if any(group["density"] is not None or group["k"] is not None for group in self.param_groups):
            raise ValueError(
                "`mask`: expected groups without a density or k of their own, got some with; the mask covers them, "
                "drop theirs"
            )
        members = self._follow()
        for member in members:
            if is_distributed(member.parameter) and member.local.is_meta:
                raise ValueError(
                    f"{member.name!r}: expected memory, got a DTensor on meta; call model.to_empty(device=...) and "
                    "load the weights before the optimizer is built"
                )
        indices = mask.bind((member.name, member.parameter) for member in members)
        picked = Picked({}, {i: sum(p.numel() for p in group["params"]) for i, group in enumerate(self.param_groups)})
        for member, index in zip(members, indices, strict=True):
            picked.indices[member.position] = local_index(member.parameter, index)
        replaced = self._moved(picked)
        self._selection.k = mask.k
        # parameters may be split later, and ranks then compare masks
        self._selection.mask = mask.digest() if distributed.is_available() and distributed.is_initialized() else ""
        self.defaults.update(density=mask.density, k=mask.k)
        self._make_current(picked, replaced)
        self._update_released()
        self._compared = self._agreement.versions = []
        log_mask("SparseAdamW", mask)

    def adopt(self, picked: Picked) -> None:
        """Makes a selection current, as reselect() and step() would; state of what stays selected moves over.

        Args:
            picked: For all parameters, or those of some groups.
        """
        self._adopt(picked)
        self._update_released()
        self._compared = self._agreement.versions = []

    def _adopt(self, picked: Picked) -> None:
        replaced = self._moved(picked)
        if self._ranks is not None:
            self._ranks.agree()
        # all memory is there: from here on nothing fails
        self._make_current(picked, replaced)

    def _moved(self, picked: Picked) -> dict[Tensor, State]:
        """State for a selection of what has state for another, with what stays selected."""
        members = {member.position: member for member in self._follow()}
        replaced: dict[Tensor, State] = {}
        for i, group in enumerate(self.param_groups):
            moved = []
            for position, new in picked.indices.items():
                member = members[position]
                has_moments = position[0] == i and has_state(self._states.get(member.parameter))
                if has_moments and not same_index(member.index, new):
                    check_state(member, self._states[member.parameter])
                    moved.append((member, new))
            fresh = new_states([m.local for m, _ in moved], [new for _, new in moved], group)
            for (member, new), state in zip(moved, fresh, strict=True):
                carry_over(member.local, self._states[member.parameter], member.index, state, new)
                replaced[member.parameter] = state
        return replaced

    def _make_current(self, picked: Picked, replaced: dict[Tensor, State]) -> None:
        self._states.update(replaced)
        self._members.select(picked.indices)
        for i, numel in picked.num_candidates.items():
            self.param_groups[i]["num_candidates"] = numel
        self._selection.restart()
        self._prepared = None
        followed = self._follow()
        for hook in self._selection_hooks:
            hook(followed)

    def _create_states(self, members: Sequence[Member]) -> None:
        """State for what is selected and has none; for parameters of a dense budget once they have a gradient."""
        dense = self._selection.dense_groups(self.param_groups)
        fresh: dict[int, list[Member]] = {}
        for member in members:
            i, parameter = member.position[0], member.parameter
            state = self._states.get(parameter)
            if has_state(state):
                if self.param_groups[i]["amsgrad"] and "max_exp_avg_sq" not in state and "exp_avg_sq" in state:
                    state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
                continue
            has_or_may_get_gradient = parameter.grad is not None or (
                i not in dense and (parameter.requires_grad or member.count)
            )
            if member.is_known and not member.is_pending and has_or_may_get_gradient:
                fresh.setdefault(i, []).append(member)
        for i, mine in fresh.items():
            states = new_states([m.local for m in mine], [m.index for m in mine], self.param_groups[i])
            for member, state in zip(mine, states, strict=True):
                self._states[member.parameter] = {**self._states.get(member.parameter, {}), **state}

    # ---- step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the first one selects.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            ValueError: At selection, a gradient that is not finite; nothing was changed.
            TypeError: A gradient of sparse layout.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if torch.is_inference_mode_enabled():
                # the state would be inference tensors, which nothing else may write
                with torch.inference_mode(False), torch.no_grad():
                    self._update()
            else:
                self._update()
        except Exception:
            self._take_over()  # perhaps the gradients were released for another optimizer: the next are for this one
            raise
        return loss

    def _take_over(self) -> None:
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        take_over(parameters, self, self._released)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self) -> None:
        # GradScaler's, with fused=True
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if self._released is not None:
            self._released.settle()
            if self._released.is_disturbed:
                self._take_over()
        prepared = self._prepared
        gradients = None
        if prepared is not None and not self._awaits_selection():
            gradients = prepared.gradients(self.param_groups, self._states if self._is_state_shared else None)
        if prepared is not None and gradients is not None and prepared.runs_on_device:
            try:
                if prepared.is_cuda and torch.cuda.is_current_stream_capturing():
                    self._captured.append(prepared)  # the graph reads its tables
                prepared.run(gradients, self.param_groups, 1.0 if scale is None else scale, found_inf)
                return
            except StalePlan:
                self._prepared = prepared = gradients = None
        is_cuda = (
            any(p.is_cuda for g in self.param_groups for p in g["params"]) if prepared is None else prepared.is_cuda
        )
        if is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() under CUDA graph capture: expected capturable=True and a step before the capture with the same "
                "parameters, got a step that has to wait for the device; warm up first, as torch.cuda.graph asks for"
            )
        if found_inf is not None and bool(found_inf):
            return
        grad_scale = 1.0 if scale is None else float(scale)
        if prepared is None or gradients is None:
            prepared = self._prepare(grad_scale)
            if prepared is None:
                return
            gradients = prepared.current_gradients()
        try:
            prepared.run(gradients, self.param_groups, grad_scale, None)
        except StalePlan:
            self._prepared = None
            self._update()

    def _awaits_selection(self, *, on_any_rank: bool = True) -> bool:
        """Whether a budget is yet to be spent, and gradients are there to tell how: on any rank, perhaps."""
        return any(
            p.grad is not None or (on_any_rank and self._ranks is not None)
            for g in self.param_groups
            if g["num_candidates"] is None
            for p in g["params"]
        )

    def _prepare(self, grad_scale: float) -> PreparedStep | None:
        """Selects where that is due, and makes the step ready. None when there is nothing to step with yet."""
        check_fused(self.param_groups)
        self._follow()
        awaits_selection = self._awaits_selection(on_any_rank=False)
        if self._ranks is None or (self._compared and not self._awaits_selection()):
            return self._prepare_here(grad_scale, awaits_selection)
        with self._ranks.together("step()"):
            check_same(self._ranks, self._follow(), self.param_groups, self._selection, self._loaded)
            self._loaded = []
            return self._prepare_here(grad_scale, self._ranks.any([awaits_selection])[0])

    def _prepare_here(self, grad_scale: float, awaits_selection: bool) -> PreparedStep | None:
        members = self._checked_members()
        if not self._has_begun():
            if any(member.parameter.grad is not None for member in members):
                self._await_first_step(members)
            return None
        self._drop_early_states(members)
        if awaits_selection and not self._select(members, grad_scale):
            return None
        versions = [member.version for member in members]
        if versions != self._compared:
            compare(members, self.param_groups, self._states)
            self._compared = versions
        with out_of_memory_says("step()", _OUT_OF_MEMORY):
            self._create_states(members)
            self._update_released()
            self._prepared = None
            self._prepared = PreparedStep(
                self._follow(), self.param_groups, self._states, self._released is not None, self.backend
            )
        return self._prepared

    def _await_first_step(self, members: Sequence[Member]) -> None:
        """State, of no steps, for what is trained whatever its gradient.

        torch.distributed.checkpoint takes a step with gradients of zeros for it: it loads into state of the same sizes.
        """
        for pool in self._selection.pools(self.param_groups, pending=True):
            if pool.is_dense:
                picked, mine = Picked({}, {}), pool.of(members)
                picked.add(pool, mine, mine)
                self._adopt(picked)
        self._create_states(self._follow())
        self._has_early_states = True

    def _drop_early_states(self, members: Sequence[Member]) -> None:
        """Of no steps: the weights that they have copies of may have been loaded since."""
        early, self._has_early_states = self._has_early_states and not self._has_stepped(), False
        for member in members if early else ():
            state = self._states.get(member.parameter)
            if has_state(state):
                self._states[member.parameter] = {k: v for k, v in state.items() if k not in STATE_KEYS}

    def _has_stepped(self) -> bool:
        """Whether any state is older than what gradients of zeros make."""
        return any(has_state(state) and float(state["step"]) > 0 for state in self._states.values())

    def _select(self, members: Sequence[Member], grad_scale: float) -> bool:
        """Selects for what is pending; False when that takes more steps.

        When it raises, nothing has changed, but for a gradient that `selection_steps` has added up: the next call
        selects from the sums as they are.
        """
        for member in members:
            if member.is_pending:
                check_selectable(member)
        with out_of_memory_says("selection in step()", _OUT_OF_MEMORY):
            picked = self._selection.select(self.param_groups, members, grad_scale, self.backend)
            if picked is not None:
                if self._ranks is not None:
                    states = [self._states.get(member.parameter) for member in members]
                    for state, step in zip(states, steps_of(self._ranks, states), strict=True):
                        if has_state(state):
                            state["step"].fill_(step)
                self._adopt(picked)
                log_selected(members)
        return picked is not None

    def _has_begun(self) -> bool:
        """Whether there has been a step, or there is a gradient for the first one; on any rank."""
        begun = self._has_stepped() or self._has_gradients()
        if self._ranks is not None and not self._agreement.saw_nonzero:
            (begun,) = self._ranks.any([begun])
            self._agreement.saw_nonzero = begun
        return begun

    def _has_gradients(self) -> bool:
        """Whether any gradient is not all zero."""
        if self._agreement.saw_nonzero or (self._released is not None and self._released.saw_nonzero):
            return True
        gradients = [(m.name, gradient) for m in self._follow() if (gradient := m.gradient) is not None]
        for name, gradient in gradients:
            check_dense(name, gradient)
        return any_nonzero(gradient for _, gradient in gradients)

    # ---- gradients ----

    def _update_released(self) -> None:
        if self._released is not None:
            self._released.update(self._follow(), not self._has_stepped())

    def selected_grad(self, parameter: Tensor) -> Tensor:
        """The selected values of a parameter's gradient, (k_p,), in the order of its indices.

        With release_grads=True they are the fp32 values (fp64 for fp64 parameters) themselves: what is written to them
        is stepped with. Else, and for a dense gradient, a copy in its dtype. Zeros where there is no gradient. Of a
        parameter that is split over ranks, this rank's values.

        Raises:
            ValueError: Not a parameter of this optimizer, or its selection is pending.
        """
        for member in self._checked_members():
            if member.parameter is parameter:
                if member.is_pending:
                    raise ValueError(
                        f"`parameter`: expected a selection, got {member.name!r} before its own; step() first, or pass "
                        "a mask"
                    )
                return selected_values(member, self._released)
        raise ValueError(
            f"`parameter`: expected one of this optimizer, got another of shape {tuple(parameter.shape)}; pass the "
            "object in param_groups"
        )

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scales all gradients so that the norm of the selected values is at most `max_norm`; returns the norm before.

        Before selection all values count, as in torch.nn.utils.clip_grad_norm_. Where parameters are split over ranks,
        those of all ranks do; all of them call it.

        Raises:
            RuntimeError: The norm is not finite and `error_if_nonfinite`; nothing was scaled.
        """
        gradients, values = [], []
        with together(self._ranks, "clip_grad_norm_()"):
            for member in self._checked_members():
                if member.parameter.grad is not None:
                    gradients.append(member.parameter)
                    index, mine = member.counted, selected_values(member, self._released)  # ranks add up partial sums
                    if self._ranks is not None and not self._ranks.is_first and member.part is None:
                        continue  # all ranks have it, and one counts it
                    if index is None or index.numel():  # an empty one changes in what order the norms are added up
                        values.append(mine)
            if self._ranks is None:
                norm = nn.utils.get_total_norm(values, norm_type, error_if_nonfinite)
            else:
                norm = norm_over(self._ranks, values, norm_type, error_if_nonfinite)
        for kind in (False, True):  # torch has no operation for both together
            alike = [parameter for parameter in gradients if is_distributed(parameter) == kind]
            nn.utils.clip_grads_with_norm_(alike, max_norm, norm)
        return norm

    @torch.no_grad()
    def all_reduce_grads(self, group: Any = None) -> None:
        """Averages the gradients over the ranks of torch.distributed, in the place of DistributedDataParallel.

        Call it after the last backward pass of a step (in the closure, where there is one), before `scaler.unscale_`,
        `clip_grad_norm_` and `step()`. Of a parameter it sends what is selected, so k values where
        DistributedDataParallel sends all; whole gradients before selection, and of wholly selected parameters. A
        gradient that only other ranks have counts as zeros. Gradients are zero afterwards where nothing is selected,
        and None where that is all of a parameter.

        All ranks have to have the same parameters in the same order, the same weights at the start and the same mask;
        each then steps by itself, to the same values. They call it equally often; `reselect()` goes before backward.
        Waits for the device once, after the first call.

        Args:
            group: A torch.distributed process group; None: all ranks.

        Raises:
            RuntimeError: torch.distributed is not initialized.
            ValueError: The selection is not the same on all ranks, or the number of steps after a load (which all of
                them raise); `group` is without this rank; a gradient of another selection. Gradients are as they were.
            TypeError: A gradient of sparse layout.
        """
        refuse_split(self.param_groups, "all_reduce_grads()", "leave it out: fully_shard averages them")
        has_nonzero = not self._has_stepped() and self._has_gradients()
        members, steps = self._checked_members(), 0
        if not self._agreement.versions:
            states = (self._states.get(member.parameter) for member in members if member.count)
            steps = max((int(state["step"]) for state in states if has_state(state)), default=0)
        all_reduce_grads(members, self._released, self._agreement, has_nonzero, steps, group)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's, with `param_shapes` in each group of which a part is selected.

        While `selection_steps` gathers gradients their sums are in it, as `grad_sum`. Where parameters are split over
        ranks, all of them call it, and get the same: indices and values of the whole, k of them; what has a value for
        every element of a parameter is a DTensor.
        """
        state_dict = super().state_dict()
        dense = self._selection.dense_groups(self.param_groups)
        for i, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=True)):
            if i not in dense:
                saved["param_shapes"] = [tuple(p.shape) for p in group["params"]]
            elif saved["num_candidates"] is not None:
                saved["num_candidates"] = 0  # all, however many this rank has of them
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        members = self._follow()
        if self._ranks is not None:
            with self._ranks.together("state_dict()"):
                states = whole_states(self._ranks, members, self._states, self.param_groups)
            state_dict["state"].update({ids[row]: state for row, state in states.items()})
        for key, member in zip(ids, members, strict=True):
            if member.position in self._selection.sums:
                count = torch.tensor(float(self._selection.num_sums), dtype=torch.float32, device="cpu")
                total = self._selection.sums[member.position]
                if member.part is not None:
                    total = as_distributed(total, member.parameter)
                sums = {"grad_sum": total, "num_grads": count}
                state_dict["state"][key] = {**state_dict["state"].get(key, {}), **sums}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this optimizer, or of torch.optim.AdamW at density 1.0; indices and moments keep dtype.

        An empty state leaves what is selected, or yet to be, as it is.

        Raises:
            ValueError: A state of another density, shape or model; nothing has been loaded.
        """

        # runs after the user's pre-hooks: sees what they made of the state
        def check(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            shielded = shield(loaded, self.param_groups, self._follow(), self._selection)
            if self._ranks is not None:
                self._loaded = loaded_facts(self._follow(), loaded)
            return shielded

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _adopt_loaded(self, loaded: dict[Position, Tensor | None]) -> None:
        """The selection of a loaded state: what it does not name is frozen, or dense without a gradient so far."""
        dense = self._selection.dense_groups(self.param_groups)
        rest = {m.position: None if m.position[0] in dense else NOTHING for m in self._follow()}
        self._members.select({**rest, **loaded})
        self._selection.restart()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        keep = ("backend", "release_grads", "_selection", "_members", "_step_supports_amp_scaling")
        return {**state, **{name: getattr(self, name) for name in keep}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = None
        self._compared = []
        self._captured = getattr(self, "_captured", [])  # of a copy: none
        if "release_grads" in state:  # a copy: its parameters have no hooks yet
            self._agreement, self._loaded, self._selection_hooks = Agreement(), [], []
            self._released = GradientBuffer() if self.release_grads else None
        self._agreement.versions = []
        self._find_ranks()
        for group in self.param_groups:
            for name, default in (
                ("maximize", False),
                ("amsgrad", False),
                ("foreach", None),
                ("fused", None),
                ("capturable", False),
                ("differentiable", False),
            ):
                group.setdefault(name, default)
            group["decoupled_weight_decay"] = True
        loaded, sums, num_sums = unshield(self.param_groups, self._states)
        if loaded:
            self._adopt_loaded(loaded)
        if sums:
            self._selection.sums, self._selection.num_sums = sums, num_sums
        self._update_released()


def _ranks_of(where: str, group: dict[str, Any], ranks: Ranks | None) -> Ranks | None:
    """Over whom parameters are split: those of a group, and those before. TypeError for a split that is not known."""
    names = group.get("param_names") or [""] * len(group["params"])
    split = [(i, p) for i, p in enumerate(group["params"]) if is_distributed(p)]
    return check_parts(((f"{where}['params'][{i}] {names[i]}".rstrip(), p) for i, p in split), ranks)


def _state_of(optimizer: SparseAdamW) -> defaultdict[Tensor, Any]:
    """Its own state. A wrapper that imitates this class, as Lightning's do, has none: it then asks what it wraps."""
    try:
        return optimizer.__dict__["state"]  # type: ignore[no-any-return]
    except KeyError:
        raise AttributeError("state") from None
