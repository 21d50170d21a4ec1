"""Fine-tune a decoder with SAFT under a memory budget: see what it will take before it starts, and what it took.

SAFT trains 0.1 % of the parameters, so weights and activations are all that has to stay in memory; three modes differ
in what else is there:

    dense        p.grad of every parameter, as in any training
    release      SparseAdamW(..., release_grads=True): the selected values of each gradient, as backward makes it
    sparse_grad  linear layers compute the selected entries of their gradient alone

Choosing the parameters is a step of its own, select(..., streaming=...): from a gradient sum per element, from the sums
of one block of parameters per pass, or from one batch without any sums.

A forward and backward pass on tensors without memory tells what each combination takes. The first that fits the budget
is used, activation checkpointing last, for it costs a second forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory_plan import (
    TRAINING,
    Peak,
    Plan,
    Step,
    dry_run,
    free_bytes,
    parse_bytes,
    plans,
    readable,
    return_freed_blocks,
    with_margin,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import saft_kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 256  # bytes
LESS = "lower --batch or --tokens, take --dtype bfloat16, or a smaller model"

EPILOG = """\
examples:
  # a small decoder with random weights on made-up data: a minute on a CPU
  python finetune_large.py

  # the same in less memory: gradients are released, the selection streams
  python finetune_large.py --memory-budget 150MiB

  # your text, a model of the Hugging Face hub or a folder with one (needs transformers)
  python finetune_large.py --model Qwen/Qwen2.5-7B --data notes.txt --memory-budget 24GiB --output runs/notes

  # only say what would be done
  python finetune_large.py --model Qwen/Qwen2.5-7B --memory-budget 24GiB --dry-run

written to --output:
  mask.safetensors     which elements were trained
  tuned.safetensors    the fine-tune as a SparseDelta: what changed, for the command saft-kernels, too
"""


class InputError(Exception):
    """Something the user gave does not fit; printed as one line."""


# ---- a decoder that needs no download ----


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), in and out."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """A language model over bytes."""

    def __init__(self, width: int, layers: int, tokens: int, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(tokens, width)
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)  # of 64 channels or more
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (batch, tokens, vocabulary)."""
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(self.norm(x))


def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the next token."""
    logits = model(ids[:, :-1])
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def model_builder(args: argparse.Namespace) -> Callable[[bool, bool], nn.Module]:
    """A function of (checkpointing, pretrained) that makes the model; without weights of its own for the dry run."""
    if args.model is None:

        def build(checkpointing: bool, pretrained: bool) -> nn.Module:
            torch.manual_seed(args.seed)
            torch.set_default_dtype(DTYPES[args.dtype])
            try:
                with torch.device(args.device):
                    return Decoder(args.width, args.layers, args.tokens, checkpointing)
            finally:
                torch.set_default_dtype(torch.float32)

        return build
    try:
        import transformers
    except ImportError as error:
        raise InputError("--model needs transformers; pip install transformers") from error
    kind = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise InputError(f"--model: {str(error).splitlines()[0]}") from error
    config.use_cache = False

    def build_pretrained(checkpointing: bool, pretrained: bool) -> nn.Module:
        if pretrained:
            model = kind.from_pretrained(args.model, config=config, dtype=DTYPES[args.dtype]).to(args.device)
        else:
            with torch.device(args.device):
                model = kind.from_config(config, dtype=DTYPES[args.dtype])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    return build_pretrained


def batch_source(args: argparse.Namespace) -> list[Tensor]:
    """All batches of ids, (batch, tokens): of the text, or of made-up sequences that count up in steps of 1 to 3."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.data is None:
        start = torch.randint(VOCABULARY, (args.steps, args.batch, 1), generator=generator)
        steps = torch.randint(1, 4, (args.steps, args.batch, 1), generator=generator)
        return list((start + steps * torch.arange(args.tokens)) % VOCABULARY)
    try:
        text = args.data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data: expected a text file, got {args.data}: {error}") from error
    if args.model is None:
        ids = torch.tensor(list(text.encode()))
    else:
        import transformers

        ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(args.model)(text)["input_ids"])
    if len(ids) <= args.tokens:
        raise InputError(f"--data: expected more than {args.tokens} tokens, got {len(ids)}; lower --tokens")
    starts = torch.randint(len(ids) - args.tokens + 1, (args.steps, args.batch), generator=generator)
    return [torch.stack([ids[i : i + args.tokens] for i in row.tolist()]) for row in starts]


