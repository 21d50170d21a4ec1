"""What the tests of selection and of the optimizer train, and the oracle: torch.optim.AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FP32_ROUNDINGS = 1e-6
"""Of the tensor's largest value: about 16 roundings. Over 100 steps ours and AdamW's round in different places."""


class TwoTowers(nn.Module):
    """A CLIP in miniature: images and token ids to logits; a scalar temperature; an unused parameter."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)
        self.token_embedding = nn.Embedding(50, width)
        self.text = nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        image = functional.normalize(self.norm(self.visual(images)), dim=-1)
        text = functional.normalize(self.text(self.token_embedding(tokens).mean(1)), dim=-1)
        return self.logit_scale.exp() * image @ text.T


Batch = tuple[Tensor, Tensor, Tensor]


def two_towers(seed: int = 0, dtype: torch.dtype = torch.float32) -> TwoTowers:
    torch.manual_seed(seed)
    return TwoTowers().to(dtype)


def batches(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """Images, prompts of 5 classes, labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(6, 3, 8, 8, generator=generator).to(dtype),
            torch.randint(50, (5, 4), generator=generator),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    images, tokens, labels = batch
    return functional.cross_entropy(model(images, tokens), labels)


def backward(model: nn.Module, batch: Batch) -> None:
    loss_fn(model, batch).backward()


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    """Parameters of every kind of shape and layout; the same seed makes the same ones."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors = [
        randn(16, 9),
        randn(16),
        randn(),
        randn(0, 3),
        randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
        randn(7, 6).t(),
        randn(10, 8)[:, ::2],  # gaps between the elements
        randn(1, 11),
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


def set_gradients(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Gradients that do not depend on the parameters: rounding does not grow from step to step."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def first_steps(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    """Steps with made-up gradients."""
    for step in range(start, start + count):
        set_gradients(params, step)
        optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Batch], schedule: Any = None) -> None:
    """The loop of every script."""
    for batch in data:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def dense_masks(optimizer: Any) -> list[Tensor]:
    """Bool tensors on the CPU, True where selected, in the order of the parameters."""
    mask = optimizer.mask
    assert mask is not None
    return list(mask.to_dense().values())


def step_masked_adamw(optimizer: torch.optim.AdamW, masks: Sequence[Tensor]) -> None:
    """Dense AdamW with masked gradients, and with decay on the selected alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = clones(params)
    for parameter, mask in zip(params, masks, strict=True):
        if parameter.grad is not None:
            parameter.grad = torch.where(mask, parameter.grad, 0)
    optimizer.step()
    with torch.no_grad():
        for parameter, mask, old in zip(params, masks, before, strict=True):
            parameter.copy_(torch.where(mask, parameter, old))


def largest(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Flat indices per tensor of the k largest magnitudes over all: a stable sort, the definition."""
    flat = torch.cat([tensor.detach().reshape(-1).double().abs() for tensor in tensors])
    order = torch.sort(flat, descending=True, stable=True).indices[:k].sort().values
    bounds = torch.tensor([0, *(tensor.numel() for tensor in tensors)]).cumsum(0).tolist()
    return [order[(order >= low) & (order < high)] - low for low, high in itertools.pairwise(bounds)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value of the tensor."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).abs().max() / expected.abs().max())


def states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Position and state of the parameters that have one, and something selected."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(params):
        state = optimizer.state.get(parameter)
        if state and ("indices" not in state or state["indices"].numel()):
            yield i, state
