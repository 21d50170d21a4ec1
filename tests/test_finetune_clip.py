"""examples/finetune_clip.py, finetuning.py: the demo in small, every method, folders, resuming, errors' one line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("open_clip", reason="the example needs open_clip: pip install saft_kernels[examples]")
pytest.importorskip("sklearn", reason="the example needs scikit-learn: pip install saft_kernels[examples]")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import digits_demo
import finetune_clip
import finetuning
import frontier
import open_clip
from PIL import Image

from saft_kernels import SparseDelta, SparseMask

DENSITY = 0.01
CLASSES = ("apple", "fig", "ripe_plum")


def _tiny(vocab_size: int, image_size: int) -> dict:
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": image_size, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 12, "vocab_size": vocab_size, "width": 16, "heads": 2, "layers": 1},
    }


RECIPE = digits_demo.Recipe(
    steps=8, batch_size=42, test_digits=30, model=_tiny(digits_demo.DigitsTokenizer().vocab_size, 32)
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo(cache):
    """Runs the demo on its tiny recipe; arguments given override."""

    def run(output: Path, *arguments: str) -> int:
        small = ["--epochs", "3", "--shots", "3", "--batch-size", "8", "--density", str(DENSITY)]
        return finetune_clip.main(["--cache-dir", str(cache), "--output", str(output), *small, *arguments], RECIPE)

    return run


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert demo(output) == 0
    return output


@pytest.fixture(scope="module")
def base(demo, finished, cache):
    return load_file(cache / f"digits-{RECIPE.key()}" / "digits-clip.safetensors")


# ---- the demo ----


def _rows(output: Path) -> list[frontier.Row]:
    return frontier.read_rows(output / "results.jsonl")


def _tuned(output: Path) -> dict[str, frontier.Row]:
    """By method, not interpolated."""
    return {row.method: row for row in _rows(output) if row.alpha == 1 or row.method == "zero-shot"}


def test_rows(finished, base):
    rows = _rows(finished)
    assert [(row.method, row.alpha) for row in rows] == [
        ("zero-shot", 0),
        *((m, a) for m in ("saft", "full") for a in (1, 0.5)),
    ]
    for row in rows:
        assert set(row.accuracy) == {"select", "val", *digits_demo.RENDERINGS} - {"upright"}
        assert all(0 <= value <= 100 for value in row.accuracy.values())
        assert set(row.versions) == {"saft_kernels", "torch", "python"}
        assert (row.task, row.shots, row.settings["epochs"]) == ("digits", 3, 3)
        assert row.hardware
        assert row.seconds > 0
    zero_shot, saft, full = _tuned(finished).values()
    numel = sum(value.numel() for value in base.values())
    assert (zero_shot.trained, zero_shot.seed, saft.seed) == (0, None, 0)
    assert saft.trained == round(DENSITY * numel) == sum(saft.selected.values())
    assert full.trained == numel
    assert full.state_bytes > 50 * saft.state_bytes > 0
    assert 0 < saft.ms_per_optimizer_step < saft.ms_per_step


def test_rows_name_no_folder_of_this_machine(finished, cache):
    text = (finished / "results.jsonl").read_text()
    assert str(cache) not in text
    assert str(finished) not in text


def test_values_file_is_a_delta_of_the_selected_elements(finished, base):
    mask = SparseMask.load(finished / "seed0" / f"saft-{DENSITY}.mask.safetensors")
    file = finished / "seed0" / f"saft-{DENSITY}.safetensors"
    delta = SparseDelta.load(file)
    tuned = {name: value.clone() for name, value in base.items()}
    delta.apply_(tuned)
    changed = 0
    for name, index in mask.items():
        different = (tuned[name] != base[name]).flatten()
        changed += int(different.sum())
        assert not different.index_fill(0, index.long(), False).any()
    assert changed > 0.9 * mask.k  # a token that no prompt has gets no gradient and no decay to speak of
    header = 2_000 + 250 * sum(index.numel() > 0 for index in mask.values())
    assert file.stat().st_size <= 8 * mask.k + header


def test_full_fine_tune_is_a_delta_of_everything(finished, base):
    delta = SparseDelta.load(finished / "seed0" / "full.safetensors")
    assert delta.k > 0.9 * sum(value.numel() for value in base.values())
    tuned = {name: value.clone() for name, value in base.items()}
    delta.apply_(tuned)
    assert not torch.equal(tuned["visual.proj"], base["visual.proj"])


def test_figure_and_no_leftovers(finished):
    with Image.open(finished / "results.png") as figure:
        assert figure.width > 1000
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    deltas = {f"seed0/saft-{DENSITY}.mask.safetensors", f"seed0/saft-{DENSITY}.safetensors", "seed0/full.safetensors"}
    assert names == {f"results.{end}" for end in ("jsonl", "md", "csv", "png")} | deltas


def test_table(demo, tmp_path, capsys):
    assert demo(tmp_path, "--seed", "0", "1", "--epochs", "1", "--method", "saft", "full", "--wise", "0.5") == 0
    printed = capsys.readouterr().out
    for expected in ("zero-shot", "SAFT 1 %", "±", "paired", "ms per", "low_contrast", "Best trade at equal accuracy"):
        assert expected in printed
    masks = [SparseMask.load(tmp_path / f"seed{s}" / f"saft-{DENSITY}.mask.safetensors") for s in (0, 1)]
    assert 0 < masks[0].iou(masks[1]) < 1


# ---- methods ----


@pytest.fixture(scope="module")
def every_method(demo, tmp_path_factory):
    output = tmp_path_factory.mktemp("methods") / "out"
    methods = ["--method", *finetuning.METHODS, "--epochs", "1", "--wise", "0.5", "--lora-rank", "2"]
    assert demo(output, *methods, "--density", str(DENSITY), "0.1", "--lr", "1e-3", "saft=1e-3,1e-2") == 0
    return output


def test_every_method_changes_what_it_trains(every_method, base):
    pytest.importorskip("peft", reason="LoRA is PEFT's: pip install saft_kernels[lora]")
    where = {
        "full": lambda name: name != "head",
        "linear_probe": lambda name: name == "head",
        "lp_ft": lambda name: name == "head" or name.startswith("visual."),
        "lora": lambda name: (name.endswith("weight") and "attn" in name) or "mlp.c_" in name,
        f"saft-{DENSITY}": lambda name: name != "head",
        "random-0.1": lambda name: name != "head",
    }
    for method, may in where.items():
        delta = SparseDelta.load(every_method / "seed0" / f"{method}.safetensors")
        assert delta.k > 0, method
        assert {name for name, index in delta.mask.items() if index.numel() and not may(name)} == set(), method
    tuned = [row for row in _rows(every_method) if row.alpha == 1]
    numel = sum(value.numel() for value in base.values())
    assert {(row.method, row.trained) for row in tuned if row.density} == {
        (method, round(density * numel)) for method in ("saft", "random") for density in (DENSITY, 0.1)
    }
    assert len([row for row in tuned if row.method == "saft"]) == 4  # two densities, two rates


def test_interpolation_is_between_in_place(demo, finished, base, monkeypatch):
    """What is tested at alpha is base + alpha * (tuned - base), of the same model object."""
    seen = {}
    evaluate = finetuning.Task.evaluate

    def spy(task, name):
        seen[name.rpartition(" ")[2]] = (id(task.model), task.model.state_dict()["visual.proj"].clone())
        return evaluate(task, name)

    monkeypatch.setattr(finetuning.Task, "evaluate", spy)
    assert demo(finished.with_name("between"), "--method", "full", "--epochs", "1", "--wise", "0.25") == 0
    (_, start), (tuned_id, tuned), (between_id, between) = seen["zero-shot"], seen["1"], seen["0.25"]
    assert tuned_id == between_id
    assert not torch.equal(tuned, start)
    torch.testing.assert_close(between, start + 0.25 * (tuned - start), rtol=0, atol=1e-7)


def test_masks_are_shared_by_the_rates_and_differ_by_method(every_method):
    masks = {
        method: SparseMask.load(every_method / "seed0" / f"{method}-{DENSITY}.mask.safetensors")
        for method in ("saft", "random")
    }
    assert masks["saft"].iou(masks["random"]) < 0.2


def test_saved_delta_is_of_the_rate_that_is_best_on_selection(every_method, base):
    best = max(
        (row for row in _rows(every_method) if (row.method, row.density, row.alpha) == ("saft", 0.1, 1)),
        key=lambda row: (row.accuracy["select"], -row.lr),
    )
    delta = SparseDelta.load(every_method / "seed0" / "saft-0.1.safetensors")
    moved = max(
        float((v - base[n].flatten()[delta.mask[n].long()]).abs().max()) for n, v in delta.values.items() if len(v)
    )
    # AdamW moves an element by up to lr a step: warm-up and cosine leave at most the number of steps
    assert (moved > 1e-3 * 4) == (best.lr == 1e-2)


def test_tower_scope_gives_each_tower_its_share(demo, tmp_path):
    arguments = [
        "--method",
        "saft",
        "--epochs",
        "1",
        "--wise",
        "--scope",
        "tower",
        "--exclude",
        "*embedding*",
        "logit*",
    ]
    assert demo(tmp_path, *arguments) == 0
    mask = SparseMask.load(tmp_path / "seed0" / f"saft-{DENSITY}.mask.safetensors")
    for tower in (True, False):
        of = {n: i for n, i in mask.items() if n.startswith("visual.") == tower}
        candidates = [n for n in of if "embedding" not in n and not n.startswith("logit")]
        numel = sum(torch.Size(mask.shapes[n]).numel() for n in candidates)
        assert sum(len(i) for i in of.values()) == sum(len(of[n]) for n in candidates) == round(DENSITY * numel)


def test_a_rate_that_is_too_large_is_said(demo, tmp_path, capsys):
    assert demo(tmp_path, "--method", "full", "--lr", "1e30", "--wise") == 0
    assert (
        "full, lr 1e+30, seed 0: the loss is nan: training diverged; the rate is too large" in capsys.readouterr().out
    )


def test_lora_without_peft(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert demo(tmp_path / "out", "--method", "lora") == 2
    _one_line(capsys, "--method lora", "saft_kernels[lora]")


# ---- resuming ----


def _last_epochs(output: Path) -> None:
    """Every checkpoint is gone when its row is there."""
    assert not list(output.rglob("*.checkpoint.pt"))


@pytest.mark.parametrize("method", finetuning.METHODS)
def test_resumed_run_is_bit_equal(demo, tmp_path, monkeypatch, capsys, method):
    if method == "lora":
        pytest.importorskip("peft", reason="LoRA is PEFT's: pip install saft_kernels[lora]")
    save = finetuning.FineTuning._save_checkpoint
    arguments = ["--method", method, "--epochs", "2", "--wise", "0.5"]

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert demo(straight, *arguments) == 0
    with monkeypatch.context() as patch:
        patch.setattr(finetuning.FineTuning, "_save_checkpoint", interrupted)
        assert demo(resumed, *arguments) == 130
        assert "--resume" in capsys.readouterr().err
        assert not list(resumed.rglob(f"{method}*[!k].safetensors"))
        assert demo(resumed, *arguments, "--resume") == 130  # the second epoch
    assert demo(resumed, *arguments, "--resume") == 0
    (file,) = (f for f in straight.glob("seed0/*.safetensors") if "mask" not in f.name)
    first, second = SparseDelta.load(file), SparseDelta.load(resumed / "seed0" / file.name)
    if method == "lora":  # PEFT adds to attention weights and takes off again at every forward pass, which rounds
        assert first.mask == second.mask
        for name, values in first.values.items():
            torch.testing.assert_close(second.values[name], values, rtol=0, atol=1e-6)
    else:
        assert first == second
        assert [row.accuracy for row in _rows(resumed)] == [row.accuracy for row in _rows(straight)]
    _last_epochs(resumed)


def test_resuming_a_finished_run_reports_it_again_and_adds_what_is_new(demo, tmp_path, monkeypatch):
    arguments = ["--method", "saft", "--epochs", "1", "--wise"]
    assert demo(tmp_path, *arguments) == 0
    first = _rows(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(finetuning.Task, "evaluate", lambda *_: pytest.fail("tested again"))
        assert demo(tmp_path, *arguments, "--resume") == 0
    assert _rows(tmp_path) == first
    assert demo(tmp_path, *arguments, "--resume", "--lr", "saft=1e-2", "--seed", "1") == 0
    assert [(row.lr, row.seed) for row in _rows(tmp_path)] == [(0, None), (1e-3, 0), (1e-2, 1)]
    assert _rows(tmp_path)[:2] == first


def test_starting_anew_puts_what_was_there_aside(demo, tmp_path, capsys):
    def files(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    arguments = ["--method", "saft", "--epochs", "1", "--wise"]
    mine = {"results.txt": b"mine", "seed1-notes/a.txt": b"mine, too"}
    for name, data in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert demo(tmp_path, *arguments) == 0
    first = {name: data for name, data in files(tmp_path).items() if name not in mine}
    assert "results.jsonl" in first
    assert any(name.endswith(".mask.safetensors") for name in first)
    for number in (1, 2):  # not the second in place of the first
        assert demo(tmp_path, *arguments) == 0
        assert f"earlier-{number}; --resume would have gone on from it" in capsys.readouterr().out
    assert files(tmp_path / "earlier-1") == first
    assert files(tmp_path / "earlier-2").keys() == first.keys()
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine


def test_an_interrupted_run_that_was_put_aside_can_be_gone_on_from(tmp_path):
    theirs = ("seed0/full.checkpoint.pt", "seed0/full.safetensors", "results.jsonl")
    for name in (*theirs, "seed9-photos/big.checkpoint.pt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "saft.checkpoint.pt").write_text("there")
    (tmp_path / "out" / "seed1").symlink_to("../elsewhere")
    (tmp_path / "out" / "earlier-1").symlink_to("nowhere")
    aside = finetuning.put_aside(tmp_path / "out")
    assert aside == tmp_path / "out" / "earlier-2"
    for name in theirs:
        assert (aside / name).read_text() == name
    assert (aside / "seed1" / "saft.checkpoint.pt").read_text() == "there"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"earlier-1", "earlier-2", "seed9-photos"}
    assert finetuning.put_aside(tmp_path / "out") is None


def test_nothing_to_resume(demo, tmp_path, capsys):
    assert demo(tmp_path / "new", "--resume") == 2
    _one_line(capsys, "--resume", "nothing to resume", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["--epochs", "4"], ["--templates", "{}"], ["--score", "fisher"]])
def test_resuming_with_other_arguments(demo, finished, capsys, arguments):
    before = (finished / "results.jsonl").read_bytes()
    assert demo(finished, "--resume", *arguments) == 2
    _one_line(capsys, "--resume", f"expected {arguments[0]}", f"got {arguments[0]}")
    assert (finished / "results.jsonl").read_bytes() == before


def test_damaged_checkpoint(demo, tmp_path, capsys):
    arguments = ["--method", "full", "--epochs", "1", "--wise"]
    assert demo(tmp_path, *arguments) == 0
    (tmp_path / "results.jsonl").write_text((tmp_path / "results.jsonl").read_text().splitlines()[0] + "\n")
    file = tmp_path / "seed0" / "full-lr0.0001.checkpoint.pt"
    file.write_bytes(b"not a checkpoint")
    assert demo(tmp_path, *arguments, "--resume") == 2
    _one_line(capsys, str(file))


# ---- folders of images ----


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """--model and --pretrained of a random CLIP with open_clip's own tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = _tiny(49408, 16)
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(1)
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "tiny.pt")
    return ["--model", "tiny-clip", "--pretrained", str(folder / "tiny.pt")]


