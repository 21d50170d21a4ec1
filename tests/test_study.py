"""bench/study.py: every variant of SAFT does what it says, on a tiny demo; the parts have arguments of the scripts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip", reason="the study needs open_clip: pip install saft_kernels[examples]")
pytest.importorskip("sklearn", reason="the demo needs scikit-learn: pip install saft_kernels[examples]")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import finetune_clip
import finetuning
import frontier
import study
from safetensors.torch import load_file
from test_finetune_clip import RECIPE

from saft_kernels import SparseDelta, SparseMask

DENSITY = 0.01
EPOCHS = 4


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """The variants as methods, one thread, and all of it undone."""
    methods, masked, threads = dict(finetuning.METHODS), finetuning.MASKED, torch.get_num_threads()
    torch.set_num_threads(1)
    study.register()
    yield
    torch.set_num_threads(threads)
    finetuning.METHODS.clear()
    finetuning.METHODS.update(methods)
    finetuning.MASKED = masked


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What a run of SAFT, full fine-tuning and all variants leaves."""
    folder = tmp_path_factory.mktemp("study")
    small = ["--epochs", str(EPOCHS), "--shots", "3", "--batch-size", "8", "--density", str(DENSITY), "--wise"]
    methods = ["saft", "full", *study.VARIANTS]
    where = ["--cache-dir", str(folder / "cache"), "--output", str(folder / "out")]
    assert finetune_clip.main([*where, *small, "--method", *methods, "--lr", "1e-3"], RECIPE) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def base(output):
    return load_file(output.parent / "cache" / f"digits-{RECIPE.key()}" / "digits-clip.safetensors")


def _mask(output, method: str) -> SparseMask:
    return SparseMask.load(output / "seed0" / f"{method}-{DENSITY}.mask.safetensors")


def _equal(a: SparseMask, b: SparseMask) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _change(output, base, method: str) -> dict[str, torch.Tensor]:
    file = (
        output / "seed0" / (f"{method}.safetensors" if method.startswith("full") else f"{method}-{DENSITY}.safetensors")
    )
    tuned = {name: value.clone() for name, value in base.items()}
    SparseDelta.load(file).apply_(tuned)
    return {name: tuned[name] - base[name] for name in base}


def _outside(change, mask: SparseMask) -> int:
    """Elements that have changed and are not of the mask."""
    return sum(int((change[name] != 0).flatten().index_fill(0, i.long(), False).sum()) for name, i in mask.items())


def test_every_variant_has_rows(output):
    rows = frontier.read_rows(output / "results.jsonl")
    numel = next(row.trained for row in rows if row.method == "full")
    trained = {row.method: row.trained for row in rows if row.alpha == 1}
    for name in study.VARIANTS:
        expected = numel if name.startswith("full") else DENSITY * numel
        assert trained[name] == pytest.approx(expected, rel=0.3), (
            name
        )  # in small tensors budgets of their own round far


@pytest.mark.parametrize(
    "method", [name for name in study.VARIANTS if not name.startswith(("full", "l2sp", "refreshed", "narrowed"))]
)
def test_selection_differs_and_nothing_else_is_trained(output, base, method):
    mask = _mask(output, method)
    assert not _equal(mask, _mask(output, "saft"))
    assert _outside(_change(output, base, method), mask) == 0


def test_refreshed_trains_what_is_selected_later(output, base):
    assert _equal(_mask(output, "refreshed"), _mask(output, "saft"))
    assert _outside(_change(output, base, "refreshed"), _mask(output, "refreshed")) > 0


def test_narrowed_trains_few_later(output, base):
    mask, change = _mask(output, "narrowed"), _change(output, base, "narrowed")
    assert 0 < _outside(change, mask) <= study.NARROW * mask.k
    plain = _change(output, base, "saft")
    assert sum(int(((plain[name] == change[name]) & (plain[name] != 0)).sum()) for name in base) == 0


@pytest.mark.parametrize(
    ("plain", "weak", "strong"), [("saft", "l2sp-10", "l2sp-100"), ("full", "full-l2sp-10", "full-l2sp-100")]
)
def test_pull_stays_nearer(output, base, plain, weak, strong):
    far, nearer, nearest = (
        sum(float(change.square().sum()) for change in _change(output, base, method).values())
        for method in (plain, weak, strong)
    )
    assert nearest < nearer < far


def test_no_embedding(output):
    mask = _mask(output, "no-embedding")
    assert not mask["token_embedding.weight"].numel()
    assert _mask(output, "saft")["token_embedding.weight"].numel()


@pytest.mark.parametrize("part", study.PARTS)
def test_arguments_of_parts(part):
    script, runs = study.PARTS[part]
    for argv in runs:
        args = script.build_parser().parse_args(argv)
        finetuning.take_lrs(args, {"linear_probe": 1e-3})  # every method has rates
        assert all(args.lr[method] for method in args.method)


def test_unknown_part(capsys):
    with pytest.raises(SystemExit):
        study.main(["emoji-5"])
    assert "expected parts of emoji-16" in capsys.readouterr().err


def test_report_of_the_rows_that_are_kept(capsys, monkeypatch, tmp_path):
    """A table and a picture of each part; full fine-tuning is not compared with itself."""
    monkeypatch.setattr(study, "PICTURES", tmp_path)
    assert study.main(["--report"]) == 0
    said = capsys.readouterr().out
    parts = [file.stem for file in study.FIDELITY.glob("*.jsonl")]
    assert all(f"## {part}\n" in said for part in parts)
    assert {file.stem for file in tmp_path.iterdir()} == {part for part in parts if not part.endswith("-variants")}
    distances = said.split("## Beside full fine-tuning's frontier")[1].split("##")[0]
    assert "| SAFT 1 % |" in distances
    assert "| full |" not in distances


def test_distance_to_the_frontier():
    """Above, below, and beyond the ends, of which the nearer one counts."""

    def row(method: str, lr: float, into: float, out: float) -> frontier.Row:
        known = frontier.read_rows(study.FIDELITY / "emoji-16.jsonl")[1]
        density = None if method == "full" else 0.01
        accuracy = {frontier.VAL: into, frontier.SELECT: 0.0, "line": out}
        return dataclasses.replace(known, method=method, lr=lr, alpha=1.0, density=density, accuracy=accuracy)

    full = [row("full", 1e-4, 60.0, 50.0), row("full", 1e-3, 70.0, 40.0)]
    for into, out, expected in ((65.0, 46.0, "+1.0"), (70.0, 39.5, "-0.5"), (50.0, 50.5, "+0.5"), (80.0, 40.0, "+0.0")):
        table = study.distances_table({"part": [*full, row("saft", 1e-3, into, out), row("saft", 1e-4, 0.0, 0.0)]})
        assert table.splitlines()[-1] == f"| SAFT 1 % | {expected} |"
