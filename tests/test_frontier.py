"""examples/frontier.py: rows that survive a kill, choices that look at no test set, the front, tables and picture."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the tables need rich: pip install saft_kernels[examples]")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import frontier
from frontier import Row
from PIL import Image


def _row(method="full", lr=1e-3, alpha=1.0, seed=0, select=50.0, val=50.0, shifted=(40.0, 60.0), **more) -> Row:
    density = more.pop("density", 0.001 if method == "saft" else None)
    sets = {f"set{i}": value for i, value in enumerate(shifted)}
    return Row("t", method, density, lr, seed, 16, alpha, {"select": select, "val": val, **sets}, 1.0, **more)


ZERO_SHOT = replace(_row("zero-shot", 0.0, 0.0, val=50.0, shifted=(60.0, 60.0)), seed=None)


# ---- rows ----


def test_rows_come_back(tmp_path):
    rows = frontier.Rows(tmp_path / "below" / "results.jsonl")
    for row in (ZERO_SHOT, _row(trained=7, selected={"text": 3}, train_loss=math.nan)):
        assert row.key not in rows
        rows.add(row)
        assert row.key in rows
    again = frontier.Rows(rows.file)
    assert again.rows[0] == ZERO_SHOT
    assert (again.rows[1].selected, math.isnan(again.rows[1].train_loss)) == ({"text": 3}, True)
    assert _row(seed=1).key not in again


def test_what_a_killed_process_left_is_no_row(tmp_path):
    rows = frontier.Rows(tmp_path / "results.jsonl")
    rows.add(ZERO_SHOT)
    whole = rows.file.read_bytes()
    rows.file.write_bytes(whole + b'{"task": "t", "meth')
    again = frontier.Rows(rows.file)
    assert again.rows == [ZERO_SHOT]
    again.add(_row())
    assert rows.file.read_bytes().startswith(whole + b'{"task": "t", "method": "full"')
    assert frontier.read_rows(rows.file) == [ZERO_SHOT, _row()]


@pytest.mark.parametrize("line", ["not a row", "[]", '{"task": "t"}'])
def test_a_line_that_is_no_row(tmp_path, line):
    rows = frontier.Rows(tmp_path / "results.jsonl")
    rows.add(ZERO_SHOT)
    rows.file.write_text(rows.file.read_text() + line + "\n")
    with pytest.raises(frontier.InputError, match=r"results.jsonl, line 2: expected a row of results"):
        frontier.read_rows(rows.file)


# ---- choices ----


def test_choice_is_by_selection_over_seeds_and_looks_at_no_test_set():
    rows = [
        _row(lr=1e-4, seed=0, select=70, val=1), _row(lr=1e-4, seed=1, select=50, val=1),
        _row(lr=1e-3, seed=0, select=60, val=99), _row(lr=1e-3, seed=1, select=59, val=99),
        _row(lr=1e-4, alpha=0.25, select=50, val=99), _row(lr=1e-4, alpha=0.5, select=55),
        _row(lr=1e-3, alpha=0.75, select=99),
    ]  # fmt: skip
    tuned, between = frontier.choose(frontier.points_of(rows))
    assert (tuned.lr, len(tuned.rows)) == (1e-4, 2)
    assert between.alpha == 0.5


def test_ties_go_to_the_smaller_rate_and_alpha():
    rows = [_row(lr=lr) for lr in (1e-2, 1e-4, 1e-3)] + [_row(lr=1e-4, alpha=a) for a in (0.75, 0.25)]
    tuned, between = frontier.choose(frontier.points_of(rows))
    assert (tuned.lr, between.alpha) == (1e-4, 0.25)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 1)], [(1, 1)]),
        ([(1, 3), (2, 2), (3, 1), (2, 1), (0, 3)], [(1, 3), (2, 2), (3, 1)]),
        ([(1, 1), (1, 2), (1, 2)], [(1, 2)]),
        ([(2, 2), (1, 2)], [(2, 2)]),
    ],
)
def test_pareto_front(points, front):
    assert frontier.pareto_front(points) == front


def test_along_the_front():
    front = [(10.0, 8.0), (20.0, 6.0), (30.0, 0.0)]
    assert [frontier.along(front, x) for x in (5, 10, 15, 20, 25, 30, 40)] == [8, 8, 7, 6, 3, 0, 0]


def test_paired_and_matched_differences():
    """Pairs are of one seed; a match is with full's front from zero-shot on, whatever the rate."""
    rows = [ZERO_SHOT]
    for seed, noise in ((0, 0.0), (1, 4.0)):
        rows += [
            _row(lr=1e-4, seed=seed, select=60, val=60, shifted=(50 + noise,)),
            _row(lr=1e-3, seed=seed, select=70, val=70, shifted=(30 + noise,)),
            _row("saft", lr=1e-2, seed=seed, select=50, val=65, shifted=(45 + noise + seed,)),
        ]
    lines = {(line.point.label, line.point.lr): line for line in frontier.summarise(rows)}
    full, saft = lines["full", 1e-3], lines["SAFT 0.1 %", 1e-2]
    assert full.paired == (0, 0)
    assert full.matched == pytest.approx(0)
    mean, spread = saft.paired
    assert (mean, spread) == pytest.approx((15.5, math.sqrt(0.5)))
    assert saft.point.at == pytest.approx((65, 47.5))
    assert saft.matched == pytest.approx(47.5 - (52 + 32) / 2)
    assert frontier.best_trade(list(lines.values())) is saft
    assert frontier.trade_sentence(list(lines.values())).startswith(
        "Best trade at equal accuracy in distribution: SAFT"
    )


