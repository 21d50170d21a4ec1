"""Exact top-k by |g| over many tensors: GB/s against the read roof, beside what people use today.

Peers: torch.topk on |x| (with the concatenation and the absolute value it needs), torch.kthvalue and numpy argpartition
on a CPU; torch.topk and, where a library built from bench/cub_topk.cu is at hand, CUB DeviceTopK on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import resource
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

import saft_kernels
from saft_kernels import ops

DATA = ("structured", "gaussian", "clip", "all_equal", "one_tile")
MEMORY_NUMEL = 1 << 26  # below it, memory that the allocator kept hides what a call takes
PEER_NUMEL = 1 << 24  # torch.topk takes about 10 s per 2^28 elements on a CPU


def split(numel: int, num_tensors: int, seed: int) -> list[int]:
    """Sizes like a transformer's: a few large tensors, many small ones, and the sum is `numel`."""
    weights = np.random.default_rng(seed).lognormal(0.0, 1.5, num_tensors)
    sizes = np.maximum(1, (weights / weights.sum() * numel).astype(np.int64))
    sizes[sizes.argmax()] += numel - sizes.sum()
    return [int(size) for size in sizes]


def gaussian(numel: int, num_tensors: int, device: str) -> list[Tensor]:
    return [torch.randn(n, device=device) for n in split(numel, num_tensors, 0)]


