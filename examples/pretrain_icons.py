"""Pre-train a small CLIP on the pairs that icons_data.py draws: a ResNet or ViT over 32 x 32 pixels, a word tokenizer.

The result is a folder that open_clip loads as `local-dir:FOLDER`: model, or of --tower vit model-vit.
Pre-training takes a fixed number of steps; the same command on the same machine gives the same bits, also after an
interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from frontier import progress, replacing, say
from icons_data import CLASS_OF, SIZE, InputError, class_of, replacing_folder
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CONTEXT_LENGTH = 10
MAX_NAMES = 12  # of an image
TEMPLATES = ("{}", "an icon of a {}.", "a picture of a {}.", "a drawing of a {}.", "{} {kind}", "a {kind} of a {}.")
TEST_TEMPLATE = "an icon of a {}."
MAX_LOGIT_SCALE = math.log(100)
# open_clip's configurations of the image tower. Convolutions see in fewer images what the ViT has to learn.
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"layers": [1, 1, 1, 1], "width": 32, "head_width": 64},
    "vit": {
        "patch_size": 8,
        "width": 128,
        "head_width": 32,
        "layers": 6,
        "pool_type": "avg",
        "pos_embed_type": "sin_cos_2d",
    },
}


@dataclass(frozen=True)
class Recipe:
    """Everything that, beside the pairs, decides the pre-trained model."""

    tower: str = "resnet"
    steps: int = 1600
    decay_steps: int = 480  # the last ones, to a learning rate of 0
    warmup_steps: int = 100
    batch_size: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.1
    object_share: float = 0.7  # of the images: those of the tasks' classes
    short_share: float = 0.7  # of the captions: the head noun or the class alone
    bf16: bool = True  # in the forward pass; half the time where the machine has such instructions, else twice
    seed: int = 0

    def model(self, vocab_size: int) -> dict[str, Any]:
        """open_clip's configuration."""
        return {
            "embed_dim": 128,
            "vision_cfg": {"image_size": SIZE, **TOWERS[self.tower]},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocab_size,
                "width": 96,
                "heads": 3,
                "layers": 2,
                "hf_tokenizer_name": "tokenizer.json",  # of the same folder: open_clip needs a name to look there
            },
        }


# ---- text ----


