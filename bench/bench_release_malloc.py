"""What returning freed gradients to the system costs: training steps with `release_grads=True`, and their peak memory.

Under glibc, gradients that are released one by one leave holes in the heap; their pages stay in the process unless they
are returned before the free, as `saft_kernels` does, for the price of page faults when they are used again. "kept" is
without that, "returned" with it. Each is a process of its own, in turn, round by round: compare ratios. Processor time
counts the faults and is not the other jobs'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from bench_memory import MIB, Peak, random_mask, warm_up
from torch import Tensor, nn

import saft_kernels
from saft_kernels.optim import release

FREED = ("kept", "returned")


def layers(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor], str]:
    """Equal linear layers: nothing but gradients and small activations."""
    steps = [m for _ in range(args.layers) for m in (nn.Linear(args.width, args.width, bias=False), nn.ReLU())]
    x = torch.randn(args.batch, args.width)
    what = f"{args.layers} layers of {args.width} x {args.width}, batch {args.batch}"
    return nn.Sequential(*steps), lambda model: model(x).square().mean(), what


def clip(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor], str]:
    """open_clip's ViT-B-32, random weights and images."""
    import open_clip

    texts = open_clip.tokenize([f"a photo of thing number {i}" for i in range(args.images)])
    images, labels = torch.randn(args.images, 3, 224, 224), torch.arange(args.images)

    def loss(model: nn.Module) -> Tensor:
        image, text, scale = model(images, texts)
        return nn.functional.cross_entropy(scale * image @ text.T, labels)

    return open_clip.create_model("ViT-B-32"), loss, f"CLIP ViT-B/32, batch {args.images}"


MODELS = {"layers": layers, "clip": clip}


def work(args: argparse.Namespace) -> dict[str, Any]:
    name, freed = args.worker
    if freed == "kept":
        release.free = list.clear  # type: ignore[assignment]
        release.return_holes = lambda: None
    warm_up("", "cpu")
    torch.manual_seed(0)
    model, loss, what = MODELS[name](args)
    mask = random_mask(model, args.density)
    peak = Peak("cpu")
    optimizer = saft_kernels.SparseAdamW(model.named_parameters(), mask=mask, release_grads=True)
    wall, processor = [], []
    for _ in range(args.steps + 1):
        start, used = time.perf_counter(), time.process_time()
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {
        "model": what,
        "gradients_mib": round(sum(p.numel() * p.itemsize for p in model.parameters()) / MIB, 1),
        "peak_mib": round(peak.bytes() / MIB, 1),
        "wall_ms": round(statistics.median(wall[1:]) * 1e3, 1),
        "processor_ms": round(statistics.median(processor[1:]) * 1e3, 1),
    }


@dataclass
class Row:
    """A process. Milliseconds per step: the median, without the first. `peak_mib` is above the model."""

    model: str
    freed: str
    round: int
    gradients_mib: float
    peak_mib: float | None
    wall_ms: float | None
    processor_ms: float | None
    device: str
    load: float
    torch: str
    commit: str
    day: str
    allocator: str = ""
    threads: int = 0
    triton: str = ""
    density: float = 1e-3
    note: str = ""

    @property
    def label(self) -> str:
        """What was measured of what."""
        return f"{self.freed} ({self.model})"


UNMEASURED = {"gradients_mib": 0.0, "peak_mib": None, "wall_ms": None, "processor_ms": None}


def run(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    cases = [(i, model, freed) for i in range(args.rounds) for model in args.models for freed in FREED]
    for round_, model, freed in harness.progress(cases, "release_malloc"):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", model, freed]
        measured, error = harness.run_worker(command)
        where = harness.provenance("cpu")
        results.append(
            Row(
                freed=freed,
                round=round_,
                load=round(harness.load(), 1),
                allocator=where.pop("malloc"),
                density=args.density,
                note=harness.notes(error),
                **where,
                **(UNMEASURED | {"model": model} | measured),
            )
        )
    return results


def medians(rows: list[Row], column: str) -> dict[str, float]:
    """Of a column, kept and returned."""
    found = {freed: [getattr(row, column) for row in rows if row.freed == freed] for freed in FREED}
    return {freed: statistics.median(values) for freed, values in found.items() if values}


def report(results: harness.Results) -> None:
    measured = [row for row in results.rows if harness.is_measured(row)]
    by_model = {row.model: [r for r in measured if r.model == row.model] for row in measured}
    harness.table(
        ["model", "freed", "peak MiB", "of the gradients", "wall ms", "processor ms", "of kept, by rounds", "note"],
        (
            (
                *(model, freed, f"{medians(rows, 'peak_mib')[freed]:,.0f}"),
                f"{medians(rows, 'peak_mib')[freed] / rows[0].gradients_mib:.0%}",
                *(f"{medians(rows, column)[freed]:,.0f}" for column in ("wall_ms", "processor_ms")),
                ", ".join(f"{ratio:.2f}" for ratio in ratios(rows)) if freed == "returned" else "",
                next((row.note for row in rows if row.note and row.freed == freed), ""),
            )
            for model, rows in by_model.items()
            for freed in medians(rows, "peak_mib")
        ),
        title=f"release_grads=True, {results.rows[0].device}",
    )


def ratios(rows: list[Row]) -> list[float]:
    """Processor time, returned to kept, of each round that has both."""
    by_round: dict[int, dict[str, float]] = {}
    for row in rows:
        by_round.setdefault(row.round, {})[row.freed] = row.processor_ms or 0.0
    return [found["returned"] / found["kept"] for found in by_round.values() if len(found) == 2]


def draw(plt: Any, results: harness.Results) -> Any:
    """Peak of each model, kept and returned."""
    figure, axis = plt.subplots(figsize=(9, 3))
    names = list(dict.fromkeys((row.model, row.freed) for row in results.rows))
    peaks = [medians([r for r in results.rows if r.model == model], "peak_mib")[freed] for model, freed in names]
    axis.barh([f"{model}: {freed}" for model, freed in names], peaks)
    axis.bar_label(axis.containers[0], [f"{peak:,.0f} MiB" for peak in peaks], padding=3)
    row = results.rows[0]
    axis.set(xlabel="peak above the model, MiB (lower is better)")
    sizes = " and ".join(f"{n:,.0f}" for n in dict.fromkeys(row.gradients_mib for row in results.rows))
    what = f"freed gradients, release_grads=True: {sizes} MiB of them, density {row.density:.2g}"
    axis.set_title(f"{what}\n{row.device}", fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    return figure


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="rows of the layers' input")
    parser.add_argument("--images", type=int, default=8, help="of the CLIP batch")
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "FREED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args)))
    else:
        harness.main(parser, "release_malloc", run, report, draw, row_class=Row)


if __name__ == "__main__":
    main()