# ---- before it starts ----


def choose(
    args: argparse.Namespace, build: Callable[[bool, bool], nn.Module], say: Callable[[str], None]
) -> tuple[Plan, Iterator[Plan]]:
    """The first plan that fits, and those after it. Raises InputError when none does."""
    budget, itemsize = args.memory_budget, DTYPES[args.dtype].itemsize

    @functools.cache
    def step(mode: str, checkpointing: bool) -> Step:
        def make_batch() -> Tensor:
            return torch.zeros(args.batch, args.tokens, dtype=torch.long, device=args.device)

        return dry_run(lambda: build(checkpointing, False), make_batch, loss_fn, mode, args.density)

    rest = plans(step, args.density, itemsize, torch.device(args.device).type, args.output is not None)
    rest = (plan for plan in rest if args.mode in ("auto", plan.mode))
    seen: list[Plan] = []
    for plan in rest:
        seen.append(plan)
        if plan.peak <= budget:
            break
    else:
        least = min(seen, key=lambda plan: plan.peak)
        remedy = LESS if args.mode == "auto" else f"leave out --mode {args.mode}, {LESS}"
        raise InputError(
            f"--memory-budget: expected at least {readable(least.peak)} ({least}), got {readable(budget)}; {remedy}"
        )
    first, numel = seen[0], step("dense", False).numel
    say(f"{numel:,} parameters in {args.dtype}, {args.batch} x {args.tokens} tokens, budget {readable(budget)}")
    say(f"{plan}")
    larger = "selection" if first.selection > first.training else "training"
    why = "" if plan is first else f": {first} would take {readable(first.peak)}, in {larger}"
    say(f"this is the fastest way{'' if args.mode == 'auto' else f' of --mode {args.mode}'} that fits{why}")
    full = with_margin(step("dense", False).peak + 2 * numel * max(4, itemsize))
    say(
        f"expected at the peak: selection {readable(plan.selection)}, training {readable(plan.training)} "
        f"(full fine-tuning with fp32 moments: {readable(full)})"
    )
    return plan, rest


# ---- training ----


