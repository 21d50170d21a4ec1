"""A CLIP small enough to pre-train in a minute, and image folders to fine-tune it on. No download.

``finetune_clip.py`` without ``--data`` uses this module. It makes, once, a cache folder with

* ``images/``: scikit-learn's 1,797 real handwritten digits (8 x 8), enlarged to 32 x 32 RGB and drawn in several
  renderings: ``train``, ``select`` and ``val`` in one of them, one further folder per shifted rendering;
* ``digits-clip.json`` and ``digits-clip.safetensors``: an open_clip model (both towers, 0.6 M parameters),
  pre-trained here with the contrastive loss on digits and captions.

Four disjoint sets of digits: 900 for pre-training, 200 for fine-tuning, 100 for selection, 597 for every test set.

What fine-tuning has to learn. Pre-training captions nearly always write a digit as a numeral ("a photo of the digit
7."); the class names of the downstream task are the words ("seven"), which one caption in 1,200 uses. So the image
features are good in many renderings while the zero-shot classes are poorly named, which is how CLIP meets a
specialist's class names. Fine-tuning sees white digits on black only; seven of the thirteen shifted renderings were
never seen by the model at all.

Where SAFT loses. When the class names are known (``word_share`` of 1 % and more) and fine-tuning is on a rendering the
model has not seen, such as ``outlined``, what has to be learnt is in the pixels. The largest gradients are then in the
patch and position embeddings, which all renderings share, and in a model this small full fine-tuning is better both in
and out of distribution, at densities of 0.1 % and of 1 %.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from frontier import progress, say
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

MODEL_NAME = "digits-clip"
IMAGE_SIZE = 32
CONTEXT_LENGTH = 12
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}.",
    "an image of the number {}.",
    "the handwritten digit {}.",
    "a picture of a {}.",
)
FINE_TUNED = "upright"


# Renderings: (n, 1, 32, 32) ink in [0, 1] -> (n, 3, 32, 32) in [0, 1].

Paint = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Rendering:
    """One way to draw a digit. ``caption`` is None where pre-training never sees it."""

    paint: Paint
    caption: str | None = None
    angle: float = 8.0  # degrees either way
    shear: float = 0.0


def _rgb(gray: Tensor) -> Tensor:
    return gray.expand(-1, 3, -1, -1)


def _colours(n: int, g: torch.Generator, high: float = 1.0) -> Tensor:
    return high * torch.rand(n, 3, 1, 1, generator=g)


def _upright(ink: Tensor, g: torch.Generator) -> Tensor:
    return _rgb(ink)


def _inverted(ink: Tensor, g: torch.Generator) -> Tensor:
    return _rgb(1 - ink)


def _coloured(ink: Tensor, g: torch.Generator) -> Tensor:
    paper = _colours(len(ink), g)
    pen = torch.where(paper > 0.5, paper - 0.5, paper + 0.5)
    return paper * (1 - ink) + pen * ink


def _noisy(ink: Tensor, g: torch.Generator) -> Tensor:
    image = 0.1 + 0.8 * _rgb(ink)
    return image + 0.2 * torch.randn(image.shape, generator=g)


def _blurred(ink: Tensor, g: torch.Generator) -> Tensor:
    return _rgb(F.avg_pool2d(ink, 5, stride=1, padding=2))


def _gradient(ink: Tensor, g: torch.Generator) -> Tensor:
    left, right = _colours(len(ink), g, 0.6), _colours(len(ink), g, 0.6)
    paper = torch.lerp(left, right, torch.linspace(0, 1, IMAGE_SIZE))
    return paper * (1 - ink) + ink


def _low_contrast(ink: Tensor, g: torch.Generator) -> Tensor:
    return 0.4 + 0.2 * _rgb(ink)


def _striped(ink: Tensor, g: torch.Generator) -> Tensor:
    phase = 2 * math.pi * torch.rand(len(ink), 1, 1, 1, generator=g)
    stripes = torch.sin(torch.arange(IMAGE_SIZE) * (2 * math.pi / 8) + phase)
    return _rgb(torch.maximum(ink, 0.225 * (1 + stripes)))


def _occluded(ink: Tensor, g: torch.Generator) -> Tensor:
    corner = torch.randint(4, 20, (2, len(ink), 1, 1), generator=g)
    at = torch.arange(IMAGE_SIZE)
    rows = (at[:, None] >= corner[0]) & (at[:, None] < corner[0] + 8)
    columns = (at >= corner[1]) & (at < corner[1] + 8)
    return _rgb(torch.where((rows & columns)[:, None], 0.5, ink))


def _speckled(ink: Tensor, g: torch.Generator) -> Tensor:
    u = torch.rand(ink.shape, generator=g)
    return _rgb(torch.where(u < 0.08, 0.0, torch.where(u > 0.92, 1.0, ink)))


def _outlined(ink: Tensor, g: torch.Generator) -> Tensor:
    edge = F.max_pool2d(ink, 3, 1, 1) + F.max_pool2d(-ink, 3, 1, 1)
    return _rgb(1.6 * edge)


def _dotted(ink: Tensor, g: torch.Generator) -> Tensor:
    grid = torch.arange(IMAGE_SIZE) % 4 < 2
    return _rgb(ink * (grid[:, None] & grid))


RENDERINGS = {
    "upright": Rendering(_upright, "a white digit {} on black."),
    "inverted": Rendering(_inverted, "a black digit {} on white."),
    "coloured": Rendering(_coloured, "a coloured digit {}."),
    "noisy": Rendering(_noisy, "a noisy photo of the digit {}."),
    "rotated": Rendering(_upright, "a rotated photo of the digit {}.", angle=30),
    "blurred": Rendering(_blurred, "a blurry photo of the digit {}."),
    "gradient": Rendering(_gradient, "the digit {} on a smooth background."),
    "low_contrast": Rendering(_low_contrast),
    "striped": Rendering(_striped),
    "occluded": Rendering(_occluded),
    "speckled": Rendering(_speckled),
    "sheared": Rendering(_upright, shear=0.5),
    "outlined": Rendering(_outlined),
    "dotted": Rendering(_dotted),
}


def render(digits: Tensor, rendering: Rendering, g: torch.Generator) -> Tensor:
    """Draws (n, 8, 8) digits, each with a small random rotation, size and place, as (n, 3, 32, 32) images."""
    n = len(digits)

    def jitter(amount: float) -> Tensor:
        return amount * (2 * torch.rand(n, generator=g) - 1)

    angle, scale, shear = torch.deg2rad(jitter(rendering.angle)), 1 + jitter(0.08), jitter(rendering.shear)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    affine = torch.stack([cos, shear - sin, jitter(0.06), sin, cos, jitter(0.06)], dim=1).view(n, 2, 3)
    large = F.interpolate(digits[:, None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
    grid = F.affine_grid(affine, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    ink = F.grid_sample(large.clamp(0, 1), grid, align_corners=False)
    return rendering.paint(ink, g).clamp(0, 1)


# Text: one token a word.


class DigitsTokenizer:
    """Word tokenizer for the demo's captions, called as open_clip's are: strings in, (n, context) ids out."""

    _WORD = re.compile(r"[a-z]+|\d|\.")
    _PAD, _START, _UNKNOWN = 0, 1, 2

    def __init__(self) -> None:
        captions = [r.caption for r in RENDERINGS.values() if r.caption]
        texts = [*TEMPLATES, *captions, *WORDS, *map(str, range(10))]
        words = sorted({word for text in texts for word in self._WORD.findall(text)})
        self._ids = {word: i for i, word in enumerate(words, start=3)}
        self._end = 3 + len(words)  # the largest id: open_clip pools the text at its arg max
        self.vocab_size = self._end + 1

    def __call__(self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
        """Token ids of each text, cut and padded to ``context_length``."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), context_length), self._PAD)
        for row, text in zip(tokens, texts, strict=True):
            words = [self._ids.get(word, self._UNKNOWN) for word in self._WORD.findall(text.lower())]
            ids = [self._START, *words[: context_length - 2], self._end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# Pre-training.


def _model_config() -> dict[str, Any]:
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "width": 96,
            "head_width": 32,
            "layers": 4,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": DigitsTokenizer().vocab_size,
            "width": 64,
            "heads": 2,
            "layers": 3,
        },
    }


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the pre-trained model; a change of it, or of this file, pre-trains anew."""

    steps: int = 600
    batch_size: int = 126
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 50
    word_share: float = 1 / 1200  # of the captions: "seven", else "7"
    seed: int = 0
    test_digits: int = 597
    model: dict[str, Any] = field(default_factory=_model_config)

    def key(self) -> str:
        """Names the cache entry."""
        text = json.dumps(asdict(self), sort_keys=True).encode() + Path(__file__).read_bytes()
        return hashlib.sha256(text).hexdigest()[:12]


@dataclass(frozen=True)
class Digits:
    """(n, 8, 8) images in [0, 1] and (n,) labels."""

    images: Tensor
    labels: Tensor


def load_splits(test_digits: int = 597) -> tuple[Digits, Digits, Digits, Digits]:
    """Disjoint, stratified sets of digits: for pre-training, for fine-tuning, for selection, for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    pretrain, rest = train_test_split(torch.arange(len(labels)), train_size=900, stratify=labels, random_state=0)
    tune, test = train_test_split(rest, train_size=300, stratify=labels[rest], random_state=0)
    tune, select = train_test_split(tune, train_size=200, stratify=labels[tune], random_state=0)
    first, second, third, fourth = (Digits(images[i], labels[i]) for i in (pretrain, tune, select, test[:test_digits]))
    return first, second, third, fourth