def structured(numel: int, num_tensors: int, device: str) -> list[Tensor]:
    """Heavy-tailed, correlated by row and column, another scale per tensor: what gradients look like."""
    tensors = []
    for n in split(numel, num_tensors, 0):
        columns = max(1, min(n, 1 << (n.bit_length() // 2)))
        rows = math.ceil(n / columns)
        row_scale = torch.randn(rows, 1, device=device).mul_(1.5).exp_()
        column_scale = torch.randn(1, columns, device=device).mul_(0.7).exp_()
        x = torch.randn(rows, columns, device=device).mul_(row_scale).mul_(column_scale)
        x.mul_(math.exp(float(torch.randn(())) * 1.5))
        tensors.append(x.reshape(-1)[:n].clone())
    return tensors


def clip(numel: int, num_tensors: int, device: str) -> list[Tensor]:
    """One backward pass of open_clip's ViT-B-32 (151 M parameters, random weights) on random images and captions."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").to(device)
    texts = open_clip.get_tokenizer("ViT-B-32")([f"a photo of thing number {i}" for i in range(8)]).to(device)
    image, text, scale = model(torch.randn(8, 3, 224, 224, device=device), texts)
    logits = scale * image @ text.T
    torch.nn.functional.cross_entropy(logits, torch.arange(8, device=device)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def all_equal(numel: int, num_tensors: int, device: str) -> list[Tensor]:
    return [torch.full((n,), 0.1, device=device) for n in split(numel, num_tensors, 0)]


def one_tile(numel: int, num_tensors: int, device: str) -> list[Tensor]:
    """Everything selected sits in one tile of one tensor."""
    tensors = [torch.rand(n, device=device) for n in split(numel, num_tensors, 0)]
    largest = max(tensors, key=Tensor.numel)
    largest[: min(65536, largest.numel())] += 10.0
    return tensors


def flat_topk(tensors: list[Tensor], k: int) -> Callable[[], object]:
    return lambda: torch.topk(torch.cat([t.reshape(-1) for t in tensors]).abs(), k, sorted=False)


def flat_kthvalue(tensors: list[Tensor], k: int) -> Callable[[], object]:
    def run() -> object:
        keys = torch.cat([t.reshape(-1) for t in tensors]).abs()
        return (keys >= torch.kthvalue(keys, keys.numel() - k + 1).values).nonzero()

    return run


def flat_argpartition(tensors: list[Tensor], k: int) -> Callable[[], object]:
    def run() -> object:
        keys = torch.cat([t.reshape(-1) for t in tensors]).abs().numpy()
        return np.argpartition(keys, keys.size - k)[keys.size - k :]

    return run


def cub_topk(tensors: list[Tensor], k: int) -> Callable[[], object] | None:
    """CUB DeviceTopK over the concatenated |x|, where `make gpu` built it."""
    library = Path(__file__).with_name("libcub_topk.so")
    if not library.exists():
        return None
    call = ctypes.CDLL(str(library)).cub_topk
    pointers = [ctypes.c_void_p] * 3
    call.argtypes = [*pointers, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    call.restype = ctypes.c_int64
    values = torch.empty(k, device="cuda")
    indices = torch.empty(k, dtype=torch.int64, device="cuda")

    def run(keys: Tensor | None = None) -> object:
        keys = torch.cat([t.reshape(-1) for t in tensors]).abs() if keys is None else keys
        stream = torch.cuda.current_stream().cuda_stream
        arguments = (keys.data_ptr(), values.data_ptr(), indices.data_ptr(), keys.numel(), k)
        needed = call(*arguments, None, 0, stream)
        workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
        if call(*arguments, workspace.data_ptr(), needed, stream) < 0:
            raise RuntimeError("CUB DeviceTopK failed")
        return indices

    return run


def peers(device: str, tensors: list[Tensor], k: int) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object] | None] = {"torch.topk": flat_topk(tensors, k)}
    if device == "cpu":
        found |= {
            "torch.kthvalue": flat_kthvalue(tensors, k),
            "numpy.argpartition": flat_argpartition(tensors, k),
        }
    else:
        found["cub.DeviceTopK"] = cub_topk(tensors, k)
    return {name: fn for name, fn in found.items() if fn is not None}


def peak_extra_bytes(fn: Callable[[], object], device: str) -> int | None:
    """Peak memory of one call above what was held before: the allocator's on a GPU, resident memory on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    clear = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")  # resets the peak resident set size
        before = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])
        fn()
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 - before
    except (OSError, AttributeError, StopIteration):  # not Linux with glibc
        return None


def run(args: argparse.Namespace) -> harness.Results:
    sizes = args.numel or ([1 << 22, 1 << 25, 1 << 28] if args.device == "cpu" else [1e9])
    args.numel = [int(numel) for numel in sizes]
    args.backend = args.backend or [
        name
        for name in ops.BACKENDS
        if name != "reference" and ops.why_unavailable(name, "topk_magnitude", args.device) is None
    ]
    results = harness.Results(args.name, args.output)
    device = args.device
    common = {"op": "topk_magnitude", "device": harness.device_name(device)}
    cases = [
        (dtype, data, numel)
        for data in args.data
        for dtype in args.dtype
        for numel in (args.numel[-1:] if data == "clip" else args.numel)  # the model has its own size
    ]
    for dtype_name, data, numel in harness.progress(cases, "topk_magnitude"):
        dtype = getattr(torch, dtype_name)
        torch.manual_seed(0)
        try:
            tensors = [t.to(dtype) for t in globals()[data](numel, args.tensors, device)]
        except ImportError as error:  # clip is a model of open_clip
            print(f"{data}: left out, {error}")
            continue
        total = sum(t.numel() for t in tensors)
        what = {**common, "dtype": dtype_name, "data": data, "numel": total, "num_tensors": len(tensors)}
        for share in args.share:
            k = max(1, int(total * share))
            size = harness.topk_magnitude_bytes(total, dtype.itemsize, k)
            for backend in args.backend:
                roof = harness.read_roof(tensors)

                call = partial(saft_kernels.topk_magnitude, tensors, k, backend=backend)
                timing = harness.Timing.attempt(partial(harness.measure, call, device, repeats=args.repeats))
                extra = peak_extra_bytes(call, device) if total >= MEMORY_NUMEL and not timing.error else None
                note = (
                    ""
                    if extra is None
                    else f"extra memory {(extra - 8 * k) / (total * dtype.itemsize):.1%} of the data"
                )
                results.add(timing, roof, size, backend=backend, k=k, note=note, **what)
            if args.peers and dtype == torch.float32 and data == args.data[0]:
                add_peers(results, what, tensors, share, args.repeats)
    return results


def add_peers(
    results: harness.Results, what: dict[str, object], tensors: list[Tensor], share: float, repeats: int
) -> None:
    """Peers on a prefix of the tensors on a CPU, where they are too slow for all of it: compare ns per element."""
    device = tensors[0].device.type
    subset, numel = tensors, sum(t.numel() for t in tensors)
    if device == "cpu" and numel > PEER_NUMEL:
        subset, numel = [torch.cat([t[: PEER_NUMEL // len(tensors)] for t in tensors])], 0
        numel = subset[0].numel()
    k = max(1, int(numel * share))
    size = harness.topk_magnitude_bytes(numel, 4, k)
    for name, fn in peers(device, subset, k).items():
        timing = harness.Timing.attempt(partial(harness.measure, fn, device, repeats=min(repeats, 3), warmup=1))
        columns = {**what, "numel": numel, "num_tensors": len(subset)}
        results.add(timing, harness.read_roof(subset), size, backend=name, k=k, **columns)


def report(results: harness.Results) -> None:
    harness.table(
        ["data", "dtype", "backend", "numel", "k/N", "ms p50", "ms wall", "ns/elem", "GB/s", "of the roof", "note"],
        (
            (
                *(row.data, row.dtype, row.backend, f"{row.numel:,}", f"{row.k / row.numel:.0e}"),
                *(f"{row.p50_ms:.2f}", harness.wall(row, 2)),
                *(f"{row.p50_ms * 1e6 / row.numel:.3f}", f"{row.gb_per_s:.1f}", f"{row.roof_fraction:.0%}", row.note),
            )
            for row in results.rows
        ),
        title=f"topk_magnitude on {results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """GB/s against k/N per data set and backend, each at its largest N, and, where there are several, against N."""
    series: dict[str, list[harness.Row]] = {}
    for row in results.rows:
        name = f"{row.backend}, {row.data}, {row.dtype}" if row.backend in ops.BACKENDS else row.backend
        series.setdefault(name, []).append(row)
    at_share = {name: [row for row in rows if abs(row.k / row.numel - 1e-3) < 1e-4] for name, rows in series.items()}
    panels = 2 if any(len({row.numel for row in rows}) > 1 for rows in at_share.values()) else 1
    figure, axes = plt.subplots(1, panels, figsize=(6.5 * panels, 5), sharey=True, squeeze=False)
    by_k = axes[0, 0]
    for color, (name, rows) in enumerate(series.items()):
        style = {"marker": "o" if rows[0].backend in ops.BACKENDS else "x", "color": f"C{color}"}
        largest = max(row.numel for row in rows)
        at_largest = sorted((row for row in rows if row.numel == largest), key=lambda row: row.k)
        x, y = [row.k / row.numel for row in at_largest], [row.gb_per_s for row in at_largest]
        by_k.plot(x, y, label=f"{name}, N = {largest:.2g}", **style)
        by_size = sorted(at_share[name], key=lambda row: row.numel)
        if panels > 1 and len(by_size) > 1:
            axes[0, 1].plot([row.numel for row in by_size], [row.gb_per_s for row in by_size], **style)
    largest = max(row.numel for row in results.rows)
    roof = statistics.median(row.roof_gb_per_s for row in results.rows if row.numel == largest)
    for axis, label in zip(axes[0], ("k / N", "N  (k / N = 1e-3)"), strict=False):
        axis.axhline(roof, color="black", linestyle="--", label=f"read roof, {roof:.0f} GB/s")
        axis.set(xscale="log", xlabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    by_k.set_ylabel("GB/s (bytes of one read and the indices / time)")
    by_k.legend(fontsize=7)
    figure.suptitle(f"topk_magnitude, {results.rows[0].device}")
    return figure


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--backend", nargs="+", help="default: all that run on the device but the reference")
    parser.add_argument("--numel", nargs="+", type=float, default=None, help="elements, e.g. 1e9")
    parser.add_argument("--tensors", type=int, default=150, help="tensors that share them (default 150)")
    parser.add_argument("--share", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2, 1e-1], help="k / N")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    harness.main(parser, "topk_magnitude", run, report, draw)


if __name__ == "__main__":
    main()
