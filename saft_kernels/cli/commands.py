"""What each command does with its arguments."""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..common import files, tensor_files
from ..common.names import listing, plain_names
from ..delta import file as delta_file
from ..delta.changes import Changes, check_alpha, rest_checksum, same_bits
from ..delta.difference import comparable, difference, ties
from ..delta.sparse_delta import SparseDelta
from ..delta.targets import Copies, Targets, check_apart, check_state, check_verify, matched, other_base, take_originals
from ..mask import FORMAT as MASK_FORMAT
from ..mask import SparseMask
from .checkpoint import Checkpoint, check_format, folder_of
from .checkpoint_files import TORCH_SUFFIXES, TorchFile
from .progress import Progress
from .summary import Row, grouped, natural, print_table, save_figure


def info(_: argparse.Namespace) -> None:
    """Versions and backends."""
    from .report import report

    print(report())


def examples(args: argparse.Namespace) -> None:
    """A list of the example scripts, or a new folder with copies of them."""
    scripts = _example_scripts()
    if args.folder is None:
        width = max(len(script.name) for script in scripts)
        for script in scripts:
            about = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]
            print(f"{script.name:{width}}  {about}")
        return
    with files.new_folder(args.folder) as folder:
        for script in scripts:
            shutil.copyfile(script, folder / script.name)
    print(f"{args.folder}: {len(scripts)} scripts; each says with --help, or at its top, what it does and needs")


def _example_scripts() -> list[Path]:
    package = Path(__file__).parents[1]
    for folder in (package / "examples", package.parent / "examples"):  # installed; in a checkout
        if (folder / "finetune_clip.py").is_file():
            return sorted(folder.glob("*.py"))
    raise FileNotFoundError(f"{package / 'examples'}: expected the example scripts, found none; reinstall saft_kernels")


def diff(args: argparse.Namespace) -> None:
    """Two checkpoints in, a delta out."""
    _check_output(args.output, args.base, args.tuned)
    files.output(args.output)
    if args.output.suffix in TORCH_SUFFIXES:
        raise ValueError(
            f"{args.output}: expected a name for a safetensors file, which a delta is, got {args.output.suffix!r}; "
            f"name it {args.output.with_suffix('.safetensors').name}"
        )
    with _opened(args.base) as base, _opened(args.tuned) as tuned:
        names = comparable(base.tensors, tuned.tensors, args.exclude)
        keys = ({name: side.memory(name) for name in names if side.tensors[name].numel()} for side in (base, tuned))
        tied, untied = ties(*keys)
        own = [name for name in names if name not in tied]
        total = sum(base.tensors[name].nbytes for name in own)
        with Progress("comparing", total) as progress:
            changes = difference(
                _pairs(base, tuned, own, progress),
                own,
                tied=tied,
                untied=untied,
                whole=args.whole,
                numel=sum(base.tensors[name].numel() for name in own),
            )
        base.check_unchanged()
        tuned.check_unchanged()
    if not args.dry_run:
        delta_file.write(args.output, changes, changes.originals if args.include_original else None)
    _say_written(args, changes)


def apply(args: argparse.Namespace) -> None:
    """The base in, the tuned checkpoint out, or one between."""
    _move(args, args.alpha)


def revert(args: argparse.Namespace) -> None:
    """The tuned checkpoint in, the base out."""
    _move(args, 0.0, originals_needed=True)


def summary(args: argparse.Namespace) -> None:
    """A table of where the elements of a mask or delta are, and a picture."""
    if args.png is not None:
        _check_output(args.png, args.file)
        files.output(args.png)
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
        size = args.file.stat().st_size
        each = f", {size / loaded.k:.2f} per value" if loaded.k else ""
        print(f"delta of {size:,} bytes{each}; original values {kept}")
    if args.png is not None:
        save_figure(args.png, title, rows, loaded.numel)
        print(f"{args.png}: written")


def compare(args: argparse.Namespace) -> None:
    """A table of how two masks or deltas overlap."""
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
    empty = torch.empty(0, dtype=torch.int32, device="cpu")
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


# ---- checkpoints ----


def _opened(path: Path) -> Checkpoint:
    checkpoint = Checkpoint(path)
    if checkpoint.others:
        print(f"{path}: left out, no tensors: {listing(checkpoint.others)}", file=sys.stderr)
    _say_copies(checkpoint)
    return checkpoint


def _say_copies(checkpoint: Checkpoint) -> None:
    if checkpoint.copies:
        print(f"{checkpoint.path}: other weights in it are left alone: {listing(checkpoint.copies)}", file=sys.stderr)


