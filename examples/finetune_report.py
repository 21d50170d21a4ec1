"""What `finetune_clip.py` reports: the runs, their summary over seeds, two tables and a figure."""

from __future__ import annotations

import os
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

COLOURS = {"zero-shot": "#8a8f98", "saft": "#0b6fa4", "full": "#d1622b"}


@dataclass
class Run:
    """One fine-tuning and what came of it."""

    method: str
    seed: int | None
    accuracy: dict[str, float]  # percent, per test set
    trained_parameters: int = 0
    optimizer_state_bytes: int = 0
    ms_per_step: float | None = None  # medians
    ms_per_optimizer_step: float | None = None
    train_loss: float | None = None  # mean of the last epoch
    selected: dict[str, int] | None = None  # per part of the model

    @property
    def in_distribution(self) -> float:
        """Accuracy on val."""
        return self.accuracy["val"]

    @property
    def mean_shifted(self) -> float | None:
        """Mean accuracy over the shifted test sets."""
        shifted = [value for name, value in self.accuracy.items() if name != "val"]
        return statistics.fmean(shifted) if shifted else None


def progress(what: str, total: int, unit: str, initial: int = 0) -> tqdm[Any]:
    """A bar on a terminal; elsewhere, as in a log file, a line that says what begins."""
    say(f"{what}: {total - initial} {unit}s")
    return tqdm(total=total, desc=what, unit=unit, initial=initial, leave=False, disable=not sys.stderr.isatty())


def say(line: str) -> None:
    """Prints a line where there are no bars, at once, also into a pipe."""
    if not sys.stderr.isatty():
        print(line, flush=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to ``path`` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def part_of(name: str) -> str:
    """The part of the model that a parameter is in, by the names of open_clip's towers."""
    if name.startswith("logit_"):
        return "logit scale"
    tower = "image" if name.startswith("visual.") else "text"
    block = re.search(r"(?:blocks|layers?|stages)(\.?)(\d+)\.", name)
    if block:
        return f"{tower} block {int(block[2]) + len(block[1])}"  # blocks.0 is the first, and so is a ResNet's layer1
    first = re.search(r"embed|conv1|bn1|ln_pre|stem|cls_token", name)
    return f"{tower} {'embedding' if first else 'head'}"


def count_by_part(counts: Mapping[str, int]) -> dict[str, int]:
    """Adds up a number per parameter over each part, from the image's pixels to the text's projection."""
    parts: dict[str, int] = {}
    for name, count in counts.items():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + count

    def order(part: str) -> tuple[int, int, int]:
        tower, kind, *number = part.split()
        depth = int(number[0]) if number else 0
        return ("image", "text", "logit").index(tower), ("embedding", "block", "head", "scale").index(kind), depth

    return {part: parts[part] for part in sorted(parts, key=order)}


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each method's figures over its seeds."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        same = [run for run in runs if run.method == method]
        figures: dict[str, list[Any]] = {name: [run.accuracy[name] for run in same] for name in same[0].accuracy}
        figures["mean shifted"] = [run.mean_shifted for run in same]
        for name in ("ms_per_step", "ms_per_optimizer_step", "trained_parameters", "optimizer_state_bytes"):
            figures[name] = [getattr(run, name) for run in same]
        row: dict[str, Any] = {"method": method, "seeds": len(same)}
        for name, values in figures.items():
            known = [value for value in values if value is not None]
            spread = statistics.stdev(known) if len(known) > 1 else 0.0
            row[name] = {"mean": statistics.fmean(known), "std": spread} if known else None
        rows.append(row)
    return rows


def _cell(figure: Mapping[str, float] | None, seeds: int, form: str = ".1f") -> str:
    if figure is None:
        return "-"
    return f"{figure['mean']:{form}}" + (f" ± {figure['std']:.1f}" if seeds > 1 else "")


def print_tables(rows: Sequence[Mapping[str, Any]], tests: Sequence[str], console: Console) -> None:
    """Two tables: a row per method, then a row per test set."""
    spread = ": mean ± standard deviation over seeds" if rows[-1]["seeds"] > 1 else ""
    table = Table("method", title=f"Accuracy (%){spread}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = (
        "in\ndistribution",
        "mean\nshifted",
        "trained\nparameters",
        "optimizer\nstate",
        "ms per\nstep",
        "of it\noptimizer",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        seeds = row["seeds"]
        accuracy = [_cell(row[name], seeds) for name in ("val", "mean shifted")]
        sizes = [_cell(row["trained_parameters"], 1, ",.0f"), _bytes(row["optimizer_state_bytes"]["mean"])]
        times = [_cell(row["ms_per_step"], 1), _cell(row["ms_per_optimizer_step"], 1, ".2f")]
        table.add_row(row["method"], *accuracy, *sizes, *times)
    console.print(table)
    table = Table("test set", title="Accuracy (%) by test set", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_column(row["method"], justify="right")
    for name in tests:
        label = "val (in distribution)" if name == "val" else name
        table.add_row(label, *(_cell(row[name], row["seeds"]) for row in rows))
    console.print(table)


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def save_figure(file: Path, rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> None:
    """Accuracy per test set and method. Where the selected elements are, ``saft-kernels summary --png`` draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tests = list(runs[0].accuracy)
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.34 * (len(tests) + 1)), layout="constrained")
    _plot_accuracy(axis, rows, tests)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(rows))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def _plot_accuracy(axis: Any, rows: Sequence[Mapping[str, Any]], tests: Sequence[str]) -> None:
    shifted = sorted((name for name in tests if name != "val"), key=lambda name: -rows[0][name]["mean"])
    names = ["val", *(["mean shifted"] if shifted else []), *shifted]
    labels = ["in distribution", "mean shifted", *(name.replace("_", " ") for name in shifted)]
    for i, row in enumerate(rows):
        at = [y + 0.18 * (i - (len(rows) - 1) / 2) for y in range(len(names))]
        means, spread = ([row[name][figure] for name in names] for figure in ("mean", "std"))
        # no accuracy is beyond 0 or 100 %
        ends = [list(map(min, spread, means)), [min(s, 100 - m) for s, m in zip(spread, means, strict=True)]]
        style = {"fmt": "o", "ms": 6, "lw": 1.5, "color": COLOURS[row["method"]], "clip_on": False}
        axis.errorbar(means, at, xerr=ends, label=row["method"], **style)
    left, right = axis.get_xlim()
    room = max(0, 10 - (right - left)) / 2  # tenths of a point would look like much
    axis.set_xlim(max(0, left - room), min(100, right + room))
    axis.set_yticks(range(len(names)), labels[: len(names)])
    for label in axis.get_yticklabels()[:2]:
        label.set_fontweight("bold")
    axis.axhspan(-0.5, min(1.5, len(names) - 0.5), color="#f1f3f5", zorder=0)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="x", color="#e3e5e8")
    axis.set_axisbelow(True)
    axis.set_xlabel("accuracy (%)")
    axis.set_title("Accuracy in and out of distribution", loc="left", fontsize=11)
