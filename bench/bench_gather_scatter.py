"""`gather` and `scatter_`: selected elements of many tensors in one call, beside torch's ways to do it per tensor.

Tensors of an open_clip model, density 0.1 % by default, coordinates uniformly at random. All are timed in turn, round
by round, in one run: compare ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness
import torch
from bench_sparse_adamw import make_model, uniform_mask
from torch import Tensor

import saft_kernels


def gathers(tensors: list[Tensor], indices: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Ways to read tensors[i].flat[indices[i]]."""
    flat = [t.view(-1) for t in tensors]
    wide = [i.long() for i in indices]
    return {
        "saft_kernels": lambda: saft_kernels.gather(tensors, indices),
        "torch index_select": lambda: [t.index_select(0, i) for t, i in zip(flat, wide, strict=True)],
        "torch take": lambda: [t.take(i) for t, i in zip(tensors, wide, strict=True)],
        "torch indexing": lambda: [t[i] for t, i in zip(flat, wide, strict=True)],
    }


def scatters(tensors: list[Tensor], indices: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Ways to write them."""
    flat = [t.view(-1) for t in tensors]
    wide = [i.long() for i in indices]
    values = saft_kernels.gather(tensors, indices)
    return {
        "saft_kernels": lambda: saft_kernels.scatter_(tensors, indices, values),
        "torch index_copy_": lambda: [t.index_copy_(0, i, v) for t, i, v in zip(flat, wide, values, strict=True)],
        "torch put_": lambda: [t.put_(i, v) for t, i, v in zip(tensors, wide, values, strict=True)],
        "torch index_put_": lambda: [t.index_put_((i,), v) for t, i, v in zip(flat, wide, values, strict=True)],
    }


def run(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    model = make_model(args.model, args.device)
    mask = uniform_mask(model, args.density)
    for dtype in harness.progress([torch.float32, torch.bfloat16], "gather, scatter_"):
        members = [(p.detach().to(dtype), mask[name].to(args.device)) for name, p in model.named_parameters()]
        tensors, indices = [t for t, i in members if i.numel()], [i for _, i in members if i.numel()]
        roof = harness.read_roof(tensors)
        for op, ways in (("gather", gathers(tensors, indices)), ("scatter_", scatters(tensors, indices))):
            timings = harness.interleave(ways, args.device, args.rounds)
            for name, timing in timings.items():
                results.add(
                    timing,
                    roof,
                    harness.gather_bytes(mask.k, dtype.itemsize, writes=op == "scatter_"),
                    op=op,
                    backend=name,
                    device=harness.device_name(args.device),
                    dtype=str(dtype).removeprefix("torch."),
                    data="uniform",
                    numel=mask.numel,
                    num_tensors=len(tensors),
                    k=mask.k,
                    note=f"{timing.p50 / timings['saft_kernels'].p50:.1f}x the time of saft_kernels",
                )
    return results


def report(results: harness.Results) -> None:
    harness.table(
        ["op", "dtype", "way", "ms p20", "ms p50", "ms p80", "note"],
        ((row.op, row.dtype, row.backend, *harness.times(row, 3), row.note) for row in results.rows),
        title=f"{results.rows[0].k:,} of {results.rows[0].numel:,} elements in {results.rows[0].num_tensors} tensors, "
        f"{results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """Time per op and way."""
    rows = [row for row in results.rows if row.dtype == "float32"]
    labels = [f"{row.op}: {row.backend}" for row in rows]
    title = f"fp32, {results.subject}: {rows[0].k:,} of N = {rows[0].numel:,} elements\n{rows[0].device}"
    return harness.bars(plt, labels, rows, [f"{row.p50_ms:.2f} ms" for row in rows], title=title)


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip model name (default ViT-B-16)")
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=7)
    harness.main(parser, "gather_scatter", run, report, draw)


if __name__ == "__main__":
    main()
