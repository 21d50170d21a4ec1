"""What the host pays per call: the work around the kernels, on tensors so small that nothing else is left.

On a GPU it is the host that sets the pace of small models. Each call is timed in turn with the least that torch itself
would take for it, round by round, one thread: compare ratios. With --device cuda the device is waited for between
calls, and not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from torch import Tensor, nn

import saft_kernels
from saft_kernels import SparseMask

Call = Callable[[], object]
DENSITY = 0.125


@dataclass
class Case:
    """Two calls to compare, of `count` items each; `less` is taken off what `ours` takes."""

    what: str
    peer: str
    count: int
    ours: Call
    theirs: Call
    before: Call = lambda: None  # each call, untimed
    less: Call | None = None


def random_mask(model: nn.Module) -> SparseMask:
    """An eighth of each parameter."""
    parameters = dict(model.named_parameters())
    ks = {name: max(1, int(p.numel() * DENSITY)) for name, p in parameters.items()}
    indices = {name: torch.randperm(p.numel())[: ks[name]].sort().values for name, p in parameters.items()}
    return SparseMask(indices, {name: tuple(p.shape) for name, p in parameters.items()})


def many(device: str, count: int, numel: int = 64) -> tuple[nn.ParameterList, list[Tensor]]:
    """Parameters and gradients for them."""
    torch.manual_seed(0)
    gradients = [torch.randn(numel, device=device) for _ in range(count)]
    return nn.ParameterList([torch.randn(numel, device=device) for _ in range(count)]), gradients


def selection(device: str) -> Case:
    _, gradients = many(device, 150)
    return Case(
        "topk_magnitude of 150 tensors",
        "torch.topk of all of them, concatenated",
        1,
        lambda: saft_kernels.topk_magnitude(gradients, 96),
        lambda: torch.cat(gradients).abs().topk(96),
    )


def step(device: str, **how: Any) -> Case:
    ours, gradients = many(device, 446)
    theirs, _ = many(device, 446)
    for model in (ours, theirs):
        for p, gradient in zip(model, gradients, strict=True):
            p.grad = gradient.clone()
    if "mask" in how:
        how = {"mask": random_mask(ours)}
    sparse = saft_kernels.SparseAdamW(ours.named_parameters(), **how)
    dense = torch.optim.AdamW(theirs.parameters(), fused=True)
    what = "masked" if "mask" in how else "density 1.0"
    return Case(f"a step of 446 tensors, {what}", "torch.optim.AdamW, fused", 1, sparse.step, dense.step)


def release(device: str) -> Case:
    """512 values a parameter, about what ViT-B/16 has at 0.1 %, of gradients too small to be returned to the system."""
    parameters, gradients = many(device, 300, 4096)
    plain, _ = many(device, 300, 4096)
    mask = random_mask(parameters)
    optimizer = saft_kernels.SparseAdamW(parameters.named_parameters(), mask=mask, release_grads=True)
    indices = [mask[str(i)].to(device, torch.int64) for i in range(len(gradients))]
    kept = [torch.empty(index.numel(), device=device) for index in indices]

    def clear() -> None:
        optimizer.zero_grad()
        for p in plain:
            p.grad = None

    def select() -> None:
        for gradient, index, out in zip(gradients, indices, kept, strict=True):
            torch.index_select(gradient, 0, index, out=out)

    return Case(
        "release_grads, a parameter",
        "torch.index_select(out=)",
        len(gradients),
        lambda: torch.autograd.backward(list(parameters), gradients),
        select,
        clear,
        lambda: torch.autograd.backward(list(plain), gradients),
    )


def linear(device: str) -> Case:
    """Forward and backward passes of layers in a row, 16 x 16 with a bias, batch 8."""
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(*(nn.Linear(16, 16) for _ in range(40))).to(device) for _ in range(2))
    optimizer = saft_kernels.SparseAdamW(ours.named_parameters(), mask=random_mask(ours), release_grads=True)
    saft_kernels.sparse_grad(ours, optimizer)
    x = torch.randn(8, 16, device=device, requires_grad=True)

    def train(model: nn.Module) -> None:
        model(x).sum().backward()

    def clear() -> None:
        optimizer.zero_grad()
        theirs.zero_grad()
        x.grad = None

    return Case(
        "sparse_grad, a linear layer", "nn.Linear", len(ours), lambda: train(ours), lambda: train(theirs), clear
    )


CASES: tuple[Callable[[str], Case], ...] = (
    selection,
    lambda device: step(device, mask=True),
    lambda device: step(device, density=1.0),
    release,
    linear,
)


@dataclass
class Row:
    """Microseconds per item: medians; the ratio is the median of the rounds' own."""

    what: str
    us: float
    peer: str
    peer_us: float
    ratio: float
    least_ratio: float
    largest_ratio: float
    rounds: int
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
        return f"{self.what} beside {self.peer}"


def least(call: Call, before: Call, device: str, repeats: int) -> float:
    """Seconds, the least of some."""
    seconds = []
    for _ in range(repeats):
        before()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measured(case: Case, args: argparse.Namespace) -> Row:
    pairs = []
    for _ in range(args.rounds):
        ours, theirs = (least(call, case.before, args.device, args.repeats) for call in (case.ours, case.theirs))
        if case.less:
            ours -= least(case.less, case.before, args.device, args.repeats)
        pairs.append((ours / case.count, theirs / case.count))
    ratios = [ours / theirs for ours, theirs in pairs]
    return Row(
        what=case.what,
        us=round(statistics.median(ours for ours, _ in pairs) * 1e6, 2),
        peer=case.peer,
        peer_us=round(statistics.median(theirs for _, theirs in pairs) * 1e6, 2),
        ratio=round(statistics.median(ratios), 3),
        least_ratio=round(min(ratios), 3),
        largest_ratio=round(max(ratios), 3),
        rounds=args.rounds,
        note=harness.notes(),
        **harness.provenance(args.device),
    )


def keep_freed_memory() -> None:
    """From here on glibc returns no heap to the system: page faults would be in some of the calls."""
    trim_threshold = -1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(trim_threshold, 2**30)


def run(args: argparse.Namespace) -> harness.Results:
    torch.set_num_threads(1)
    keep_freed_memory()
    results = harness.Results(args.name, args.output)
    for make in harness.progress(CASES, "host"):
        results.append(measured(make(args.device), args))
    return results


def report(results: harness.Results) -> None:
    harness.table(
        ["call", "us", "beside", "us", "ratio", "of the rounds", "note"],
        (
            (
                *(row.what, f"{row.us:,.1f}", row.peer, f"{row.peer_us:,.1f}", f"{row.ratio:.2f}"),
                *(f"{row.least_ratio:.2f} to {row.largest_ratio:.2f}", row.note),
            )
            for row in results.rows
        ),
        title=f"time of the host, {results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """Ratios, and their range over the rounds."""
    figure, axis = plt.subplots(figsize=(9, 3))
    rows = results.rows
    around = [[r.ratio - r.least_ratio for r in rows], [r.largest_ratio - r.ratio for r in rows]]
    axis.barh([row.label for row in rows], [row.ratio for row in rows], xerr=around)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xlabel="times as long (lower is better)")
    axis.set_title(f"time of the host\n{rows[0].device}", fontsize=9)
    axis.invert_yaxis()
    return figure


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=15, help="of which the least counts")
    harness.main(parser, "host", run, report, draw, row_class=Row)


if __name__ == "__main__":
    main()
