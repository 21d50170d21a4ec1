"""The Trainer of Hugging Face transformers: both ways to give it an optimizer, decay groups, and going on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import (
    EXAMPLES,
    assert_only_selected_changed,
    assert_same_weights,
    folder,  # noqa: F401
    load_example,
    mask_under,
    run_example,
    weights,
)
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate: pip install accelerate")
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import saft_kernels
from saft_kernels import SparseAdamW
from saft_kernels.integrations.transformers import SelectionCallback

DENSITY = 0.03


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


def a_classifier(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=3,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config).to(dtype)


def sentences(count: int = 24) -> list[dict[str, Tensor]]:
    """The second word says the class."""
    words = torch.randint(10, 40, (count, 6), generator=torch.Generator().manual_seed(0))
    words[:, 1] = torch.arange(count) % 3
    return [{"input_ids": words[i], "labels": torch.tensor(i % 3)} for i in range(count)]


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    batch = {key: torch.stack([sentence[key] for sentence in sentences()]) for key in ("input_ids", "labels")}
    return float(model.eval()(**batch).loss)


def a_trainer(model: nn.Module, output: Path, callbacks: list[Any] | None = None, **kwargs: Any) -> Trainer:
    """Two epochs of three steps, from two batches each; a checkpoint after each epoch."""
    options = {key: kwargs.pop(key) for key in ("bf16", "learning_rate") if key in kwargs}
    arguments = TrainingArguments(
        str(output),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        **{"learning_rate": 0.05, **options},
    )
    return Trainer(model, arguments, train_dataset=sentences(), callbacks=callbacks, **kwargs)


@pytest.mark.parametrize("callback", [False, True], ids=["first-step", "callback"])
@pytest.mark.parametrize(("dtype", "bf16"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_optimizer_cls_and_kwargs(dtype: str, bf16: bool, callback: bool, tmp_path: Path) -> None:
    """Groups without names, with and without decay; a resumed run has an uninterrupted one's bits."""

    def run(output: Path, resume: Path | None = None) -> tuple[Trainer, SelectionCallback]:
        selection = SelectionCallback(progress=False)
        trainer = a_trainer(
            a_classifier(getattr(torch, dtype)),
            output,
            [selection] if callback else None,
            bf16=bf16,
            optimizer_cls_and_kwargs=(SparseAdamW, {"lr": 0.05, "density": DENSITY}),
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer, selection

    before = weights(a_classifier(getattr(torch, dtype)))
    whole, selection = run(tmp_path / "whole")
    optimizer = whole.optimizer.optimizer  # in accelerate's wrapper
    assert type(optimizer) is SparseAdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    mask = mask_under(whole.model, optimizer)
    # steps that bfloat16 rounds away are still in the fp32 master
    assert_only_selected_changed(before, weights(whole.model), mask, DENSITY, 0.9 if dtype == "float32" else 0.5)
    if callback:
        assert selection.mask == mask
    assert loss_of(whole.model) < loss_of(a_classifier(getattr(torch, dtype))) - 0.01

    resumed, selection = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3")
    assert resumed.state.global_step == 6
    assert selection.mask is None  # it came with the checkpoint
    assert_same_weights(weights(resumed.model), weights(whole.model))
    for i, state in enumerate(whole.optimizer.state_dict()["state"].values()):
        other = resumed.optimizer.state_dict()["state"][i]
        assert_same_weights(other, state)


def test_callback_selects_by_the_mean_gradient_of_the_data(tmp_path: Path) -> None:
    """What `select` picks, with the optimizer's budget, over the batches taken; the weights stay as they were."""
    model = a_classifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    seen: list[Any] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append({key: value.clone() for key, value in batch.items()})
        return model(**batch).loss

    selection = SelectionCallback(loss_fn, max_batches=5, progress=False)
    trainer = a_trainer(model, tmp_path, [selection], optimizer_cls_and_kwargs=(SparseAdamW, {"lr": 0.0, "k": 50}))
    before = weights(model)
    trainer.train()
    assert_same_weights(weights(model), before)
    assert len(seen) == 5
    assert selection.mask == saft_kernels.select(
        model, seen, lambda model, batch: model(**batch).loss, k=50, progress=False
    )


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from sentences()


class OneShot(torch.utils.data.IterableDataset[Any]):
    """Counts what was read, and cannot start again."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> OneShot:
        return self

    def __next__(self) -> Any:
        self.read += 1
        if self.read > 24:
            raise StopIteration
        return sentences()[self.read - 1]


@pytest.mark.parametrize(("kind", "what"), [(Endless, "unknown length"), (OneShot, "read once")])
def test_callback_asks_how_much_of_a_stream(kind: Any, what: str, tmp_path: Path) -> None:
    for max_batches in (None, 2):
        stream = kind()
        trainer = a_trainer(
            a_classifier(),
            tmp_path,
            [selection := SelectionCallback(max_batches=max_batches, progress=False)],
            optimizer_cls_and_kwargs=(SparseAdamW, {"lr": 0.05, "density": DENSITY}),
        )
        trainer.train_dataset, trainer.args.max_steps = stream, 2
        if max_batches is None:
            with pytest.raises(ValueError, match=f"`max_batches` .*, got None for .*{what}.*; pass max_batches=100"):
                trainer.train()
            assert getattr(stream, "read", 0) == 0
        else:
            trainer.train()
            assert trainer.state.global_step >= 1  # what the stream has left: three batches of six, or any number
            assert selection.mask is not None


def test_optimizers_with_a_mask(tmp_path: Path) -> None:
    """`optimizers=`: selected beforehand, by name; the callback leaves it be; Trainer's own schedule runs."""
    model = a_classifier()
    before = weights(model)
    data = [{key: torch.stack([s[key] for s in sentences()]) for key in ("input_ids", "labels")}]
    mask = saft_kernels.select(model, data, lambda model, batch: model(**batch).loss, density=DENSITY, progress=False)
    selection = SelectionCallback()
    optimizer = SparseAdamW(model.named_parameters(), lr=0.02, mask=mask)
    trainer = a_trainer(model, tmp_path, [selection], optimizers=(optimizer, None))
    trainer.train()
    assert selection.mask is None
    assert optimizer.mask == mask
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert_only_selected_changed(before, weights(model), mask, DENSITY)


def test_callback_with_the_trainers_own_loss(tmp_path: Path) -> None:
    """Label smoothing is the Trainer's: its compute_loss is the callback's loss_fn."""
    model = a_classifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer = a_trainer(model, tmp_path, optimizer_cls_and_kwargs=(SparseAdamW, {"lr": 0.0, "k": 40}))
    trainer.label_smoother = transformers.trainer_pt_utils.LabelSmoother(0.3)
    selection = SelectionCallback(trainer.compute_loss, progress=False)
    trainer.add_callback(selection)
    trainer.train()

    def smoothed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3)

    batch = {key: torch.stack([sentence[key] for sentence in sentences()]) for key in ("input_ids", "labels")}
    expected = saft_kernels.select(model, [batch], smoothed, k=40, progress=False)
    assert selection.mask is not None
    # summed in another order: elements at the threshold may differ
    assert selection.mask.iou(expected) > 0.9
    plain = saft_kernels.select(model, [batch], lambda model, batch: model(**batch).loss, k=40, progress=False)
    assert selection.mask.iou(plain) < selection.mask.iou(expected)


