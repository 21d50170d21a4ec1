"""Timing, byte model, roof, CSV rows and plots shared by the benches.

Times are p20/p50/p80 over repeats: on a CPU from perf_counter; on a GPU the device's, between two events with the L2
flushed before and the host ahead, and beside it the wall time of the call until the device is done. The roof is the
best bandwidth measured in the same run, so a fraction of it holds on a shared machine; what comes out above it, or on a
machine that has more to do, is measured against the roof again, and marked.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
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
    wall: float | None = None  # on a GPU, where the others are the device's: of the call until the device is done
    error: str = ""  # why there is no time: the others are NaN

    @classmethod
    def of(cls, seconds: Sequence[float], walls: Sequence[float] = ()) -> Timing:
        """Percentiles of repeats."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            *(ordered[round(q * last)] for q in (0.2, 0.5, 0.8)), wall=statistics.median(walls) if walls else None
        )

    @classmethod
    def across(cls, timings: Sequence[Timing]) -> Timing:
        """Percentiles of medians."""
        return cls.of([t.p50 for t in timings], [t.wall for t in timings if t.wall is not None])

    @classmethod
    def attempt(cls, timed: Callable[[], Timing]) -> Timing:
        """Of `timed()`; where that raises, the error in place of the time: the other ways still have theirs."""
        try:
            return timed()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"failed: {text}", file=sys.stderr)
            return cls(math.nan, math.nan, math.nan, error=text[:300])


def measure(
    fn: Callable[[], object],
    device: str = "cpu",
    *,
    repeats: int = 7,
    warmup: int = 2,
    min_seconds: float = 0.0,
    setup: Callable[[], object] | None = None,
) -> Timing:
    """Times `fn`: `repeats` times, on a CPU for at least `min_seconds`. `setup` runs before each, untimed."""
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
    """Each repeat twice: the call until the device is done; and its span on the device, which the host gets ahead of.

    A call that waits for the device itself, or launches more than the queue takes (some 1,000 kernels), spans host
    time all the same.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # larger than any L2
    spans, walls = [], []
    for _ in range(repeats):
        if setup:
            setup()
        flush.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fn()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - begin)
        if setup:
            setup()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(1.5 * host + 100e-6, _LONGEST_LEAD) * _CYCLES_PER_S))
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        spans.append(start.elapsed_time(end) * 1e-3)
    return Timing.of(spans, walls)


_CYCLES_PER_S = 2e9  # of a GPU, at the most: it sleeps that long, or longer
_LONGEST_LEAD = 0.25  # seconds: the queue is full by then


def interleave(ways: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Timing]:
    """Three timed calls each per round, after a warm one: drift hits all alike, caches hold the way's own data.

    A way that fails keeps its error, and is left out from then on.
    """
    samples: dict[str, list[Timing]] = {name: [] for name in ways}
    failed: dict[str, Timing] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            if name not in failed:
                timing = Timing.attempt(lambda way=way: measure(way, device, repeats=3, warmup=1))  # type: ignore[misc]
                if timing.error:
                    failed[name] = timing
                samples[name].append(timing)
    return {name: failed.get(name) or Timing.across(timings) for name, timings in samples.items()}


class Roof:
    """Bytes per second of the fastest pass over memory: one sum, or one copy, of one block, as torch does them.

    On a GPU the block has 4 GB; a sum of many tensors would time the calls. On a CPU it has the size of the data, since
    what fits in a cache is read faster.
    """

    def __init__(self, device: str, nbytes: int) -> None:
        self._device = device
        self._numel = max(nbytes // 4, 1)
        self.bytes_per_s = self._measure()

    def _measure(self) -> float:
        source = torch.ones(self._numel, device=self._device)
        target = torch.empty_like(source)
        size = 4 * self._numel
        passes = ((lambda: source.sum(), size), (lambda: target.copy_(source), 2 * size))
        return max(moved / measure(run, self._device, repeats=9).p20 for run, moved in passes)

    def covers(self, rate: float, tries: int = 3) -> bool:
        """Whether `rate` is not above; the roof is measured again, and the best counts, where it does not."""
        for _ in range(tries):
            if rate <= self.bytes_per_s:
                break
            self.bytes_per_s = max(self.bytes_per_s, self._measure())
        return rate <= self.bytes_per_s


GPU_ROOF_BYTES = 4_000_000_000
CPU_ROOF_BYTES = 1 << 30  # at the most: beyond every cache


def read_roof(tensors: Sequence[Tensor]) -> Roof:
    """The roof of a pass over these tensors."""
    device = tensors[0].device.type
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return Roof(device, min(GPU_ROOF_BYTES, free // 4))
    return Roof(device, min(sum(t.numel() * t.itemsize for t in tensors), CPU_ROOF_BYTES))


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
    malloc: str = ""
    triton: str = ""
    wall_ms: float | None = None  # on a GPU, where the others are the device's: of the call until the device is done

    @property
    def label(self) -> str:
        """What was measured of what."""
        return f"{self.backend} ({self.data})"


ABOVE_THE_ROOF = "ABOVE THE ROOF: one of the two was disturbed, or the data lie in a cache"


def is_measured(row: Any) -> bool:
    """False: the way failed, and the note says how."""
    return not row.note.startswith("failed: ")


def notes(error: str = "", *others: str) -> str:
    """A row's note: how the way failed or else the `others`, and whether that was on a busy machine."""
    found = [f"failed: {error}"] if error else [other for other in others if other]
    return "; ".join(found + ([f"BUSY: load {load():.1f} on {os.cpu_count()} cores"] if is_busy() else []))