def _normalise(images: Tensor) -> Tensor:
    """What open_clip's preprocessing does after it has scaled an image to [0, 1]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (images - mean) / std


def _pretraining_batches(digits: Digits, recipe: Recipe) -> Iterator[tuple[Tensor, list[str]]]:
    """Yields images, each rendering in equal share, and one caption for each."""
    g = torch.Generator().manual_seed(recipe.seed)
    seen = [r for r in RENDERINGS.values() if r.caption]
    per_rendering = recipe.batch_size // len(seen)
    for _ in range(recipe.steps):
        images: list[Tensor] = []
        captions: list[str] = []
        for rendering in seen:
            chosen = torch.randint(len(digits.labels), (per_rendering,), generator=g)
            images.append(render(digits.images[chosen], rendering, g))
            forms = (*TEMPLATES, rendering.caption, rendering.caption)
            form = torch.randint(len(forms), (per_rendering,), generator=g)
            as_word = torch.rand(per_rendering, generator=g) < recipe.word_share
            for label, f, word in zip(digits.labels[chosen].tolist(), form, as_word, strict=True):
                captions.append(forms[f].format(WORDS[label] if word else label))
        yield _normalise(torch.cat(images)), captions


def _contrastive_loss(model: torch.nn.Module, images: Tensor, captions: list[str], tokenize: DigitsTokenizer) -> Tensor:
    """CLIP's loss; images with the same caption are positives of each other, so no false negatives."""
    unique = sorted(set(captions))
    target = torch.tensor([unique.index(caption) for caption in captions])
    image_features, text_features, scale = model(images, tokenize(unique))
    logits = scale * image_features @ text_features.T
    owners = F.one_hot(target, len(unique)).T.float()
    owners = owners / owners.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, owners)) / 2


