"""Selected entries of a weight gradient dW = dY^T X, beside the dense product and other ways to get at them.

Layers of CLIP ViT-B/32 at batch 16: 50 tokens per image, 77 per text. Entries are spread uniformly at random, or are
the largest of a matrix of random numbers with heavy-tailed rows and columns, as gradients have. All ways are timed in
turn, round by round: compare ratios. Bytes are those of the channels that have a selected entry, read once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from saft_kernels import sddmm
from saft_kernels.layers.weight_gradient import Product, plan

# tokens, outputs, inputs
SHAPES = {
    "vision c_fc": (800, 3072, 768),
    "vision c_proj": (800, 768, 3072),
    "text out_proj": (1232, 512, 512),
}
DENSITIES = (1e-4, 1e-3, 1e-2, 0.1, 0.3)
CHOSEN = "sparse_grad's choice"
MAX_GATHERED = 5_000_000
"""Elements that gather + bmm may copy out of each factor."""


def uniform(outputs: int, inputs: int, count: int) -> Tensor:
    return torch.randperm(outputs * inputs)[:count].sort().values.int()


def heavy_tailed(outputs: int, inputs: int, count: int) -> Tensor:
    scale = torch.randn(outputs, 1).mul(1.5).exp() * torch.randn(1, inputs).mul(1.5).exp()
    return (scale * torch.randn(outputs, inputs)).abs().flatten().topk(count).indices.sort().values.int()


def gather_bmm(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Both channels of every entry copied out, then a dot product for each."""
    row, column = indices // x.shape[1], indices % x.shape[1]
    return torch.bmm(dy.t()[row].unsqueeze(1), x.t()[column].unsqueeze(2)).flatten()


def candidates(dy: Tensor, x: Tensor, indices: Tensor, device: str) -> dict[str, Callable[[], object]]:
    flat = indices.long()
    shape = dy.shape[1], x.shape[1]
    by_rows_and_columns, chosen = Product.of(indices, shape, (True, True)), plan(indices, shape)
    ways: dict[str, Callable[[], object]] = {
        "saft_kernels": lambda: sddmm(dy, x, indices),
        "dense product": lambda: dy.t() @ x,
        "dense product, take": lambda: (dy.t() @ x).take(flat),
        "rows and columns, dense": lambda: by_rows_and_columns(dy, x),
        CHOSEN: lambda: chosen(dy, x),
    }
    if indices.numel() * len(dy) <= MAX_GATHERED:
        ways["gather, bmm"] = lambda: gather_bmm(dy, x, flat)
    if device == "cuda":
        ways["triton"] = lambda: sddmm(dy, x, indices, backend="triton")
    return ways


def run(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    cases = [(shape, data, density) for shape in SHAPES for data in ("uniform", "heavy") for density in DENSITIES]
    factors = {
        name: (torch.randn(t, o).to(args.device, dtype), torch.randn(t, i).to(args.device, dtype))
        for name, (t, o, i) in SHAPES.items()
    }
    roof = harness.read_roof([t for pair in factors.values() for t in pair])
    for shape, data, density in harness.progress(cases, "sddmm"):
        dy, x = factors[shape]
        count = round(density * dy.shape[1] * x.shape[1])
        indices = {"uniform": uniform, "heavy": heavy_tailed}[data](dy.shape[1], x.shape[1], count).to(args.device)
        used = (indices // x.shape[1]).unique().numel() + (indices % x.shape[1]).unique().numel()
        ways = candidates(dy, x, indices, args.device)
        chosen = plan(indices, (dy.shape[1], x.shape[1]))
        way = f"{chosen}" if isinstance(chosen, Product) else "sampled by sddmm"
        timings = harness.interleave(ways, args.device, args.rounds)
        dense = timings["dense product"].p50
        for name, timing in timings.items():
            results.add(
                timing,
                roof,
                harness.sddmm_bytes(used, len(dy), count, dy.itemsize),
                op="sddmm",
                backend=name,
                device=harness.device_name(args.device),
                dtype=args.dtype,
                data=f"{shape}, {data}",
                numel=dy.shape[1] * x.shape[1],
                num_tensors=1,
                k=count,
                note=f"{timing.p50 / dense:.3f} of the dense product's time; {used} channels used"
                + (f"; {way}" if name == CHOSEN else ""),
            )
    return results


def report(results: harness.Results) -> None:
    harness.table(
        ["layer, entries", "way", "k / N", "ms p20", "ms p50", "ms p80", "note"],
        ((row.data, row.backend, f"{row.k / row.numel:.0e}", *harness.times(row, 3), row.note) for row in results.rows),
        title=f"selected entries of dY^T X, {results.rows[0].dtype}, {results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """Time against the selected share, one panel per layer, for heavy-tailed entries."""
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(4.2 * len(SHAPES), 4))
    for axis, shape in zip(axes, SHAPES, strict=True):
        rows = [row for row in results.rows if row.data == f"{shape}, heavy"]
        for way in dict.fromkeys(row.backend for row in rows):
            mine = [row for row in rows if row.backend == way]
            axis.plot([row.k / row.numel for row in mine], [row.p50_ms for row in mine], marker="o", label=way)
        tokens, outputs, inputs = SHAPES[shape]
        axis.set(xscale="log", yscale="log", xlabel="selected share", ylabel="ms")
        axis.set_title(f"{shape}: {outputs} x {inputs}, {tokens} tokens", fontsize=9)
    axes[0].set_ylim(top=axes[0].get_ylim()[1] * 20)  # room for the legend
    axes[0].legend(loc="upper left", fontsize=8)
    return figure


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=2)
    harness.main(parser, "sddmm", run, report, draw)


if __name__ == "__main__":
    main()
