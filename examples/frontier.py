"""Accuracy in against out of distribution: the rows of finished fine-tunings, what is chosen of them, table, picture.

`finetune_clip.py` and `finetune_text.py` write the rows. To draw them again, or those of several runs together:

    python examples/frontier.py runs/a/results.jsonl runs/b/results.jsonl --output both

A row's accuracy has one number per set: "select" chooses learning rate and alpha and is no test, "val" is in
distribution, all others are shifted and count equally in their mean.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

SELECT, VAL = "select", "val"
ZERO_SHOT = "zero-shot"
REFERENCE = "full"
MOST_COLUMNS = 6  # of a table on the terminal
NAMES = {"saft": "SAFT", "random": "random", "linear_probe": "linear probe", "lp_ft": "LP-FT", "lora": "LoRA"}
COLOURS = {
    "saft": ("#0b6fa4", "#45a6d9", "#0a3d62", "#8cc8e8"),  # one per density
    "random": ("#6c757d", "#a3aab1", "#3d4348", "#c4c9ce"),
    "full": ("#d1622b",),
    "linear_probe": ("#8e44ad",),
    "lp_ft": ("#b8860b",),
    "lora": ("#2e8b57",),
}


class InputError(Exception):
    """Something the user gave does not fit; printed as one line."""


# ---- rows ----


@dataclass(frozen=True)
class Row:
    """One model that was tested: a fine-tuning, or a point between it (alpha 1) and the pre-trained model (0)."""

    task: str
    method: str
    density: float | None  # of saft and random
    lr: float
    seed: int | None
    shots: int
    alpha: float
    accuracy: dict[str, float]  # percent, per set
    seconds: float  # training, where alpha is 1, and testing
    trained: int = 0
    state_bytes: int = 0  # of the optimizer
    ms_per_step: float | None = None  # medians
    ms_per_optimizer_step: float | None = None
    train_loss: float | None = None  # mean of the last epoch
    selected: dict[str, int] | None = None  # per part of the model
    settings: dict[str, Any] = field(default_factory=dict)  # what else decides the result
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is a result of."""
        return self.task, self.method, self.density, self.lr, self.seed, self.shots, self.alpha

    @property
    def label(self) -> str:
        """The method's name, with its density."""
        name = NAMES.get(self.method, self.method)
        return name if self.density is None else f"{name} {100 * self.density:g} %"

    @property
    def shifted(self) -> float:
        """Mean accuracy over the shifted sets; NaN where there are none."""
        values = [value for name, value in self.accuracy.items() if name not in (SELECT, VAL)]
        return statistics.fmean(values) if values else math.nan


def read_rows(file: Path) -> list[Row]:
    """The rows of a file. A last line without an end, as a killed process leaves it, is no row."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected rows of results, cannot read it: {error}") from None
    rows: list[Row] = []
    try:
        for line in lines:
            rows.append(Row(**json.loads(line)))
    except (TypeError, ValueError) as error:
        number = len(rows) + 1
        raise InputError(f"{file}, line {number}: expected a row of results, got {error}; remove the line") from None
    return rows


class Rows:
    """Rows in a file that only grows: each is there as soon as it is known, whole or not at all."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = read_rows(file) if file.exists() else []
        self._keys = {row.key for row in self.rows}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._keys

    def add(self, row: Row) -> None:
        """Appends it; what a killed process left of another goes first."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(asdict(row)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._keys.add(row.key)


# ---- what is chosen, and compared ----


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of one value; NaN where one is."""
    mean = statistics.fmean(values)
    return mean, mean if math.isnan(mean) else statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Point:
    """One method at one learning rate and alpha, over its seeds."""

    rows: list[Row]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows[0], name)  # task, method, density, lr, alpha, label: the same in all

    def of(self, figure: Callable[[Row], float | None]) -> tuple[float, float]:
        """Mean and standard deviation over the seeds; NaN where a row has none."""
        values = [figure(row) for row in self.rows]
        return mean_std([math.nan if value is None else value for value in values])

    @property
    def at(self) -> tuple[float, float]:
        """Mean accuracy in and out of distribution."""
        return self.of(lambda row: row.accuracy[VAL])[0], self.of(lambda row: row.shifted)[0]

    @property
    def selection(self) -> float:
        """Mean accuracy on the selection split."""
        return self.of(lambda row: row.accuracy.get(SELECT))[0]


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Rows that differ in nothing but the seed, together."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.label, row.lr, row.alpha), []).append(row)
    return [Point(group) for group in groups.values()]


