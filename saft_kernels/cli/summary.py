"""Where selected elements are: tables for the terminal, and a picture."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common import files

ACCENT, DARK, GREY, LIGHT = "#0b6fa4", "#24292f", "#57606a", "#eef0f2"
_MAX_KINDS = 18
_MAX_PARTS = 44
_MAX_STACKS = 4


@dataclass(frozen=True)
class Row:
    """A tensor, or a group of tensors."""

    name: str
    k: int
    numel: int


def grouped(rows: Sequence[Row], depth: int | None) -> list[Row]:
    """Adds up rows whose names agree in their first `depth` components, None in all; "blocks.9" before "blocks.10"."""
    sums: dict[str, list[int]] = {}
    for row in rows:
        total = sums.setdefault(".".join(row.name.split(".")[:depth]), [0, 0])
        total[0] += row.k
        total[1] += row.numel
    return [Row(name, *sums[name]) for name in sorted(sums, key=natural)]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in names by value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


# ---- tables ----


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> None:
    """The first column to the left, numbers to the right; the last row apart when it is a total.

    A terminal gets rich's table, where rich is installed; a pipe gets plain columns.
    """
    if sys.stdout.isatty():
        try:
            _print_rich(title, headings, rows, total)
            return
        except ImportError:
            pass
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    print(title)
    for row in [headings, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def _print_rich(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], total: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    # the frame: an edge, and two characters after each column
    width = console.width - 2 * len(headings) - 1
    width -= sum(max(len(row[i]) for row in [headings, *rows]) for i in range(1, len(headings)))
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for i, row in enumerate(rows):
        if total and i == len(rows) - 1:
            table.add_section()
        table.add_row(*(Text(cell) for cell in (broken(row[0], width), *row[1:])))
    console.print(table)


def broken(name: str, width: int) -> str:
    """A name in lines of at most that width, broken after dots as far as there are any."""
    lines, rest = [], name
    while len(rest) > width and (dot := rest.rfind(".", 1, width)) > 0:
        lines.append(rest[: dot + 1])
        rest = "  " + rest[dot + 1 :]
    return "\n".join([*lines, rest])


# ---- the picture ----


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind in a row, such as the layers of a transformer: cells by (depth, kind of tensor)."""

    name: str
    depths: list[int]
    kinds: list[str]
    cells: dict[tuple[int, str], Row]


def stacks(rows: Sequence[Row]) -> list[Stack]:
    """Groups `prefix.NUMBER.kind` by prefix, where it has two numbers or more."""
    found: dict[str, list[tuple[int, str, Row]]] = {}
    for row in rows:
        match = re.match(r"(?:(.*?)\.)?(\d+)\.(.+)$", row.name)
        if match:
            found.setdefault(match[1] or "", []).append((int(match[2]), match[3], row))
    result = []
    for prefix, members in found.items():
        depths = sorted({depth for depth, _, _ in members})
        if len(depths) < 2:
            continue
        kinds = sorted({kind for _, kind, _ in members}, key=natural)
        if len(kinds) > _MAX_KINDS:
            weight = {kind: sum(row.k for _, other, row in members if other == kind) for kind in kinds}
            best = sorted(kinds, key=lambda kind: -weight[kind])[:_MAX_KINDS]
            kinds = [kind for kind in kinds if kind in best]
        cells = {(depth, kind): row for depth, kind, row in members if kind in kinds}
        result.append(Stack(prefix or "blocks", depths, kinds, cells))
    return result