@pytest.fixture
def photos(tmp_path):
    """A --data folder; its shifted set has two of the three classes."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "photos"
    for split, classes in {"train": CLASSES, "select": CLASSES, "val": CLASSES, "sketches": CLASSES[:2]}.items():
        for label, name in enumerate(classes):
            (folder / split / name / "more").mkdir(parents=True)
            for i in range(4):
                noise = torch.randint(0, 90, (24, 20, 3), generator=generator, dtype=torch.uint8)
                noise[..., label] += 120
                where = folder / split / name / ("more" if i == 3 else "")
                Image.fromarray(noise.numpy()).save(where / f"{i}.{'jpg' if i % 2 else 'png'}")
    (folder / "train" / "notes.txt").write_text("not a class")
    (folder / ".thumbnails").mkdir()
    return folder


def _run(photos: Path, output: Path, *arguments: str) -> int:
    small = ["--epochs", "2", "--batch-size", "5", "--workers", "0", "--wise"]
    return finetune_clip.main(["--data", str(photos), "--output", str(output), *small, *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers", "1", "--shots", "0"],
        ["--precision", "amp_bf16", "--templates", "a photo of a {}.", "{}, a fruit"],
        ["--precision", "amp_fp16", "--method", "saft"],
        ["--method", "full", "--lr", "1e-3"],
    ],
    ids=" ".join,
)
def test_folders(tiny_clip, photos, tmp_path, arguments):
    output = tmp_path / "out"
    assert _run(photos, output, *tiny_clip, *arguments) == 0
    methods = arguments[arguments.index("--method") + 1 :][:1] if "--method" in arguments else ["saft", "full"]
    tuned = _tuned(output)
    assert list(tuned) == ["zero-shot", *methods]
    assert all(set(row.accuracy) == {"select", "val", "sketches"} and row.task == "photos" for row in tuned.values())
    assert all(0 < tuned[method].train_loss < 10 for method in methods)
    assert bool(list(output.glob("seed0/*.mask.safetensors"))) == ("saft" in methods)


def test_folders_learn(tiny_clip, photos, tmp_path):
    arguments = ["--epochs", "12", "--lr", "saft=1e-2", "full=1e-3"]
    assert _run(photos, tmp_path / "out", *tiny_clip, *arguments) == 0
    assert [row.accuracy["val"] > 90 for row in _tuned(tmp_path / "out").values()] == [False, True, True]


def test_templates_file(tiny_clip, photos, tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\na drawing of a {}.\n")
    arguments = ["--templates", str(tmp_path / "templates.txt"), "--epochs", "1", "--method", "saft"]
    assert _run(photos, tmp_path / "out", *tiny_clip, *arguments) == 0
    assert _rows(tmp_path / "out")[0].settings["templates"] == ["a photo of a {}.", "a drawing of a {}."]


def _task(photos: Path, *arguments: str) -> finetune_clip.ClipTask:
    args = finetune_clip.build_parser().parse_args(["--data", str(photos), "--workers", "0", *arguments])
    return finetune_clip.load_task(args)


def _counts(task: finetune_clip.ClipTask) -> tuple[dict[str, int], dict[str, int]]:
    """Training examples by class, and of each set."""
    examples = [task.classes[label] for _, label in finetuning.few_shot(task.train, task.args.shots, 0)]
    return {c: examples.count(c) for c in task.classes}, {name: len(of) for name, of in task.sets.items()}


def test_selection_split_is_taken_off_flatwhere_there_is_none(tiny_clip, photos, capsys):
    shutil.rmtree(photos / "select")
    for i in range(4, 20):
        _save_image(photos / "train" / "fig" / f"{i}.png")
    task = _task(photos, *tiny_clip, "--shots", "0")
    assert f"no {photos / 'select'}: 6 images of train/ are kept from training" in capsys.readouterr().out
    train, sets = _counts(task)
    assert train == {"apple": 3, "fig": 16, "ripe_plum": 3}
    assert sets == {"select": 6, "val": 12, "sketches": 8}
    chosen = {file for file, _ in task.sets["select"]}
    assert not chosen & {file for file, _ in finetuning.few_shot(task.train, task.args.shots, 0)}
    moved = photos.rename(photos.with_name("elsewhere"))
    again = _task(moved, *tiny_clip).sets["select"]
    assert [f.relative_to(moved) for f, _ in again] == [f.relative_to(photos) for f, _ in task.sets["select"]]


def test_no_image_to_select_by(tiny_clip, photos, tmp_path, capsys):
    shutil.rmtree(photos / "select")
    for name in CLASSES:
        for file in [*(photos / "train" / name).rglob("[123].*")]:
            file.unlink()
    assert _run(photos, tmp_path / "out", *tiny_clip) == 2
    _one_line(capsys, str(photos / "train"), "add a select/")


# ---- the shape of ImageNet and its shifts ----

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
NAMES = ("tench", "goldfish", "great white shark", "tiger shark")


@pytest.fixture
def imagenet(tmp_path):
    """train/ and val/ by WordNet id, no select/; V2 by number, Sketch by id, A and R with some of the classes."""
    folder, generator = tmp_path / "imagenet", torch.Generator().manual_seed(0)
    shapes = {"train": (WNIDS, 24), "val": (WNIDS, 5), "v2": ("0123", 2), "sketch": (WNIDS, 2), "a": (WNIDS[:2], 2),
              "r": (WNIDS[1:], 2)}  # fmt: skip
    for split, (classes, number) in shapes.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                noise = torch.randint(0, 255, (20, 24, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(folder / split / name / f"{name}_{i}.JPEG")
    return folder


def test_imagenet_protocol(tiny_clip, imagenet, tmp_path, capsys):
    """The documented command: 16 shots, class names and templates by file, V2 / Sketch / A / R as shifted sets."""
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("".join(f"{wnid} {name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True)))
    templates.write_text("a photo of a {}.\na sketch of a {}.\n")
    arguments = ["--class-names", str(names), "--templates", str(templates), "--shots", "16", "--seed", "0", "1"]
    arguments += ["--method", "saft", "full", "--lr", "saft=1e-3,1e-2", "full=1e-4", "--wise", "0.5", "--epochs", "1"]
    assert _run(imagenet, tmp_path / "out", *tiny_clip, *arguments) == 0
    assert f"{imagenet / 'v2'}: its folders are numbers" in capsys.readouterr().out
    rows = _rows(tmp_path / "out")
    assert len(rows) == 1 + 2 * 3 * 2  # zero-shot; seeds x settings x alphas
    assert all(list(row.accuracy) == ["select", "val", "a", "r", "sketch", "v2"] for row in rows)
    assert all(row.shots == 16 and row.settings["class_names"] == str(names) for row in rows)
    shifted = [rows[0].accuracy[name] for name in ("a", "r", "sketch", "v2")]
    assert rows[0].shifted == pytest.approx(sum(shifted) / 4)


def test_imagenet_folders_become_classes_and_prompts(tiny_clip, imagenet, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"{w}\t{n}\n" for w, n in zip(WNIDS, NAMES, strict=True)))
    task = _task(imagenet, *tiny_clip, "--class-names", str(tmp_path / "names.txt"))
    train, sets = _counts(task)
    assert train == dict.fromkeys(WNIDS, 16)
    assert sets == {"select": 20, "val": 20, "a": 4, "r": 6, "sketch": 8, "v2": 8}
    assert {label: {f.parent.name for f, i in task.sets["v2"] if i == label} for label in range(4)} == {
        0: {"0"}, 1: {"1"}, 2: {"2"}, 3: {"3"},
    }  # fmt: skip
    tokens = open_clip.get_tokenizer("tiny-clip")([f"a photo of a {name}." for name in NAMES])
    assert torch.equal(task.prompts[:, 0], tokens)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("", "empty file"),
        ("n01440764 tench\n", "got none for 'n01443537' and 2 more"),
        ("imagenet", "the 1,000 folders of ImageNet"),
    ],
)
def test_bad_class_names(tiny_clip, imagenet, tmp_path, capsys, content, said):
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_text(content)
    given = content if content == "imagenet" else str(file)
    assert _run(imagenet, tmp_path / "out", *tiny_clip, "--class-names", given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_names_of_imagenet():
    folders = [f"n{i:08}" for i in range(1000)]
    assert finetune_clip.read_class_names("imagenet", folders)[:2] == ["tench", "goldfish"]


def _save_image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


def test_hidden_files_and_folders_are_no_data(tiny_clip, photos, tmp_path):
    """macOS's resource forks, notebooks' copies; and a folder that is called like an image."""
    (photos / "train" / "fig" / "._0.png").write_bytes(b"resource fork")
    _save_image(photos / "train" / "fig" / ".ipynb_checkpoints" / "0-checkpoint.png")
    _save_image(photos / "val" / "fig" / "more" / ".trash" / "old" / "1.png")
    _save_image(photos / "val" / ".cache" / "0.png")
    (photos / "val" / "fig" / "album.jpg").mkdir()
    assert _run(photos, tmp_path / "out", *tiny_clip, "--method", "saft", "--shots", "0", "--epochs", "1") == 0
    train, sets = _counts(_task(photos, *tiny_clip, "--shots", "0"))
    assert train == dict.fromkeys(CLASSES, 4)
    assert sets == {"select": 12, "val": 12, "sketches": 8}


def test_a_hidden_folder_does_not_hide_what_is_above(tiny_clip, photos, tmp_path):
    """Only what is below a class counts."""
    photos = photos.rename(tmp_path / ".photos")
    assert {c: len(files) for c, files in finetune_clip.read_folders(photos).train.items()} == dict.fromkeys(CLASSES, 4)


def test_what_is_passed_over_is_said(tiny_clip, photos, tmp_path, capsys):
    """A phone's .heic files are not left out in silence."""
    for name in ("1.heic", "2.HEIC", "notes.txt"):
        (photos / "train" / "fig" / name).write_bytes(b"x")
    assert _run(photos, tmp_path / "out", *tiny_clip, "--method", "saft", "--epochs", "1") == 0
    assert "not read as images: 2 .heic, 1 .txt\n" in capsys.readouterr().out