def provenance(device: str) -> dict[str, Any]:
    """The columns that say where, when and with what a row was measured."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "day": date.today().isoformat(),
        "malloc": allocator(),
        "triton": triton_version(),
    }


def run_worker(command: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Of a process that measures: the JSON object in its last line, and, where it failed, the last of its errors."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found, ""
    print(done.stderr[-2000:], file=sys.stderr)
    return {}, " ".join((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1].split())[:300]


def triton_version() -> str:
    """Empty where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def milliseconds(seconds: float | None) -> float | None:
    """To four digits; None and NaN, which a CSV has no number for, are None."""
    return None if seconds is None or math.isnan(seconds) else round(seconds * 1e3, 4)


@functools.cache
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


def allocator() -> str:
    """The C library's malloc, and what the environment sets of it."""
    try:
        version = ctypes.CDLL(None).gnu_get_libc_version
        version.restype = ctypes.c_char_p
        name = f"glibc {version().decode()}"
    except (AttributeError, OSError, TypeError):
        name = platform.libc_ver()[0] or platform.system()
    names = sorted(
        name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")
    )
    return " ".join([name, *(f"{name}={os.environ[name]}" for name in names)])


def environment() -> str:
    """What times and peaks depend on beside the code: a bench's first line."""
    cores = os.cpu_count()
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads on {cores} cores, load {load():.1f}, "
        f"triton {triton_version() or 'none'}, {allocator()}, commit {commit()}"
    )


def load() -> float:
    """Processes that ran or waited, over the last minute, this one among them; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def is_busy() -> bool:
    """Whether others want the processors, too: the bench alone keeps no more running than there are."""
    return load() > (os.cpu_count() or 1) + 1


@dataclass
class Results:
    """Collects rows; writes them as CSV and prints them as a table."""

    name: str
    directory: Path = RESULTS
    rows: list[Any] = field(default_factory=list)  # Row, or another dataclass
    subject: str = ""  # what the rows do not say of what was measured: the model's name

    def add(self, timing: Timing, roof: Roof, bytes_moved: int, note: str = "", **columns: object) -> Row:
        """Appends a row. What cannot be true, or was measured on a busy machine, says so in its note."""
        above = not timing.error and not roof.covers(bytes_moved / timing.p50)
        row = Row(
            p20_ms=round(timing.p20 * 1e3, 4),
            p50_ms=round(timing.p50 * 1e3, 4),
            p80_ms=round(timing.p80 * 1e3, 4),
            wall_ms=milliseconds(timing.wall),
            gb_per_s=round(bytes_moved / timing.p50 / 1e9, 3),
            roof_gb_per_s=round(roof.bytes_per_s / 1e9, 3),
            roof_fraction=round(bytes_moved / timing.p50 / roof.bytes_per_s, 4),
            note=notes(timing.error, note, ABOVE_THE_ROOF if above else ""),
            **(provenance("cpu") | columns),
        )
        self.append(row)
        return row

    def append(self, row: Any) -> None:
        """Adds a row and writes all: a bench that is stopped, or fails, leaves what it has measured."""
        self.rows.append(row)
        self.write()

    def write(self) -> Path:
        """Writes <directory>/<name>.csv."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.name}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(self.rows[0])], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        return path

    def failed(self) -> list[Any]:
        """The rows whose way failed."""
        return [row for row in self.rows if not is_measured(row)]


