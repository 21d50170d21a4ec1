"""Fine-tuning in several ways that differ in nothing but what is trained: what both finetune_*.py scripts run.

A script derives its `Task` (data, model, classes) and calls `main`. Every method shares loss, order of the data, cosine
schedule with warm-up and gradient clipping at 1.0; each is a function in `METHODS` that says what it trains. All are
interpolated with the pre-trained model in place, as a SparseDelta (WiSE-FT).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from frontier import SELECT, ZERO_SHOT, InputError, Row, Rows, print_tables, progress, replacing, save_report, say
from rich.console import Console
from torch import Tensor, nn

import saft_kernels
from saft_kernels.selection.scores import SCORES

MAX_GRAD_NORM = 1.0
TEST_PROMPTS = 256  # at once; training needs the gradient of all prompts
AUTOCAST = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
MASKED = ("saft", "random")  # methods with a density
Example = tuple[Any, int]  # an input, as the task reads it, and its label


# ---- arguments ----


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> Any:
        """Exits with status 2."""
        self.exit(2, f"error: {message}; see --help\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def number(kind: type[int] | type[float], accepts: Callable[[float], bool], expected: str) -> Callable[[str], Any]:
    """A type for arguments: the number, if it is accepted."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


count = number(int, lambda n: n >= 1, "a whole number of at least 1")
whole = number(int, lambda n: n >= 0, "a whole number of at least 0")
_rate = number(float, lambda x: 0 < x < math.inf, "a positive number")
_decay = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
_share = number(float, lambda x: 0 < x <= 1, "a number in (0, 1] (0.001 trains 0.1 % of the parameters)")
_alpha = number(float, lambda x: 0 < x < 1, "a number between 0, pre-trained, and 1, fine-tuned")


def _lr(text: str) -> tuple[str | None, list[float]]:
    method, equals, numbers = text.rpartition("=")
    if equals and method not in METHODS:
        known = ", ".join(METHODS)
        raise argparse.ArgumentTypeError(f"expected LR or METHOD=LR[,LR...] with one of {known}, got {text!r}")
    return method if equals else None, [_rate(n) for n in numbers.split(",")]


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"expected a device of this machine such as cpu, got {text!r}: {reason}"
        ) from None


