"""The command `saft-kernels`: fine-tunes as small files, from the shell."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..common import files, tensor_files
from ..common.names import listing, plain_names
from ..delta.changes import same_bits
from ..delta.file import FORMAT as DELTA_FORMAT
from ..delta.sparse_delta import SparseDelta
from ..mask import FORMAT as MASK_FORMAT
from ..mask import SparseMask
from .checkpoint_files import TORCH_SUFFIXES, Checkpoint, check_format, find_state_dict, read_torch
from .summary import Row, grouped, natural, print_table, save_figure

_DESCRIPTION = """\
Fine-tunes as small files: what changed, its new values, and a check that they meet the right model.
Without a command: `info`."""

_EXAMPLES = """\
examples:
  saft-kernels diff pretrained.safetensors logs/run/checkpoints/epoch_5.pt -o task.safetensors
  saft-kernels apply pretrained.safetensors task.safetensors -o tuned.safetensors
  saft-kernels apply pretrained.safetensors task.safetensors -o half.safetensors --alpha 0.5
  saft-kernels revert tuned.safetensors task.safetensors -o pretrained.safetensors --base other_copy.pt
  saft-kernels summary task.safetensors --depth 3 --png where.png
  saft-kernels compare mask_a.safetensors mask_b.safetensors

Checkpoints are .safetensors, .pt, .pth, .bin or .ckpt files (read without running their code). The state dict may be
nested under state_dict, model, model_state_dict or module, and its names may start with "module.". The output has the
format and nesting of MODEL. Existing outputs are replaced, once the new file is whole. Exit status: 0, 1 for an error,
2 for wrong usage, 130 when interrupted, 143 when terminated."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saft-kernels",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_info)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], help: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  saft-kernels {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    command(
        "info",
        _info,
        "versions and backends of this machine, to paste into a bug report",
        "info\n\nSet SAFT_BACKEND to one of the backends to force it.",
    )

    sub = command(
        "diff",
        _diff,
        "write what changed between two checkpoints as a delta",
        "diff pretrained.pt epoch_5.pt -o task.safetensors",
    )
    sub.add_argument("base", metavar="BASE", type=Path, help="checkpoint before fine-tuning")
    sub.add_argument("tuned", metavar="TUNED", type=Path, help="checkpoint after it")
    _output(sub, "the delta, a .safetensors file")
    sub.add_argument("--exclude", metavar="GLOB", action="append", default=[], help="names to leave out; repeatable")
    sub.add_argument(
        "--include-original", action="store_true", help="store the old values, too: `revert` then needs no base"
    )
    sub.add_argument(
        "--whole",
        action="store_true",
        help="store checksums of all that did not change, too: `apply` then checks every element of its model",
    )

    sub = command(
        "apply",
        _apply,
        "write the tuned checkpoint, from the base and a delta",
        "apply pretrained.pt task.safetensors -o tuned.pt",
    )
    sub.add_argument("model", metavar="MODEL", type=Path, help="checkpoint that the delta was made from")
    sub.add_argument("delta", metavar="DELTA", type=Path)
    _output(sub, "the tuned checkpoint")
    sub.add_argument(
        "--alpha", type=float, default=1.0, metavar="A", help="base + A * (tuned - base), as in WiSE-FT (default: 1)"
    )

    sub = command(
        "revert",
        _revert,
        "write the base checkpoint, from the tuned one and a delta",
        "revert tuned.pt task.safetensors -o pretrained.pt",
    )
    sub.add_argument("model", metavar="MODEL", type=Path, help="checkpoint that carries the delta")
    sub.add_argument("delta", metavar="DELTA", type=Path)
    _output(sub, "the base checkpoint")
    sub.add_argument("--base", type=Path, help="where the old values are, if the delta does not include them")

    sub = command(
        "summary",
        _summary,
        "show where the elements of a mask or delta are",
        "summary task.safetensors --depth 4 --png where.png",
    )
    sub.add_argument("file", metavar="MASK_OR_DELTA", type=Path)
    sub.add_argument("--depth", type=_positive, metavar="N", help="add up tensors by the first N parts of their names")
    sub.add_argument("--png", type=Path, metavar="FILE", help="draw it (needs matplotlib)")

    sub = command(
        "compare",
        _compare,
        "show how two masks or deltas overlap: intersection over union",
        "compare a.safetensors b.safetensors --depth 3",
    )
    sub.add_argument("a", metavar="A", type=Path)
    sub.add_argument("b", metavar="B", type=Path)
    sub.add_argument("--depth", type=_positive, metavar="N", help="add up tensors by the first N parts of their names")
    return parser


def _output(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help=help)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


# ---- commands ----


def _info(_: argparse.Namespace) -> None:
    from .report import report

    print(report())


def _diff(args: argparse.Namespace) -> None:
    _check_output(args.output, args.base, args.tuned)
    if args.output.suffix in TORCH_SUFFIXES:
        raise ValueError(
            f"{args.output}: expected a name for a safetensors file, which a delta is, got {args.output.suffix!r}; "
            f"name it {args.output.with_suffix('.safetensors').name}"
        )
    base, tuned = Checkpoint(args.base), Checkpoint(args.tuned)
    for checkpoint in (base, tuned):
        if checkpoint.others:
            print(f"{checkpoint.path}: left out, no tensors: {listing(checkpoint.others)}", file=sys.stderr)
    delta = SparseDelta.diff(base.tensors, tuned.tensors, exclude=args.exclude, whole=args.whole, progress=True)
    delta.save(args.output, include_original=args.include_original)
    _written(args.output, delta)


def _apply(args: argparse.Namespace) -> None:
    _check_output(args.output, args.delta)
    check_format(args.output, args.model)
    delta = SparseDelta.load(args.delta)
    model = Checkpoint(args.model)
    delta.interpolate_(model.tensors, args.alpha, verify="whole" if delta.rest else "selected")
    model.save(args.output)
    _written(args.output, delta)


def _revert(args: argparse.Namespace) -> None:
    _check_output(args.output, args.delta, *([args.base] if args.base is not None else []))
    check_format(args.output, args.model)
    delta = SparseDelta.load(args.delta)
    model = Checkpoint(args.model)
    if args.base is not None:
        delta.take_originals(Checkpoint(args.base).tensors)
    elif delta.originals is None:
        raise ValueError(
            f"{args.delta}: expected a delta with original values, got one without; pass --base with the model before "
            "fine-tuning, or make it with `diff --include-original`"
        )
    delta.revert_(model.tensors, verify="whole" if delta.rest else "selected")
    model.save(args.output)
    _written(args.output, delta)


def _summary(args: argparse.Namespace) -> None:
    if args.png is not None:
        _check_output(args.png, args.file)
        if args.png.suffix != ".png":
            raise ValueError(f"{args.png}: expected a name that ends in .png, got {args.png.suffix!r}; name it so")
    loaded = _load(args.file)
    mask = loaded.mask if isinstance(loaded, SparseDelta) else loaded
    rows = [Row(row.name, row.k, row.numel) for row in mask.summary().rows]
    title = f"{args.file.name}: {mask.k:,} of {loaded.numel:,} elements ({loaded.density:.3%})"
    table = [
        [row.name, f"{row.k:,}", f"{row.numel:,}", f"{row.k / max(row.numel, 1):.3%}", f"{row.k / mask.k:.2%}"]
        for row in grouped(rows, args.depth)
        if row.k
    ]
    table.append(["total", f"{mask.k:,}", f"{loaded.numel:,}", f"{loaded.density:.3%}", "100%"])
    print_table(title, ["tensor", "selected", "numel", "density", "share"], table, total=True)
    if isinstance(loaded, SparseDelta):
        kept = "included" if loaded.originals is not None else "not included"
        print(f"delta, {args.file.stat().st_size / max(loaded.k, 1):.2f} bytes per value; original values {kept}")
    if args.png is not None:
        save_figure(args.png, title, rows, loaded.numel)
        print(f"{args.png}: written")


def _compare(args: argparse.Namespace) -> None:
    a, b = _load(args.a), _load(args.b)
    masks = [loaded.mask if isinstance(loaded, SparseDelta) else loaded for loaded in (a, b)]
    names = list(dict.fromkeys([*masks[0], *masks[1]]))
    for name in names:
        shapes = [mask.shapes[name] for mask in masks if name in mask]
        if shapes[0] != shapes[-1]:
            raise ValueError(
                f"{args.b}: expected shape {shapes[0]} for {name!r}, as in {args.a}, got {shapes[1]}; compare masks of "
                "one model"
            )
    if masks[0].k and masks[1].k and not set(masks[0]) & set(masks[1]):
        raise ValueError(
            f"{args.b}: expected tensor names as in {args.a}, such as {listing(list(masks[0]))}, got "
            f"{listing(list(masks[1]))}; compare masks of one model"
        )
    empty = torch.empty(0, dtype=torch.int32)
    rows: dict[str, list[int]] = {}
    agreeing = 0
    for name in names:
        indices = [mask[name].long() if name in mask else empty.long() for mask in masks]
        in_b = torch.isin(indices[0], indices[1], assume_unique=True)
        key = ".".join(name.split(".")[: args.depth])
        counts = rows.setdefault(key, [0, 0, 0])
        for i, count in enumerate((indices[0].numel(), indices[1].numel(), int(in_b.sum()))):
            counts[i] += count
        if isinstance(a, SparseDelta) and isinstance(b, SparseDelta) and bool(in_b.any()):
            in_a = torch.isin(indices[1], indices[0], assume_unique=True)
            agreeing += _count_same(a.values[name], in_b, b.values[name], in_a)
    sorted_rows = sorted(rows.items(), key=lambda item: natural(item[0]))
    totals = [sum(counts[i] for counts in rows.values()) for i in range(3)]
    table = [_compare_row(name, counts) for name, counts in sorted_rows if counts[0] or counts[1]]
    iou = _iou(totals)
    title = f"IoU {iou:.4f}: {totals[2]:,} elements in both, {totals[0] + totals[1] - totals[2]:,} in either"
    print_table(title, ["tensor", "A", "B", "both", "IoU"], [*table, _compare_row("total", totals)], total=True)
    if isinstance(a, SparseDelta) and isinstance(b, SparseDelta):
        print(f"same new value in {agreeing:,} of the {totals[2]:,} elements in both")


def _count_same(a: Tensor, in_b: Tensor, b: Tensor, in_a: Tensor) -> int:
    if a.dtype != b.dtype:
        return 0
    shared_a, shared_b = (
        tensor.view(torch.uint8).view(-1, tensor.itemsize)[chosen] for tensor, chosen in ((a, in_b), (b, in_a))
    )
    return len(shared_a) if same_bits(shared_a, shared_b) else int((shared_a == shared_b).all(1).sum())


def _compare_row(name: str, counts: Sequence[int]) -> list[str]:
    return [name, *(f"{count:,}" for count in counts), f"{_iou(counts):.4f}"]


def _iou(counts: Sequence[int]) -> float:
    either = counts[0] + counts[1] - counts[2]
    return counts[2] / either if either else 1.0


# ---- files ----


def _load(path: Path) -> SparseMask | SparseDelta:
    """A mask, a delta, or a dictionary of bool or 0/1 masks from torch.save."""
    try:
        with open(path, "rb") as file:
            form = tensor_files.read_header(file).metadata.get("format")
    except ValueError as error:
        if path.suffix in TORCH_SUFFIXES:
            return _load_masks(path)
        raise ValueError(
            f"{path}: expected a mask or a delta, got another file or a damaged one ({error}); get it anew"
        ) from error
    if form not in (DELTA_FORMAT, MASK_FORMAT):
        raise ValueError(
            f"{path}: expected a mask or a delta, got another safetensors file: its format is {form!r}; of two "
            "checkpoints, `saft-kernels diff` makes a delta"
        )
    return SparseDelta.load(path) if form == DELTA_FORMAT else SparseMask.load(path)


def _load_masks(path: Path) -> SparseMask:
    masks = find_state_dict(read_torch(path))
    if masks is None or any(not isinstance(m, Tensor) or bool(((m != 0) & (m != 1)).any()) for m in masks.values()):
        raise ValueError(
            f"{path}: expected a dictionary of bool or 0/1 masks, got something else; for two checkpoints, make a "
            "delta with `saft-kernels diff`"
        )
    return SparseMask.from_dense({plain: masks[name] for plain, name in plain_names(masks).items()})


def _check_output(path: Path, *inputs: Path) -> None:
    """Before anything is read: an output that can be written, and is none of the inputs, by whatever name."""
    files.output(path)
    for other in inputs:
        if path.exists() and other.exists() and path.samefile(other):
            raise ValueError(
                f"{path}: expected an output that is no input, got {other}, which would be lost; name another file"
            )


def _written(path: Path, delta: SparseDelta) -> None:
    size = path.stat().st_size
    each = f", {size / delta.k:.2f} bytes per value" if delta.k and size < 100 * delta.k else ""
    print(f"{path}: {delta.k:,} of {delta.numel:,} elements ({delta.density:.3%}) changed; {size:,} bytes{each}")


class _Stopped(BaseException):
    """A signal that would end the process."""


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise, so that no temporary file stays, as SIGINT does in any Python program."""

    def stop(number: int, _: object) -> None:
        raise _Stopped(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if in_main_thread and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or after one line on stderr 1, or 128 + a signal's number; argparse exits with 2."""
    args = _parser().parse_args(argv)
    try:
        with _unwinding_on_signals():
            args.run(args)
            sys.stdout.flush()
    except BrokenPipeError:  # `saft-kernels summary ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _said("interrupted", 128 + signal.SIGINT)
    except _Stopped as stopped:
        return _said(f"stopped by {signal.Signals(stopped.args[0]).name}", 128 + stopped.args[0])
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, MemoryError) as error:
        # what is none of these is a bug: it shows its traceback
        return _said(" ".join(str(error).split()) or type(error).__name__, 1)
    return 0


def _said(what: str, status: int) -> int:
    print(f"saft-kernels: {what}", file=sys.stderr)
    return status
