"""How long each CUDA kernel of topk_magnitude takes: a table, and CSV rows for a results directory.

With --once it runs each configuration twice and measures nothing: the program that `ncu` looks at.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from saft_kernels.ops import cuda

COLUMNS = ("device", "dtype", "numel", "k", "kernel", "calls", "us_per_call", "gb_per_s_of_one_read", "reads")


def kernel_times(tensors: list[torch.Tensor], k: int, repeats: int) -> dict[str, tuple[int, float]]:
    """Kernel name to (calls per run, microseconds per run)."""
    options: dict[str, Any] = {"activities": [torch.profiler.ProfilerActivity.CUDA]}
    if "acc_events" in inspect.signature(torch.profiler.profile).parameters:
        options["acc_events"] = True  # torch 2.11 keeps no events without
    with torch.profiler.profile(**options) as profiler:
        for _ in range(repeats):
            cuda.launch_topk_magnitude(tensors, k)
        torch.cuda.synchronize()
    return per_run(profiler.events(), repeats)


def per_run(events: Iterable[Any], repeats: int) -> dict[str, tuple[int, float]]:
    """Kernel name to (calls, microseconds) of one run, of the events that took time on the device.

    Raises:
        RuntimeError: None did.
    """
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    seen = 0
    for event in events:
        seen += 1
        if not event.device_time:  # what the host did
            continue
        found = re.search(r"(\w+_kernel)<", event.name)
        name = found.group(1) if found and "cuda_topk_magnitude" in event.name else event.name[:40]
        calls[name] += 1
        total[name] += event.device_time
    if not total:
        raise RuntimeError(
            f"torch.profiler of torch {torch.__version__}: expected kernels with device time, got {seen} events "
            "without; profile with ncu and --once"
        )
    return {name: (calls[name] // repeats, total[name] / repeats) for name in total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", nargs="+", type=float, default=[10**9])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--share", nargs="+", type=float, default=[1e-3, 1e-2])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("topk_magnitude_kernels.csv"))
    args = parser.parse_args()
    rows, failures = [], 0
    for numel in map(int, args.numel):
        for name in args.dtype:
            x = torch.empty(numel, dtype=getattr(torch, name), device="cuda")
            for start in range(0, numel, 2**28):
                x[start : start + 2**28].normal_()
            for share in args.share:
                k = int(numel * share)
                pending = [cuda.launch_topk_magnitude([x], k) for _ in range(2)][-1]
                pending.result()
                if args.once:
                    continue
                try:
                    times = kernel_times([x], k, args.repeats)
                except RuntimeError as error:  # the other configurations still have theirs
                    print(f"{name} N {numel:.1e} k/N {share:.0e}: failed: {error}")
                    failures += 1
                    continue
                times["all kernels"] = (sum(c for c, _ in times.values()), sum(us for _, us in times.values()))
                for kernel, (calls, us) in times.items():
                    rate = numel * x.itemsize / us / 1e3
                    row = (torch.cuda.get_device_name(), name, numel, k, kernel, calls, round(us, 2), round(rate, 1))
                    rows.append((*row, pending.reads))
                    what = f"{name:9} N {numel:.1e} k/N {share:.0e} {kernel:28}"
                    print(f"{what} {calls:3} calls {us:10.1f} us {rate:8.0f} GB/s")
            del x
    if rows:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    if failures:
        sys.exit(f"{failures} configurations failed")


if __name__ == "__main__":
    main()