def choose(points: Sequence[Point]) -> tuple[Point, Point | None]:
    """Of one method: the learning rate that is best on the selection split, and with it the best alpha below 1.

    Ties go to the smaller rate and the smaller alpha. No test set is looked at.
    """
    tuned = max((p for p in points if p.alpha == 1), key=lambda p: (p.selection, -p.lr))
    between = [p for p in points if p.lr == tuned.lr and p.alpha != 1]
    return tuned, max(between, key=lambda p: (p.selection, -p.alpha), default=None)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is at least as good as in both coordinates, by the first, ascending."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def along(front: Sequence[tuple[float, float]], x: float) -> float:
    """The front's second coordinate at ``x``, linear between its points; beyond an end, that of the end."""
    if x <= front[0][0]:
        return front[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(front):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return front[-1][1]


@dataclass(frozen=True)
class Line:
    """A line of the table: what was chosen of a method, beside full fine-tuning."""

    point: Point
    paired: tuple[float, float] | None = None  # out of distribution, less full with its chosen rate, seed by seed
    matched: float | None = None  # less what full reaches at the same accuracy in distribution, with any rate


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Zero-shot, then each method with its chosen rate, and interpolated with its chosen alpha."""
    methods: dict[str, list[Point]] = {}
    for point in points_of(rows):
        methods.setdefault(point.label, []).append(point)
    zero_shot = methods.pop(ZERO_SHOT, [])
    lines = [Line(point) for point in zero_shot]
    chosen = {label: choose(points) for label, points in methods.items() if any(p.alpha == 1 for p in points)}
    reference = {row.seed: row for row in chosen[REFERENCE][0].rows} if REFERENCE in chosen else {}
    reached = [p.at for p in methods.get(REFERENCE, []) if p.alpha == 1]
    front = pareto_front([p.at for p in zero_shot] + reached) if reached else []
    for point in (p for pair in chosen.values() for p in pair if p is not None):
        pairs = [row.shifted - reference[row.seed].shifted for row in point.rows if row.seed in reference]
        ours, theirs = point.at[1], along(front, point.at[0]) if front else math.nan
        lines.append(
            Line(
                point,
                mean_std(pairs) if pairs else None,
                ours - theirs if front and not math.isnan(ours) else None,
            )
        )
    return lines


def best_trade(lines: Sequence[Line]) -> Line | None:
    """The line that is furthest out of distribution above full fine-tuning of the same accuracy in distribution."""
    compared = [line for line in lines if line.matched is not None]
    return max(compared, key=lambda line: line.matched or 0.0, default=None)


def at_an_edge(rows: Sequence[Row]) -> list[str]:
    """A sentence for each method whose chosen learning rate has no other beyond it."""
    rates: dict[str, list[Point]] = {}
    for point in points_of(rows):
        if point.alpha == 1 and point.method != ZERO_SHOT:
            rates.setdefault(point.label, []).append(point)
    notes = []
    for label, points in rates.items():
        tuned, tried = choose(points)[0].lr, sorted(p.lr for p in points)
        if len(tried) > 1 and tuned in (tried[0], tried[-1]):
            end, further = ("smallest", tuned / 3) if tuned == tried[0] else ("largest", tuned * 3)
            notes.append(f"{label}: the {end} rate that was tried is the best; try --lr {further:.0e}, too")
    return notes


# ---- tables ----

LEGEND = (
    f"{REFERENCE}, paired: less {REFERENCE} fine-tuning with its chosen rate, seed by seed. At equal acc.: less what "
    f"{REFERENCE} fine-tuning reaches with any rate at that accuracy in distribution."
)


def plus_minus(figure: tuple[float, float], seeds: int, form: str = ".1f") -> str:
    """Such as "65.3 ± 0.4"; without a deviation of one seed."""
    if math.isnan(figure[0]):
        return "-"
    return f"{figure[0]:{form}}" + (f" ± {figure[1]:.1f}" if seeds > 1 else "")


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def accuracy_table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: what each method gives and keeps."""
    header = [
        "method",
        "lr",
        "alpha",
        "in dis-\ntribution",
        "mean\nshifted",
        "- full,\npaired",
        "- full, at\nequal acc.",
    ]
    cells = []
    for line in lines:
        p, n = line.point, len(line.point.rows)
        plain = p.method == ZERO_SHOT
        cells.append(
            [
                p.label,
                "-" if plain else f"{p.lr:g}",
                "-" if plain else f"{p.alpha:g}",
                plus_minus(p.of(lambda row: row.accuracy[VAL]), n),
                plus_minus(p.of(lambda row: row.shifted), n),
                "-"
                if line.paired is None or (p.label == REFERENCE and p.alpha == 1)
                else plus_minus(line.paired, n, "+.1f"),
                "-" if line.matched is None else f"{line.matched:+.1f}",
            ]
        )
    return header, cells


def cost_table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: what each method takes."""
    header = ["method", "trained\nparameters", "optimizer\nstate", "ms per\nstep", "of it\noptimizer"]
    cells = []
    for p in (line.point for line in lines if line.point.alpha == 1):
        times = [p.of(lambda row: row.ms_per_step)[0], p.of(lambda row: row.ms_per_optimizer_step)[0]]
        sizes = [f"{p.trained:,}", _bytes(p.state_bytes)]
        cells.append([p.label, *sizes, plus_minus((times[0], 0), 1), plus_minus((times[1], 0), 1, ".2f")])
    return header, cells


def set_table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracy on each test set, a column per method, not interpolated."""
    points = [line.point for line in lines if line.point.alpha == 1 or line.point.method == ZERO_SHOT]
    tests = [name for name in points[0].accuracy if name != SELECT]
    cells = [
        [name] + [plus_minus(p.of(lambda row, name=name: row.accuracy.get(name)), len(p.rows)) for p in points]
        for name in tests
    ]
    return ["test set", *(p.label for p in points)], cells


def trade_sentence(lines: Sequence[Line]) -> str:
    """Names the best trade, by test accuracy; empty where there is nothing to compare."""
    best = best_trade(lines)
    if best is None:
        return ""
    p = best.point
    between = f", alpha {p.alpha:g}" if p.alpha != 1 else ""
    if (best.matched or 0.0) < 0.05:
        return "Best trade at equal accuracy in distribution: full fine-tuning; nothing lies above it."
    return (
        f"Best trade at equal accuracy in distribution: {p.label}{between}, {p.at[0]:.1f} % in and {p.at[1]:.1f} % out "
        f"of distribution, {best.matched:+.1f} points on full fine-tuning with a rate that gives that accuracy."
    )


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Three tables and a sentence."""
    lines = summarise(rows)
    best = best_trade(lines)
    titles = ("Accuracy (%), rates and alphas chosen on the selection split", "Cost", "Accuracy (%) by test set")
    for title, (header, cells) in zip(titles, _tables(lines), strict=True):
        if title == titles[2] and len(header) > MOST_COLUMNS:
            console.print(f"{title}: in results.md")
            continue
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, heading in enumerate(header):
            table.add_column(heading, justify="right" if i else "left", no_wrap=True)
        for i, row in enumerate(cells):
            marked = title == titles[0] and lines[i] is best
            table.add_row(*row, style="bold" if marked else None)
        console.print(table)
    if best is not None:
        console.print(trade_sentence(lines), soft_wrap=True)
        console.print(LEGEND, soft_wrap=True)
    for note in at_an_edge(rows):
        console.print(note, soft_wrap=True)


def _tables(lines: Sequence[Line]) -> list[tuple[list[str], list[list[str]]]]:
    return [table(lines) for table in (accuracy_table, cost_table, set_table)]


def save_tables(folder: Path, rows: Sequence[Row]) -> None:
    """The tables as results.md, and every rate and alpha, a line each, as results.csv."""
    lines = summarise(rows)
    parts = []
    for header, cells in _tables(lines):
        heading = [text.replace("-\n", "").replace("\n", " ") for text in header]
        rule = ["---", *("---:" for _ in header[1:])]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *cells)))
    with replacing(folder / "results.md") as file:
        file.write_text("\n\n".join([*parts[:1], *filter(None, [trade_sentence(lines)]), *parts[1:]]) + "\n")
    text = io.StringIO()
    sets = list(rows[0].accuracy)
    out = csv.writer(text, lineterminator="\n")
    names = [f"{name}{end}" for name in [*sets, "mean_shifted"] for end in ("", "_std")]
    out.writerow(["task", "method", "density", "lr", "alpha", "seeds", "trained", *names])
    for p in points_of(rows):
        figures = [p.of(lambda row, name=name: row.accuracy.get(name)) for name in sets] + [p.of(lambda r: r.shifted)]
        numbers = [f"{x:.2f}" for figure in figures for x in figure]
        out.writerow([p.task, p.method, p.density, p.lr, p.alpha, len(p.rows), p.trained, *numbers])
    with replacing(folder / "results.csv") as file:
        file.write_text(text.getvalue())


# ---- picture ----


def save_figure(file: Path, rows: Sequence[Row]) -> None:
    """A curve per method over its learning rates, WiSE-FT curves of the chosen ones, and the Pareto front of all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    closer = close_up(rows)
    panels = 1 if closer is None else 2
    figure, axes = plt.subplots(1, panels, figsize=(4 * panels + 3.2, 4.6), layout="constrained", squeeze=False)
    for axis in axes[0]:
        plot(axis, rows)
    if closer is not None:
        (left, right), (low, high) = closer
        axes[0, 1].set(xlim=(left, right), ylim=(low, high), ylabel="", title="")
        axes[0, 1].set_title("closer", loc="left", fontsize=11)
        axes[0, 0].add_patch(plt.Rectangle((left, low), right - left, high - low, fill=False, ec="#999", lw=0.8))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3 * panels)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def close_up(rows: Sequence[Row]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Limits around the chosen points that are nearly as good in distribution as the best, where they lie densely."""
    chosen = [line.point.at for line in summarise(rows) if line.point.method != ZERO_SHOT]
    everything = [p.at for p in points_of(rows)]
    widths = [max(values) - min(values) for values in zip(*everything, strict=True)]
    best = max(chosen)[0]
    near = [at for at in chosen if at[0] >= best - widths[0] / 8]
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*near, strict=True))
    if len(near) < max(2, len(chosen) / 2) or high - low > widths[1] / 2:
        return None
    side = (max(1.0, (right - left) / 4), max(1.0, (high - low) / 4))
    return (left - side[0], right + side[0]), (low - side[1], high + side[1])


def plot(axis: Any, rows: Sequence[Row]) -> None:
    """Draws the rows of one task."""
    points = points_of(rows)
    front = pareto_front([p.at for p in points])
    style = {"color": "#f3d26b", "lw": 7, "alpha": 0.6, "solid_capstyle": "round"}
    alone = {"marker": "o", "ms": 15} if len(front) == 1 else {}
    axis.plot(*zip(*front, strict=True), label="Pareto front", **style, **alone)
    start = [p.at for p in points if p.method == ZERO_SHOT]
    used: dict[str, int] = {}
    has_rates = has_wise = False
    for label in dict.fromkeys(p.label for p in points if p.method != ZERO_SHOT):
        mine = [p for p in points if p.label == label]
        if not any(p.alpha == 1 for p in mine):
            continue
        tuned, _ = choose(mine)
        shades = COLOURS.get(tuned.method, ("black",))
        colour = shades[used.setdefault(tuned.method, 0) % len(shades)]
        used[tuned.method] += 1
        wise = [p.at for p in sorted(mine, key=lambda p: p.alpha) if p.lr == tuned.lr and p.alpha != 1]
        if wise:
            has_wise = True
            path = [*start, *wise, tuned.at]
            axis.plot(*zip(*path, strict=True), ":", color=colour, marker="s", ms=3.5, lw=1.4, markevery=slice(1, -1))
        rates = [p.at for p in sorted(mine, key=lambda p: p.lr) if p.alpha == 1]
        if len(rates) > 1:
            has_rates = True
            axis.plot(*zip(*rates, strict=True), "-", color=colour, lw=1.4)
            sizes = [6 + 16 * i / (len(rates) - 1) for i in range(len(rates))]  # grows with the rate
            axis.scatter(*zip(*rates, strict=True), sizes, color=colour, zorder=2)
        spread = [[tuned.of(figure)[1]] for figure in (lambda row: row.accuracy[VAL], lambda row: row.shifted)]
        style = {"fmt": "o", "ms": 9, "color": colour, "elinewidth": 1.2, "mec": "white", "zorder": 3}
        axis.errorbar(
            *([x] for x in tuned.at), xerr=spread[0], yerr=spread[1], label=f"{label}, lr {tuned.lr:g}", **style
        )
    for x, y in start:
        axis.plot([x], [y], "*", color="black", ms=13, label=ZERO_SHOT, zorder=4, ls="none")
    if has_rates:
        axis.plot([], [], "-", color="#555", marker="o", ms=3.5, lw=1.4, label="learning rates, small to large")
    if has_wise:
        axis.plot([], [], ":", color="#555", marker="s", ms=3.5, lw=1.4, label="WiSE-FT of the chosen")
    row = rows[-1]
    seeds = len({r.seed for r in rows if r.seed is not None})
    shots = f"{row.shots} shots" if row.shots else "all training data"
    axis.set_title(f"{row.task}: {shots}, {seeds} seed{'s' * (seeds != 1)}", loc="left", fontsize=11)
    axis.set_xlabel("accuracy in distribution (%)")
    axis.set_ylabel("mean accuracy on shifted sets (%)")
    axis.grid(color="#e3e5e8")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    for get, put in ((axis.get_xlim, axis.set_xlim), (axis.get_ylim, axis.set_ylim)):
        low, high = get()
        room = max(0, 5 - (high - low)) / 2  # tenths of a point would look like much
        put(low - room, high + room)


def save_report(folder: Path, rows: Sequence[Row]) -> None:
    """results.md, results.csv and, where there are shifted sets, results.png."""
    save_tables(folder, rows)
    if not math.isnan(rows[0].shifted):
        save_figure(folder / "results.png", rows)


# ---- files and progress ----


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


def progress(what: str, total: int, unit: str, initial: int = 0) -> tqdm[Any]:
    """A bar on a terminal; elsewhere, as in a log file, a line that says what begins."""
    say(f"{what}: {total - initial} {unit}s")
    return tqdm(total=total, desc=what, unit=unit, initial=initial, leave=False, disable=not sys.stderr.isatty())


def say(line: str) -> None:
    """Prints a line where there are no bars, at once, also into a pipe."""
    if not sys.stderr.isatty():
        print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Tables and picture of rows that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="results.jsonl of one task")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for results.md, .csv and .png")
    args = parser.parse_args(argv)
    try:
        rows = [row for file in args.rows for row in read_rows(file)]
        tasks = sorted({row.task for row in rows})
        if len(tasks) != 1:
            raise InputError(f"expected the rows of one task, got {', '.join(tasks) or 'no rows'}; draw each by itself")
        rows = list({row.key: row for row in rows}.values())
        save_report(args.output, rows)
        print_tables(rows, Console())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