def build_tokenizer(texts: Sequence[str], minimum: int = 3) -> Tokenizer:
    """One token for each word that is in ``minimum`` of the texts or in a template."""
    counts = Counter(word for text in texts for word in set(re.findall(r"[a-z0-9]+", text)))
    fixed = {word for text in [*TEMPLATES, *CLASS_OF] for word in re.findall(r"[a-z0-9]+|\.", text)}
    words = sorted(fixed | {word for word, n in counts.items() if n >= minimum})
    # open_clip pools the text at its largest id
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<start>", "<unknown>", *words, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z0-9]+|\."), "removed", invert=True)
    ends = [(token, vocabulary[token]) for token in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(pad_token="<pad>", length=CONTEXT_LENGTH)
    return tokenizer


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Their ids, (n, CONTEXT_LENGTH)."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


# ---- pairs ----


class Pairs:
    """Images, uint8 (n, 3, SIZE, SIZE), and what each may be called: name, aliases, head noun, class."""

    def __init__(self, folder: Path, object_share: float) -> None:
        try:
            self.images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2).contiguous()
            rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: expected the pairs of icons_data.py, got {error}; run it first") from None
        if len(rows) != len(self.images):
            raise InputError(
                f"{folder}: expected a caption for each of {len(self.images)} images, got {len(rows)}; "
                "remove the folder and run icons_data.py"
            )
        self.kinds = [row["kind"] for row in rows]
        short = [class_of(row["icon"]) or row["captions"][0].split()[-1] for row in rows]
        self.names = [
            list(dict.fromkeys([s, row["captions"][0].split()[-1], *row["captions"]]))[:MAX_NAMES]
            for s, row in zip(short, rows, strict=True)
        ]
        self.ids = {name: i for i, name in enumerate(sorted({name for names in self.names for name in names}))}
        words = {word: i for i, word in enumerate(sorted({word for name in self.ids for word in name.split()}))}
        self.name_ids = _padded([[self.ids[name] for name in names] for names in self.names], -1)
        self.words = _padded([sorted({words[w] for n in names for w in n.split()}) for names in self.names], -1)
        self.words_of_name = _padded([[words[w] for w in name.split()] for name in self.ids], -2)
        self.coloured = (self.images.amax(1) - self.images.amin(1)).flatten(1).amax(1) > 40
        self.weights = _weights(rows, short, object_share)

    def batch(self, size: int, short_share: float, g: torch.Generator) -> tuple[Tensor, list[str], Tensor, Tensor]:
        """Augmented images, texts, and two bool (images, texts): which belong together; which may, and do not count.

        Of the second kind are those that share a word, as "cat face" and "black cat".
        """
        chosen = torch.multinomial(self.weights, min(size, len(self.weights)), generator=g)
        u = torch.rand(3, len(chosen), generator=g)
        texts: dict[str, str] = {}
        for i, use_short, which, form in zip(chosen.tolist(), *u.tolist(), strict=True):
            names = self.names[i]
            name = names[0 if use_short < short_share else int(which * len(names))]
            texts.setdefault(name, TEMPLATES[int(form * len(TEMPLATES))].format(name, kind=self.kinds[i]))
        ids = torch.tensor([self.ids[name] for name in texts])
        positive = (self.name_ids[chosen][:, :, None] == ids).any(1)
        shared = (self.words[chosen][:, :, None, None] == self.words_of_name[ids]).any(3).any(1)
        images = augment(self.images[chosen].float() / 255, self.coloured[chosen], g)
        return images, list(texts.values()), positive, shared & ~positive


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    width = min(MAX_NAMES, max(map(len, rows)))
    return torch.tensor([(row + [fill] * width)[:width] for row in rows])


def _weights(rows: list[dict[str, Any]], short: list[str], object_share: float) -> Tensor:
    """How often an image is drawn: by the root of how many have its short name, and one of a short name more often."""
    counts = Counter(short)
    weights = torch.tensor(
        [1 / max(20, counts[s]) ** 0.5 / len(row["captions"][0].split()) for s, row in zip(short, rows, strict=True)],
        dtype=torch.float64,
    )
    objects = torch.tensor([class_of(row["icon"]) is not None for row in rows])
    for of, share in ((objects, object_share), (~objects, 1 - object_share)):
        weights[of] *= share / weights[of].sum().clamp(min=1e-12)
    return weights