def test_images_are_what_one_sees(tmp_path, recwarn):
    """Turned as the camera says, 16 bits not clipped to white, transparency without a warning."""
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(ramp.astype(np.uint16) * 256).save(tmp_path / "16.png")
    Image.fromarray(ramp).quantize(256).save(tmp_path / "palette.png", transparency=b"\0\x80")
    Image.fromarray(np.stack([255 - ramp] * 3 + [0 * ramp], -1), "CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    for name in ("turned.png", "16.png", "palette.png", "cmyk.jpg"):
        seen = finetune_clip.as_rgb(Image.open(tmp_path / name))
        assert seen.mode == "RGB"
        expected = ramp.T if name == "turned.png" else ramp
        assert np.abs(np.asarray(seen).astype(int) - expected[..., None]).max() <= (4 if name == "cmyk.jpg" else 0), (
            name
        )
    assert not recwarn.list


def test_more_shots_than_images_are_said(tiny_clip, photos, tmp_path, capsys):
    (photos / "train" / "fig" / "0.png").unlink()
    arguments = [*tiny_clip, "--method", "saft", "--epochs", "1"]
    assert _run(photos, tmp_path / "out", *arguments, "--shots", "4") == 0
    assert "--shots 4: fewer training images in 'fig' (3); all are used" in capsys.readouterr().out
    assert _counts(_task(photos, *tiny_clip, "--shots", "4"))[0] == {"apple": 4, "fig": 3, "ripe_plum": 4}
    capsys.readouterr()
    for shots in ("3", "0"):
        assert _run(photos, tmp_path / "out", *arguments, "--shots", shots) == 0
        assert "fewer training images" not in capsys.readouterr().out


def test_random_weights(tiny_clip, photos, tmp_path):
    """They are asked for by name, and are the same in a run that is resumed."""
    arguments = ["--model", "tiny-clip", "--pretrained", "none", "--method", "saft", "--epochs", "1"]
    assert _run(photos, tmp_path / "out", *arguments) == 0
    assert _rows(tmp_path / "out")[0].settings["pretrained"] == "none"
    torch.manual_seed(5)
    assert _run(photos, tmp_path / "out", *arguments, "--resume") == 0
    args = finetune_clip.build_parser().parse_args(arguments)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(finetune_clip.load_model(args)[0].state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    saved = torch.load(tiny_clip[3], weights_only=True)
    assert not torch.equal(models[0]["visual.conv1.weight"], saved["visual.conv1.weight"])


@pytest.fixture
def local_dir(tiny_clip, tmp_path):
    """--model of a folder with a CLIP and its weights."""
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": _tiny(49408, 16), "preprocess_cfg": {}}))
    (folder / "open_clip_pytorch_model.bin").write_bytes(Path(tiny_clip[3]).read_bytes())
    return f"local-dir:{folder}"


@pytest.mark.parametrize("pretrained", [None, "none"])
def test_results_say_which_weights_a_local_model_had(tiny_clip, local_dir, photos, tmp_path, pretrained):
    given = [] if pretrained is None else ["--pretrained", pretrained]
    args = finetune_clip.build_parser().parse_args(["--model", local_dir, *given])
    weight = finetune_clip.load_model(args)[0].visual.conv1.weight
    saved = torch.load(tiny_clip[3], weights_only=True)["visual.conv1.weight"]
    assert torch.equal(weight, saved) == (pretrained is None)
    arguments = ["--model", local_dir, *given, "--method", "saft", "--epochs", "1"]
    assert _run(photos, tmp_path / "out", *arguments) == 0
    assert _rows(tmp_path / "out")[0].settings["pretrained"] == pretrained


def test_a_local_model_without_weights_is_not_random_in_silence(local_dir, photos, tmp_path, capsys):
    Path(local_dir.partition(":")[2], "open_clip_pytorch_model.bin").unlink()
    assert _run(photos, tmp_path / "out", "--model", local_dir) == 2
    _one_line(capsys, "--model local-dir:", "could not load it")


@pytest.mark.parametrize("model", ["local-dir:.", "hf-hub:org/name"])
@pytest.mark.parametrize("pretrained", ["no-such-file.pt", "openai", __file__])
def test_weights_beside_a_model_with_its_own(model, pretrained, photos, tmp_path, capsys):
    assert _run(photos, tmp_path / "out", "--model", model, "--pretrained", pretrained) == 2
    _one_line(capsys, f"--pretrained {pretrained}", f"--model {model}", "leave it out")


def test_rows_are_written_one_by_one(tiny_clip, photos, tmp_path, monkeypatch, capsys):
    output, run_one = tmp_path / "out", finetuning.FineTuning.run

    def run(self, rows):
        assert _rows(output)[0].method == "zero-shot"
        if self.setting.method == "full":
            raise KeyboardInterrupt
        run_one(self, rows)

    monkeypatch.setattr(finetuning.FineTuning, "run", run)
    assert _run(photos, output, *tiny_clip) == 130
    assert list(_tuned(output)) == ["zero-shot", "saft"]
    monkeypatch.undo()
    before = (output / "results.jsonl").read_bytes()
    assert _run(photos, output, *tiny_clip, "--resume") == 0
    assert list(_tuned(output)) == ["zero-shot", "saft", "full"]
    assert (output / "results.jsonl").read_bytes().startswith(before)


# ---- what is said meanwhile ----


def test_a_log_file_gets_a_line_per_phase_and_epoch(tiny_clip, photos, tmp_path, capsys):
    assert _run(photos, tmp_path / "out", *tiny_clip, "--shots", "4", "--seed", "3", "--wise", "0.5") == 0
    captured = capsys.readouterr()
    assert [line.partition(" of ")[0] for line in captured.err.splitlines()] == [
        "select(): reads 3 batches",
        f"select(): selected {_tuned(tmp_path / 'out')['saft'].trained}",
    ]
    assert "\r" not in captured.out + captured.err
    lines = iter(captured.out.splitlines())
    for expected in (
        "checking images: 44 images",
        "testing zero-shot: 32 examples",
        "[1/2] saft 0.1 %, lr 0.0001, seed 3",
        "saft 0.1 %, lr 0.0001, seed 3: 6 steps",
        "saft 0.1 %, lr 0.0001, seed 3: epoch 1/2, loss ",
        "saft 0.1 %, lr 0.0001, seed 3: epoch 2/2, loss ",
        "testing saft 0.1 %, lr 0.0001, seed 3, alpha 1: 32 examples",
        "testing saft 0.1 %, lr 0.0001, seed 3, alpha 0.5: 32 examples",
        "[2/2] full, lr 1e-05, seed 3",
        "full, lr 1e-05, seed 3: epoch 2/2, loss ",
    ):
        assert any(line.startswith(expected) for line in lines), expected  # in this order


def test_pre_training_the_demo_is_said(tmp_path, capsys):
    digits_demo.prepare(tmp_path, dataclasses.replace(RECIPE, steps=200))
    captured = capsys.readouterr()
    assert captured.err == ""
    for expected in (
        "drawing the demo's images",
        "pre-training the demo's CLIP",
        "step 100/200, loss ",
        "step 200/200",
    ):
        assert expected in captured.out


def test_a_terminal_gets_bars_and_no_lines(tiny_clip, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert _run(photos, tmp_path / "out", *tiny_clip, "--method", "saft", "--epochs", "1") == 0
    captured = capsys.readouterr()
    assert "saft 0.1 %, lr 0.0001, seed 0" in captured.err
    assert "testing" in captured.err
    assert "epoch 1/1" not in captured.out
    assert "testing" not in captured.out


# ---- errors ----


def test_all_unreadable_images_are_listed_at_the_start(tiny_clip, photos, tmp_path, capsys, monkeypatch):
    """Cut off, empty, and no image at all; before the model is built."""
    monkeypatch.setattr(finetune_clip, "load_model", lambda *_: pytest.fail("built the model"))
    _break(photos / "train/fig/0.png")
    (photos / "val/apple/1.jpg").write_bytes(b"")
    file = photos / "sketches/fig/more/3.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    assert _run(photos, tmp_path / "out", *tiny_clip) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[0] == "error: 3 images:"
    assert len(error) == 4
    for line, where in zip(error[1:], ("sketches/fig/more/3.jpg", "train/fig/0.png", "val/apple/1.jpg"), strict=True):
        assert line.startswith(f"  {photos / where}: expected a readable image, got ")
    assert error[-1].endswith("replace or remove them")


def test_images_that_are_not_used_are_not_read(tiny_clip, photos, tmp_path):
    folders = finetune_clip.read_folders(photos)
    chosen = {file for file, _ in finetuning.few_shot(folders.by_label(), 1, 0)}
    for file in itertools.chain(*folders.train.values()):
        if file not in chosen:
            _break(file)
    assert _run(photos, tmp_path / "out", *tiny_clip, "--method", "saft", "--shots", "1", "--epochs", "1") == 0


def _file(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: _file(path), "expected a folder to write to"),
        (lambda path: _file(path) / "below" / "it", "expected a folder to write to"),
        (lambda path: path / ("x" * 300), "expected a folder to write to"),
        (lambda path: (path / "results.jsonl").mkdir(parents=True) or path, "expected to write a file"),
        (lambda path: (path / "seed0" / "full.safetensors").mkdir(parents=True) or path, "expected to write a file"),
    ],
)
def test_bad_output_fails_before_any_work(tiny_clip, photos, tmp_path, capsys, monkeypatch, make, said):
    monkeypatch.setattr(finetune_clip, "load_task", lambda *_: pytest.fail("worked"))
    output = make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    assert _run(photos, output, *tiny_clip) == 2
    _one_line(capsys, "--output", str(output), said)
    assert sorted(tmp_path.rglob("*")) == before


def _one_line(capsys, *expected: str) -> None:
    captured = capsys.readouterr()
    lines = [line for line in captured.err.strip().splitlines() if not line.startswith("select(): ")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for text in expected:
        assert text in lines[0]


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def _empty(folder: Path) -> None:
    _remove(folder)
    folder.mkdir()


def _break(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def _foreign(folder: Path) -> None:
    (folder / "figs").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "figs" / "0.png")


def _flatten(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")


@pytest.mark.parametrize(
    ("damage", "where", "said", "workers"),
    [
        (_remove, ".", "expected a folder with train/ and val/", 0),
        (_remove, "train", "expected a folder", 0),
        (_remove, "val", "expected a folder", 0),
        (_empty, "train", "expected one sub-folder per class, got none", 0),
        (_empty, "sketches", "expected one sub-folder per class, got none", 0),
        (_empty, "train/fig", "expected images", 0),
        (_foreign, "sketches", "rename it to 'fig'", 0),
        (_flatten, "sketches", "got none but 1 images: a class itself?", 0),
        (_break, "train/fig/0.png", "expected a readable image", 0),
        (_break, "train/fig/0.png", "expected a readable image", 1),
        (_break, "val/apple/1.jpg", "expected a readable image", 0),
        (_break, "val/apple/1.jpg", "expected a readable image", 1),
    ],
)
def test_bad_folder(tiny_clip, photos, tmp_path, capsys, damage, where, said, workers):
    damage(photos / where)
    arguments = ["--workers", str(workers), "--method", "full", "--shots", "0"]
    assert _run(photos, tmp_path / "out", *tiny_clip, *arguments) == 2
    _one_line(capsys, str(photos / where) if where != "." else str(photos), said)
    assert not list((tmp_path / "out").rglob("*"))


def test_models_that_are_folders(photos, tmp_path, capsys):
    """A mistaken one is found before any image is read."""
    (tmp_path / "clip").mkdir()
    photos.joinpath("train", "fig", "0.png").write_bytes(b"no image")
    assert finetune_clip.main(["--data", str(photos), "--model", str(tmp_path / "clip")]) == 2
    _one_line(capsys, f"--model local-dir:{tmp_path / 'clip'}")
    assert finetune_clip.main(["--data", str(photos), "--model", "local-dir:/nowhere"]) == 2
    _one_line(capsys, "expected a folder, found none at /nowhere")


def test_a_tokenizer_that_needs_a_package(tiny_clip, photos, tmp_path, capsys, monkeypatch):
    def lacking(name):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(finetune_clip.open_clip, "get_tokenizer", lacking)
    assert _run(photos, tmp_path / "out", *tiny_clip) == 2
    _one_line(capsys, "its tokenizer needs", "pip install transformers")


def test_one_class_alone(tiny_clip, photos, tmp_path, capsys):
    """There is nothing to tell it from; said before the model is built."""
    for name in CLASSES[1:]:
        for split in ("train", "select", "val", "sketches"):
            shutil.rmtree(photos / split / name, ignore_errors=True)
    assert _run(photos, tmp_path / "out", *tiny_clip) == 2
    _one_line(capsys, str(photos / "train"), "expected two classes or more, got 'apple' alone")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "ViT-B-61", "--pretrained", "openai"], ["--model ViT-B-61", "ViT-B-16"]),
        (["--model", "ViT-B-16", "--pretrained", "openia"], ["--pretrained openia", "laion2b_s34b_b88k"]),
        (["--model", "ViT-B-16"], ["--pretrained None", "openai"]),
        (["--pretrained", "openai"], ["--model", "got none"]),
        (["TINY", "--templates", "no-such-file"], ["--templates no-such-file"]),
        (["TINY", "--templates", "a photo", "of {}"], ["--templates", "'a photo'"]),
        (["TINY", "--templates", "a {color} photo of {}"], ["--templates", "'a {color} photo of {}'"]),
        (["TINY", "--templates", "a {0}"], ["--templates", "'a {0}'"]),
        (["TINY", "--templates", "a {}", "{} {!r}"], ["--templates", "'{} {!r}'"]),
        (["TINY", "--templates", "a {} {"], ["--templates", "'a {} {'"]),
        (["TINY", "--templates", "a {} and {}"], ["--templates", "'a {} and {}'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_model_or_templates(tiny_clip, photos, tmp_path, capsys, arguments, said):
    arguments = [a for argument in arguments for a in (tiny_clip if argument == "TINY" else [argument])]
    assert _run(photos, tmp_path / "out", *arguments) == 2
    _one_line(capsys, *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"), [(b"\n \n", "empty"), (b"\xff\xfe a {}", "UTF-8"), (b"a {}\na {b} {}", "'a {b} {}'")]
)
def test_bad_templates_file(photos, tmp_path, capsys, content, said, monkeypatch):
    """Before anything of the model is looked at."""
    monkeypatch.setattr(finetune_clip, "check_model", lambda *_: pytest.fail("went on"))
    (tmp_path / "templates.txt").write_bytes(content)
    assert _run(photos, tmp_path / "out", "--model", "ViT-B-16", "--templates", str(tmp_path / "templates.txt")) == 2
    _one_line(capsys, "--templates", said)


def test_bad_templates_before_the_demo_pre_trains(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits_demo, "prepare", lambda *_: pytest.fail("prepared the demo"))
    assert demo(tmp_path / "out", "--templates", "the digit {digit}") == 2
    _one_line(capsys, "--templates", "'the digit {digit}'")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_meanwhile(tiny_clip, photos, tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr(finetune_clip, "check_images", lambda _: _break(photos / "val/fig/0.png"))
    assert _run(photos, tmp_path / "out", *tiny_clip, "--workers", str(workers)) == 2
    _one_line(capsys, f"{photos / 'val/fig/0.png'}: expected a readable image")


def test_checkpoint_of_another_model(tiny_clip, photos, tmp_path, capsys):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert _run(photos, tmp_path / "out", "--model", "tiny-clip", "--pretrained", str(tmp_path / "other.pt")) == 2
    _one_line(capsys, "--pretrained", "other.pt", "could not load it")


def test_model_without_data(capsys):
    assert finetune_clip.main(["--model", "ViT-B-16"]) == 2
    _one_line(capsys, "--model ViT-B-16", "--data")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--density", "0"], ["--density", "(0, 1]", "'0'"]),
        (["--density", "1.5"], ["--density", "(0, 1]", "'1.5'"]),
        (["--density", "much"], ["--density", "'much'"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--lr", "lota=1"], ["--lr", "'lota=1'", "lora"]),
        (["--lr", "-1"], ["--lr"]),
        (["--lr", "full=1e-3,x"], ["--lr", "'x'"]),
        (["--wise", "1"], ["--wise", "between 0"]),
        (["--device", "abacus"], ["--device", "'abacus'"]),
        (["--method", "half"], ["--method", "half"]),
        (["--nonsense"], ["--nonsense"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_argument(capsys, arguments, said):
    with pytest.raises(SystemExit) as exit_:
        finetune_clip.main(arguments)
    assert exit_.value.code == 2
    _one_line(capsys, *said)


def test_gradient_that_is_not_finite(demo, tmp_path, monkeypatch, capsys):
    loss = finetuning.Task.loss
    monkeypatch.setattr(finetuning.Task, "loss", lambda *batch: loss(*batch) * torch.nan)
    assert demo(tmp_path / "out", "--method", "saft") == 2
    _one_line(capsys, "finite")
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["results.jsonl"]  # of zero-shot


# ---- pieces ----


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_:
        finetune_clip.main(["--help"])
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in ("examples:", "--resume", "train/<class>", "(default: [0.001])", "written to --output"):
        assert expected in printed
    assert "(default: None)" not in printed


def test_demo_folder_is_made_once(demo, finished, cache, monkeypatch):
    monkeypatch.setattr(digits_demo, "pretrain", lambda *_: pytest.fail("pre-trained again"))
    assert digits_demo.prepare(cache, RECIPE) == cache / f"digits-{RECIPE.key()}"
    assert digits_demo.Recipe(seed=1).key() != digits_demo.Recipe().key()


def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_demo, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits_demo.prepare(tmp_path, RECIPE)
    assert not list(tmp_path.iterdir())


def test_digit_splits_are_disjoint_and_whole():
    splits = digits_demo.load_splits()
    assert [len(split.labels) for split in splits] == [900, 200, 100, 597]
    rows = torch.cat([split.images.flatten(1) for split in splits])
    assert len(rows.unique(dim=0)) == len(rows) == 1797


@pytest.mark.parametrize("name", digits_demo.RENDERINGS)
def test_renderings(name):
    digits = digits_demo.load_splits()[0].images[:6]
    first, again = (
        digits_demo.render(digits, digits_demo.RENDERINGS[name], torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first.shape == (6, 3, 32, 32)
    assert torch.equal(first, again)
    assert 0 <= float(first.min()) < float(first.max()) <= 1


def test_tokenizer():
    tokenize = digits_demo.DigitsTokenizer()
    tokens = tokenize(["a photo of the digit seven.", "A photo of the digit SEVEN.", "unheard words", "7 " * 30])
    assert tokens.shape == (4, digits_demo.CONTEXT_LENGTH)
    assert torch.equal(tokens[0], tokens[1])
    assert set(tokens.max(dim=1).values.tolist()) == {tokenize.vocab_size - 1}
    assert tokens[2, 1] == tokens[2, 2] == 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("visual.conv1.weight", "image embedding"),
        ("visual.positional_embedding", "image embedding"),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "image block 12"),
        ("visual.layer3.0.conv1.weight", "image block 3"),
        ("visual.trunk.blocks.0.mlp.fc1.weight", "image block 1"),
        ("visual.trunk.patch_embed.proj.weight", "image embedding"),
        ("visual.proj", "image head"),
        ("token_embedding.weight", "text embedding"),
        ("transformer.resblocks.0.ln_1.bias", "text block 1"),
        ("text.transformer.resblocks.2.ln_1.bias", "text block 3"),
        ("text_projection", "text head"),
        ("logit_scale", "logit scale"),
    ],
)
def test_part_of(name, part):
    assert finetune_clip.part_of(name) == part