def read_rows(path: Path, row_class: type) -> list[Any]:
    """Rows from a CSV that `Results.write` made; columns that came later have their defaults."""
    types = typing.get_type_hints(row_class)

    def value(name: str, text: str) -> object:
        if types[name] is str:
            return text
        return None if not text else int(text) if types[name] is int else float(text)

    with open(path, newline="") as file:
        return [row_class(**{name: value(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def times(row: Row, digits: int) -> tuple[str, ...]:
    """Cells under "ms p20", "ms p50", "ms p80"."""
    return tuple(f"{ms:.{digits}f}" for ms in (row.p20_ms, row.p50_ms, row.p80_ms))


def wall(row: Row, digits: int) -> str:
    """The cell under "ms wall": empty on a CPU, where every time is one."""
    return "" if row.wall_ms is None else f"{row.wall_ms:.{digits}f}"


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
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw the rows that are there")
    return parser


def bars(plt: Any, labels: Sequence[str], rows: Sequence[Row], values: Sequence[str], **axes: Any) -> Any:
    """A figure of one bar per row, its p50; `values` stand beside them, `axes` are those of Axes.set.

    On a logarithmic axis, where a bar's length means nothing, points.
    """
    figure, axis = plt.subplots(figsize=(9, 4))
    milliseconds = [row.p50_ms for row in rows]
    if axes.get("xscale") == "log":
        axis.set_xscale("log")  # before the limits are
        axis.plot(milliseconds, range(len(rows)), "o", markersize=8)
        axis.set_yticks(range(len(rows)), labels)
        axis.grid(axis="y", linestyle=":")
        for at, (x, text) in enumerate(zip(milliseconds, values, strict=True)):
            where = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(
                text, (x, at), fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, **where
            )
    else:
        axis.barh(labels, milliseconds)
        axis.bar_label(axis.containers[0], labels=values, padding=3, fontsize=9)
    axis.set_title(axes.pop("title"), fontsize=9)
    axis.set(xlabel="ms (lower is better)", **axes)
    axis.margins(x=0.25, y=0.1)
    if axis.get_xscale() == "linear":
        axis.set_xlim(0, 1.3 * max(milliseconds))  # bars stick to their margin, and the values stand beyond them
    axis.invert_yaxis()
    return figure


def check_destination(parser: argparse.ArgumentParser, args: argparse.Namespace, default_name: str) -> None:
    """Rows of other sizes do not replace the ones of the default sizes."""
    changed = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(args).items()
        if name not in ("device", "name", "output", "redraw") and value != parser.get_default(name)
    ]
    if changed and args.output.resolve() == RESULTS.resolve() and args.name == default_name:
        parser.error(
            f"`--output`: {RESULTS.name}/{default_name}.csv holds rows of the default options, got "
            f"{', '.join(changed)}; pass --output DIR, or --name NAME for a file of its own"
        )


def main(
    parser: argparse.ArgumentParser,
    op: str,
    run: Callable[[argparse.Namespace], Results],
    report: Callable[[Results], None],
    draw: Callable[[Any, Results], Any],
    row_class: type = Row,
) -> None:
    """A bench from its command line to its files: the rows that `run` returns as a table, a CSV and a figure.

    `draw(matplotlib.pyplot, results)` makes the figure, where matplotlib is installed, of what was measured. Exits with
    an error after that when a way failed.
    """
    args = parser.parse_args()
    default_name = f"{op}_{args.device}"
    args.name = args.name or default_name
    if args.redraw:
        path = args.output / f"{args.name}.csv"
        if not path.exists():
            parser.error(f"`--redraw`: expected rows in {path}, got no such file; measure them first")
        results = Results(args.name, args.output, read_rows(path, row_class))
    else:
        check_destination(parser, args, default_name)
        print(environment())
        if is_busy():
            print(f"warning: load {load():.1f}: others use this machine, and rows will say so", file=sys.stderr)
        results = run(args)
    if not results.rows:
        parser.error("nothing was measured: expected options that leave at least one case, got none; see --help")
    results.subject = getattr(args, "model", "")
    if not args.redraw:
        report(results)
        print(f"rows: {results.write()}")
        above = sum(ABOVE_THE_ROOF in row.note for row in results.rows)
        if above:
            print(f"warning: {above} rows are above the roof; see their notes, and measure again", file=sys.stderr)
    failed = results.failed()
    drawn = replace(results, rows=[row for row in results.rows if row not in failed])
    if drawn.rows:
        plot(drawn, draw)
    if failed and not args.redraw:
        sys.exit(f"failed: {', '.join(sorted({row.label for row in failed}))}; see the notes")


def plot(results: Results, draw: Callable[[Any, Results], Any]) -> None:
    """Writes the figure, where matplotlib is installed."""
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