def train(
    args: argparse.Namespace,
    plan: Plan,
    build: Callable[[bool, bool], nn.Module],
    batches: list[Tensor],
    say: Callable[[str], None],
) -> int:
    """Selects, trains, and says what it took."""
    batches = [batch.to(args.device) for batch in batches]
    warm_up(args)
    peak = Peak(torch.device(args.device))
    model = build(plan.checkpointing, True)
    start = time.perf_counter()
    few = batches[: 1 if plan.streaming is True else args.selection_batches]
    mask = saft_kernels.select(model, few, loss_fn, density=args.density, streaming=plan.streaming, blocks=plan.blocks)
    took = {"selection": (plan.selection, peak.bytes(), time.perf_counter() - start)}
    say(f"training for {len(batches)} steps")

    peak.restart()
    optimizer = saft_kernels.SparseAdamW(
        model.named_parameters(), lr=args.lr, weight_decay=0.0, mask=mask, release_grads=plan.mode != "dense"
    )
    originals = saft_kernels.Originals(optimizer)
    if plan.mode == "sparse_grad":
        saft_kernels.sparse_grad(model, optimizer)
    start = time.perf_counter()
    losses = []
    for number, batch in enumerate(batches, 1):
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        del loss
        if number % max(1, len(batches) // 5) == 0:
            say(f"step {number}/{len(batches)}  loss {losses[-1]:.3f}")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        mask.save(args.output / "mask.safetensors")
        saft_kernels.SparseDelta.from_optimizer(optimizer, originals).save(args.output / "tuned.safetensors")
        say(f"mask and values: {args.output}")
    took["training"] = (plan.training, peak.bytes(), time.perf_counter() - start)

    say(f"{'':12}{'expected':>12}{'measured':>12}{'seconds':>10}")
    over = False
    for what, (expected, measured, seconds) in took.items():
        got = "unknown" if measured is None else readable(measured)
        say(f"{what:12}{readable(expected):>12}{got:>12}{seconds:>10.1f}")
        over |= measured is not None and measured > args.memory_budget
    if over:
        say("the budget was exceeded; please report this with the lines above")
    return 1 if over else 0


def check_output(folder: Path) -> None:
    """Raises InputError where the files cannot be written. Leaves nothing behind."""
    made: list[Path] = []
    try:
        import safetensors  # noqa: F401

        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for name in ("mask.safetensors", "tuned.safetensors"):
            if (folder / name).is_dir():
                raise InputError(f"--output: expected to write a file {folder / name}, got a folder; name another")
    except ImportError as error:
        raise InputError("--output needs safetensors; pip install 'saft_kernels[io]'") from error
    except OSError as error:
        raise InputError(
            f"--output: expected a folder to write to, got {folder}: {error.strerror}; name another"
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def out_of_memory(error: BaseException, plan: Plan, rest: Iterator[Plan]) -> str:
    """What to say: where it happened, and the next plan that takes less there."""
    stage = "selection" if str(error).startswith("select()") else "training"
    expected = getattr(plan, stage)
    less = next((other for other in rest if getattr(other, stage) < expected and other.peak <= plan.peak), None)
    remedy = LESS if less is None else f"pass --mode {less.mode} --memory-budget {-(-less.peak // 2**20)}MiB ({less})"
    got = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
    return f"out of memory in {stage} ({plan}): expected {readable(expected)} to do, got: {got}; {remedy}"


def warm_up(args: argparse.Namespace) -> None:
    """Libraries load what they load on first use; it is not the model's."""
    layer = nn.Linear(8, 8).to(args.device, DTYPES[args.dtype])
    optimizer = saft_kernels.SparseAdamW(layer.parameters())
    layer(torch.ones(2, 8, device=args.device, dtype=DTYPES[args.dtype])).sum().backward()
    optimizer.step()


# ---- arguments ----


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see --help\n")


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(kind: Callable[[str], Any], most: float = float("inf"), least: int = 0) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value <= most or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0{'' if most > 1 else ' up to 1'}, got {text!r}")
        if value < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text!r}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """Every option, with what it is for."""
    parser = _Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--memory-budget", type=_size, help="such as 16GiB; default: what the device has free now")
    add("--mode", choices=("auto", *TRAINING), default="auto", help="what of the gradients exists (default: what fits)")
    add("--model", help="Hugging Face name or folder of a causal language model (default: a small one, random weights)")
    add("--data", type=Path, help="a text file (default: made-up sequences)")
    add("--density", type=_positive(float, 1), default=1e-3, help="share of the parameters to train (default 0.001)")
    add("--steps", type=_positive(int), default=30, help="(default 30)")
    add("--selection-batches", type=_positive(int), default=4, help="to select from (default 4; one if it must stream)")
    add("--batch", type=_positive(int), default=4, help="sequences per step (default 4)")
    add("--tokens", type=_positive(int, least=2), default=64, help="per sequence, the next to predict (default 64)")
    add("--lr", type=_positive(float), default=1e-3, help="(default 0.001)")
    add("--dtype", choices=tuple(DTYPES), help="of the weights (default: bfloat16 on a GPU, float32 on a CPU)")
    add(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: the GPU where there is one)"
    )
    add("--width", type=_positive(int), default=512, help="of the built-in decoder (default 512)")
    add("--layers", type=_positive(int), default=6, help="of the built-in decoder (default 6)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="folder for the mask and the trained values")
    add("--dry-run", action="store_true", help="say what is expected, and stop")
    return parser


def say(line: str) -> None:
    """Prints it at once, also into a file or a pipe."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 when nothing fits the budget, 1 when it was exceeded."""
    args = build_parser().parse_args(argv)
    try:
        device = torch.zeros(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        print(f"error: --device: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    plan: Plan | None = None
    rest: Iterator[Plan] = iter(())
    try:
        args.memory_budget = args.memory_budget or free_bytes(device)
        if args.memory_budget is None:
            raise InputError(
                "--memory-budget: expected one where the system does not say what is free; pass 16GiB, say"
            )
        if args.output is not None:  # not after hours of training
            check_output(args.output)
        build, batches = model_builder(args), batch_source(args)
        plan, rest = choose(args, build, say)
        return 0 if args.dry_run else train(args, plan, build, batches, say)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if plan is None or not is_out_of_memory(error):
            raise
        print(f"error: {out_of_memory(error, plan, rest)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    return_freed_blocks()
    sys.exit(main())
