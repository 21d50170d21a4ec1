"""Lightning: clipping, mixed precision, the selection callback, checkpoints."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import assert_only_selected_changed, assert_same_weights, folder, load_example, run_example, weights  # noqa: F401
from torch import Tensor, nn

pytest.importorskip("lightning", reason="needs lightning: pip install lightning")
import lightning.pytorch as pl
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer

import saft_kernels
from saft_kernels import SparseAdamW
from saft_kernels.integrations import select_into
from saft_kernels.integrations.lightning import SelectionCallback

DENSITY = 0.05


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers, loggers, and the model summary
        yield
    torch.set_num_threads(threads)


def a_module() -> Any:
    torch.manual_seed(0)
    return load_example("lightning_module").Classifier()


def fit(
    module: Any, output: Path, callbacks: list[Any], ckpt_path: Path | None = None, data: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Data in the same order every epoch: Lightning does not save the random state."""
    options = {"max_epochs": 2, "accelerator": "cpu", "gradient_clip_val": 0.5, **options}
    trainer = pl.Trainer(
        default_root_dir=output,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, load_example("lightning_module").loader() if data is None else data, ckpt_path=ckpt_path)
    return module, trainer


@torch.no_grad()
def loss_of(module: Any) -> float:
    losses = [
        float(nn.functional.cross_entropy(module.net(inputs.to(module.dtype)).float(), labels))
        for inputs, labels in load_example("lightning_module").loader()
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("callback", [False, True], ids=["first-step", "callback"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fit_and_go_on(precision: str, callback: bool, tmp_path: Path) -> None:
    def run(output: Path, **options: Any) -> tuple[Any, Any, SelectionCallback]:
        selection = SelectionCallback(progress=False)
        module, trainer = fit(a_module(), output, [selection] if callback else [], precision=precision, **options)
        return module, trainer, selection

    whole, trainer, selection = run(tmp_path / "whole")
    optimizer = trainer.optimizers[0]
    before = a_module().to(whole.dtype)
    names = [name for name, _ in whole.named_parameters()]
    mask = saft_kernels.SparseMask(
        dict(zip(names, optimizer.mask.values(), strict=True)),
        dict(zip(names, optimizer.mask.shapes.values(), strict=True)),
    )
    share = 0.5 if precision == "bf16-true" else 0.9
    assert_only_selected_changed(weights(before), weights(whole), mask, DENSITY, share)
    assert loss_of(whole) < loss_of(before) - 0.05
    assert selection.mask == (mask if callback else None)

    run(tmp_path / "first", max_epochs=1)
    (checkpoint,) = (tmp_path / "first").rglob("*.ckpt")
    resumed, trainer, selection = run(tmp_path / "second", ckpt_path=checkpoint)
    assert trainer.global_step == 16
    assert selection.mask is None  # it came with the checkpoint
    assert_same_weights(weights(resumed), weights(whole))


def test_clipping_is_of_the_whole_gradient(tmp_path: Path) -> None:
    """As Lightning clips for any optimizer: a plain loop with clip_grad_norm_ has the same bits."""
    module, _ = fit(a_module(), tmp_path, [], gradient_clip_val=0.1, max_epochs=1)
    plain = a_module()
    optimizer = plain.configure_optimizers()["optimizer"]
    for batch in load_example("lightning_module").loader():
        nn.functional.cross_entropy(plain.net(batch[0]), batch[1]).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(weights(module), weights(plain))


def test_fused_and_clipping(tmp_path: Path) -> None:
    """Why `fused` is unset by default: Lightning takes it for an optimizer that unscales by itself."""
    module = a_module()
    module.configure_optimizers = lambda: SparseAdamW(module.parameters(), lr=0.02, density=DENSITY, fused=True)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(module, tmp_path, [], precision="bf16-mixed")
    fit(module, tmp_path, [], precision="bf16-mixed", gradient_clip_val=None)
    assert loss_of(module) < loss_of(a_module()) - 0.05


def test_callback_selects_by_the_mean_gradient_of_the_data(tmp_path: Path) -> None:
    module = a_module()
    before = weights(module)
    selection = SelectionCallback(max_batches=3, progress=False)
    fit(module, tmp_path, [selection], max_epochs=1, limit_train_batches=5)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    loader = load_example("lightning_module").loader()
    data = [batch for batch, _ in zip(loader, range(3), strict=False)]
    assert selection.mask == saft_kernels.select(a_module(), data, loss_fn, density=DENSITY, progress=False)
    assert_only_selected_changed(before, weights(module), selection.mask, DENSITY)

    own = SelectionCallback(lambda module, batch: loss_fn(module, batch) * 2, max_batches=3, progress=False)
    fit(a_module(), tmp_path, [own], max_epochs=1, limit_train_batches=5)
    assert own.mask == selection.mask  # scaled by a power of two


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use: 16-mixed needs one")
def test_16_mixed(tmp_path: Path) -> None:
    selection = SelectionCallback(progress=False)
    module, _ = fit(a_module(), tmp_path, [selection], accelerator="gpu", devices=1, precision="16-mixed")
    after = {name: parameter.cpu() for name, parameter in weights(module).items()}
    assert_only_selected_changed(weights(a_module()), after, selection.mask, DENSITY)
    assert loss_of(module.cpu()) < loss_of(a_module()) - 0.05


def test_example(folder: Path) -> None:  # noqa: F811
    ran = run_example("lightning_module")
    assert ran["selection"].mask.k == round(0.05 * 1348)
    assert loss_of(ran["model"]) < 0.8 * loss_of(a_module())


@pytest.mark.parametrize("wrap", [LightningOptimizer, Fabric(accelerator="cpu").setup_optimizers])
def test_a_wrapper_reads_as_its_optimizer(wrap: Any) -> None:
    """What `self.optimizers()` and Fabric return is an instance of SparseAdamW without a state of its own."""
    torch.manual_seed(0)
    model, batch = nn.Linear(8, 4), torch.randn(16, 8)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    optimizer = SparseAdamW(model.parameters(), lr=0.02, density=0.25)
    wrapped = wrap(optimizer)
    assert isinstance(wrapped, SparseAdamW)
    assert not optimizer._is_state_shared
    assert wrapped.members() == optimizer.members()
    assert optimizer._is_state_shared
    assert wrapped.mask is None

    base, originals = copy.deepcopy(model), saft_kernels.Originals(wrapped)
    mask = select_into(wrapped, model, [batch], loss_fn, progress=False)
    assert wrapped.mask.k == mask.k == originals.k == 9
    loss_fn(model, batch).backward()
    norm = nn.utils.get_total_norm([optimizer.selected_grad(p) for p in model.parameters()])
    assert torch.equal(wrapped.clip_grad_norm_(1.0), norm)
    wrapped.optimizer.step()
    assert wrapped.state is optimizer.state
    delta = saft_kernels.SparseDelta.from_optimizer(wrapped, originals, model=model)
    assert delta == saft_kernels.SparseDelta.diff(base, model)


def examples(count: float) -> Iterator[tuple[Tensor, Tensor]]:
    data = [(x, y) for batch in load_example("lightning_module").loader() for x, y in zip(*batch, strict=True)]
    for i in itertools.count() if count == float("inf") else range(int(count)):
        yield data[i % len(data)]


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return examples(float("inf"))


class OneShot(torch.utils.data.IterableDataset[Any]):
    """Counts what was read, and cannot start again."""

    def __init__(self) -> None:
        self.read, self._examples = 0, examples(80)

    def __len__(self) -> int:
        return 80

    def __iter__(self) -> OneShot:
        return self

    def __next__(self) -> Any:
        self.read += 1
        return next(self._examples)


def test_callback_asks_how_much_of_a_stream(tmp_path: Path) -> None:
    for stream, limits, what in ((Endless(), {"max_steps": 2}, "unknown length"), (OneShot(), {}, "read once")):
        data = torch.utils.data.DataLoader(stream, batch_size=8)
        with pytest.raises(ValueError, match=f"`max_batches` .*, got None for .*{what}.*; pass max_batches=100"):
            fit(a_module(), tmp_path, [SelectionCallback(progress=False)], data=data, **limits)
    assert stream.read == 0
    for stream, limits in ((Endless(), {"max_steps": 2}), (OneShot(), {"max_epochs": 1})):
        data = torch.utils.data.DataLoader(stream, batch_size=8)
        selection = SelectionCallback(max_batches=3, progress=False)
        _, trainer = fit(a_module(), tmp_path, [selection], data=data, **limits)
        assert selection.mask is not None
        assert trainer.global_step == (2 if "max_steps" in limits else 7)  # the stream had ten batches
    with pytest.raises(ValueError, match="`max_batches`: expected a positive int or None, got 0"):
        SelectionCallback(max_batches=0)


def test_callback_reads_the_batches_for_every_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = a_module()
    *body, head = module.parameters()
    module.configure_optimizers = lambda: SparseAdamW([{"params": body}, {"params": [head], "k": 1}], density=DENSITY)
    selection = SelectionCallback(max_batches=2)
    _, trainer = fit(module, tmp_path, [selection], max_epochs=1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("select(): ")]
    assert [line.partition(" of ")[0] for line in said] == [
        "select(): reads 2 batches",
        f"select(): selected {selection.mask.k - 1}",
        "select(): reads 2 batches",
        "select(): selected 1",
    ]
    assert "net." in said[1]  # the module's names, which the optimizer lacks
    assert trainer.optimizers[0].mask.k == round(DENSITY * sum(p.numel() for p in body)) + 1


def test_callback_errors(tmp_path: Path) -> None:
    module = a_module()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())
    with pytest.raises(TypeError, match="expected a SparseAdamW from configure_optimizers, got AdamW; return one"):
        fit(module, tmp_path, [SelectionCallback()])
    module = a_module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="expected `loss_fn` with manual optimization, got none; training_step would"):
        fit(module, tmp_path, [SelectionCallback()], gradient_clip_val=None)


def test_groups_of_a_finetuning_callback(tmp_path: Path) -> None:
    """BaseFinetuning adds a group, without names, once it thaws the backbone: selected then, by the same density."""

    class Thaw(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.02)

    module = a_module()
    module.configure_optimizers = lambda: SparseAdamW(
        [p for p in module.parameters() if p.requires_grad], lr=0.02, density=DENSITY
    )
    before = weights(module)
    selection = SelectionCallback(progress=False)
    _, trainer = fit(module, tmp_path, [Thaw(), selection])
    head, backbone = (sum(p.numel() for p in group["params"]) for group in trainer.optimizers[0].param_groups)
    assert trainer.optimizers[0].mask.k == round(DENSITY * head) + round(DENSITY * backbone)
    moved = [int((before[name] != parameter).sum()) for name, parameter in weights(module).items()]
    assert 0 < sum(moved) <= trainer.optimizers[0].mask.k