def pretrain(recipe: Recipe, digits: Digits) -> torch.nn.Module:
    """The demo's CLIP, pre-trained on rendered digits and captions."""
    torch.manual_seed(recipe.seed)
    model = open_clip.CLIP(**recipe.model)
    tokenize = DigitsTokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / recipe.warmup_steps) * (1 + math.cos(math.pi * step / recipe.steps)) / 2,
    )
    batches = _pretraining_batches(digits, recipe)
    bar = progress("pre-training the demo's CLIP (once)", recipe.steps, "step")
    for step, (images, captions) in enumerate(batches, 1):
        loss = _contrastive_loss(model, images, captions, tokenize)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
        if step % 100 == 0:
            say(f"step {step}/{recipe.steps}, loss {loss.item():.3f}")
    bar.close()
    return model


# The cache folder.


def write_images(folder: Path, digits: Digits, rendering: Rendering, seed: int) -> None:
    """Draws the digits into ``folder/<word>/<number>.png``."""
    images = render(digits.images, rendering, torch.Generator().manual_seed(seed))
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for label in digits.labels.unique().tolist():
        (folder / WORDS[label]).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(pixels, digits.labels.tolist(), strict=True)):
        Image.fromarray(image).save(folder / WORDS[label] / f"{i:04d}.png")


def _fill(folder: Path, recipe: Recipe) -> None:
    pretraining, tuning, selection, testing = load_splits(recipe.test_digits)
    images = folder / "images"
    write_images(images / "train", tuning, RENDERINGS[FINE_TUNED], seed=1)
    write_images(images / "select", selection, RENDERINGS[FINE_TUNED], seed=1 + len(RENDERINGS) + 1)
    say(f"drawing the demo's images (once): {len(RENDERINGS)} renderings")
    for i, (name, rendering) in enumerate(RENDERINGS.items()):
        write_images(images / ("val" if name == FINE_TUNED else name), testing, rendering, seed=2 + i)
    (folder / f"{MODEL_NAME}.json").write_text(json.dumps(recipe.model, indent=2))
    save_file(pretrain(recipe, pretraining).state_dict(), folder / f"{MODEL_NAME}.safetensors")


def prepare(cache: Path, recipe: Recipe | None = None) -> Path:
    """Makes the demo's folder under ``cache`` unless it is there, and registers its model with open_clip.

    The folder appears under its final name only when it is complete.
    """
    recipe = recipe or Recipe()
    folder = cache / f"digits-{recipe.key()}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
        unfinished.chmod(0o755)
        try:
            _fill(unfinished, recipe)
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    open_clip.add_model_config(folder / f"{MODEL_NAME}.json")
    return folder
