"""Small runs of SparseAdamW in all its modes, compared bit by bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from conftest import bits
from torch import Tensor, nn

from saft_kernels import SparseAdamW, SparseMask

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

MODES: dict[str, dict[str, Any]] = {
    "global": {"density": 0.2},
    "tensor": {"density": 0.2, "scope": "tensor"},
    "mask": {"mask": True},
    "dense": {"density": 1.0},
    "amsgrad": {"density": 0.2, "amsgrad": True},
    "dense_amsgrad": {"density": 1.0, "amsgrad": True},
    "bf16": {"dtype": BF16, "density": 0.2, "amsgrad": True},
    "fp16_dense": {"dtype": FP16, "density": 1.0},
    "fp64": {"dtype": FP64, "density": 0.2},
    "capturable": {"density": 0.2, "capturable": True},
    "capturable_dense": {"density": 1.0, "capturable": True, "amsgrad": True},
    "released": {"mask": True, "release_grads": True},
    "released_bf16": {"mask": True, "release_grads": True, "dtype": BF16, "amsgrad": True},
    "reference": {"density": 0.2, "amsgrad": True, "backend": "reference"},
    "reference_dense": {"density": 1.0, "dtype": BF16, "backend": "reference"},
    # two plans: what one finds out has to come before the other steps
    "two_plans": {"density": 0.2, "head": {"density": 1.0, "capturable": True}},
}

SHAPES = {"a": (12, 10), "b": (33,), "c": (6, 5), "d": (), "e": (4, 3)}


def draw(seed: int, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same numbers under any default device and dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=FP32, device="cpu") for n, s in shapes.items()}


def make_parameters(dtype: torch.dtype = FP32, seed: int = 0) -> dict[str, nn.Parameter]:
    """A matrix, a vector, a transposed matrix, a number, and "e", whose gradients are too small to be selected."""
    values = {name: value.to(dtype) for name, value in draw(seed, SHAPES).items()}
    values["c"] = values["c"].t()
    return {name: nn.Parameter(value) for name, value in values.items()}


def make_mask(shapes: dict[str, Any]) -> SparseMask:
    """Every fifth element, of "d" its one, nothing of "e"."""
    numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    ends = {name: 0 if name == "e" else numel for name, numel in numels.items()}
    indices = {name: torch.arange(end, device="cpu")[::5] for name, end in ends.items()}
    return SparseMask(indices, {name: tuple(shape) for name, shape in shapes.items()})


class Run:
    """Parameters and their optimizer. Gradients depend on the number of the step alone."""

    def __init__(self, mode: str, **changes: Any) -> None:
        options = {"lr": 0.05, **MODES[mode], **changes}
        self.mode, self.steps_done = mode, 0
        self.parameters = make_parameters(options.pop("dtype", FP32))
        head = options.pop("head", None)
        if options.get("mask") is True:
            options["mask"] = make_mask({name: p.shape for name, p in self.parameters.items()})
        groups: list[dict[str, Any]] = [{"params": list(self.parameters.items())}]
        if head is not None:
            groups = [{"params": groups[0]["params"][2:]}, {"params": groups[0]["params"][:2], **head}]
        self.optimizer: Any = SparseAdamW(groups, **options)

    def backward(self) -> None:
        """Adds the gradients of this step as autograd does, so that hooks see them."""
        drawn = draw(100 + self.steps_done, {name: p.shape for name, p in self.parameters.items()})
        drawn["e"] *= 1e-6
        gradients = [torch.empty_like(p).copy_(drawn[name]) for name, p in self.parameters.items()]
        torch.autograd.backward(list(self.parameters.values()), gradients)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()
            self.steps_done += 1

    def state(self, name: str) -> dict[str, Tensor]:
        return self.optimizer.state.get(self.parameters[name], {})

    def with_key(self, key: str) -> list[str]:
        """Names of the parameters that are trained, and have such state."""
        return [name for name in self.parameters if key in self.state(name) and self.state(name)["exp_avg"].numel()]


STATE_KEYS = ("indices", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the parameters, and of all that state_dict() holds of them."""
    state_dict = optimizer.state_dict()
    values: dict[str, Tensor] = {}
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for name, p, key in zip(group["param_names"], group["params"], saved["params"], strict=True):
            values[name] = p.detach().clone()
            values |= {f"{name}.{k}": v.clone() for k, v in state_dict["state"].get(key, {}).items()}
    return values


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Which values are there in one alone, or of other dtype, shape or bits."""
    wrong = sorted(actual.keys() ^ expected.keys())
    for name in sorted(actual.keys() & expected.keys()):
        a, b = actual[name], expected[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bits(a), bits(b)):
            wrong.append(name)
    return wrong


@functools.cache
def undisturbed(mode: str, steps: int) -> dict[str, Tensor]:
    """A run without anything between its steps."""
    run = Run(mode)
    run.step(steps)
    return snapshot(run.optimizer)


BEFORE, AFTER = 3, 3  # steps, before and after what happens between


def same_as_undisturbed(run: Run, what: str) -> list[str]:
    """Trains on; names what differs then."""
    run.step(BEFORE + AFTER - run.steps_done)
    return [f"{what}: {name}" for name in differences(snapshot(run.optimizer), undisturbed(run.mode, BEFORE + AFTER))]


def message_of(function: Callable[[], Any]) -> str | None:
    """Of the error that it raises."""
    try:
        function()
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        return str(error)
    return None


def poison(memory: Sequence[Tensor]) -> None:
    """Makes a read of memory that was left behind show, without a crash: NaN, or the first element over and over."""
    for tensor in memory:
        # through .data: torch counts no version of it, as of memory that was freed
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
