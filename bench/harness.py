"""Timing, byte model, roof, CSV rows and plots shared by the benches.

Times are p20/p50/p80 over repeats, from CUDA events on a GPU (L2 flushed before each) and perf_counter on a CPU.
The roof is the best read bandwidth measured in the same run, so a fraction of it holds on a shared machine.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")


# ---- byte model: the least traffic of each op, in bytes ----


def topk_magnitude_bytes(numel: int, itemsize: int, k: int) -> int:
    """One read of every element, one int64 index written per selected element."""
    return numel * itemsize + 8 * k


def sparse_adamw_bytes(k: int, index_bytes: int = 4, line: int = 64) -> int:
    """Per scattered coordinate: a line of the parameter read and written, one of the gradient read, moments, index."""
    return k * (3 * line + 16 + index_bytes)


def gather_bytes(k: int, itemsize: int, writes: bool, index_bytes: int = 4, line: int = 64) -> int:
    """Per scattered element: a line of the tensor read (and written, by scatter_), its value, its index."""
    return k * ((2 if writes else 1) * line + itemsize + index_bytes)


def sparse_delta_bytes(k: int, index_bytes: int = 4, line: int = 64) -> int:
    """Per element that a delta reads, compares and writes: a line read twice and written, index twice, two values."""
    return k * (3 * line + 2 * index_bytes + 8)


def sddmm_bytes(channels: int, tokens: int, k: int, itemsize: int, index_bytes: int = 4) -> int:
    """Every channel with a selected entry read once; one index read and one fp32 value written per entry."""
    return channels * tokens * itemsize + k * (index_bytes + 4)


# ---- timing ----


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Percentiles of repeats."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(*(ordered[round(q * last)] for q in (0.2, 0.5, 0.8)))


def measure(
    fn: Callable[[], object],
    device: str = "cpu",
    *,
    repeats: int = 7,
    warmup: int = 2,
    min_seconds: float = 0.0,
    setup: Callable[[], object] | None = None,
) -> Timing:
    """Times `fn`: `repeats` times and for at least `min_seconds`. `setup` runs before each, untimed."""
    for _ in range(warmup):
        if setup:
            setup()
        fn()
    if device == "cuda":
        return _measure_cuda(fn, repeats, setup)
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < min_seconds:
        if setup:
            setup()
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def _measure_cuda(fn: Callable[[], object], repeats: int, setup: Callable[[], object] | None) -> Timing:
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # larger than any L2
    seconds = []
    for _ in range(repeats):
        if setup:
            setup()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    return Timing.of(seconds)


def interleave(ways: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Timing]:
    """Three timed calls each per round, after a warm one: drift hits all alike, caches hold the way's own data."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            samples[name].append(measure(way, device, repeats=3, warmup=1).p50)
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def read_roof(tensors: Sequence[Tensor], repeats: int = 9) -> float:
    """Bytes per second of one read of the tensors' memory, as fast as torch sums it: the roof."""
    # the same bytes as fp32: 16-bit sums are bound by conversion. Small tensors would time the calls
    words = [t.reshape(-1)[: t.numel() // 2 * 2].view(torch.float32) for t in tensors]
    words = [w for w in words if w.numel() >= 1 << 16] or words

    def read() -> None:
        for w in words:
            w.sum()

    timing = measure(read, tensors[0].device.type, repeats=repeats)
    return sum(w.numel() for w in words) * 4 / timing.p20


# ---- rows ----


@dataclass
class Row:
    """One measurement. Written to CSV as it stands."""

    op: str
    backend: str
    device: str
    dtype: str
    data: str
    numel: int
    num_tensors: int
    k: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gb_per_s: float
    roof_gb_per_s: float
    roof_fraction: float
    threads: int
    torch: str
    commit: str
    day: str
    note: str = ""


def commit() -> str:
    """The short hash of HEAD, with "+" when the tree differs from it."""
    try:
        directory = Path(__file__).parent
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=directory, capture_output=True, text=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", "..", ":!results"],
            cwd=directory,
            capture_output=True,
            text=True,
        )
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") or "unknown"
    except OSError:
        return "unknown"


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its core count and vector instructions."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
        family = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("cpu family")]
        model = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model\t")]
        if names:
            name = f"{names[0]} (family {family[0]} model {model[0]})"
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


@dataclass
class Results:
    """Collects rows; writes them as CSV and prints them as a table."""

    name: str
    directory: Path = RESULTS
    rows: list[Any] = field(default_factory=list)  # Row, or another dataclass

    def add(self, timing: Timing, roof: float, bytes_moved: int, **columns: object) -> Row:
        """Appends a row. `roof` in bytes per second."""
        row = Row(
            p20_ms=round(timing.p20 * 1e3, 4),
            p50_ms=round(timing.p50 * 1e3, 4),
            p80_ms=round(timing.p80 * 1e3, 4),
            gb_per_s=round(bytes_moved / timing.p50 / 1e9, 3),
            roof_gb_per_s=round(roof / 1e9, 3),
            roof_fraction=round(bytes_moved / timing.p50 / roof, 4),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            commit=commit(),
            day=date.today().isoformat(),
            **columns,  # type: ignore[arg-type]
        )
        self.rows.append(row)
        return row

    def write(self) -> Path:
        """Writes <directory>/<name>.csv."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.name}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(self.rows[0])], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        return path


def times(row: Row, digits: int) -> tuple[str, ...]:
    """Cells under "ms p20", "ms p50", "ms p80"."""
    return tuple(f"{ms:.{digits}f}" for ms in (row.p20_ms, row.p50_ms, row.p80_ms))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Prints a table: rich where it is installed, plain text elsewhere (GPU machines without it)."""
    rows = [[str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [list(headers), *rows]) for i in range(len(headers))]
        print(title)
        for row in [list(headers), *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        return
    rendered = Table(title=title)
    for i, header in enumerate(headers):
        rendered.add_column(header, justify="left" if i == 0 else "right")
    for row in rows:
        rendered.add_row(*row)
    Console(width=max(120, Console().width)).print(rendered)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """What every bench takes; `description` is its module's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--name", help="file name of the results (default: <op>_<device>)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the CSV and the plot")
    return parser


def bars(plt: Any, labels: Sequence[str], rows: Sequence[Row], values: Sequence[str], **axes: Any) -> Any:
    """A figure of one bar per row, its p50; `values` stand beside them, `axes` are those of Axes.set."""
    figure, axis = plt.subplots(figsize=(9, 4))
    axis.barh(labels, [row.p50_ms for row in rows])
    axis.bar_label(axis.containers[0], labels=values, padding=3, fontsize=9)
    axis.set_title(axes.pop("title"), fontsize=9)
    axis.set(xlabel="ms (lower is better)", **axes)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    return figure


def main(
    parser: argparse.ArgumentParser,
    op: str,
    run: Callable[[argparse.Namespace], Results],
    report: Callable[[Results], None],
    draw: Callable[[Any, Results], Any],
) -> None:
    """A bench from its command line to its files: the rows that `run` returns as a table, a CSV and a figure.

    `draw(matplotlib.pyplot, results)` makes the figure, where matplotlib is installed.
    """
    args = parser.parse_args()
    args.name = args.name or f"{op}_{args.device}"
    results = run(args)
    if not results.rows:
        parser.error("nothing was measured: expected options that leave at least one case, got none; see --help")
    report(results)
    print(f"rows: {results.write()}")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure = draw(plt, results)
    figure.tight_layout()
    path = results.directory / f"{results.name}.png"
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def progress(items: Sequence[T], description: str) -> Iterable[T]:
    """A tqdm bar where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description)