def test_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The example: a CLIPModel, then further from its last checkpoint."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "hf_trainer.py")])
    ran = run_example("hf_trainer")
    trainer = ran["trainer"]
    assert isinstance(trainer.model, transformers.CLIPModel)
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert curve[-1] < 0.9 * curve[0]
    torch.manual_seed(0)
    before = weights(load_example("hf_trainer").tiny_clip())
    mask = mask_under(trainer.model, trainer.optimizer.optimizer)
    assert_only_selected_changed(before, weights(trainer.model), mask, 0.02)
    again = run_example("hf_trainer")["trainer"]
    assert again.state.global_step == trainer.state.global_step
    assert_same_weights(weights(again.model), weights(trainer.model))


def test_callback_errors(tmp_path: Path) -> None:
    trainer = a_trainer(a_classifier(), tmp_path, [SelectionCallback(progress=False)])
    with pytest.raises(TypeError, match="`optimizer`: expected a SparseAdamW, got AdamW; build it"):
        trainer.train()
    trainer = a_trainer(
        a_classifier(),
        tmp_path,
        [SelectionCallback(progress=False)],
        optimizer_cls_and_kwargs=(SparseAdamW, {}),
        data_collator=lambda rows: {"input_ids": torch.stack([row["input_ids"] for row in rows])},
    )
    with pytest.raises(
        ValueError, match=r"`loss_fn`: expected one, or a model that returns a loss, got Bert.*; .*labels"
    ):
        trainer.train()