def build_parser(description: str | None, epilog: str, lrs: str, scopes: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments of both scripts. ``lrs`` describes the default learning rates."""
    parser = Parser(description=description, epilog=epilog, formatter_class=_Formatter)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--method", nargs="+", choices=METHODS, default=["saft", "full"], help="what to run")
    add("--shots", type=whole, default=16, help="training examples per class; 0: all")
    add("--density", type=_share, nargs="+", default=[1e-3], help="shares of the parameters that saft and random train")
    add("--lr", type=_lr, nargs="+", metavar="LR", help=f"for all methods, or METHOD=LR,LR,...; the best on the "
        f"selection split counts; default {lrs}; lp_ft begins with a linear probe at that one's default")  # fmt: skip
    add("--wise", type=_alpha, nargs="*", default=[0.5], metavar="ALPHA", help="WiSE-FT: also test pre-"
        "trained + ALPHA * (fine-tuned - pre-trained)")  # fmt: skip
    add("--epochs", type=count, default=20, help="passes over the training examples")
    add("--batch-size", type=count, default=32, help="examples per step")
    add("--weight-decay", type=_decay, default=0.01, help="of the trained parameters")
    add("--warmup", type=_share, default=0.1, help="share of the steps in which the learning rate rises")
    add("--seed", type=whole, nargs="+", default=[0], help="for the shots and the order; several: mean and deviation")
    add = parser.add_argument_group("what saft selects; random shares all but the score").add_argument
    scores = [name for name, score in SCORES.items() if score.needs_gradients or name == "weight"]
    add("--score", choices=scores, default="mean_grad", help="of saft_kernels.select")
    add("--scope", choices=scopes, default="global", help="which parameters compete with each other")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="names of parameters that are not selected from")
    add("--lora-rank", type=count, default=4, help="of the method lora, in all linear and attention layers")
    add = parser.add_argument_group("running").add_argument
    add("--precision", choices=AUTOCAST, default="fp32", help="of the forward and backward pass")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=device, help="of torch")
    add("--output", type=Path, default=Path("finetune-output"), metavar="DIR", help="for the results")
    add("--resume", action="store_true", help="go on from what --output holds; more seeds, rates, ... may be asked for")
    return parser


def take_lrs(args: argparse.Namespace, defaults: Mapping[str, float]) -> None:
    """Makes ``args.lr`` the learning rates of each method, and ``args.probe_lr`` that of lp_ft's first stage."""
    given: dict[str | None, list[float]] = {}
    for method, rates in args.lr or []:
        given.setdefault(method, []).extend(rates)
    args.probe_lr = defaults["linear_probe"]
    args.lr = {m: list(dict.fromkeys(given.get(m) or given.get(None) or [defaults[m]])) for m in args.method}


def describe(rates: Mapping[str, float]) -> str:
    """Such as "saft=0.001 full=0.0001"."""
    return " ".join(f"{method}={rate:g}" for method, rate in rates.items())


# ---- task ----


class Task:
    """A pre-trained model, what it is fine-tuned on, its classes, and the sets that it is tested on.

    A script derives from it, gives `features`, `class_features`, `scale` and `batches`, and calls this `__init__` last.
    """

    tower = ""  # parameters that make features of inputs have names that begin so

    def __init__(
        self,
        name: str,
        model: nn.Module,
        train: list[list[Example]],
        sets: Mapping[str, Sequence[Example]],
        classes: Sequence[str],
        prompts_per_class: int,
        args: argparse.Namespace,
    ) -> None:
        """``train``: by class. ``sets``: "select", "val", shifted ones; each is scored among the classes it holds."""
        self.name, self.model, self.sets, self.args = name, model, dict(sets), args
        self.train, self.classes, self.prompts_per_class = train, list(classes), prompts_per_class
        self.parameters = dict(model.named_parameters())
        self.numel = sum(p.numel() for p in self.parameters.values())
        model.eval()
        self.head = nn.Parameter(self.all_class_features())  # of methods that train a classifier in place of prompts
        self.use_head = False
        self.base = {name: tensor.clone() for name, tensor in self.state().items()}

    def features(self, inputs: Any) -> Tensor:
        """Of inputs as `batches` makes them: (n, dim), normalised."""
        raise NotImplementedError

    def class_features(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Of the prompts of some classes: (n, dim), normalised."""
        raise NotImplementedError

    def scale(self) -> Tensor | float:
        """What cosine similarities are multiplied with to make logits."""
        raise NotImplementedError

    def batches(self, examples: Sequence[Example], batch_size: int, train: bool = False) -> Any:
        """A sized iterable of (inputs, labels); for training shuffled by torch's generator, and augmented."""
        raise NotImplementedError

    def after_step(self) -> None:
        """What follows an update."""

    def part_of(self, name: str) -> str:
        """The part of the model that a parameter is counted under."""
        return name.partition(".")[0]

    def settings(self) -> dict[str, Any]:
        """The arguments that decide every result, as plain values. One folder of results has one such set."""
        names = ("epochs", "batch_size", "weight_decay", "warmup", "shots", "score", "scope", "exclude", "lora_rank",
                 "precision")  # fmt: skip
        return {name: getattr(self.args, name) for name in names}

    def state(self) -> dict[str, Tensor]:
        """The tensors that fine-tuning may change, by name; not copied."""
        return {**self.model.state_dict(), "head": self.head.detach()}

    def reset(self) -> None:
        """Back to the pre-trained weights, all of them trainable."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(self.base[name])
        self.use_head = False
        self.model.eval().requires_grad_(True)

    def autocast(self) -> torch.autocast:
        """The forward pass's precision."""
        dtype = AUTOCAST[self.args.precision]
        return torch.autocast(self.args.device.type, dtype, enabled=dtype is not None)

    @torch.no_grad()
    def all_class_features(self) -> Tensor:
        """Of every class, a few prompts at a time: (classes, dim)."""
        chunk = max(1, TEST_PROMPTS // self.prompts_per_class)
        with self.autocast():
            parts = [self.class_features(i, i + chunk) for i in range(0, len(self.classes), chunk)]
        return torch.cat(parts).float()

    def loss(self, inputs: Any, labels: Tensor) -> Tensor:
        """Cross entropy."""
        with self.autocast():
            classes = F.normalize(self.head, dim=1) if self.use_head else self.class_features()
            logits = self.scale() * self.features(inputs) @ classes.T
        return F.cross_entropy(logits.float(), labels.to(self.args.device))

    @torch.no_grad()
    def evaluate(self, what: str) -> dict[str, float]:
        """Accuracy in percent on every set. ``what`` is said meanwhile."""
        self.model.eval()
        bar = progress(f"testing {what}", sum(map(len, self.sets.values())), "example")
        accuracy = {}
        with bar, self.autocast():
            classes = F.normalize(self.head, dim=1) if self.use_head else self.all_class_features()
            for name, examples in self.sets.items():
                present = torch.tensor(sorted({label for _, label in examples}))
                of_present, correct = classes[present.to(classes.device)].T, 0
                for inputs, labels in self.batches(examples, 128):
                    features = self.features(inputs)
                    best = (features @ of_present.to(features.dtype)).argmax(dim=1).cpu()
                    correct += int((present[best] == labels.cpu()).sum())
                    bar.update(len(labels))
                accuracy[name] = 100 * correct / len(examples)
        return accuracy


def few_shot(train: Sequence[Sequence[Example]], shots: int, seed: int) -> list[Example]:
    """``shots`` random examples of each class (all where it has fewer, or with 0)."""
    rng = random.Random(seed)
    return [example for of in train for example in rng.sample(of, min(shots or len(of), len(of)))]


# ---- methods ----


@dataclass(frozen=True)
class Setting:
    """One fine-tuning."""

    method: str
    density: float | None
    lr: float
    seed: int

    def __str__(self) -> str:
        density = "" if self.density is None else f" {100 * self.density:g} %"
        return f"{self.method}{density}, lr {self.lr:g}, seed {self.seed}"

    @property
    def name(self) -> str:
        """For files, of whatever learning rate."""
        return self.method if self.density is None else f"{self.method}-{self.density:g}"


@dataclass
class Trained:
    """What a method trains: parameters by name, or of all parameters those that the mask selects."""

    parameters: dict[str, nn.Parameter]
    mask: saft_kernels.SparseMask | None = None
    after_step: Callable[[], None] = field(default=lambda: None)  # called after every update
    finish: Callable[[], None] = field(default=lambda: None)  # called after training, before testing


def _full(run: FineTuning) -> Trained:
    return Trained(run.task.parameters)


def _saft(run: FineTuning) -> Trained:
    """The paper's mask, the top `density` of all parameters by |mean gradient|; or by another score, or at random."""
    file = run.folder / f"{run.setting.name}.mask.safetensors"
    try:
        if file.exists():
            return Trained(run.task.parameters, saft_kernels.SparseMask.load(file))
        mask = select_mask(run.task, run.examples, run.setting)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    mask.save(file)
    return Trained(run.task.parameters, mask)


def select_mask(task: Task, examples: Sequence[Example], setting: Setting) -> saft_kernels.SparseMask:
    """The top `density` of the parameters over ``examples``; with --scope tower, of those of each tower."""

    def loss_fn(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        # select() weighs batches equally; this weighs examples equally, also in a short last batch
        return factor * len(batch[1]) * task.loss(*batch)

    args = task.args
    # a constant factor leaves the ranking as it is, and lifts gradients into fp16's range
    factor = (2**10 if args.precision == "amp_fp16" else 1) / args.batch_size
    score = "random" if setting.method == "random" else args.score
    data = (task.batches(examples, args.batch_size), loss_fn) if SCORES[score].needs_gradients else ()
    how: dict[str, Any] = {"density": setting.density, "score": score}
    if args.scope != "tower":
        return saft_kernels.select(task.model, *data, exclude=args.exclude or None, scope=args.scope, **how)
    tower = f"{task.tower}*"
    first = saft_kernels.select(task.model, *data, include=tower, exclude=args.exclude or None, **how)
    second = saft_kernels.select(task.model, *data, exclude=[tower, *args.exclude], **how)
    return saft_kernels.SparseMask({name: max(first[name], second[name], key=len) for name in first}, first.shapes)


def _linear_probe(run: FineTuning) -> Trained:
    run.task.use_head = True
    return Trained({"head": run.task.head})


def _lp_ft(run: FineTuning) -> Trained:
    """LP-FT (Kumar et al., ICLR 2022, arXiv 2202.10054): the linear probe first, then with it the tower."""
    task = run.task
    if not run.resumed:  # else the checkpoint has what follows
        probe = replace(run.setting, method="linear_probe", lr=task.args.probe_lr)
        FineTuning(task, probe, run.folder, first_of=run.setting).train()
        task.model.requires_grad_(True)
    tower = {name: p for name, p in task.parameters.items() if name.startswith(task.tower)}
    task.use_head = True
    return Trained({**tower, "head": task.head})


def _lora(run: FineTuning) -> Trained:
    """LoRA (Hu et al., ICLR 2022) by PEFT on a copy of the model, merged into the weights before testing."""
    import peft

    task, plain = run.task, run.task.model
    layers = (nn.Linear, nn.MultiheadAttention)
    names = [n for n, m in plain.named_modules() if isinstance(m, layers) and not n.endswith("attn.out_proj")]
    torch.manual_seed(run.setting.seed)
    config = peft.LoraConfig(r=task.args.lora_rank, lora_alpha=2 * task.args.lora_rank, target_modules=names)
    adapted = peft.LoraModel(copy.deepcopy(plain), {"default": config}, "default")
    task.model = adapted.model

    def finish() -> None:
        merged = adapted.merge_and_unload().state_dict()
        task.model = plain
        plain.load_state_dict(merged)

    parameters = {n: p for n, p in adapted.model.named_parameters() if p.requires_grad}
    return Trained(parameters, finish=finish)


METHODS: dict[str, Callable[[FineTuning], Trained]] = {
    "saft": _saft,
    "full": _full,
    "random": _saft,
    "linear_probe": _linear_probe,
    "lp_ft": _lp_ft,
    "lora": _lora,
}


def warmup_cosine(total: int, warmup: int) -> Callable[[int], float]:
    """Factor of the learning rate per step: a linear rise, then half a cosine to zero."""
    return lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / total)) / 2)


class FineTuning:
    """One setting: what it trains, its optimizer and schedule, its epochs, its files."""

    def __init__(self, task: Task, setting: Setting, folder: Path, first_of: Setting | None = None) -> None:
        """``first_of``: the setting that this one is the first stage of; then it has no files."""
        self.task, self.setting, self.folder, self.args = task, setting, folder, task.args
        self.checkpoint_file = folder / f"{setting.name}-lr{setting.lr:g}.checkpoint.pt"
        self.title, self.keeps = str(first_of or setting), first_of is None
        self.epoch, self.loss, self.seconds = 0, math.nan, 0.0
        self.times: list[tuple[float, float]] = []  # ms per step, and of it in the optimizer
        saved = self._read_checkpoint() if self.keeps else None
        self.resumed = saved is not None
        self.examples = few_shot(task.train, self.args.shots, setting.seed)
        task.reset()
        torch.manual_seed(setting.seed)
        self.trained = METHODS[setting.method](self)
        names = self.trained.parameters
        for name, parameter in task.model.named_parameters():
            parameter.requires_grad_(name in names)
        self.batches = task.batches(self.examples, self.args.batch_size, train=True)
        how = {"lr": setting.lr, "weight_decay": self.args.weight_decay}
        self.optimizer: torch.optim.Optimizer
        if self.trained.mask is None:
            self.optimizer = torch.optim.AdamW(names.values(), **how)
        else:
            self.optimizer = saft_kernels.SparseAdamW(names.items(), mask=self.trained.mask, **how)
        total = self.args.epochs * len(self.batches)
        factor = warmup_cosine(total, max(1, round(self.args.warmup * total)))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.scaler = torch.amp.GradScaler(self.args.device.type, enabled=self.args.precision == "amp_fp16")
        if saved is not None:
            self._restore(saved)

    def train(self) -> None:
        """The epochs that are left. The task's model is then the fine-tuned one, or, of LoRA, `finish` makes it so."""
        steps = len(self.batches)
        with progress(self.title, self.args.epochs * steps, "step", initial=self.epoch * steps) as bar:
            while self.epoch < self.args.epochs:
                start = time.perf_counter()
                self._train_epoch(bar)
                self.seconds += time.perf_counter() - start
                if self.keeps:
                    self._save_checkpoint()
                say(f"{self.title}: epoch {self.epoch}/{self.args.epochs}, loss {self.loss:.3f}")
        if not math.isfinite(self.loss):
            print(f"{self.title}: the loss is {self.loss}: training diverged; the rate is too large", flush=True)

    def run(self, rows: Rows) -> None:
        """Trains, then tests what came of it and every interpolation; a row each. Saves the fine-tune as a delta."""
        self.train()
        self.trained.finish()
        delta = saft_kernels.SparseDelta.diff(self.task.base, self.task.state())
        for alpha in (1.0, *self.args.wise):
            if row_key(self.task, self.setting, alpha) in rows:
                continue
            start = time.perf_counter()
            if alpha != 1:
                delta.interpolate_(self.task.state(), alpha)
            accuracy = self.task.evaluate(f"{self.title}, alpha {alpha:g}")
            if alpha == 1:
                start -= self.seconds
                if all(accuracy[SELECT] > row.accuracy[SELECT] for row in rows.rows if self._is_sibling(row)):
                    delta.save(self.folder / f"{self.setting.name}.safetensors")
            rows.add(self._row(alpha, accuracy, time.perf_counter() - start))
        self.checkpoint_file.unlink(missing_ok=True)

    def _is_sibling(self, row: Row) -> bool:
        """Whether it differs in the learning rate alone."""
        mine = (self.setting.method, self.setting.density, self.setting.seed, 1.0)
        return (row.method, row.density, row.seed, row.alpha) == mine

    def _row(self, alpha: float, accuracy: dict[str, float], seconds: float) -> Row:
        mask, names = self.trained.mask, self.trained.parameters
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        step_ms, optimizer_ms = zip(*self.times, strict=True)
        parts: dict[str, int] = {}
        for name, index in (mask or {}).items():
            if index.numel():
                part = self.task.part_of(name)
                parts[part] = parts.get(part, 0) + index.numel()
        return make_row(
            self.task,
            self.setting,
            alpha,
            accuracy,
            seconds,
            trained=sum(p.numel() for p in names.values()) if mask is None else mask.k,
            state_bytes=sum(t.numel() * t.element_size() for t in state),
            ms_per_step=round(statistics.median(step_ms), 3),
            ms_per_optimizer_step=round(statistics.median(optimizer_ms), 3),
            train_loss=self.loss,
            selected=parts or None,
        )

    def _train_epoch(self, bar: Any) -> None:
        # Everything random in an epoch follows from its number, so a resumed run needs no saved generator.
        torch.manual_seed(1_000_003 * self.setting.seed + self.epoch)
        # frozen features are those of the model as it is used
        self.task.model.train(self.trained.parameters.keys() != {"head"})
        for module in self.task.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # running statistics are not parameters: no mask covers them
        losses = []
        for inputs, labels in self.batches:
            losses.append(self._step(inputs, labels))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{self.scheduler.get_last_lr()[0]:.1e}")
        self.loss = statistics.fmean(losses)
        self.epoch += 1

    def _step(self, inputs: Any, labels: Tensor) -> float:
        start = self._now()
        loss = self.task.loss(inputs, labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained.parameters.values(), MAX_GRAD_NORM)
        before = self._now()
        self.scaler.step(self.optimizer)
        after = self._now()
        with torch.no_grad():
            self.task.after_step()
            self.trained.after_step()
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the scaler met an inf and skipped the step
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.times.append((1e3 * (self._now() - start), 1e3 * (after - before)))
        return loss.item()

    def _now(self) -> float:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        return time.perf_counter()

    def _values(self) -> dict[str, Tensor]:
        """What has been trained: the selected elements, or whole parameters."""
        named = {name: p.detach() for name, p in self.trained.parameters.items()}
        if self.trained.mask is None:
            return {name: p.cpu() for name, p in named.items()}
        chosen = {name: i.to(self.args.device) for name, i in self.trained.mask.items() if i.numel()}
        values = saft_kernels.gather([named[name] for name in chosen], list(chosen.values()))
        return {name: value.cpu() for name, value in zip(chosen, values, strict=True)}

    def _save_checkpoint(self) -> None:
        state: dict[str, Any] = {name: getattr(self, name) for name in ("epoch", "loss", "times", "seconds")}
        state |= {part: getattr(self, part).state_dict() for part in ("optimizer", "scheduler", "scaler")}
        with replacing(self.checkpoint_file) as file:
            torch.save(state | {"values": self._values()}, file)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        file = self.checkpoint_file
        if not file.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zipfile, pickle and torch each raise their own
            raise InputError(f"{file}: expected a checkpoint of this script, cannot read it; remove it") from error
        return saved

    def _restore(self, saved: Mapping[str, Any]) -> None:
        for part in ("optimizer", "scheduler", "scaler"):
            getattr(self, part).load_state_dict(saved[part])
        for name in ("epoch", "loss", "times", "seconds"):
            setattr(self, name, saved[name])
        for name, value in saved["values"].items():
            parameter, value = self.trained.parameters[name].detach(), value.to(self.args.device)
            if self.trained.mask is None:
                parameter.copy_(value)
            else:
                saft_kernels.scatter_([parameter], [self.trained.mask[name].to(self.args.device)], [value])


# ---- running ----


def row_key(task: Task, setting: Setting, alpha: float) -> tuple[Any, ...]:
    """`Row.key` of what is to be tested."""
    seed = None if setting.method == ZERO_SHOT else setting.seed
    return task.name, setting.method, setting.density, setting.lr, seed, task.args.shots, alpha


def make_row(
    task: Task, setting: Setting, alpha: float, accuracy: dict[str, float], seconds: float, **figures: Any
) -> Row:
    """A row with the run's settings, versions and hardware."""
    name, method, density, lr, seed, shots, alpha = row_key(task, setting, alpha)
    versions = {"saft_kernels": saft_kernels.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    return Row(
        name, method, density, lr, seed, shots, alpha,
        {name: round(value, 4) for name, value in accuracy.items()},
        round(seconds, 2),
        settings=task.settings(),
        versions=versions,
        hardware=_hardware(task.args.device),
        **figures,
    )  # fmt: skip


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{model}, {torch.get_num_threads()} threads"
    return f"{device}, {torch.get_num_threads()} threads"


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """What is asked for, seed by seed."""
    return [
        Setting(method, density, lr, seed)
        for seed in args.seed
        for method in args.method
        for density in (args.density if method in MASKED else [None])
        for lr in args.lr[method]
    ]


RESULTS = ("results.jsonl", "results.md", "results.csv", "results.png")


def check_output(args: argparse.Namespace) -> None:
    """Raises InputError where the files cannot be written. Leaves nothing behind."""
    folders = [args.output, *(args.output / f"seed{seed}" for seed in args.seed)]
    for folder in folders:
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
    names = [f"{s.name}{end}" for s in settings_of(args) for end in (".safetensors", ".mask.safetensors")]
    files = [args.output / name for name in RESULTS]
    files += [folder / name for folder in folders[1:] for name in names]
    for file in files:
        if file.is_dir():
            raise InputError(f"--output: expected to write a file {file}, got a folder; name another, or remove it")


def put_aside(output: Path) -> Path | None:
    """Moves what an earlier run left in --output to a folder of its own there, whole: it can be gone on from there."""
    results = [path for name in RESULTS if (path := output / name).exists()]
    seeds = [path for path in output.glob("seed*") if re.fullmatch(r"seed(0|[1-9]\d*)", path.name) and path.is_dir()]
    theirs = [*results, *seeds]
    if not theirs:
        return None
    aside = next(path for n in itertools.count(1) if not os.path.lexists(path := output / f"earlier-{n}"))
    aside.mkdir()
    for path in theirs:
        if path.is_symlink():  # a relative one would lead elsewhere
            (aside / path.name).symlink_to(path.resolve())
            path.unlink()
        else:
            os.replace(path, aside / path.name)
    return aside


def open_rows(task: Task) -> Rows:
    """The rows to go on from with --resume; without it none: earlier ones and their files are put aside."""
    args, file = task.args, task.args.output / "results.jsonl"
    if not args.resume:
        if aside := put_aside(args.output):
            print(f"what an earlier run left is now in {aside}; --resume would have gone on from it", flush=True)
        return Rows(file)
    rows = Rows(file)
    ours = {"task": task.name, **task.settings()}
    for row in rows.rows:
        theirs = {"task": row.task, **row.settings}
        for name in ours:
            if theirs.get(name) != ours[name]:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"--resume: expected {flag} {theirs.get(name)}, with which {file} was made, got {flag} "
                    f"{ours[name]}; repeat the arguments, or name another --output"
                )
    return rows


def run(args: argparse.Namespace, load_task: Callable[[argparse.Namespace], Task], console: Console) -> None:
    """Zero-shot, then every setting, then the report."""
    for name in ("seed", "method", "density", "wise"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if "lora" in args.method and find_spec("peft") is None:
        raise InputError("--method lora: expected PEFT, it is not installed; pip install 'saft_kernels[lora]'")
    check_output(args)
    if args.resume and not (args.output / "results.jsonl").exists():
        raise InputError(
            f"--resume: expected {args.output / 'results.jsonl'}, found none: nothing to resume; run without --resume, "
            "or check --output"
        )
    task = load_task(args)
    examples = len(few_shot(task.train, args.shots, args.seed[0]))
    console.print(
        f"{task.name}: {task.numel:,} parameters, {len(task.classes)} classes, {examples} training examples, "
        f"{len(task.sets[SELECT])} for selection, {len(task.sets) - 1} test sets",
        soft_wrap=True,
    )
    rows, settings = open_rows(task), settings_of(args)
    zero_shot = Setting(ZERO_SHOT, None, 0.0, 0)
    if row_key(task, zero_shot, 0.0) not in rows:
        start = time.perf_counter()
        accuracy = task.evaluate(ZERO_SHOT)
        rows.add(make_row(task, zero_shot, 0.0, accuracy, time.perf_counter() - start))
    for number, setting in enumerate(settings, 1):
        if all(row_key(task, setting, alpha) in rows for alpha in (1.0, *args.wise)):
            say(f"[{number}/{len(settings)}] {setting}: there already")
            continue
        say(f"[{number}/{len(settings)}] {setting}")
        FineTuning(task, setting, args.output / f"seed{setting.seed}").run(rows)
    save_report(args.output, rows.rows)
    print_tables(rows.rows, console)
    console.print(f"written to {args.output}: results.jsonl, .md, .csv, .png, masks and deltas", soft_wrap=True)


def main(args: argparse.Namespace, load_task: Callable[[argparse.Namespace], Task]) -> int:
    """`run`, with errors as one line and a status."""
    try:
        run(args, load_task, Console())
    except InputError as error:
        # a DataLoader worker wraps the message in its traceback
        print(f"error: {str(error).strip().rpartition('InputError: ')[2]}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if (args.output / "results.jsonl").exists():
            remedy = "repeat the command with --resume to go on from the last epoch"
        else:
            remedy = "repeat the command: there is nothing yet to go on from"
        print(f"interrupted; {remedy}", file=sys.stderr)
        return 130
    return 0