def augment(x: Tensor, coloured: Tensor, g: torch.Generator) -> Tensor:
    """Drawings (n, 3, h, w) in [0, 1], moved, turned, flipped; in other ink, other or no colours, as the negative."""
    n = len(x)

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(n, generator=g) - 1)

    def some(share: float) -> Tensor:
        return torch.rand(n, generator=g) < share

    def where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(condition[:, None, None, None], new, old)

    angle, scale, flip = uniform(math.pi / 24), 1.05 + uniform(0.1), 1 - 2 * some(0.5).float()
    rows = [
        flip * scale * angle.cos(),
        -scale * angle.sin(),
        uniform(0.1),
        flip * scale * angle.sin(),
        scale * angle.cos(),
        uniform(0.1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # what comes in from outside is white
    thick = some(0.1)
    x[thick] = -F.max_pool2d(-x[thick], 3, stride=1, padding=1)
    x = where(coloured & some(0.2), x.mean(1, keepdim=True), x)
    shuffled = x[:, torch.randperm(3, generator=g)]
    x = where(coloured & some(0.2), shuffled, x)
    ink, paper = torch.rand(2, n, 3, 1, 1, generator=g)
    x = where(~coloured & some(0.3), 0.7 * ink + (1 - 0.4 * paper - 0.7 * ink) * x, x)
    return where(some(0.1), 1 - x, x)


def normalise(x: Tensor) -> Tensor:
    """What open_clip's preprocessing does after it has scaled an image to [0, 1]."""
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (x - mean) / std


# ---- training ----


def contrastive_loss(logits: Tensor, positive: Tensor, left_out: Tensor) -> Tensor:
    """CLIP's loss, with all that belong together as positives; pairs that are left out are no negatives either."""
    logits = logits.masked_fill(left_out, -torch.inf)

    def one_way(logits: Tensor, positive: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=1)
        return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()

    return (one_way(logits, positive) + one_way(logits.T, positive.T)) / 2


def has_bf16(device: str) -> bool:
    """Whether a device multiplies bfloat16 by instructions of its own."""
    if torch.device(device).type != "cpu":
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def forward(model: nn.Module, images: Tensor, ids: Tensor, bf16: bool) -> Tensor:
    """Logits, (images, texts)."""
    # the flash kernel's backward pass takes most of the time on a CPU in bf16
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        image_features, text_features, scale = model(normalise(images), ids)
    return scale * image_features.float() @ text_features.float().T


class Pretraining:
    """Model, optimizer and step, and their checkpoint."""

    def __init__(self, recipe: Recipe, pairs: Pairs, device: str = "cpu") -> None:
        self.recipe, self.pairs, self.device = recipe, pairs, device
        self.tokenizer = build_tokenizer([text for names in pairs.names for text in names[1:]])
        torch.manual_seed(recipe.seed)
        self.config = recipe.model(self.tokenizer.get_vocab_size())
        self.model = open_clip.CLIP(**self.config)
        self.model.to(device)
        self.model.visual.to(memory_format=torch.channels_last)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
        self.step = 0

    def lr(self) -> float:
        """Warm-up, constant, then linear to 0."""
        r = self.recipe
        return r.lr * min(1, (self.step + 1) / r.warmup_steps, (r.steps - self.step) / r.decay_steps)

    def train_step(self) -> float:
        """One step; the loss before it. All that is random comes from the seed and the number of the step."""
        g = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        images, texts, positive, left_out = self.pairs.batch(self.recipe.batch_size, self.recipe.short_share, g)
        inputs = images, tokens(self.tokenizer, texts), positive, left_out
        images, ids, positive, left_out = (tensor.to(self.device) for tensor in inputs)
        loss = contrastive_loss(forward(self.model, images, ids, self.recipe.bf16), positive, left_out)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.step += 1
        return loss.item()

    def save(self, file: Path) -> None:
        """Writes what resuming needs."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        with replacing(file) as temporary:
            torch.save({**state, "recipe": asdict(self.recipe), "pairs": len(self.pairs.names)}, temporary)

    def load(self, file: Path) -> None:
        """Goes on from a checkpoint. Raises InputError where it is of other pairs or another recipe."""
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
            got = {**state["recipe"], "pairs": state["pairs"]}
        except Exception as error:  # torch.load raises many kinds
            raise InputError(f"{file}: expected a checkpoint, got {str(error).splitlines()[0]}; remove it") from None
        for name, value in {**asdict(self.recipe), "pairs": len(self.pairs.names)}.items():
            if got.get(name) != value:
                raise InputError(f"{file}: expected {name} {value}, got {got.get(name)}; remove it to begin anew")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Writes the folder that open_clip loads."""
        with replacing_folder(folder) as temporary:
            preprocessing = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}
            config = {"model_cfg": self.config, "preprocess_cfg": preprocessing}
            (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=2))
            weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            with replacing(temporary / "open_clip_model.safetensors") as file:
                save_file(weights, file)
            self.tokenizer.save(str(temporary / "tokenizer.json"))
            special = {"pad_token": "<pad>", "bos_token": "<start>", "unk_token": "<unknown>", "eos_token": "<end>"}
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT_LENGTH}
            (temporary / "tokenizer_config.json").write_text(json.dumps(kind | special, indent=2))
            (temporary / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2))


# ---- zero-shot ----


