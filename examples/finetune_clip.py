"""Fine-tune CLIP on folders of images with SAFT and other methods, and see what each gains and what each forgets.

SAFT (Nguyen et al., ECCV 2024, arXiv 2407.03036) trains only the parameters whose mean downstream-loss gradient is
largest in magnitude: 0.1 % of both towers together, chosen once. Here that is two calls:

    mask = saft_kernels.select(model, batches, loss_fn, density=1e-3)
    optimizer = saft_kernels.SparseAdamW(model.named_parameters(), lr=lr, mask=mask)

The classes are prompts ("a photo of a seven.") that go through the text tower at every step; there is no new head, but
in linear_probe and lp_ft, where it starts as the prompts' features. All methods share everything but what is trained
and the learning rate: loss, order of the data, cosine schedule with warm-up, gradient clipping at 1.0.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetuning
import open_clip
import torch
import torch.nn.functional as F
from finetuning import Example, describe, whole
from frontier import SELECT, VAL, InputError, progress
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

# SAFT moves few parameters, so it needs larger steps.
DEFAULT_LR = {"saft": 1e-4, "full": 1e-5, "random": 1e-4, "linear_probe": 1e-4, "lp_ft": 1e-5, "lora": 1e-4}
DEMO_LR = {"saft": 1e-3, "full": 1e-4, "random": 1e-2, "linear_probe": 1e-3, "lp_ft": 1e-4, "lora": 3e-3}
DEFAULT_TEMPLATE = "a photo of a {}."
OWN_WEIGHTS = ("hf-hub:", "local-dir:")  # of --model: open_clip ignores any others
RANDOM = "none"
MAX_LOGIT_SCALE = math.log(100)  # as open_clip's training
KEPT_IMAGES = 2**28  # bytes of decoded test images that stay in memory between tests
SELECT_SHARE, SELECT_MOST = 0.2, 10  # of the training images of a class, where there is no select/
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

EPILOG = f"""\
--data DIR holds one folder per set of images, with one sub-folder per class, named as the class ("_" for a space):
  DIR/train/<class>/*.jpg     fine-tuning takes --shots of each class
  DIR/select/<class>/*.jpg    what learning rates and alphas are chosen by; without it, {SELECT_SHARE:.0%} of train/ is
                              kept for that, at most {SELECT_MOST} images of a class, always the same ones
  DIR/val/<class>/*.jpg       the test set in distribution
  DIR/<any>/<class>/*.jpg     every further folder is a shifted test set. A test set may hold some of the classes; it is
                              then scored among those. Folders 0, 1, 2, ... are the classes by the order of their names.
  Names that begin with a dot are passed over, at every depth.
--class-names is a file with a folder and its class name a line ("n01440764 tench"), or imagenet: open_clip's names for
the 1,000 folders of ImageNet.
--templates are texts with {{}} for the class name, or one file with one text a line. A class is the mean of its texts'
features, so a step reads classes x templates prompts through the text tower, with gradients.

examples:
  # the demo: a small CLIP and handwritten digits, no download; a minute of pre-training the first time
  python finetune_clip.py

  # your photos: DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg; every further folder of DIR is a shifted test set
  python finetune_clip.py --model ViT-B-16 --pretrained openai --data DIR --shots 16 --output runs/photos \\
      --templates "a photo of a {{}}." --precision amp_bf16 --device cuda

  # a frontier: several methods, rates and densities over three draws of the 16 shots
  python finetune_clip.py --data DIR --model ViT-B-16 --pretrained openai --method saft random full linear_probe \\
      --density 1e-3 1e-2 --lr saft=1e-4,3e-4,1e-3 full=3e-6,1e-5,3e-5 --wise 0.25 0.5 0.75 --seed 0 1 2

  # ImageNet and its shifts: link the folders of ImageNet's train and val, of ImageNet-V2, -Sketch, -A and -R into DIR
  #   DIR/train  DIR/val  DIR/v2  DIR/sketch  DIR/a  DIR/r
  python finetune_clip.py --model ViT-B-16 --pretrained openai --data DIR --shots 16 --class-names imagenet \\
      --method saft full --lr saft=3e-5,1e-4,3e-4 full=1e-6,3e-6,1e-5 --seed 0 1 2 --precision amp_bf16 --device cuda \\
      --workers 16 --output runs/imagenet

  # go on after an interruption, or add methods, rates, densities and seeds: the arguments and --resume
  python finetune_clip.py --data DIR --model ViT-B-16 --pretrained openai --output runs/photos --resume

written to --output:
  results.jsonl                   a line for everything that was tested, as soon as it is known
  results.md, .csv, .png          what they come to; `frontier.py` makes them of any results.jsonl
  seedN/*.mask.safetensors        which parameters are trained; `saft-kernels summary FILE --png PICTURE` draws it
  seedN/METHOD[-DENSITY].safetensors
                                  the fine-tune as a SparseDelta, of this seed's best rate on the selection split: for
                                  the command saft-kernels, too ("head" is the classifier of a probe)
  seedN/*.checkpoint.pt           for --resume; written after every epoch, removed at the end
  A file is written whole or not at all.
"""


# ---- arguments ----


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saft_kernels"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    lrs = f"{describe(DEFAULT_LR)}; in the demo {describe(DEMO_LR)}"
    parser = finetuning.build_parser(__doc__, EPILOG, lrs, ("global", "tower", "tensor", "row"))
    add = parser.add_argument_group("model and data (without --data: the digits demo)").add_argument
    add("--model", help="an open_clip model, as in open_clip.list_models(), or hf-hub:NAME, or local-dir:PATH")
    add("--pretrained", help="one of the model's pre-trained tags, or a checkpoint file, or none: random weights")
    add("--data", type=Path, metavar="DIR", help="folder with train/, val/ and shifted test sets; see below")
    add("--class-names", metavar="FILE", help="what the folders are called in prompts; see below; default their names")
    add(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help=f"prompts, or a file of them; see below; default {DEFAULT_TEMPLATE!r}",
    )
    add("--workers", type=whole, help="processes that read images; default 0 in the demo, else 2")
    add("--cache-dir", type=Path, default=_default_cache(), metavar="DIR", help="for the demo's model and images")
    return parser


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
        beside = sorted(e.name for e in folder.parent.iterdir() if e.is_dir()) if folder.parent.is_dir() else []
        names = ", ".join(beside[:5]) + (" ..." if len(beside) > 5 else "")
        there = f"; {folder.parent} has the folders {names}" if beside else ""
        raise InputError(
            f"{folder}: expected a folder with one sub-folder per class, found none{there}; --data is the folder that "
            "train/ and val/ are in: see --help"
        )
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
        images = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir())
        if images:
            raise InputError(
                f"{folder}: expected one sub-folder per class, got none but {images} images: a class itself? --data is "
                "the folder that train/ and val/ are in, and classes are the folders in those; see --help"
            )
        raise InputError(f"{folder}: expected one sub-folder per class, got none; remove it, or see --help")
    return classes


def _counts(numbers: Mapping[str, int]) -> str:
    """Such as "3 .heic, 1 .txt"."""
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))


@dataclass(frozen=True)
class ImageFolders:
    """What --data holds. The sets are select, val, then the shifted ones by name."""

    train: dict[str, list[Path]]  # by class, in the order of their folders' names
    sets: dict[str, list[tuple[Path, int]]]
    passed_over: dict[str, int]  # files that are no images, by suffix

    def by_label(self) -> list[list[Example]]:
        """Training images of each class, with its number."""
        return [[(file, label) for file in files] for label, files in enumerate(self.train.values())]


def split_off(files: Mapping[str, list[Path]], folder: Path) -> dict[str, list[Path]]:
    """Takes the selection split out of the training images, the same ones whenever their names are the same."""

    def rank(file: Path) -> bytes:
        return hashlib.sha256(file.relative_to(folder).as_posix().encode()).digest()

    taken = {}
    for name, of_class in files.items():
        number = min(SELECT_MOST, max(1, round(SELECT_SHARE * len(of_class))), len(of_class) - 1)
        if number:
            taken[name] = sorted(sorted(of_class, key=rank)[:number])
            of_class[:] = sorted(set(of_class).difference(taken[name]))
    if not taken:
        raise InputError(f"{folder}: expected a class with two images or more, to choose by, got none; add a select/")
    return taken


def read_folders(data: Path) -> ImageFolders:
    """Lists the images under ``data`` and checks that all sets have classes of the training set."""
    if not data.is_dir():
        raise InputError(f"--data {data}: expected a folder with train/ and val/, found no such folder")
    passed_over: Counter[str] = Counter()
    train = scan(data / "train", passed_over)
    classes = list(train)
    if len(classes) < 2:
        raise InputError(f"{data / 'train'}: expected two classes or more, got {classes[0]!r} alone; add another")
    others = {d.name for d in data.iterdir() if d.is_dir() and not d.name.startswith(".")}
    found = {}
    if SELECT not in others:
        found[SELECT] = split_off(train, data / "train")
        taken = sum(map(len, found[SELECT].values()))
        print(f"no {data / SELECT}: {taken} images of train/ are kept from training, to choose rates by", flush=True)
    for name in [SELECT] * (SELECT in others) + [VAL, *sorted(others - {"train", SELECT, VAL})]:
        found[name] = _by_class(scan(data / name, passed_over), classes, data, name)
    sets = {name: [(f, classes.index(c)) for c, fs in of.items() for f in fs] for name, of in found.items()}
    return ImageFolders(train, sets, passed_over)


def _by_class(found: dict[str, list[Path]], classes: Sequence[str], data: Path, name: str) -> dict[str, list[Path]]:
    """By training class; folders that are numbers, as ImageNet-V2's, stand for the classes in order."""
    unknown = sorted(found.keys() - set(classes))
    if not unknown:
        return found
    if all(folder.isdecimal() and int(folder) < len(classes) for folder in found):
        print(f"{data / name}: its folders are numbers; they are taken for the classes in order", flush=True)
        return {classes[int(folder)]: files for folder, files in found.items()}
    near = difflib.get_close_matches(unknown[0], classes, n=1)
    hint = f"rename it to {near[0]!r}" if near else "remove it, or add training images"
    raise InputError(f"{data / name / unknown[0]}: expected a class of {data / 'train'}, got {unknown[0]!r}; {hint}")


# ---- model ----


class ClipTask(finetuning.Task):
    """A CLIP, folders of images, and the classes as prompts."""

    tower = "visual."

    def __init__(
        self,
        model: nn.Module,
        transforms: Sequence[Any],
        prompts: Tensor,
        folders: ImageFolders,
        args: argparse.Namespace,
    ) -> None:
        """Transforms for training and for testing; ``prompts``: (classes, templates, context) token ids."""
        self.transforms, self.prompts = transforms, prompts
        self._decoded: dict[int, list[tuple[Tensor, Tensor]]] = {}
        super().__init__(
            args.task, model, folders.by_label(), folders.sets, list(folders.train), prompts.shape[1], args
        )

    def features(self, inputs: Tensor) -> Tensor:
        """Of images."""
        return self.model.encode_image(inputs.to(self.args.device, non_blocking=True), normalize=True)

    def class_features(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Mean of the normalised text features over the templates, normalised."""
        prompts = self.prompts[start:stop]
        features = self.model.encode_text(prompts.flatten(0, 1), normalize=True)
        return F.normalize(features.unflatten(0, prompts.shape[:2]).mean(dim=1), dim=-1)

    def scale(self) -> Tensor:
        """CLIP's temperature."""
        return self.model.logit_scale.exp()

    def batches(self, examples: Sequence[tuple[Path, int]], batch_size: int, train: bool = False) -> Any:
        """Of image files; those of a small test set are decoded once."""
        if not train and id(examples) in self._decoded:
            return self._decoded[id(examples)]
        images = ImageSet(examples, self.transforms[0] if train else self.transforms[1])
        pin = self.args.device.type == "cuda"
        loader = DataLoader(images, batch_size, shuffle=train, num_workers=self.args.workers, pin_memory=pin)
        tested = sum(map(len, self.sets.values()))
        if any(examples is of for of in self.sets.values()) and tested * images[0][0].nbytes <= KEPT_IMAGES:
            self._decoded[id(examples)] = list(loader)
            return self._decoded[id(examples)]
        return loader

    def after_step(self) -> None:
        """As in pre-training, the temperature is bounded."""
        self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def part_of(self, name: str) -> str:
        """Such as "image block 3"."""
        return part_of(name)

    def settings(self) -> dict[str, Any]:
        """And the model and its data."""
        names = ("model", "pretrained", "templates", "class_names", "data")
        return {name: getattr(self.args, name) for name in names} | super().settings()


def part_of(name: str) -> str:
    """The part of the model that a parameter is in, by the names of open_clip's towers."""
    if name.startswith("logit_"):
        return "logit scale"
    tower = "image" if name.startswith("visual.") else "text"
    block = re.search(r"(?:blocks|layers?|stages)(\.?)(\d+)\.", name)
    if block:
        return f"{tower} block {int(block[2]) + len(block[1])}"  # blocks.0 is the first, and so is a ResNet's layer1
    first = re.search(r"embed|conv1|bn1|ln_pre|stem|cls_token", name)
    return f"{tower} {'embedding' if first else 'head'}"


def read_class_names(file: str, folders: Sequence[str]) -> list[str]:
    """The --class-names argument: a name for every folder."""
    if file == "imagenet":
        if len(folders) != len(IMAGENET_CLASSNAMES):
            raise InputError(
                f"--class-names imagenet: expected the {len(IMAGENET_CLASSNAMES):,} folders of ImageNet in train/, got "
                f"{len(folders)}; give a file"
            )
        return list(IMAGENET_CLASSNAMES)
    lines = (line.split(maxsplit=1) for line in read_lines("--class-names", file, "a folder and its name a line"))
    names = {line[0]: line[-1] for line in lines}
    missing = [folder for folder in folders if folder not in names]
    if missing:
        raise InputError(
            f"--class-names {file}: expected a line for every folder of train/, got none for {missing[0]!r} and "
            f"{len(missing) - 1} more; add them"
        )
    return [names[folder] for folder in folders]


def read_lines(flag: str, file: str, expected: str) -> list[str]:
    """Lines of a text file that hold something."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"a file that is no UTF-8 text: {error}"
        raise InputError(f"{flag} {file}: expected {expected}, got {reason}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise InputError(f"{flag} {file}: expected {expected}, got an empty file")
    return lines


def read_templates(given: list[str]) -> list[str]:
    """The --templates argument: prompts, or a file with one a line."""
    if len(given) == 1 and "{" not in given[0]:
        given = read_lines("--templates", given[0], "a text with {} or a file of them, one a line")
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
        path = Path(args.model.removeprefix("local-dir:"))
        if args.model.startswith("local-dir:") and not path.is_dir():
            raise InputError(f"--model {args.model}: expected a folder, found none at {path.resolve()}")
        return
    if args.model not in open_clip.list_models():
        if Path(args.model).is_dir():
            raise InputError(
                f"--model {args.model}: expected a name, got a folder; for a model that open_clip saved there, "
                f"--model local-dir:{args.model}"
            )
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


def load_tokenizer(args: argparse.Namespace) -> Any:
    """open_clip's, of which some need transformers."""
    try:
        return open_clip.get_tokenizer(args.model)
    except ImportError as error:
        raise InputError(
            f"--model {args.model}: expected {error.name}, which its tokenizer needs, it is not installed; pip install "
            f"{error.name}"
        ) from None


# ---- main ----


def use_digits(args: argparse.Namespace, recipe: Any) -> Callable[[list[str]], Tensor]:
    """Points the arguments at the demo's model and images; returns its tokenizer."""
    import digits_demo

    for name in ("model", "pretrained", "class_names"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {getattr(args, name)}: expected --data DIR with it, got none; see --help")
    folder = digits_demo.prepare(args.cache_dir, recipe)
    args.data, args.model = folder / "images", digits_demo.MODEL_NAME
    args.pretrained = str(folder / f"{digits_demo.MODEL_NAME}.safetensors")
    args.templates = args.templates or list(digits_demo.TEMPLATES)
    return digits_demo.DigitsTokenizer()


def load_task(args: argparse.Namespace, recipe: Any = None) -> ClipTask:
    """Reads folders, model and prompts, after filling in the arguments that depend on others."""
    demo = args.data is None
    if args.templates is not None:  # before the demo pre-trains
        args.templates = read_templates(args.templates)
    tokenize = use_digits(args, recipe) if demo else None
    if args.model is None:
        raise InputError("--model: expected an open_clip model with --data, got none; for example --model ViT-B-16")
    args.templates = args.templates or [DEFAULT_TEMPLATE]
    if args.workers is None:
        args.workers = 0 if demo else 2
    check_model(args)
    folders = read_folders(args.data)
    names = [name.replace("_", " ") for name in folders.train]
    if args.class_names is not None:
        names = read_class_names(args.class_names, list(folders.train))
    if folders.passed_over:
        print(f"not read as images: {_counts(folders.passed_over)}", flush=True)
    few = [f"{name!r} ({len(files)})" for name, files in folders.train.items() if len(files) < args.shots]
    if few:
        more = f" and {len(few) - 5} more classes" if len(few) > 5 else ""
        print(f"--shots {args.shots}: fewer training images in {', '.join(few[:5])}{more}; all are used", flush=True)
    tokenize = tokenize or load_tokenizer(args)
    if not demo:  # else they are its own
        used = {file for seed in args.seed for file, _ in finetuning.few_shot(folders.by_label(), args.shots, seed)}
        check_images(sorted(used.union(*([file for file, _ in files] for files in folders.sets.values()))))
    model, *transforms = load_model(args)
    texts = [template.replace("{}", name) for name in names for template in args.templates]
    prompts = tokenize(texts).unflatten(0, (len(names), len(args.templates))).to(args.device)
    args.task = "digits" if demo else args.data.resolve().name
    # what the results say: no folder of the cache, but which demo it is
    args.data, args.pretrained = ("digits", args.data.parent.name) if demo else (str(args.data), args.pretrained)
    return ClipTask(model, transforms, prompts, folders, args)


def main(argv: Sequence[str] | None = None, recipe: Any = None) -> int:
    """Runs the command line. ``recipe`` replaces the demo's `digits_demo.Recipe`."""
    args = build_parser().parse_args(argv)
    finetuning.take_lrs(args, DEMO_LR if args.data is None else DEFAULT_LR)
    return finetuning.main(args, lambda args: load_task(args, recipe))


if __name__ == "__main__":
    sys.exit(main())
