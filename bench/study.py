"""The study of docs/fidelity.md: every method of examples/finetune_*.py over several seeds, and variants of SAFT.

    python examples/icons_data.py --shots 16 && python examples/pretrain_icons.py       # for the parts on icons
    python examples/pretrain_icons.py --tower vit --steps 3200                          # for emoji-16-vit
    python bench/study.py emoji-16 emoji-16-variants

Run it where data/ is. A part goes on from the rows that it finds in --output/PART/results.jsonl; all go to
bench/results/fidelity, too, in place of those that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import finetune_clip
import finetune_text
import finetuning
import frontier
import torch
from finetuning import METHODS, FineTuning, Trained
from frontier import Row
from harness import RESULTS

FIDELITY = RESULTS / "fidelity"
PICTURES = RESULTS.parents[1] / "docs" / "pictures"
HALF = 0.5
VIEWS = 8  # augmented passes over the training examples
REFRESHED = 5  # epochs after which the mask is selected anew
NARROW = 0.1  # of the density, in the second half of the epochs
Method = Callable[[FineTuning], Trained]


# ---- variants of SAFT ----


@contextmanager
def arguments(args: argparse.Namespace, **changes: Any) -> Iterator[None]:
    """Some arguments changed for a while."""
    before = {name: getattr(args, name) for name in changes}
    vars(args).update(changes)
    try:
        yield
    finally:
        vars(args).update(before)


def with_arguments(**changes: Any) -> Method:
    """SAFT with another --score, --scope or --exclude."""

    def method(run: FineTuning) -> Trained:
        with arguments(run.args, **changes):
            return METHODS["saft"](run)

    return method


class Repeated:
    """Batches several times over."""

    def __init__(self, batches: Any, times: int) -> None:
        self.batches, self.times = batches, times

    def __len__(self) -> int:
        return self.times * len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield from self.batches


def from_views(run: FineTuning) -> Trained:
    """The mean gradient over augmented images, several times over, in place of the images as they are."""
    views = Repeated(run.task.batches(run.examples, run.args.batch_size, train=True), VIEWS)
    run.task.batches = lambda *_: views  # type: ignore[method-assign]
    try:
        return METHODS["saft"](run)
    finally:
        del run.task.batches


def from_all_shots(run: FineTuning) -> Trained:
    """The gradient over all training images of a class, more than are then trained on."""
    few, run.examples = run.examples, [example for of in run.task.train for example in of]
    try:
        return METHODS["saft"](run)
    finally:
        run.examples = few


def _at_epoch_ends(run: FineTuning, act: Callable[[int], None]) -> Trained:
    trained = METHODS["saft"](run)
    run.keeps = False  # the mask changes: a checkpoint would have to hold it

    def after_step() -> None:
        epoch, rest = divmod(len(run.times) + 1, len(run.batches))
        if rest == 0:
            act(epoch)

    trained.after_step = after_step
    return trained


def _select_anew(run: FineTuning, share: float = 1.0) -> None:
    """With the gradients of the model as it is now; of the setting's density, a share."""
    setting = dataclasses.replace(run.setting, density=share * (run.setting.density or 0.0))
    with torch.enable_grad():
        mask = finetuning.select_mask(run.task, run.examples, setting)
    run.optimizer.use_mask(mask)  # type: ignore[attr-defined]


def refreshed(run: FineTuning) -> Trained:
    """Selected anew after each of the first epochs."""
    return _at_epoch_ends(run, lambda epoch: _select_anew(run) if epoch <= REFRESHED else None)


