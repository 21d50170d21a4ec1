"""register_timm(): "sparseadamw" in timm's factory, with timm's own scheduler, scaler and checkpoints."""

from __future__ import annotations

import logging
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import (
    assert_only_selected_changed,
    assert_same_weights,
    changed,
    folder,  # noqa: F401
    load_example,
    mask_under,
    run_example,
    weights,
)
from torch import nn

pytest.importorskip("timm.optim", reason="needs timm: pip install timm")

import timm.optim as timm_optim

import saft_kernels
from saft_kernels import SparseAdamW


@pytest.fixture(autouse=True)
def _registered() -> None:
    saft_kernels.register_timm()


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def test_it_is_one_of_timms_optimizers() -> None:
    assert "sparseadamw" in timm_optim.list_optimizers("*adamw")
    assert dict(timm_optim.list_optimizers(with_description=True))["sparseadamw"].startswith("saft_kernels.SparseAdamW")
    info = timm_optim.get_optimizer_info("sparseadamw")
    assert info.has_betas
    assert info.has_eps
    made = timm_optim.get_optimizer_class("sparseadamw")(a_model().parameters(), lr=0.1)
    assert isinstance(made, SparseAdamW)


def test_groups_with_and_without_decay_share_one_budget() -> None:
    model = a_model()
    optimizer = timm_optim.create_optimizer_v2(
        model, "SparseAdamW", lr=0.1, weight_decay=0.3, eps=1e-5, betas=[0.8, 0.9], k=10
    )
    assert isinstance(optimizer, SparseAdamW)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(4, 0.0), (2, 0.3)]
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.9), 1e-5)
    before = weights(model)
    model(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    mask = mask_under(model, optimizer)
    assert mask.k == 10
    assert_only_selected_changed(before, weights(model), mask, 10 / mask.numel)


def test_what_its_caller_leaves_out() -> None:
    """open_clip_train passes eps=None, and no betas: SparseAdamW's defaults hold."""
    optimizer = timm_optim.create_optimizer_v2(a_model(), "sparseadamw", lr=None, eps=None, foreach=None)
    plain = SparseAdamW(a_model().parameters())
    assert {**optimizer.defaults, "weight_decay": 0} == {**plain.defaults, "weight_decay": 0}


def test_defaults(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        saft_kernels.register_timm(k=7, scope="global")
    assert not caplog.records  # timm warns of what it overwrites
    model = a_model()
    optimizers = [timm_optim.create_optimizer_v2(model, "sparseadamw", **given) for given in ({}, {"k": 3})]
    model(torch.randn(5, 8)).square().mean().backward()
    for optimizer, k in zip(optimizers, (7, 3), strict=True):
        optimizer.step()
        assert optimizer.mask.k == k
    saft_kernels.register_timm()
    assert timm_optim.get_optimizer_info("sparseadamw").defaults is None
    with pytest.raises(TypeError, match="expected arguments of SparseAdamW, got 'densty'; it takes"):
        saft_kernels.register_timm(densty=0.1)


def test_arguments_of_timms_training_script() -> None:
    """`train.py --opt sparseadamw --opt-betas 0.8 0.9 --opt-kwargs density=0.1 selection_steps=2`."""
    arguments = Namespace(
        opt="sparseadamw", lr=0.1, weight_decay=0.05, momentum=0.9, opt_eps=None, opt_betas=[0.8, 0.9], layer_decay=None
    )
    options = {**timm_optim.optimizer_kwargs(cfg=arguments), "density": 0.1, "selection_steps": 2}
    model = a_model()
    optimizer = timm_optim.create_optimizer_v2(model, **options)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    before = weights(model)
    for _ in range(2):
        assert_same_weights(weights(model), before)
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    assert_only_selected_changed(before, weights(model), mask_under(model, optimizer), 0.1)


def test_its_class() -> None:
    """timm's own tests take it, and build from it; a checkpoint of the whole optimizer does, too."""
    saft_kernels.register_timm(k=7)
    bound = timm_optim.get_optimizer_class("sparseadamw")(a_model().parameters())
    plain = timm_optim.get_optimizer_class("sparseadamw", bind_defaults=False)
    assert issubclass(plain, SparseAdamW)
    assert plain is timm_optim.get_optimizer_info("sparseadamw").opt_class
    model = a_model()
    optimizer = pickle.loads(pickle.dumps(plain(model.parameters(), k=3)))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert type(optimizer) is type(bound) is SparseAdamW
    assert optimizer.mask.k == 3


@pytest.mark.parametrize(("name", "remedy"), [("caution", r"drop it: .*cadamw"), ("momentum", "drop it"), ("typo", "")])
def test_arguments_of_other_optimizers(name: str, remedy: str) -> None:
    with pytest.raises(TypeError, match=f"sparseadamw: expected arguments of SparseAdamW, got '{name}'; {remedy}"):
        timm_optim.get_optimizer_class("sparseadamw")(a_model().parameters(), **{name: True})


def test_timms_cautious_flag() -> None:
    with pytest.raises(TypeError, match="got 'caution'"):
        timm_optim.create_optimizer_v2(a_model(), "sparseadamw", caution=True)


def test_lookahead() -> None:
    model = a_model()
    optimizer = timm_optim.create_optimizer_v2(model, "lookahead_sparseadamw", lr=0.1, k=5)
    before = weights(model)
    for _ in range(7):  # past lookahead's first synchronization
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    assert 0 < sum(int(where.sum()) for where in changed(before, weights(model)).values()) <= 5


def test_example(folder: Path) -> None:  # noqa: F811
    """All of timm's tools: the loss goes down, only the selected move, and a run goes on bit-equal."""
    losses = run_example("timm_train")["losses"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])

    example: Any = load_example("timm_train")
    made: list[torch.optim.Optimizer] = []
    create = example.create_optimizer_v2
    before: dict[str, torch.Tensor] = {}

    def create_and_keep(model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        before.update(weights(model))
        made.append(create(model, *args, **kwargs))
        return made[-1]

    example.create_optimizer_v2 = create_and_keep
    example.OUTPUT = folder / "whole"
    whole, _ = example.train()
    assert_only_selected_changed(before, weights(whole), mask_under(whole, made[-1]), 0.02)

    example.OUTPUT = folder / "interrupted"
    example.train(epochs=2)
    resumed, losses = example.train()
    assert len(losses) == 8
    assert_same_weights(weights(resumed), weights(whole))
