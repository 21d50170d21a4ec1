"""SparseDelta on CLIP tensors, density 0.1 %: swapping two fine-tunes in a model, files, and bytes per changed value.

Beside it, what a swap costs without it: load_state_dict of the other fine-tune, from memory and from its file (in the
page cache). Elements are spread uniformly at random, or those that a real CLIP gradient selects (random weights, random
images); the two fine-tunes have most of them in common. All are timed in turn, round by round: compare ratios.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import safetensors.torch
import torch
from bench_sparse_adamw import clip_gradient, make_model, masks
from torch import nn

from saft_kernels import SparseDelta, SparseMask


def fine_tuned(model: nn.Module, mask: SparseMask, seed: int) -> nn.Module:
    """A copy whose selected values have moved by a little; a quarter of the places are the next ones instead."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            index = mask[name].long()
            index = (
                (index + (torch.rand(len(index), generator=generator) < 0.25)).clamp(max=parameter.numel() - 1).unique()
            )
            flat = parameter.view(-1)
            flat[index] += 1e-2 * torch.randn(len(index), generator=generator).to(parameter.device)
    return tuned


def candidates(
    model: nn.Module, deltas: list[SparseDelta], others: list[nn.Module], folder: Path
) -> dict[str, Callable[[], object]]:
    """Name -> what is timed. Each leaves `model` at the base."""
    a, b = deltas
    paths = [folder / f"{i}.safetensors" for i in range(2)]
    for path, other in zip(paths, others, strict=True):
        safetensors.torch.save_file({n: t.contiguous() for n, t in other.state_dict().items()}, path)
    carrier = copy.deepcopy(model)
    a.apply_(carrier)

    def swap(verify: Any) -> None:
        # there and back: two swaps
        a.revert_(carrier, verify=verify)
        b.apply_(carrier, verify=verify)
        b.revert_(carrier, verify=verify)
        a.apply_(carrier, verify=verify)

    plain = copy.deepcopy(model)
    device = str(next(model.parameters()).device)

    def load(path: Path) -> None:
        plain.load_state_dict(safetensors.torch.load_file(path, device=device))

    swept = copy.deepcopy(model)
    a.interpolate_(swept, 0.25)
    file = folder / "delta"
    a.save(file)
    return {
        "2 swaps: revert_, apply_": lambda: swap("selected"),
        "2 swaps, verify='none'": lambda: swap("none"),
        "2 swaps: load_state_dict": lambda: [plain.load_state_dict(other.state_dict()) for other in others],
        "2 swaps: load_state_dict of files": lambda: [load(path) for path in paths],
        "interpolate_": lambda: a.interpolate_(swept, 0.75 if a._alphas[0] == 0.25 else 0.25),
        "diff": lambda: SparseDelta.diff(model, others[0]),
        "save": lambda: a.save(file),
        "load": lambda: SparseDelta.load(file),
    }


def run(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    model = make_model(args.model, args.device)
    clip_gradient(model)
    named = dict(model.named_parameters())
    numel = sum(p.numel() for p in named.values())
    both = masks(model, args.density)
    model.zero_grad()
    roof = harness.read_roof([p.detach() for p in named.values()])
    for data, mask in harness.progress(both, "sparse_delta"):
        others = [fine_tuned(model, mask, seed) for seed in (1, 2)]
        deltas = [SparseDelta.diff(model, other) for other in others]
        k = deltas[0].k
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            timings = harness.interleave(candidates(model, deltas, others, folder), args.device, args.rounds)
            notes = {"save": f"{(folder / 'delta').stat().st_size / k:.2f} B per value"}
            deltas[0].save(folder / "delta", include_original=True)
            notes["save"] += f", {(folder / 'delta').stat().st_size / k:.2f} with originals"
        for what, timing in timings.items():
            results.add(
                timing,
                roof,
                harness.sparse_delta_bytes(4 * k if what.startswith("2 swaps") else k),
                op="sparse_delta",
                backend=what,
                device=harness.device_name(args.device),
                dtype="float32",
                data=data,
                numel=numel,
                num_tensors=len(named),
                k=k,
                note=notes.get(what, ""),
            )
    return results


def report(results: harness.Results) -> None:
    harness.table(
        ["data", "what", "k", "ms p20", "ms p50", "ms p80", "note"],
        ((row.data, row.backend, f"{row.k:,}", *harness.times(row, 2), row.note) for row in results.rows),
        title=f"SparseDelta, {results.rows[0].numel:,} parameters in {results.rows[0].num_tensors} tensors, "
        f"{results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """Time of each, points on a logarithmic axis."""
    rows = [row for row in results.rows if row.data == "clip"]
    labels, values = [row.backend for row in rows], [f"{row.p50_ms:.1f} ms" for row in rows]
    title = f"SparseDelta, {results.subject}: N = {rows[0].numel:,}, k = {rows[0].k:,}\n{rows[0].device}"
    return harness.bars(plt, labels, rows, values, title=title, xscale="log")


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip model name (default ViT-B-32)")
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=7)
    harness.main(parser, "sparse_delta", run, report, draw)


if __name__ == "__main__":
    main()