def test_without_full_nothing_is_compared():
    lines = frontier.summarise([ZERO_SHOT, _row("saft")])
    assert [(line.paired, line.matched) for line in lines] == [(None, None)] * 2
    assert frontier.trade_sentence(lines) == ""


# ---- report ----


def _frontier(seeds=2) -> list[Row]:
    rows = [ZERO_SHOT]
    for seed in range(seeds):
        for method, densities, lrs in (("saft", (0.001, 0.01), (1e-3, 1e-2)), ("full", (None,), (1e-5, 1e-4))):
            for density in densities:
                for lr in lrs:
                    for alpha in (0.5, 1.0):
                        gain = 10 * alpha + 2 * seed + 1e3 * lr
                        figures = {"select": 50 + gain, "val": 50 + gain, "shifted": (60 - gain, 61 - gain)}
                        rows.append(
                            _row(method, lr, alpha, seed, density=density, trained=9, ms_per_step=1.0, **figures)
                        )
    return rows


def test_report(tmp_path):
    frontier.save_report(tmp_path, _frontier())
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 1000
    text = (tmp_path / "results.md").read_text()
    assert "| SAFT 1 % | 0.01 | 1 | 71.0 ± 1.4 |" in text
    assert "| in distribution |" in text
    with open(tmp_path / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 1 + 3 * 2 * 2  # every rate and alpha, seeds together
    assert {line["seeds"] for line in lines} == {"1", "2"}
    assert float(lines[0]["mean_shifted"]) == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.md", "results.png"]


def test_report_without_shifted_sets(tmp_path):
    rows = [replace(row, accuracy={"select": 1.0, "val": 2.0}) for row in _frontier(2)]
    frontier.save_report(tmp_path, rows)
    assert not (tmp_path / "results.png").exists()
    assert "| - |" in (tmp_path / "results.md").read_text()


def test_the_picture_does_not_blow_up_tenths_of_a_point():
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    frontier.plot(axis, [ZERO_SHOT, _row("saft", val=50.1, shifted=(60.1,)), _row(val=50.2, shifted=(59.9,))])
    for low, high in (axis.get_xlim(), axis.get_ylim()):
        assert 5 <= high - low < 6
    plt.close(figure)


def test_the_picture_has_the_chosen_the_curves_and_the_front():
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    rows = _frontier()
    frontier.plot(axis, rows)
    labels = axis.get_legend_handles_labels()[1]
    chosen = {f"{line.point.label}, lr {line.point.lr:g}" for line in frontier.summarise(rows) if line.point.alpha == 1}
    assert {name.partition(",")[0] for name in chosen} == {"SAFT 0.1 %", "SAFT 1 %", "full"}
    assert {"Pareto front", "zero-shot", *chosen} < set(labels)
    front = next(line for line in axis.lines if line.get_label() == "Pareto front")
    points = [point.at for point in frontier.points_of(rows)]
    assert list(zip(*front.get_data(), strict=True)) == frontier.pareto_front(points)
    plt.close(figure)


def test_a_close_up_where_the_best_lie_densely():
    rows = [
        ZERO_SHOT,
        _row(val=90, shifted=(70,)),
        _row("saft", val=89, shifted=(74,)),
        _row("random", val=60, shifted=(50,)),
    ]
    (left, right), (low, high) = frontier.close_up(rows)
    assert 60 < left < 89 < 90 < right
    assert 50 < low < 70 < 74 < high
    assert frontier.close_up(rows[:2]) is None
    assert frontier.close_up([*rows, _row("lora", val=90, shifted=(20,))]) is None  # not densely


def test_command_line_joins_files(tmp_path, capsys):
    rows = _frontier()
    for name, some in (("a", rows[:8]), ("b", rows[4:])):
        of = frontier.Rows(tmp_path / f"{name}.jsonl")
        for row in some:
            of.add(row)
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    assert frontier.main([*files, "--output", str(tmp_path / "both")]) == 0
    frontier.save_tables(tmp_path / "straight", rows)
    assert (tmp_path / "both" / "results.csv").read_text() == (tmp_path / "straight" / "results.csv").read_text()
    assert "SAFT 0.1 %" in capsys.readouterr().out


def test_command_line_errors_are_one_line(tmp_path, capsys):
    rows = frontier.Rows(tmp_path / "rows.jsonl")
    rows.add(ZERO_SHOT)
    rows.add(replace(ZERO_SHOT, task="u"))
    for arguments, said in (([str(rows.file)], "got t, u"), ([str(tmp_path / "none")], "cannot read it")):
        assert frontier.main([*arguments, "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert said in line
    assert not (tmp_path / "out").exists()


def test_replacing_leaves_the_old_file_on_error(tmp_path):
    file = tmp_path / "results.md"
    file.write_text("old")

    def write_half() -> None:
        with frontier.replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    assert file.read_text() == "old"


def test_a_rate_at_the_end_of_those_tried_is_told():
    """Of one rate alone nothing is known; alphas below 1 are no rates."""
    rates = {"saft": (1e-4, 1e-3, 1e-2), "full": (1e-4, 1e-3), "random": (1e-3,)}
    best = {"saft": 1e-3, "full": 1e-3, "random": 1e-3}
    rows = [
        _row(method, lr, alpha, select=60.0 if lr == best[method] else 50.0)
        for method, lrs in rates.items()
        for lr in lrs
        for alpha in (0.5, 1.0)
    ]
    assert frontier.at_an_edge([ZERO_SHOT, *rows]) == [
        "full: the largest rate that was tried is the best; try --lr 3e-03, too"
    ]
    best["saft"], rows[0] = 0.0, _row("saft", 1e-4, 1.0, select=99.0)
    assert frontier.at_an_edge(rows)[0].startswith("SAFT 0.1 %: the smallest rate")