def narrowed(run: FineTuning) -> Trained:
    """The second half of the epochs trains a tenth as many, selected anew."""
    return _at_epoch_ends(run, lambda epoch: _select_anew(run, NARROW) if epoch == run.args.epochs // 2 else None)


def pulled(of: str, strength: float) -> Method:
    """With decay toward the pre-trained values: L2-SP (Li et al., ICML 2018, arXiv 1802.01483), decoupled."""

    def method(run: FineTuning) -> Trained:
        trained = METHODS[of](run)

        def after_step() -> None:
            share = run.scheduler.get_last_lr()[0] * strength
            for name, parameter in trained.parameters.items():  # what is not selected is where it began
                parameter.lerp_(run.task.base[name], share)

        trained.after_step = after_step
        return trained

    return method


VARIANTS: dict[str, Method] = {
    "towers": with_arguments(scope="tower"),
    "tensors": with_arguments(scope="tensor"),
    "no-embedding": with_arguments(exclude=["*token_embedding*"]),
    "abs": with_arguments(score="mean_abs_grad"),
    "fisher": with_arguments(score="fisher"),
    "relative": with_arguments(score="relative_grad"),
    "views": from_views,
    "all-shots": from_all_shots,
    "refreshed": refreshed,
    "narrowed": narrowed,
    "l2sp-10": pulled("saft", 10.0),
    "l2sp-100": pulled("saft", 100.0),
    "full-l2sp-10": pulled("full", 10.0),
    "full-l2sp-100": pulled("full", 100.0),
}


def register() -> None:
    """Makes the variants methods of finetune_clip.py."""
    METHODS.update(VARIANTS)
    masked = [name for name in VARIANTS if not name.startswith("full-")]
    finetuning.MASKED = (*finetuning.MASKED, *masked)  # type: ignore[assignment]


# ---- parts ----

RATES = {
    "saft": "saft=3e-4,1e-3,3e-3",
    "random": "random=3e-3,1e-2,3e-2",
    "full": "full=3e-5,1e-4,3e-4,1e-3",
    "linear_probe": "linear_probe=1e-3,3e-3",
    "lp_ft": "lp_ft=1e-4,3e-4",
    "lora": "lora=3e-3,1e-2",
}
FEWER = {name: RATES[name] for name in ("saft", "full", "random", "linear_probe", "lora")}
SPARSER, DENSER = {"saft": RATES["saft"]}, {"saft": "saft=1e-4,3e-4,1e-3"}
TEXT = {
    "saft": "saft=1e-3,3e-3",
    "full": "full=3e-5,1e-4,3e-4",
    "random": "random=1e-2,3e-2",
    "linear_probe": "linear_probe=1e-3,3e-3,1e-2",
    "lp_ft": "lp_ft=3e-5,1e-4",
    "lora": "lora=1e-3,3e-3",
}
SHOTS = (4, 8, 16)
TASKS = ("emoji", "line")
WISE = ["--wise", "0.25", "0.5", "0.75"]


def icons(
    task: str, shots: int, rates: dict[str, str], density: Sequence[str] = ("1e-2",), model: str = "model"
) -> list[str]:
    """Arguments of finetune_clip.py."""
    what = ["--data", f"data/icons/{task}", "--shots", str(shots), "--method", *rates, "--density", *density]
    how = ["--model", f"local-dir:data/icons/{model}", "--templates", "an icon of a {}.", "--workers", "0"]
    return [*how, *what, "--epochs", "12", "--lr", *rates.values(), *WISE]


def glosses(shots: int, rates: dict[str, str]) -> list[str]:
    """Arguments of finetune_text.py: many steps."""
    return ["--shots", str(shots), "--epochs", "30", "--method", *rates, "--lr", *rates.values(), *WISE]


DIGITS = {
    "saft": "saft=3e-4,1e-3,3e-3",
    "full": "full=3e-5,1e-4,3e-4",
    "random": "random=1e-2,3e-2",
    "linear_probe": "linear_probe=1e-3,3e-3",
}
CHANGED = {name: f"{name}={'3e-4' if name.startswith('full') else '1e-3'}" for name in VARIANTS}
VIT = "model-vit"  # pretrain_icons.py --tower vit --steps 3200


def at_16_shots(task: str, model: str = "model") -> list[list[str]]:
    """Every method."""
    return [
        icons(task, 16, RATES, model=model),
        icons(task, 16, SPARSER, ["1e-3"], model),
        icons(task, 16, DENSER, ["1e-1"], model),
    ]


# name: script, and one or more runs of it into one folder
PARTS: dict[str, tuple[Any, list[list[str]]]] = {
    **{f"{task}-16": (finetune_clip, at_16_shots(task)) for task in TASKS},
    "emoji-16-variants": (finetune_clip, [icons("emoji", 16, CHANGED)]),
    **{f"{task}-{shots}": (finetune_clip, [icons(task, shots, FEWER)]) for task in TASKS for shots in SHOTS[:-1]},
    "emoji-16-vit": (finetune_clip, at_16_shots("emoji", VIT)),
    "digits-16": (finetune_clip, [["--method", *DIGITS, "--lr", *DIGITS.values(), *WISE]]),
    "supersenses-4": (finetune_text, [glosses(4, TEXT)]),
}


def run(part: str, seeds: Sequence[int], output: Path) -> int:
    """Runs a part, or what is left of it. Returns its exit status."""
    script, runs = PARTS[part]
    rows = output / part / "results.jsonl"
    kept = FIDELITY / f"{part}.jsonl"
    for argv in runs:
        resume = ["--resume"] if rows.exists() else []
        try:
            status: int = script.main([*argv, "--seed", *map(str, seeds), "--output", str(output / part), *resume])
        finally:
            if rows.exists():
                kept.parent.mkdir(exist_ok=True)
                shutil.copyfile(rows, kept)
        if status:
            return status
    return 0


# ---- what it comes to ----


def report() -> None:
    """Prints the tables of the rows that are kept, and draws their pictures into docs/pictures."""
    beside: dict[str, Sequence[Row]] = {}
    for file in sorted(FIDELITY.glob("*.jsonl")):
        rows = frontier.read_rows(file)
        print(f"\n## {file.stem}\n")
        if file.stem.endswith("-variants"):
            whole = frontier.read_rows(file.with_name(file.name.replace("-variants", "")))
            print(variants_table(rows, whole))
            continue
        with tempfile.TemporaryDirectory() as folder:
            frontier.save_tables(Path(folder), rows)
            print(Path(folder, "results.md").read_text())
        frontier.save_figure(PICTURES / f"{file.stem}.png", rows)
        beside[file.stem] = rows
    print(f"\n## Beside full fine-tuning's frontier\n\n{distances_table(beside)}")
    for task in TASKS:
        files = {shots: FIDELITY / f"{task}-{shots}.jsonl" for shots in SHOTS}
        parts = {shots: frontier.read_rows(file) for shots, file in files.items() if file.exists()}
        if len(parts) > 1:
            print(f"\n## {task}, by shots\n\n{shots_table(parts)}")


def distances_table(parts: Mapping[str, Sequence[Row]]) -> str:
    """Of each method, the least distance out of distribution to the front of full fine-tuning and its interpolations.

    Over all rates and alphas, and read off the test sets: what there is, not what one would have chosen.
    """
    found: dict[str, dict[str, float]] = {}
    for part, rows in parts.items():
        points = frontier.points_of(rows)
        front = frontier.pareto_front([p.at for p in points if p.label in (frontier.REFERENCE, frontier.ZERO_SHOT)])
        for p in points:
            distance = p.at[1] - frontier.along(front, p.at[0])
            found.setdefault(p.label, {})[part] = max(distance, found.get(p.label, {}).get(part, distance))
    lines = [f"| method | {' | '.join(parts)} |", "| --- |" + " ---: |" * len(parts)]
    for label, distances in found.items():
        if label != frontier.REFERENCE:
            cells = [f"{distances[part]:+.1f}" if part in distances else "-" for part in parts]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shots_table(parts: Mapping[int, Sequence[Row]]) -> str:
    """Of each number of shots, accuracy in / out of distribution: rates, and then alphas, as chosen on select."""
    columns = [
        {(line.point.label, line.point.alpha == 1): line.point for line in frontier.summarise(rows)}
        for rows in parts.values()
    ]
    lines = [f"| method | alpha | {' | '.join(f'{shots} shots' for shots in parts)} |"]
    lines.append("| --- | --- |" + " ---: |" * len(parts))
    for label, is_whole in dict.fromkeys(key for column in columns for key in column):
        points = [column.get((label, is_whole)) for column in columns]
        if sum(point is not None for point in points) > 1:
            cells = ["-" if p is None else "{:.1f} / {:.1f}".format(*p.at) for p in points]
            alpha = "-" if label == frontier.ZERO_SHOT else "1" if is_whole else "chosen"
            lines.append(f"| {label} | {alpha} | {' | '.join(cells)} |")
    return "\n".join(lines)


def variants_table(rows: Sequence[Row], whole: Sequence[Row]) -> str:
    """Each variant beside the plain method of the same rate and density, seed by seed: accuracy in and out."""
    lines = ["| variant | in | out | in, - plain | out, - plain | in, alpha 0.5 | out, alpha 0.5 |"]
    lines.append("| --- |" + " ---: |" * (lines[0].count("|") - 2))
    plain = {(row.method, row.lr, row.density, row.alpha, row.seed): row for row in whole}
    points = {p.method: p for p in frontier.points_of(rows) if p.alpha == 1}
    for point in (points[name] for name in VARIANTS if name in points):
        of = "full" if point.method.startswith("full") else "saft"
        half = frontier.Point([r for r in rows if r.method == point.method and r.alpha == HALF and r.lr == point.lr])
        beside = [plain[of, r.lr, r.density, 1.0, r.seed] for r in point.rows]
        differences = [
            [figure(ours) - figure(theirs) for ours, theirs in zip(point.rows, beside, strict=True)]
            for figure in (lambda r: r.accuracy[frontier.VAL], lambda r: r.shifted)
        ]
        cells = [point.method, *(f"{x:.1f}" for x in point.at)]
        cells += [frontier.plus_minus(frontier.mean_std(d), len(d), "+.1f") for d in differences]
        cells += [f"{x:.1f}" for x in half.at]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; default all")
    parser.add_argument("--report", action="store_true", help="tables and pictures of the rows that are kept; no runs")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), metavar="DIR", help="for masks and deltas")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of shots and order")
    args = parser.parse_args(argv)
    unknown = [part for part in args.part if part not in PARTS]
    if unknown:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {unknown[0]!r}")
    if args.report:
        report()
        return 0
    register()
    for part in args.part or PARTS:
        status = run(part, args.seed, args.output)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
