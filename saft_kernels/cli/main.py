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

from ..delta.targets import VERIFY
from . import commands

_FILES = """\
files:
  A checkpoint is a .safetensors, .pt, .pth, .bin, .ckpt or .tar file, read without running its code; or a folder (or an
  index in it, *.index.json) as Hugging Face's libraries save models, in one file or in shards. The state dict may be
  nested under state_dict, model, model_state_dict or module, and its names may start with "module.".
  A delta is the .safetensors file that `diff` writes: the changed elements, their new values, and checksums by which
  the base is recognised. Of a mask, SparseMask.save writes the file.
  Outputs replace existing files, once they are whole; nothing is left of one that failed. No input is written over,
  but MODEL, where you name it as the output, too.
"""
_DESCRIPTION = f"""\
Fine-tunes as small files: what changed, its new values, and a check that they meet the right model.

  saft-kernels diff pretrained.safetensors logs/run/checkpoints/epoch_5.pt -o task.safetensors
  saft-kernels apply pretrained.safetensors task.safetensors -o tuned.safetensors

Without a command: `info`. `saft-kernels COMMAND --help` has more examples.

{_FILES}"""
_STATUS = "Exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted, 143 when terminated."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saft-kernels",
        description=_DESCRIPTION,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=commands.info)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], help: str, examples: Sequence[str], files: str = ""
    ) -> argparse.ArgumentParser:
        lines = "".join(f"  saft-kernels {name}{example}\n" for example in examples)
        sub = subparsers.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"examples:\n{lines}\n{files}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("info", commands.info, "versions and backends of this machine, to paste into a bug report", [""])
    sub.epilog = f"{sub.epilog}Set SAFT_BACKEND to one of the backends to force it."

    sub = command(
        "diff",
        commands.diff,
        "write what changed between two checkpoints as a delta",
        [
            " pretrained.pt epoch_5.pt -o task.safetensors",
            " llama-7b/ llama-7b-tuned/ -o task.safetensors --whole",
            " a.pt b.pt -o task.safetensors --exclude '*.num_batches_tracked' --exclude 'head.*'",
        ],
        _FILES,
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
        commands.apply,
        "write the tuned checkpoint, from the base and a delta",
        [
            " pretrained.pt task.safetensors -o tuned.pt",
            " llama-7b/ task.safetensors -o llama-7b-task/",
            " pretrained.pt task.safetensors -o half.pt --alpha 0.5",
        ],
        _FILES,
    )
    _move(
        sub,
        model="checkpoint that the delta was made from",
        output="the tuned checkpoint",
        base="where the old values are, if MODEL is not the base",
    )
    sub.add_argument(
        "--alpha", type=float, default=1.0, metavar="A", help="base + A * (tuned - base), as in WiSE-FT (default: 1)"
    )

    sub = command(
        "revert",
        commands.revert,
        "write the base checkpoint, from the tuned one and a delta",
        [
            " tuned.pt task.safetensors -o pretrained.pt --base other_copy.safetensors",
            " tuned.pt with_originals.safetensors -o pretrained.pt",
        ],
        _FILES,
    )
    _move(
        sub,
        model="checkpoint that carries the delta",
        output="the base checkpoint",
        base="where the old values are, if the delta does not include them",
    )

    sub = command(
        "summary",
        commands.summary,
        "show where the elements of a mask or delta are",
        [" task.safetensors --depth 4", " mask.safetensors --png where.png"],
    )
    sub.add_argument(
        "file", metavar="MASK_OR_DELTA", type=Path, help="a .safetensors file of ours, or a torch.saved dict of masks"
    )
    _depth(sub)
    sub.add_argument("--png", type=Path, metavar="FILE", help="draw it (needs matplotlib)")

    sub = command(
        "compare",
        commands.compare,
        "show how two masks or deltas overlap: intersection over union",
        [" a.safetensors b.safetensors --depth 3"],
    )
    for name in ("a", "b"):
        sub.add_argument(name, metavar=name.upper(), type=Path, help="mask or delta, as for `summary`")
    _depth(sub)

    sub = command(
        "examples",
        commands.examples,
        "list the example scripts, or write them into a new folder",
        ["", " saft-examples"],
    )
    sub.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="folder to make; without it, the list")
    return parser


def _move(parser: argparse.ArgumentParser, *, model: str, output: str, base: str) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help=model)
    parser.add_argument("delta", metavar="DELTA", type=Path, help="what `diff` or SparseDelta.save wrote")
    _output(parser, f"{output}, of MODEL's format and nesting; a new folder, if MODEL is one")
    parser.add_argument("--base", type=Path, help=base)
    parser.add_argument(
        "--verify",
        choices=VERIFY,
        help="what of MODEL is checked before: the elements that the delta changes, all, or nothing but names and "
        "shapes (default: whole, if the delta has the checksums of `diff --whole`, else selected)",
    )


def _output(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("-o", "--output", metavar="OUTPUT", type=Path, required=True, help=help)
    parser.add_argument("--dry-run", action="store_true", help="check everything, and write nothing")


def _depth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depth", type=_positive, metavar="N", help="add up tensors by the first N parts of names")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


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
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as by `>&-`
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    try:
        with _unwinding_on_signals():
            args = _parser().parse_args(argv)
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
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {error.strerror}"
        return _said(" ".join(text.split()) or type(error).__name__, 1)
    return 0


def _said(what: str, status: int) -> int:
    print(f"saft-kernels: {what}", file=sys.stderr)
    return status