def read_sets(task: Path) -> tuple[list[str], dict[str, tuple[Tensor, Tensor]]]:
    """The classes of a task, and images in [0, 1], (n, 3, h, w), and labels of each of its test sets."""
    folders = [
        task / "val",
        *sorted(d for d in task.iterdir() if d.is_dir() and d.name not in ("train", "select", "val")),
    ]
    classes = sorted(folder.name for folder in (task / "train").iterdir())
    sets = {}
    for folder in folders:
        files = sorted(folder.glob("*/*.png"))
        images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        labels = torch.tensor([classes.index(file.parent.name) for file in files])
        sets[folder.name] = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, labels
    return classes, sets


@torch.no_grad()
def zero_shot(model: nn.Module, tokenizer: Tokenizer, task: Path) -> dict[str, float]:
    """Accuracy in percent on each test set of a task, among all its classes."""
    classes, sets = read_sets(task)
    model.eval()
    device = model.logit_scale.device
    prompts = [TEST_TEMPLATE.format(name.replace("_", " ")) for name in classes]
    text = model.encode_text(tokens(tokenizer, prompts).to(device), normalize=True)
    accuracy = {}
    for name, (images, labels) in sets.items():
        predicted = (model.encode_image(normalise(images.to(device)), normalize=True) @ text.T).argmax(1).cpu()
        accuracy[name] = 100 * (predicted == labels).float().mean().item()
    model.train()
    return accuracy


def report(model: nn.Module, tokenizer: Tokenizer, data: Path) -> str:
    """Zero-shot accuracy on the tasks that are there."""
    lines = []
    for task in ("emoji", "line"):
        if (data / task).is_dir():
            accuracy = zero_shot(model, tokenizer, data / task)
            shifted = [value for name, value in accuracy.items() if name != "val"]
            sets = ", ".join(f"{name} {value:.1f}" for name, value in accuracy.items())
            lines.append(f"zero-shot {task}: mean shifted {sum(shifted) / len(shifted):.1f}; {sets}")
    return "\n".join(lines)


# ---- the command ----


def run(args: argparse.Namespace) -> None:
    """Pre-trains, or goes on, and writes the model."""
    if args.steps < 1:
        raise InputError(f"--steps: expected a whole number of at least 1, got {args.steps}")
    bf16 = has_bf16(args.device) if args.precision is None else args.precision == "bf16"
    decay_steps = math.ceil(0.3 * args.steps)
    recipe = Recipe(tower=args.tower, steps=args.steps, decay_steps=decay_steps, bf16=bf16, seed=args.seed)
    name = "model" if args.tower == "resnet" else f"model-{args.tower}"
    checkpoint = args.data / f"{name}.checkpoint.pt"
    pretraining = Pretraining(recipe, Pairs(args.data / "pretrain", recipe.object_share), args.device)
    if checkpoint.exists():
        pretraining.load(checkpoint)
    model = pretraining.model
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{len(pretraining.pairs.names)} pairs, {size:,} parameters, {recipe.steps} steps of {recipe.batch_size}, "
        f"{'bf16' if recipe.bf16 else 'fp32'}"
    )
    bar = progress("pre-training", recipe.steps, "step", initial=pretraining.step)
    with bar:
        while pretraining.step < recipe.steps:
            loss = pretraining.train_step()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if pretraining.step % args.save_every == 0:
                pretraining.save(checkpoint)
                say(f"step {pretraining.step}/{recipe.steps}, loss {loss:.3f}")
                say(report(model, pretraining.tokenizer, args.data))
    pretraining.export(args.data / name)
    checkpoint.unlink(missing_ok=True)
    print(report(model, pretraining.tokenizer, args.data))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/icons"), metavar="DIR", help="what icons_data.py wrote (%(default)s)")
    add("--tower", choices=TOWERS, default=default.tower, help="of the images (%(default)s)")
    add("--steps", type=int, default=default.steps, help="the last 30 %% of them lower the learning rate (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of the weights and the order (%(default)s)")
    add("--precision", choices=("bf16", "fp32"), help="of the forward pass; default what the machine is faster with")
    add(
        "--save-every", type=int, default=100, metavar="STEPS", help="to go on from after an interruption (%(default)s)"
    )
    add("--threads", type=int, default=1, help="of torch; with other numbers it rounds otherwise (%(default)s)")
    add("--device", default="cpu", help="of torch (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