def save_figure(path: str | os.PathLike[str], title: str, rows: Sequence[Row], numel: int) -> None:
    """Left: the share of each part of the model. Right: the density of each tensor of its stacks of blocks, where any.

    Args:
        path: A .png file, written whole or not at all.
        title: Stands above.
        rows: One per tensor.
        numel: Elements of the model.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: Nothing is selected.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--png needs matplotlib; pip install 'saft_kernels[cli]'") from error
    if not any(row.k for row in rows):
        raise ValueError("--png: expected selected elements, got none; there is nothing to draw")
    counts = {stack.name: sum(row.k for row in stack.cells.values()) for stack in stacks(rows)}
    shown = sorted((s for s in stacks(rows) if counts[s.name]), key=lambda stack: -counts[stack.name])[:_MAX_STACKS]
    parts = _parts(rows, shown)
    # in inches: bars to the left, heat maps under each other to the right, the text under them
    bars = max(0.24 * len(parts), 1.2)
    sizes = [max(0.21 * len(stack.depths), 0.6) for stack in shown]
    names_below = 0.55 + 0.068 * max((len(kind) for stack in shown for kind in stack.kinds), default=0)
    top, label_width = 0.95, 0.3 + 0.07 * max(len(row.name) for row in parts)
    left = max(6.6, label_width + 3)
    width = left + (5.6 if shown else 0)
    height = max(top + bars + 0.9, top + sum(sizes) + names_below * len(sizes))
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)

    def axes(x: float, y: float, wide: float, high: float) -> Any:
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    figure.text(0.2 / width, 1 - 0.35 / height, title, fontsize=12, fontweight="bold", color=DARK, va="center")
    _plot_parts(axes(label_width, top, left - label_width - 0.3, bars), parts, numel, bars)
    drawn = [row for stack in shown for row in stack.cells.values() if row.k]
    if drawn:
        from matplotlib.colors import LogNorm

        densities = [row.k / row.numel for row in drawn]
        low, high = min(densities), max(densities)
        high = high if high > low else 2 * low
        norm = LogNorm(low, high)
        y = top
        for stack, size in zip(shown, sizes, strict=True):
            image = _plot_stack(axes(left + 0.55, y, 3.95, size), stack, norm)
            y += size + names_below
        bar = axes(left + 4.65, top, 0.13, sizes[0])
        figure.colorbar(image, cax=bar)
        bar.set_title("density", fontsize=8, color=GREY, loc="left")
        ticks = [low * (high / low) ** (i / 3) for i in range(4)]
        bar.set_yticks(ticks, [f"{100 * tick:.2g} %" for tick in ticks])
        bar.set_yticks([], minor=True)
        bar.tick_params(labelsize=7, colors=GREY, length=2)
        bar.spines[:].set_visible(False)
        if empty := [name for name, count in counts.items() if not count]:
            text = f"nothing selected in {', '.join(empty)}"
            figure.text((left + 0.55) / width, 1 - (y - 0.35) / height, text, fontsize=8, color=GREY, va="top")
    with files.replacing(path) as file:
        figure.savefig(file, format="png")


def _parts(rows: Sequence[Row], shown: Sequence[Stack]) -> list[Row]:
    """Each block of the stacks as one part, or each stack where that makes too many; other tensors by themselves."""
    parts: list[Row] = []
    for by_block in (True, False):
        owner = {
            row.name: f"{stack.name}.{depth if by_block else '*'}"
            for stack in shown
            for (depth, _), row in stack.cells.items()
        }
        sums: dict[str, list[int]] = {}
        for row in rows:
            total = sums.setdefault(owner.get(row.name, row.name), [0, 0])
            total[0] += row.k
            total[1] += row.numel
        parts = [Row(name, *sums[name]) for name in sorted(sums, key=natural) if sums[name][0]]
        if len(parts) <= _MAX_PARTS:
            return parts
    kept = sorted(parts, key=lambda row: -row.k)[: _MAX_PARTS - 1]
    small = [row for row in parts if row not in kept]
    others = Row(f"{len(small)} others", sum(row.k for row in small), sum(row.numel for row in small))
    return [*(row for row in parts if row in kept), others]


def _plot_parts(axis: Any, parts: Sequence[Row], numel: int, inches: float) -> None:
    k = sum(row.k for row in parts)
    share = [100 * row.k / k for row in parts]
    whole = [100 * row.numel / numel for row in parts]
    at, limit = range(len(parts)), 1.04 * max(*share, *whole)
    axis.barh(at, share, height=0.66, color=ACCENT, label="of the selected elements")
    axis.scatter(whole, at, marker="|", s=90, linewidths=2, color=DARK, label="of all elements", zorder=3)
    # in columns of their own: beside a mark, a value would be taken for the mark's
    for x, heading, cells in (
        (1.17, "share", [f"{value:.1f} %" if value >= 0.05 else "< 0.1 %" for value in share]),
        (1.38, "selected", [f"{row.k:,}" for row in parts]),
    ):
        style = {"ha": "right", "fontsize": 7.5, "color": GREY}
        axis.annotate(heading, (x * limit, -0.5), xytext=(0, 6), textcoords="offset points", **style)
        for y, text in enumerate(cells):
            axis.text(x * limit, y, text, va="center", **style)
    axis.set_yticks(at, [row.name for row in parts], fontsize=8)
    axis.set_ylim(len(parts) - 0.5, -0.5)
    axis.set_xlim(0, 1.4 * limit)
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= limit])
    axis.spines["bottom"].set_bounds(0, limit)
    axis.set_xlabel("share (%)", fontsize=8.5, loc="left")
    axis.set_title("Share of each part", loc="left", fontsize=10, color=DARK, pad=14)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.4 / inches), ncols=2)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)


def _plot_stack(axis: Any, stack: Stack, norm: Any) -> Any:
    """A cell per block and kind of tensor; light grey where nothing is selected."""
    import numpy as np
    from matplotlib import colormaps

    shape = len(stack.depths), len(stack.kinds)
    density = np.zeros(shape)
    for i, depth in enumerate(stack.depths):
        for j, kind in enumerate(stack.kinds):
            if (row := stack.cells.get((depth, kind))) is not None and row.numel:
                density[i, j] = row.k / row.numel
    axis.set_facecolor(LIGHT)
    colours = colormaps["YlGnBu"]
    image = axis.imshow(np.ma.masked_where(density == 0, density), cmap=colours, norm=norm, aspect="auto")
    axis.set_xticks(range(shape[1]), stack.kinds, rotation=90, fontsize=7)
    step = max(1, shape[0] // 12)
    axis.set_yticks(range(0, shape[0], step), stack.depths[::step], fontsize=7)
    axis.set_xticks([x - 0.5 for x in range(1, shape[1])], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, shape[0])], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2)
    axis.tick_params(which="both", length=0, colors=DARK)
    axis.spines[:].set_visible(False)
    axis.set_ylabel("block", fontsize=8, color=GREY)
    axis.set_title(stack.name, loc="left", fontsize=9, color=DARK)
    return image
