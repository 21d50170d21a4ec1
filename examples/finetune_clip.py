"""Fine-tune CLIP on folders of images with SAFT, in full, or both, and see what each keeps of the pre-trained model.

SAFT (Nguyen et al., ECCV 2024, arXiv 2407.03036) trains only the parameters whose mean downstream-loss gradient is
largest in magnitude: 0.1 % of both towers together, chosen once. Here that is two calls:

    mask = saft_kernels.select(model, batches, loss_fn, density=1e-3)
    optimizer = saft_kernels.SparseAdamW(model.named_parameters(), lr=lr, mask=mask)

The classes are prompts ("a photo of a seven.") that go through the text tower at every step; there is no new head. Both
methods share everything but the optimizer and its learning rate: loss, order of the data, cosine schedule with warm-up,
gradient clipping at 1.0.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from finetune_report import Run, count_by_part, print_tables, progress, replacing, save_figure, say, summarise
from PIL import Image, ImageOps
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import saft_kernels

METHODS = ("saft", "full")
# SAFT moves few parameters, so it needs larger steps. The demo's are chosen by accuracy on images of the training
# distribution that are neither trained on nor in any test set.
DEFAULT_LR = {"saft": 1e-4, "full": 1e-5}
DEMO_LR = {"saft": 1e-3, "full": 1e-4}
DEFAULT_TEMPLATE = "a photo of a {}."
OWN_WEIGHTS = ("hf-hub:", "local-dir:")  # of --model: open_clip ignores any others
RANDOM = "none"
MAX_GRAD_NORM = 1.0
MAX_LOGIT_SCALE = math.log(100)  # as open_clip's training
TEST_BATCH_SIZE = 128
TEST_PROMPTS = 256  # at once; training needs the gradient of all prompts
AUTOCAST = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

EPILOG = """\
--data DIR holds one folder per set of images, with one sub-folder per class, named as the class ("_" for a space):
  DIR/train/<class>/*.jpg     fine-tuning takes --shots of each class
  DIR/val/<class>/*.jpg       the test set in distribution
  DIR/<any>/<class>/*.jpg     every further folder is a shifted test set. A test set may hold some of the classes; it is
                              then scored among those.
  Names that begin with a dot are passed over, at every depth.
--templates are texts with {} for the class name, or one file with one text a line. A class is the mean of its texts'
features, so a step reads classes x templates prompts through the text tower, with gradients.

examples:
  # the demo: a small CLIP and handwritten digits, no download; a minute of pre-training the first time
  python finetune_clip.py

  # your photos: DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg; every further folder of DIR is a shifted test set
  python finetune_clip.py --model ViT-B-16 --pretrained openai --data DIR --shots 16 --output runs/photos \\
      --templates "a photo of a {}." --precision amp_bf16 --device cuda

  # SAFT alone, at half the density, over three draws of the 16 shots
  python finetune_clip.py --data DIR --model ViT-B-16 --pretrained openai --method saft --density 5e-4 --seed 0 1 2

  # go on after an interruption: the same arguments and --resume
  python finetune_clip.py --data DIR --model ViT-B-16 --pretrained openai --output runs/photos --resume

written to --output:
  results.json, results.png       accuracy, sizes and times of every run; the former grows run by run
  mask.safetensors                which parameters SAFT trains; `saft-kernels summary FILE --png PICTURE` draws it
  saft.safetensors                the fine-tune as a SparseDelta: what changed, for the command saft-kernels, too
  full.safetensors                every parameter
  METHOD.checkpoint.pt            for --resume; written after every epoch
  With several seeds the last four are in a folder per seed. A file is written whole or not at all.
"""


class InputError(Exception):
    """Something the user gave does not fit; printed as one line."""


# ---- arguments ----


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see --help\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def _number(kind: type[int] | type[float], accepts: Callable[[float], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


_count = _number(int, lambda n: n >= 1, "a whole number of at least 1")
_whole = _number(int, lambda n: n >= 0, "a whole number of at least 0")
_rate = _number(float, lambda x: 0 < x < math.inf, "a positive number")
_decay = _number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
_density = _number(float, lambda x: 0 < x <= 1, "a number in (0, 1] (0.001 trains 0.1 % of the parameters)")


def _lr(text: str) -> dict[str, float]:
    method, equals, number = text.rpartition("=")
    if equals and method not in METHODS:
        raise argparse.ArgumentTypeError(f"expected NUMBER, saft=NUMBER or full=NUMBER, got {text!r}")
    return dict.fromkeys([method] if equals else METHODS, _rate(number))


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"expected a device of this machine such as cpu, got {text!r}: {reason}"
        ) from None


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saft_kernels"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(description=__doc__, epilog=EPILOG, formatter_class=_Formatter)
    lrs = f"default {_pairs(DEFAULT_LR)}; in the demo {_pairs(DEMO_LR)}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument_group("model and data (without --data: the digits demo)").add_argument
    add("--model", help="an open_clip model, as in open_clip.list_models(), or hf-hub:NAME, or local-dir:PATH")
    add("--pretrained", help="one of the model's pre-trained tags, or a checkpoint file, or none: random weights")
    add("--data", type=Path, metavar="DIR", help="folder with train/, val/ and shifted test sets; see below")
    add(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help=f"prompts, or a file of them; see below; default {DEFAULT_TEMPLATE!r}",
    )
    add("--cache-dir", type=Path, default=_default_cache(), metavar="DIR", help="for the demo's model and images")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="what to run")
    add("--shots", type=_whole, default=16, help="training images per class; 0: all")
    add("--density", type=_density, default=1e-3, help="share of the parameters that SAFT trains")
    add("--epochs", type=_count, default=20, help="passes over the training images")
    add("--lr", type=_lr, nargs="+", metavar="LR", help=f"one for all methods, or saft=LR full=LR; {lrs}")
    add("--batch-size", type=_count, default=32, help="images per step")
    add("--weight-decay", type=_decay, default=0.01, help="of the trained parameters")
    add("--warmup", type=_density, default=0.1, help="share of the steps in which the learning rate rises")
    add("--seed", type=_whole, nargs="+", default=[0], help="for the shots and the order; several: mean and deviation")
    add = parser.add_argument_group("running").add_argument
    add("--precision", choices=AUTOCAST, default="fp32", help="of the forward and backward pass")
    add("--device", type=_device, default=device, help="of torch")
    add("--workers", type=_whole, help="processes that read images; default 0 in the demo, else 2")
    add("--output", type=Path, default=Path("finetune-output"), metavar="DIR", help="for the results")
    add("--resume", action="store_true", help="go on from the last checkpoints in --output")
    return parser


def _pairs(values: Mapping[str, float]) -> str:
    return " ".join(f"{key}={value:g}" for key, value in values.items())


# ---- images ----


class ImageSet(Dataset[tuple[Any, Any]]):
    """Image files and labels; the transform is open_clip's."""

    def __init__(self, files: Sequence[tuple[Path, int]], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files = list(files)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                return self.transform(as_rgb(image)), label
        except Exception as error:  # each format's decoder raises its own. It was readable at the start
            raise InputError(f"{path}: expected a readable image, got {error}; replace or remove the file") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Upright, as cameras mean it, and with 16 bits scaled to 8, which `convert` would clip to white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def check_images(files: Sequence[Path]) -> None:
    """Decodes each, a JPEG at an eighth of its size. Raises InputError with all that are unreadable."""

    def fault(path: Path) -> str | None:
        try:
            with Image.open(path) as image:
                image.draft("RGB", (1, 1))
                as_rgb(image)
        except Exception as error:
            return f"{path}: expected a readable image, got {error}"
        return None

    threads = os.cpu_count() or 1
    with progress("checking images", len(files), "image") as bar, ThreadPoolExecutor(threads) as pool:
        faults = []
        for found in pool.map(fault, files):
            bar.update()
            if found is not None:
                faults.append(found)
    if faults:
        number, it = (f"{len(faults)} images:\n  ", "them") if len(faults) > 1 else ("", "the file")
        separator = "\n  "
        raise InputError(f"{number}{separator.join(faults)}; replace or remove {it}")


def is_data(file: Path, folder: Path) -> bool:
    """Whether it is a file and, from the folder down, not hidden (.ipynb_checkpoints, macOS's ._name.jpg)."""
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def scan(folder: Path, passed_over: Counter[str]) -> dict[str, list[Path]]:
    """Image files by class: one sub-folder per class, images anywhere below it, but nothing hidden.

    What else is there is counted by kind in ``passed_over``.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with one sub-folder per class, found none; see --help")
    classes: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            files = sorted(file for file in entry.rglob("*") if is_data(file, entry))
            classes[entry.name] = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
            others = Counter(f.suffix.lower() or f.name for f in files if f.suffix.lower() not in IMAGE_SUFFIXES)
            if not classes[entry.name]:
                kinds = " ".join(sorted(IMAGE_SUFFIXES))
                got = _counts(others) or "none"
                raise InputError(f"{entry}: expected images ({kinds}), got {got}; add some or remove the folder")
            passed_over.update(others)
    if not classes:
        raise InputError(f"{folder}: expected one sub-folder per class, got none; remove it, or see --help")
    return classes


def _counts(numbers: Mapping[str, int]) -> str:
    """Such as "3 .heic, 1 .txt"."""
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))


@dataclass(frozen=True)
class ImageFolders:
    """What --data holds. The test sets are val, then the shifted ones by name."""

    classes: list[str]
    train: list[tuple[Path, int]]
    tests: dict[str, list[tuple[Path, int]]]
    passed_over: dict[str, int]  # files that are no images, by suffix

    def training_images(self) -> dict[str, int]:
        """How many each class has."""
        numbers = Counter(label for _, label in self.train)
        return {name: numbers[label] for label, name in enumerate(self.classes)}

    def few_shot(self, shots: int, seed: int) -> list[tuple[Path, int]]:
        """``shots`` random training images of each class (all where it has fewer, or with 0)."""
        rng = random.Random(seed)
        chosen: list[tuple[Path, int]] = []
        for label in range(len(self.classes)):
            files = [item for item in self.train if item[1] == label]
            chosen += rng.sample(files, min(shots or len(files), len(files)))
        return chosen


def read_folders(data: Path) -> ImageFolders:
    """Lists the images under ``data`` and checks that the test sets have classes of the training set."""
    if not data.is_dir():
        raise InputError(f"--data {data}: expected a folder with train/ and val/, found no such folder")
    passed_over: Counter[str] = Counter()
    train = scan(data / "train", passed_over)
    classes = list(train)
    if len(classes) < 2:
        raise InputError(f"{data / 'train'}: expected two classes or more, got {classes[0]!r} alone; add another")
    tests = {}
    others = [d.name for d in data.iterdir() if d.is_dir() and not d.name.startswith(".")]
    for name in ["val", *sorted(set(others) - {"train", "val"})]:
        found = scan(data / name, passed_over)
        for unknown in found.keys() - train.keys():
            near = difflib.get_close_matches(unknown, classes, n=1)
            hint = f"rename it to {near[0]!r}" if near else "remove it, or add training images"
            raise InputError(f"{data / name / unknown}: expected a class of {data / 'train'}, got {unknown!r}; {hint}")
        tests[name] = [(file, classes.index(c)) for c, files in found.items() for file in files]
    return ImageFolders(classes, [(f, i) for i, c in enumerate(classes) for f in train[c]], tests, passed_over)


# ---- model ----


@dataclass
class Task:
    """A model, its preprocessing, and the classes as prompts."""

    model: nn.Module
    train_transform: Callable[[Image.Image], Tensor]
    test_transform: Callable[[Image.Image], Tensor]
    prompts: Tensor  # (classes, templates, context) token ids
    folders: ImageFolders
    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.parameters = dict(self.model.named_parameters())
        self.numel = sum(p.numel() for p in self.parameters.values())

    def reset(self) -> None:
        """Back to the pre-trained weights."""
        self.model.load_state_dict(self.base)
        self.model.eval()

    def autocast(self) -> torch.autocast:
        """The forward pass's precision."""
        dtype = AUTOCAST[self.args.precision]
        return torch.autocast(self.args.device.type, dtype, enabled=dtype is not None)

    def class_features(self, prompts: Tensor) -> Tensor:
        """Mean of the normalised text features over the templates, normalised: (classes, embed_dim)."""
        features = self.model.encode_text(prompts.flatten(0, 1), normalize=True)
        return F.normalize(features.unflatten(0, prompts.shape[:2]).mean(dim=1), dim=-1)

    def logits(self, images: Tensor, class_features: Tensor) -> Tensor:
        """CLIP's scaled cosine similarities: (images, classes)."""
        features = self.model.encode_image(images.to(self.args.device, non_blocking=True), normalize=True)
        return self.model.logit_scale.exp() * features @ class_features.T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy; its gradient reaches both towers."""
        with self.autocast():
            logits = self.logits(images, self.class_features(self.prompts))
        return F.cross_entropy(logits.float(), labels.to(self.args.device))

    def loader(
        self, files: Sequence[tuple[Path, int]], batch_size: int, train: bool = False
    ) -> DataLoader[tuple[Any, Any]]:
        """Batches of images and labels; for training in random order and with open_clip's training transform."""
        images = ImageSet(files, self.train_transform if train else self.test_transform)
        pin = self.args.device.type == "cuda"
        return DataLoader(images, batch_size, shuffle=train, num_workers=self.args.workers, pin_memory=pin)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy in percent on every test set, each scored among the classes it holds."""
        self.model.eval()
        tests = self.folders.tests
        bar = progress("evaluating", sum(map(len, tests.values())), "image")
        accuracy = {}
        with bar, self.autocast():
            chunk = max(1, TEST_PROMPTS // self.prompts.shape[1])
            text = torch.cat([self.class_features(p) for p in self.prompts.split(chunk)])
            for name, files in tests.items():
                present = torch.tensor(sorted({label for _, label in files}))
                correct = 0
                for images, labels in self.loader(files, TEST_BATCH_SIZE):
                    predicted = present[self.logits(images, text).cpu()[:, present].argmax(dim=1)]
                    correct += int((predicted == labels).sum())
                    bar.update(len(labels))
                accuracy[name] = 100 * correct / len(files)
        return accuracy


def read_templates(given: list[str]) -> list[str]:
    """The --templates argument: prompts, or a file with one a line."""
    if len(given) == 1 and "{" not in given[0]:
        file = given[0]
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"a file that is no UTF-8 text: {error}"
            raise InputError(f"--templates {file}: expected a text with {{}} or a file of them, got {reason}") from None
        given = [line.strip() for line in lines if line.strip()]
        if not given:
            raise InputError(f"--templates {file}: expected a text with {{}} a line, got an empty file")
    for template in given:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise InputError(
                f"--templates: expected one {{}} for the class name, and no other braces, in each, got {template!r}"
            )
    return given


def check_model(args: argparse.Namespace) -> None:
    """Raises InputError where --model and --pretrained do not go together."""
    if args.model.startswith(OWN_WEIGHTS):
        if args.pretrained not in (None, RANDOM):
            raise InputError(
                f"--pretrained {args.pretrained}: expected none beside --model {args.model}, which has weights of its "
                "own; leave it out, or name the architecture with --model to use the checkpoint"
            )
        return
    if args.model not in open_clip.list_models():
        near = difflib.get_close_matches(args.model, open_clip.list_models(), n=3, cutoff=0.4)
        raise InputError(f"--model {args.model}: expected an open_clip model such as {', '.join(near) or 'ViT-B-16'}")
    tags = open_clip.list_pretrained_tags_by_model(args.model)
    if args.pretrained not in (RANDOM, *tags) and not os.path.isfile(args.pretrained or ""):
        raise InputError(
            f"--pretrained {args.pretrained}: expected a checkpoint file or one of {', '.join(tags) or '(no tags)'}; "
            f"or {RANDOM}, for random weights"
        )


def load_model(args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """open_clip's model and its training and evaluation transforms."""
    own, random_weights = args.model.startswith(OWN_WEIGHTS), args.pretrained == RANDOM
    pretrained = None if random_weights else args.pretrained
    config = None if own or pretrained is None else open_clip.get_pretrained_cfg(args.model, pretrained)
    how: dict[str, Any] = {"load_weights": False, "pretrained_text": False} if random_weights else {}
    torch.manual_seed(0)  # --resume needs the same random weights
    logging.disable(logging.ERROR)
    try:
        return open_clip.create_model_and_transforms(
            args.model,
            pretrained,
            device=args.device,
            force_quick_gelu=bool((config or {}).get("quick_gelu")),
            require_pretrained=not random_weights,  # else open_clip takes random ones, and only warns
            **how,
        )
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"--model {args.model}" + ("" if own else f" --pretrained {args.pretrained}")
        raise InputError(f"{what}: expected a checkpoint of this model, could not load it: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)


# ---- fine-tuning ----


def select_mask(task: Task, files: Sequence[tuple[Path, int]]) -> saft_kernels.SparseMask:
    """The paper's mask: the top `density` of all parameters of both towers by |mean gradient| over ``files``."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        # select() weighs batches equally; this weighs images equally, also in a short last batch
        return factor * len(batch[1]) * task.loss(*batch)

    # a constant factor leaves the ranking as it is, and lifts gradients into fp16's range
    factor = (2**10 if task.args.precision == "amp_fp16" else 1) / task.args.batch_size
    batches = task.loader(files, task.args.batch_size)
    return saft_kernels.select(task.model, batches, loss_fn, density=task.args.density)


def warmup_cosine(total: int, warmup: int) -> Callable[[int], float]:
    """Factor of the learning rate per step: a linear rise, then half a cosine to zero."""
    return lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / total)) / 2)


class FineTuning:
    """One method at one seed: its optimizer and schedule, its epochs, its files."""

    def __init__(self, task: Task, method: str, seed: int) -> None:
        self.task, self.method, self.seed, self.args = task, method, seed, task.args
        folder = run_folder(task.args, seed)
        self.mask_file, self.values_file = folder / "mask.safetensors", folder / f"{method}.safetensors"
        self.checkpoint_file = folder / f"{method}.checkpoint.pt"
        self.epoch, self.loss = 0, math.nan
        self.times: list[tuple[float, float]] = []  # ms per step, and of it in the optimizer
        saved = self._read_checkpoint()
        files = task.folders.few_shot(self.args.shots, seed)
        task.reset()
        self.mask = self._mask(files, resumed=saved is not None) if method == "saft" else None
        self.loader = task.loader(files, self.args.batch_size, train=True)
        lr, decay = self.args.lr[method], self.args.weight_decay
        if self.mask is not None:
            optimizer = saft_kernels.SparseAdamW(
                task.model.named_parameters(), lr=lr, weight_decay=decay, mask=self.mask
            )
            self.optimizer: torch.optim.Optimizer = optimizer
            self.originals = saft_kernels.Originals(optimizer)
        else:
            self.optimizer = torch.optim.AdamW(task.model.named_parameters(), lr=lr, weight_decay=decay)
        total = self.args.epochs * len(self.loader)
        factor = warmup_cosine(total, max(1, round(self.args.warmup * total)))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.scaler = torch.amp.GradScaler(self.args.device.type, enabled=self.args.precision == "amp_fp16")
        if saved is not None:
            self._restore(saved)

    def _mask(self, files: Sequence[tuple[Path, int]], resumed: bool) -> saft_kernels.SparseMask:
        try:
            if resumed:
                return saft_kernels.SparseMask.load(self.mask_file)
            mask = select_mask(self.task, files)
        except (OSError, ValueError) as error:
            raise InputError(str(error)) from error
        self.mask_file.parent.mkdir(parents=True, exist_ok=True)
        mask.save(self.mask_file)
        return mask

    def run(self) -> Run:
        """Trains the epochs that are left, saves the values, evaluates."""
        name, steps = f"{self.method}, seed {self.seed}", len(self.loader)
        with progress(name, self.args.epochs * steps, "step", initial=self.epoch * steps) as bar:
            while self.epoch < self.args.epochs:
                self._train_epoch(bar)
                self._save_checkpoint()
                say(f"{name}: epoch {self.epoch}/{self.args.epochs}, loss {self.loss:.3f}")
        if isinstance(self.optimizer, saft_kernels.SparseAdamW):
            saft_kernels.SparseDelta.from_optimizer(self.optimizer, self.originals).save(self.values_file)
        else:
            with replacing(self.values_file) as file:
                save_file(self.values(), file)
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        step_ms, optimizer_ms = zip(*self.times, strict=True)
        return Run(
            self.method,
            self.seed,
            self.task.evaluate(),
            trained_parameters=self.task.numel if self.mask is None else self.mask.k,
            optimizer_state_bytes=sum(t.numel() * t.element_size() for t in state),
            ms_per_step=statistics.median(step_ms),
            ms_per_optimizer_step=statistics.median(optimizer_ms),
            train_loss=self.loss,
            selected=None if self.mask is None else count_by_part({n: i.numel() for n, i in self.mask.items()}),
        )

    def _train_epoch(self, bar: Any) -> None:
        # Everything random in an epoch follows from its number, so a resumed run needs no saved generator.
        torch.manual_seed(1_000_003 * self.seed + self.epoch)
        self.task.model.train()
        for module in self.task.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # running statistics are not parameters: no mask covers them
        losses = []
        for images, labels in self.loader:
            losses.append(self._step(images, labels))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{self.scheduler.get_last_lr()[0]:.1e}")
        self.loss = statistics.fmean(losses)
        self.epoch += 1

    def _step(self, images: Tensor, labels: Tensor) -> float:
        start = self._now()
        loss = self.task.loss(images, labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.task.model.parameters(), MAX_GRAD_NORM)
        before = self._now()
        self.scaler.step(self.optimizer)
        after = self._now()
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the scaler met an inf and skipped the step
            self.scheduler.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.task.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.times.append((1e3 * (self._now() - start), 1e3 * (after - before)))
        return loss.item()

    def _now(self) -> float:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        return time.perf_counter()

    def values(self) -> dict[str, Tensor]:
        """The fine-tuned values: of the selected elements with their flat indices, or every parameter."""
        parameters = {name: p.detach() for name, p in self.task.parameters.items()}
        if self.mask is None:
            return {name: p.cpu().contiguous() for name, p in parameters.items()}
        chosen = {name: index for name, index in self.mask.items() if index.numel()}
        picked = saft_kernels.gather(
            [parameters[name] for name in chosen], [i.to(self.args.device) for i in chosen.values()]
        )
        values = {f"{name}.values": v.cpu() for name, v in zip(chosen, picked, strict=True)}
        return {f"{name}.indices": index for name, index in chosen.items()} | values

    def _settings(self) -> dict[str, Any]:
        return {**settings(self.args), "lr": self.args.lr[self.method], "seed": self.seed, "method": self.method}

    def _save_checkpoint(self) -> None:
        parts = ("optimizer", "scheduler", "scaler")
        state: dict[str, Any] = {part: getattr(self, part).state_dict() for part in parts}
        state |= {name: getattr(self, name) for name in ("epoch", "loss", "times")}
        with replacing(self.checkpoint_file) as file:
            torch.save(state | {"values": self.values(), "settings": self._settings()}, file)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, if there is one and it is asked for."""
        file = self.checkpoint_file
        if not self.args.resume or not file.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zipfile, pickle and torch each raise their own
            raise InputError(f"{file}: expected a checkpoint of this script, cannot read it; drop --resume") from error
        for name, value in self._settings().items():
            before = saved["settings"].get(name)
            if before != value:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"--resume: expected {flag} {before}, with which {file} was made, got {flag} {value}; "
                    "repeat the arguments, or start anew without --resume"
                )
        return saved

    def _restore(self, saved: Mapping[str, Any]) -> None:
        for part in ("optimizer", "scheduler", "scaler"):
            getattr(self, part).load_state_dict(saved[part])
        self.epoch, self.loss, self.times = saved["epoch"], saved["loss"], saved["times"]
        values = {name: value.to(self.args.device) for name, value in saved["values"].items()}
        for name, parameter in self.task.parameters.items():
            if self.mask is None:
                parameter.detach().copy_(values[name])
            elif f"{name}.indices" in values:
                saft_kernels.scatter_([parameter.detach()], [values[f"{name}.indices"]], [values[f"{name}.values"]])


def run_folder(args: argparse.Namespace, seed: int) -> Path:
    """Where a seed's files go: --output itself when it is the only one."""
    folder: Path = args.output if len(args.seed) == 1 else args.output / f"seed{seed}"
    return folder


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide a run's result, as plain values."""
    names = ("model", "pretrained", "data", "templates", "shots", "density", "epochs", "batch_size", "weight_decay",
             "warmup", "precision")  # fmt: skip
    plain = {name: getattr(args, name) for name in names}
    return plain | {"data": str(args.data.resolve())}


def save_results(file: Path, task: Task, runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> None:
    """Arguments, versions, every run and the summary."""
    results = {
        "arguments": settings(task.args) | {"lr": task.args.lr, "seed": task.args.seed, "method": task.args.method},
        "device": torch.cuda.get_device_name(task.args.device) if task.args.device.type == "cuda" else "cpu",
        "versions": {
            "saft_kernels": saft_kernels.__version__,
            "open_clip": open_clip.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "classes": task.folders.classes,
        "training_images": {name: min(n, task.args.shots or n) for name, n in task.folders.training_images().items()},
        "test_images": {name: len(files) for name, files in task.folders.tests.items()},
        "parameters": task.numel,
        "parameters_by_part": count_by_part({n: p.numel() for n, p in task.parameters.items()}),
        "complete": len(runs) == 1 + len(task.args.method) * len(task.args.seed),
        "runs": [
            asdict(run) | {"in_distribution": run.in_distribution, "mean_shifted": run.mean_shifted} for run in runs
        ],
        "summary": rows,
    }
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


# ---- main ----


def use_digits(args: argparse.Namespace, recipe: Any) -> Callable[[list[str]], Tensor]:
    """Points the arguments at the demo's model and images; returns its tokenizer."""
    import digits_demo

    for name in ("model", "pretrained"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} {getattr(args, name)}: expected --data DIR with it, got none; see --help")
    folder = digits_demo.prepare(args.cache_dir, recipe)
    args.data, args.model = folder / "images", digits_demo.MODEL_NAME
    args.pretrained = str(folder / f"{digits_demo.MODEL_NAME}.safetensors")
    args.templates = args.templates or list(digits_demo.TEMPLATES)
    return digits_demo.DigitsTokenizer()


def load_task(args: argparse.Namespace, recipe: Any) -> Task:
    """Reads folders, model and prompts, after filling in the arguments that depend on others."""
    demo = args.data is None
    if args.templates is not None:  # before the demo pre-trains
        args.templates = read_templates(args.templates)
    tokenize = use_digits(args, recipe) if demo else None
    if args.model is None:
        raise InputError("--model: expected an open_clip model with --data, got none; for example --model ViT-B-16")
    args.templates = args.templates or [DEFAULT_TEMPLATE]
    args.lr = {
        method: lr for given in [DEMO_LR if demo else DEFAULT_LR, *(args.lr or [])] for method, lr in given.items()
    }
    if args.workers is None:
        args.workers = 0 if demo else 2
    check_model(args)
    folders = read_folders(args.data)
    if folders.passed_over:
        print(f"not read as images: {_counts(folders.passed_over)}", flush=True)
    few = [f"{name!r} ({n})" for name, n in folders.training_images().items() if n < args.shots]
    if few:
        more = f" and {len(few) - 5} more classes" if len(few) > 5 else ""
        print(f"--shots {args.shots}: fewer training images in {', '.join(few[:5])}{more}; all are used", flush=True)
    if not demo:  # else they are its own
        used = {file for seed in args.seed for file, _ in folders.few_shot(args.shots, seed)}
        check_images(sorted(used.union(*([file for file, _ in files] for files in folders.tests.values()))))
    model, train_transform, test_transform = load_model(args)
    tokenize = tokenize or open_clip.get_tokenizer(args.model)
    names = [name.replace("_", " ") for name in folders.classes]
    texts = [template.replace("{}", name) for name in names for template in args.templates]
    prompts = tokenize(texts).unflatten(0, (len(names), len(args.templates))).to(args.device)
    return Task(model, train_transform, test_transform, prompts, folders, args)


def check_output(args: argparse.Namespace) -> None:
    """Raises InputError where the files cannot be written. Leaves nothing behind."""
    names = ["mask.safetensors", *(f"{m}{end}" for m in args.method for end in (".safetensors", ".checkpoint.pt"))]
    folders = [run_folder(args, seed) for seed in args.seed]
    files = [args.output / "results.json", args.output / "results.png", *(f / name for f in folders for name in names)]
    for folder in dict.fromkeys([args.output, *folders]):
        made: list[Path] = []
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(
                f"--output: expected a folder to write to, got {folder}: {error.strerror}; name another"
            ) from None
        finally:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
    for file in files:
        if file.is_dir():
            raise InputError(f"--output: expected to write a file {file}, got a folder; name another, or remove it")


def prepare_output(args: argparse.Namespace) -> None:
    """With --resume there must be a checkpoint; without it, those of an earlier run are void."""
    found = [run_folder(args, seed) / f"{method}.checkpoint.pt" for seed in args.seed for method in args.method]
    found = [file for file in found if file.exists()]
    if args.resume and not found:
        first = run_folder(args, args.seed[0]) / f"{args.method[0]}.checkpoint.pt"
        raise InputError(
            f"--resume: expected a checkpoint such as {first}, found none: nothing to resume; "
            "run without --resume, or check --output, --method and --seed"
        )
    if not args.resume:
        for file in found:
            file.unlink()
    args.output.mkdir(parents=True, exist_ok=True)


def run(args: argparse.Namespace, recipe: Any, console: Console) -> None:
    """Zero-shot, then every method at every seed, then the report."""
    args.seed, args.method = list(dict.fromkeys(args.seed)), list(dict.fromkeys(args.method))
    check_output(args)
    if args.resume:
        prepare_output(args)
    task = load_task(args, recipe)
    console.print(
        f"{args.model}: {task.numel:,} parameters; {len(task.folders.classes)} classes, "
        f"{len(task.folders.few_shot(args.shots, args.seed[0]))} training images, {len(task.folders.tests)} test sets",
        soft_wrap=True,
    )
    runs = [Run("zero-shot", None, task.evaluate())]
    if not args.resume:  # else more than this is there already
        prepare_output(args)
        save_results(args.output / "results.json", task, runs, summarise(runs))
    for method in args.method:
        for seed in args.seed:
            runs.append(FineTuning(task, method, seed).run())
            rows = summarise(runs)
            save_results(args.output / "results.json", task, runs, rows)
    save_figure(args.output / "results.png", rows, runs)
    print_tables(rows, list(task.folders.tests), console)
    console.print(
        f"written to {args.output}: results.json, results.png, the mask and the fine-tuned values", soft_wrap=True
    )


def main(argv: Sequence[str] | None = None, recipe: Any = None) -> int:
    """Runs the command line. ``recipe`` replaces the demo's `digits_demo.Recipe`."""
    args = build_parser().parse_args(argv)
    try:
        run(args, recipe, Console())
    except InputError as error:
        # a DataLoader worker wraps the message in its traceback
        print(f"error: {str(error).strip().rpartition('InputError: ')[2]}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; repeat the command with --resume to go on from the last epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