def _pairs(
    base: Checkpoint, tuned: Checkpoint, names: Sequence[str], progress: Progress
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """File by file, so that what is in memory of one is not needed again."""
    for name in sorted(names, key=lambda name: (base.part(name), tuned.part(name))):
        yield name, base.read(name), tuned.read(name)
        progress(base.tensors[name].nbytes)


def _move(args: argparse.Namespace, alpha: float, *, originals_needed: bool = False) -> None:
    """Writes MODEL with the changed elements at `alpha`, after the checks that `SparseDelta.apply_` makes."""
    _check_output(args.output, args.delta, *([args.base] if args.base is not None else []))
    check_format(args.output, args.model)
    check_alpha(alpha)
    _check_file(args.delta, "a delta")
    changes = SparseDelta.load(args.delta).changes
    verify = args.verify or ("whole" if changes.rest else "selected")
    check_verify(changes, verify)
    if args.base is not None:
        with Checkpoint(args.base) as base:
            take_originals(changes, _elements("base", base, changes, whole=False)[0])
            base.check_unchanged()
    if originals_needed and changes.originals is None:
        raise _without_originals(args.delta)
    with Checkpoint(args.model) as model:
        _say_copies(model)
        pairs = matched("model", model.tensors, changes)
        if alpha:
            check_apart([(name, model.memory(alias)) for name, alias in pairs], changes)
        if verify != "none":
            targets, odd = _elements("model", model, changes, whole=verify == "whole")
            if odd:
                raise other_base("model", odd)
            check_state(changes, targets, ())
        if changes.originals is None and alpha != 1.0:
            raise _without_originals(args.delta)
        values = changes.at(alpha)
        if not args.dry_run:
            elements = {alias: (changes.mask[name], values[name]) for name, alias in pairs if len(values[name])}
            with Progress("writing", model.nbytes) as progress:
                left_out = model.save(args.output, elements, progress)
            if left_out:
                print(f"{args.output}: left out of the copy: {listing(left_out)}", file=sys.stderr)
    _say_written(args, changes)


def _without_originals(delta: Path) -> ValueError:
    return ValueError(
        f"{delta}: expected a delta with original values, got one without; pass --base with the model before "
        "fine-tuning, or make it with `diff --include-original`"
    )


def _elements(argument: str, model: Checkpoint, changes: Changes, *, whole: bool) -> tuple[Targets, list[str]]:
    """The changed elements of a checkpoint, and names whose other elements have another checksum than the base's."""
    pairs = matched(argument, model.tensors, changes)
    found: dict[tuple[str, str], Tensor] = {}
    odd = []
    wanted = [(name, alias) for name, alias in pairs if whole or changes.mask[name].numel()]
    with Progress(f"checking {model.path}", sum(model.tensors[alias].nbytes for _, alias in wanted)) as progress:
        for name, alias in sorted(wanted, key=lambda pair: model.part(pair[1])):
            tensor = model.read(alias)
            (found[name, alias],) = ops.gather([tensor], [changes.mask[name]])
            if whole and rest_checksum(tensor, changes.mask[name]) != changes.rest[name]:
                odd.append(name)
            progress(tensor.nbytes)
    current = [(name, found.get((name, alias), changes.values[name])) for name, alias in pairs]
    indices = {name: torch.arange(values.numel(), device="cpu") for name, values in current}
    return Targets(current, indices, Copies()), odd


# ---- files ----


def _load(path: Path) -> SparseMask | SparseDelta:
    """A mask, a delta, or a dictionary of bool or 0/1 masks from torch.save."""
    _check_file(path, "a mask or a delta")
    try:
        with open(path, "rb") as file:
            form = tensor_files.read_header(file).metadata.get("format")
    except ValueError as error:
        if path.suffix in TORCH_SUFFIXES:
            return _load_masks(path)
        raise ValueError(
            f"{path}: expected a mask or a delta, got another file or a damaged one ({error}); get it anew"
        ) from error
    if form not in (delta_file.FORMAT, MASK_FORMAT):
        raise ValueError(
            f"{path}: expected a mask or a delta, got another safetensors file: its format is {form!r}; of two "
            "checkpoints, `saft-kernels diff` makes a delta"
        )
    return SparseDelta.load(path) if form == delta_file.FORMAT else SparseMask.load(path)


def _check_file(path: Path, expected: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"{path}: expected {expected}, got a folder; of two checkpoints, `saft-kernels diff` makes a delta"
        )


def _load_masks(path: Path) -> SparseMask:
    with closing(TorchFile(path)) as file:
        masks = {name: file.read(name) for name in file.tensors}
        file.check_unchanged()
    if file.others or any(bool(((mask != 0) & (mask != 1)).any()) for mask in masks.values()):
        raise ValueError(
            f"{path}: expected a dictionary of bool or 0/1 masks, got something else; for two checkpoints, make a "
            "delta with `saft-kernels diff`"
        )
    return SparseMask.from_dense({plain: masks[name] for plain, name in plain_names(masks).items()})


def _check_output(path: Path, *inputs: Path) -> None:
    """Before anything is read: an output that is none of the inputs, by whatever name, nor a file of one's folder."""
    for other in inputs:
        folder = folder_of(other) if other.is_dir() or other.name.endswith(".index.json") else None
        own = [other] if folder is None else [entry for entry in folder.iterdir() if entry.is_file()]
        if path.is_file() and any(path.samefile(file) for file in own if file.exists()):
            raise ValueError(
                f"{path}: expected an output that is no input, got {other}, which would be lost; name another file"
            )


def _say_written(args: argparse.Namespace, changes: Changes) -> None:
    k = changes.mask.k
    share = k / changes.numel if changes.numel else 0.0
    what = f"{args.output}: {k:,} of {changes.numel:,} elements ({share:.3%}) changed"
    if args.dry_run:
        print(f"{what}; not written")
        return
    paths = [path for path in args.output.iterdir() if path.is_file()] if args.output.is_dir() else [args.output]
    size = sum(path.stat().st_size for path in paths)
    each = f", {size / k:.2f} bytes per value" if k and size < 100 * k else ""
    print(f"{what}; {size:,} bytes{each}")
