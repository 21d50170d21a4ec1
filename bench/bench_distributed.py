"""What SparseAdamW costs between ranks: collectives and bytes of each call on a model of `fully_shard`, and times.

Processes of one machine with gloo: counts and bytes are what NCCL would be given, times are not. A rank's bytes are
those that it hands to the collectives: of an all-reduce the tensor, of an all-gather its own part, of a reduce-scatter
all of it. Gradients are random, so that each rank has about its share of the largest. "gather all" is what selection
would take without `saft_kernels.selection.shards`: every rank gathers all gradients, and takes the top-k of them.
Ranks that share the cores wait for each other: compare ratios within a number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import saft_kernels
from saft_kernels import ops

KINDS = ("reduce", "gather", "broadcast", "scatter", "alltoall", "all_to_all")
SELECTION, GATHER_ALL, SHARD = "reselect() and step()", "gather all, top-k", "top-k of the rank's shard"
TIMED = (SELECTION, GATHER_ALL, SHARD, "step()")


class Collectives(TorchDispatchMode):
    """Counts what this rank hands to torch.distributed inside: (name, bytes) of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func._schema.name.partition("::")
        if library in ("c10d", "_c10d_functional") and any(kind in name for kind in KINDS):
            # of c10d the first argument is the output: that of an all-reduce or a broadcast is the input, too
            is_first = library != "c10d" or name in ("allreduce_", "broadcast_")
            mine = [leaf for leaf in tree_leaves(args[0 if is_first else 1]) if isinstance(leaf, Tensor)]
            self.found.append((name.strip("_"), sum(tensor.nbytes for tensor in mine)))
        return func(*args, **(kwargs or {}))


def train_model(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Linear layers, each split by itself, and a batch."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers)))
    for layer in model:
        fully_shard(layer)
    return fully_shard(model), torch.randn(4, args.width)


def rank_of(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=args.worker)
    model, batch = train_model(args)
    optimizer = saft_kernels.SparseAdamW(model.named_parameters(), density=args.density)
    k = round(args.density * sum(p.numel() for p in model.parameters()))

    def backward() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        generator = torch.Generator().manual_seed(rank)
        for parameter in model.parameters():  # the real ones of random linear layers nearly vanish
            parameter.grad.to_local().normal_(generator=generator)  # type: ignore[union-attr]

    def select_again() -> None:
        optimizer.reselect()
        optimizer.step()

    def gather_all() -> None:
        ops.topk_magnitude([p.grad.full_tensor() for p in model.parameters()], k)  # type: ignore[union-attr]

    def top_k_of_shard() -> None:
        shards = [p.grad.to_local() for p in model.parameters()]  # type: ignore[union-attr]
        ops.topk_magnitude(shards, k // args.worker)

    calls: dict[str, Callable[[], object]] = {
        "forward and backward": backward,
        "first step(), which selects": optimizer.step,
        SELECTION: select_again,
        "step()": optimizer.step,
        "clip_grad_norm_()": lambda: optimizer.clip_grad_norm_(1.0),
        "mask": lambda: optimizer.mask,
        "state_dict()": optimizer.state_dict,
        GATHER_ALL: gather_all,
        SHARD: top_k_of_shard,
    }
    found = {}
    for name, call in calls.items():
        with Collectives() as collectives:
            call()
        seconds = []
        for _ in range(args.repeats if name in TIMED else 0):
            distributed.barrier()
            start = time.perf_counter()
            call()
            distributed.barrier()
            seconds.append(time.perf_counter() - start)
        found[name] = {"collectives": collectives.found, "seconds": seconds}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo and destroy_process_group(): see tests/processes.py


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Of each call, what the rank that hands in most has handed in, and the times of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_of, (args, folder), nprocs=args.worker)  # type: ignore[attr-defined]
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(args.worker)]
    found = {}
    for name, first in ranks[0].items():
        most = max((rank[name]["collectives"] for rank in ranks), key=lambda some: sum(n for _, n in some))
        found[name] = {"collectives": most, "seconds": first["seconds"]}
    return found


@dataclass
class Row:
    """One call on one number of ranks. `mib` is what a rank hands to its `collectives`, at most."""

    call: str
    ranks: int
    numel: int
    num_tensors: int
    k: int
    collectives: int | None
    mib: float | None
    what: str
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    device: str
    threads: int
    torch: str
    commit: str
    day: str
    malloc: str = ""
    triton: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """What was measured of what."""
        return f"{self.call} ({self.ranks} ranks)"


def run(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    numel = args.layers * args.width**2
    sizes = {"numel": numel, "num_tensors": args.layers, "k": round(args.density * numel)}
    for ranks in harness.progress(args.ranks, "distributed"):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(ranks)]
        measured, error = harness.run_worker(command)
        where = {**harness.provenance("cpu"), "threads": 1}
        for call, found in (measured or {"all": {"collectives": [], "seconds": []}}).items():
            times = harness.Timing.of(found["seconds"]) if found["seconds"] else None
            some = [(name, size) for name, size in found["collectives"]]
            by_kind = Counter(f"{name} {size:,} B" for name, size in some)
            results.append(
                Row(
                    call=call,
                    ranks=ranks,
                    collectives=None if error else len(some),
                    mib=None if error else round(sum(size for _, size in some) / 2**20, 6),
                    what="; ".join(f"{count} x {kind}" for kind, count in by_kind.items()),
                    p20_ms=harness.milliseconds(times and times.p20),
                    p50_ms=harness.milliseconds(times and times.p50),
                    p80_ms=harness.milliseconds(times and times.p80),
                    note=harness.notes(error),
                    **sizes,
                    **where,
                )
            )
    return results


def report(results: harness.Results) -> None:
    harness.table(
        ["call", "ranks", "collectives", "MiB per rank", "ms p50", "note"],
        (
            (
                row.call,
                row.ranks,
                row.collectives,
                "" if row.mib is None else f"{row.mib:,.4f}",
                "" if row.p50_ms is None else f"{row.p50_ms:,.1f}",
                row.note,
            )
            for row in results.rows
        ),
        title=f"{results.rows[0].numel:,} elements, k = {results.rows[0].k:,}, {results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """What selection sends and takes, beside gathering everything: lower is better."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    rows = {(row.call, row.ranks): row for row in results.rows}
    ranks = sorted({row.ranks for row in results.rows})
    for axis, column, label in zip(axes, ("mib", "p50_ms"), ("MiB handed in per rank", "ms"), strict=True):
        for call, style in ((SELECTION, "o-"), (GATHER_ALL, "s--")):
            points = [(n, value) for n in ranks if (value := getattr(rows[call, n], column))]  # 0 has no logarithm
            axis.plot(*zip(*points, strict=True), style, label=call)
        axis.set(xlabel="ranks", ylabel=label, xticks=ranks)
        axis.set_yscale("log")
        axis.grid(axis="y", linestyle=":")
    axes[0].legend(fontsize=8)
    row = results.rows[0]
    what = f"selection of {row.k:,} from {row.numel:,} elements over gloo, one thread per rank"
    figure.suptitle(f"{what}\n{row.device}", fontsize=9)
    return figure


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--worker", type=int, metavar="RANKS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args)))
    else:
        harness.main(parser, "distributed", run, report, draw, row_class=Row)


if __name__ == "__main__":
    main()
