"""examples/finetune_text.py on a made-up WordNet and a tiny BERT: what is read, that it learns, errors' one line."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the example needs it: pip install saft_kernels[text]")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import finetune_text
import frontier
import transformers

SIZES = {"select": 2, "val": 3, "sentence": 1, "verb": 2}
TRAIN = 4


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(finetune_text, "PER_CLASS", SIZES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """data.noun and data.verb as wndb(5WN) has them: a licence, then a synset a line."""
    folder, rng = tmp_path_factory.mktemp("wordnet"), random.Random(0)
    lines: dict[str, list[str]] = {"noun": [], "verb": []}
    for name, (noun, verb, _) in finetune_text.CLASSES.items():
        for part, file, number in (("noun", noun, 5 + 1 + TRAIN + 20), ("verb", verb, 4)):
            for i in range(number if file is not None else 0):
                words = " ".join(rng.choices("abcdefgh", k=3))
                sentence = f'; "{name} in use {i}"' if i % 2 else ""
                gloss = f"{name} {words}; and more{sentence}"
                lines[part].append(f"{i:08} {file:02} {part[0]} 01 {name}_{i} 0 001 @ 00000001 n 0000 | {gloss}  ")
    lines["noun"].append("00000009 03 n 01 entity 0 000 | of no class  ")
    for part, of in lines.items():
        (folder / f"data.{part}").write_text("  1 This software and database ... | licence\n" + "\n".join(of) + "\n")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = [*finetune_text.CLASSES, *"abcdefgh", "in", "use", "this", "describes", "an", ".", *map(str, range(30))]
    words += sorted({w for *_, text in finetune_text.CLASSES.values() for w in text.split()} - set(words))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=5 + len(words), max_position_embeddings=32, **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def _run(wordnet: Path, bert: Path, output: Path, *arguments: str) -> int:
    given = ["--wordnet", str(wordnet), "--model", str(bert), "--output", str(output), "--epochs", "1"]
    return finetune_text.main([*given, *arguments])


def test_sets_are_disjoint_and_do_not_depend_on_the_order_in_the_file(wordnet, tmp_path):
    train, sets = finetune_text.read_wordnet(wordnet)
    classes = len(finetune_text.CLASSES)
    assert {name: len(of) for name, of in sets.items()} == {
        "select": 2 * classes, "val": 3 * classes, "word": 3 * classes, "sentence": classes, "verb": 2 * 6,
    }  # fmt: skip
    assert [len(of) for of in train] == [30 - 2 - 3 - 1] * classes
    flat = list(itertools.chain(*train))
    glosses = [gloss for of in (flat, sets["select"], sets["val"]) for gloss, _ in of]
    names = list(finetune_text.CLASSES)
    assert all(gloss.split()[0] == names[label] for gloss, label in [*flat, *sets["val"], *sets["verb"]])
    assert all(gloss.count(" ") == 3 for gloss in glosses)  # up to the first semicolon
    assert all(sentence.startswith(f"{names[label]} in use ") for sentence, label in sets["sentence"])
    assert all("_" not in word for word, _ in sets["word"])
    for part in ("noun", "verb"):
        lines = (wordnet / f"data.{part}").read_text().splitlines(keepends=True)
        (tmp_path / f"data.{part}").write_text("".join(reversed(lines)))
    assert finetune_text.read_wordnet(tmp_path) == (train, sets)


def test_it_learns(wordnet, bert, tmp_path):
    """A gloss begins with its class's name, so a few steps are enough."""
    arguments = [
        "--epochs",
        "12",
        "--shots",
        "8",
        "--lr",
        "saft=3e-2",
        "full=1e-2",
        "--density",
        "0.1",
        "--wise",
        "0.5",
    ]
    assert _run(wordnet, bert, tmp_path / "out", *arguments) == 0
    rows = frontier.read_rows(tmp_path / "out" / "results.jsonl")
    assert [row.method for row in rows] == ["zero-shot", "saft", "saft", "full", "full"]
    assert rows[0].accuracy["val"] < 50
    assert all(row.accuracy["val"] > rows[0].accuracy["val"] + 20 for row in rows if row.alpha == 1)
    assert set(rows[0].accuracy) == {"select", "val", "word", "sentence", "verb"}
    assert rows[1].selected.keys() <= {"embeddings", "layer 1"}
    assert sum(rows[1].selected.values()) == rows[1].trained > 0


@pytest.mark.parametrize("method", ["linear_probe", "lp_ft", "lora"])
def test_methods_with_a_head_or_adapters(wordnet, bert, tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft", reason="LoRA is PEFT's: pip install saft_kernels[lora]")
    assert _run(wordnet, bert, tmp_path, "--shots", "2", "--method", method, "--wise") == 0
    row = frontier.read_rows(tmp_path / "results.jsonl")[-1]
    assert (row.method, row.alpha) == (method, 1)
    assert 0 < row.train_loss < 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--wordnet", "nowhere"], ["nowhere/data.noun", "apt install wordnet-base"]),
        (["--model", "nowhere"], ["--model nowhere", "cannot load it"]),
    ],
)
def test_what_is_missing(wordnet, bert, tmp_path, capsys, arguments, said):
    assert _run(wordnet, bert, tmp_path / "out", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(text in line for text in said)
    assert not (tmp_path / "out").exists()


def test_without_the_package(wordnet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune_text, "PACKAGE", "no_such_package")
    assert finetune_text.main(["--wordnet", str(wordnet), "--output", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps no-such-package" in capsys.readouterr().err
