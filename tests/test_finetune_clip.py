"""examples/finetune_clip.py: the demo in small, folders of images, resuming, and every error's one line."""

from __future__ import annotations

import dataclasses
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
import finetune_report
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


def test_results_json(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [run["method"] for run in results["runs"]] == ["zero-shot", "saft", "full"]
    tests = {"val", *digits_demo.RENDERINGS} - {"upright"}
    assert set(results["test_images"]) == tests
    assert results["classes"] == sorted(digits_demo.WORDS)
    assert set(results["versions"]) == {"saft_kernels", "open_clip", "torch", "python"}
    assert results["arguments"]["epochs"] == 3
    for run in results["runs"]:
        assert set(run["accuracy"]) == tests
        assert all(0 <= value <= 100 for value in run["accuracy"].values())
        shifted = [value for name, value in run["accuracy"].items() if name != "val"]
        assert run["mean_shifted"] == pytest.approx(sum(shifted) / len(shifted))
        assert run["in_distribution"] == run["accuracy"]["val"]
    zero_shot, saft, full = results["runs"]
    assert zero_shot["trained_parameters"] == 0
    assert saft["trained_parameters"] == round(DENSITY * results["parameters"]) == sum(saft["selected"].values())
    assert full["trained_parameters"] == results["parameters"] == sum(results["parameters_by_part"].values())
    assert full["optimizer_state_bytes"] > 50 * saft["optimizer_state_bytes"] > 0
    assert 0 < saft["ms_per_optimizer_step"] < saft["ms_per_step"]
    assert [row["method"] for row in results["summary"]] == ["zero-shot", "saft", "full"]


def test_values_file_is_a_delta_of_the_selected_elements(finished, base):
    mask = SparseMask.load(finished / "mask.safetensors")
    delta = SparseDelta.load(finished / "saft.safetensors")
    tuned = {name: value.clone() for name, value in base.items()}
    delta.apply_(tuned)
    changed = 0
    for name, index in mask.items():
        different = (tuned[name] != base[name]).flatten()
        changed += int(different.sum())
        assert not different.index_fill(0, index.long(), False).any()
    assert changed > 0.9 * mask.k  # a token that no prompt has gets no gradient and no decay to speak of
    header = 2_000 + 250 * sum(index.numel() > 0 for index in mask.values())
    assert (finished / "saft.safetensors").stat().st_size <= 8 * mask.k + header


def test_full_values_file_holds_every_parameter(finished, base):
    values = load_file(finished / "full.safetensors")
    assert values.keys() == base.keys()
    assert {name: tuple(v.shape) for name, v in values.items()} == {name: tuple(v.shape) for name, v in base.items()}


def test_figure_and_no_leftovers(finished):
    with Image.open(finished / "results.png") as figure:
        assert figure.width > 1000
    names = {path.name for path in finished.iterdir()}
    checkpoints = {"saft.checkpoint.pt", "full.checkpoint.pt"}
    assert (
        names
        == {"results.json", "results.png", "mask.safetensors", "saft.safetensors", "full.safetensors"} | checkpoints
    )


def test_table(demo, tmp_path, capsys):
    assert demo(tmp_path, "--seed", "0", "1", "--epochs", "1", "--method", "saft") == 0
    printed = capsys.readouterr().out
    for expected in ("zero-shot", "saft", "±", "mean", "optimizer", "ms per", "low_contrast"):
        assert expected in printed
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert [row["seeds"] for row in summary] == [1, 2]
    assert not (tmp_path / "mask.safetensors").exists()
    masks = [SparseMask.load(tmp_path / f"seed{seed}" / "mask.safetensors") for seed in (0, 1)]
    assert 0 < masks[0].iou(masks[1]) < 1


# ---- resuming ----


@pytest.mark.parametrize("method", finetune_clip.METHODS)
def test_resumed_run_is_bit_equal(demo, finished, tmp_path, monkeypatch, capsys, method):
    save = finetune_clip.FineTuning._save_checkpoint

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune_clip.FineTuning, "_save_checkpoint", interrupted)
        assert demo(tmp_path, "--method", method) == 130
        assert "--resume" in capsys.readouterr().err
        assert not (tmp_path / f"{method}.safetensors").exists()
        assert demo(tmp_path, "--method", method, "--resume") == 130  # a second epoch
    assert demo(tmp_path, "--method", method, "--resume") == 0
    resumed, straight = (load_file(folder / f"{method}.safetensors") for folder in (tmp_path, finished))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    accuracy = [
        {run["method"]: run["accuracy"] for run in json.loads((folder / "results.json").read_text())["runs"]}
        for folder in (tmp_path, finished)
    ]
    assert accuracy[0][method] == accuracy[1][method]


def test_resuming_a_finished_run_reports_it_again(demo, tmp_path):
    assert demo(tmp_path, "--method", "saft", "--epochs", "1") == 0
    first = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert demo(tmp_path, "--method", "saft", "--epochs", "1", "--resume") == 0
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == first


def test_nothing_to_resume(demo, tmp_path, capsys):
    assert demo(tmp_path / "new", "--resume") == 2
    _one_line(capsys, "--resume", "nothing to resume", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--epochs", "4"], ["--epochs 3", "--epochs 4"]), (["--lr", "saft=0.5"], ["--lr 0.001", "--lr 0.5"])],
)
def test_resuming_with_other_arguments(demo, finished, capsys, arguments, said):
    before = (finished / "saft.checkpoint.pt").read_bytes()
    assert demo(finished, "--resume", *arguments) == 2
    _one_line(capsys, "--resume", *said)
    assert (finished / "saft.checkpoint.pt").read_bytes() == before


def test_damaged_checkpoint(demo, tmp_path, capsys):
    (tmp_path / "saft.checkpoint.pt").write_bytes(b"not a checkpoint")
    assert demo(tmp_path, "--resume") == 2
    _one_line(capsys, str(tmp_path / "saft.checkpoint.pt"))


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
    for split, classes in {"train": CLASSES, "val": CLASSES, "sketches": CLASSES[:2]}.items():
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
    small = ["--epochs", "2", "--batch-size", "5", "--workers", "0"]
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
    results = json.loads((output / "results.json").read_text())
    assert results["classes"] == list(CLASSES)
    assert results["test_images"] == {"val": 12, "sketches": 8}
    methods = arguments[arguments.index("--method") + 1 :][:1] if "--method" in arguments else ["saft", "full"]
    assert [run["method"] for run in results["runs"]] == ["zero-shot", *methods]
    assert all(0 < run["train_loss"] < 10 for run in results["runs"][1:])
    assert (output / "mask.safetensors").exists() == ("saft" in methods)


def test_folders_learn(tiny_clip, photos, tmp_path):
    assert _run(photos, tmp_path / "out", *tiny_clip, "--epochs", "12", "--lr", "saft=1e-2", "full=1e-3") == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["in_distribution"] > 90 for run in runs] == [False, True, True]


def test_templates_file(tiny_clip, photos, tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\na drawing of a {}.\n")
    arguments = ["--templates", str(tmp_path / "templates.txt"), "--epochs", "1", "--method", "saft"]
    assert _run(photos, tmp_path / "out", *tiny_clip, *arguments) == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text())["arguments"]["templates"]
    assert written == ["a photo of a {}.", "a drawing of a {}."]


def _results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


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
    results = _results(tmp_path / "out")
    assert results["training_images"] == dict.fromkeys(CLASSES, 4)
    assert results["test_images"] == {"val": 12, "sketches": 8}


def test_a_hidden_folder_does_not_hide_what_is_above(tiny_clip, photos, tmp_path):
    """Only what is below a class counts."""
    photos = photos.rename(tmp_path / ".photos")
    assert finetune_clip.read_folders(photos).training_images() == dict.fromkeys(CLASSES, 4)


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
    assert _results(tmp_path / "out")["training_images"] == {"apple": 4, "fig": 3, "ripe_plum": 4}
    for shots in ("3", "0"):
        assert _run(photos, tmp_path / "out", *arguments, "--shots", shots) == 0
        assert "fewer training images" not in capsys.readouterr().out


def test_random_weights(tiny_clip, photos, tmp_path):
    """They are asked for by name, and are the same in a run that is resumed."""
    arguments = ["--model", "tiny-clip", "--pretrained", "none", "--method", "saft", "--epochs", "1"]
    assert _run(photos, tmp_path / "out", *arguments) == 0
    assert _results(tmp_path / "out")["arguments"]["pretrained"] == "none"
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
    assert _results(tmp_path / "out")["arguments"]["pretrained"] == pretrained


def test_a_local_model_without_weights_is_not_random_in_silence(local_dir, photos, tmp_path, capsys):
    Path(local_dir.partition(":")[2], "open_clip_pytorch_model.bin").unlink()
    assert _run(photos, tmp_path / "out", "--model", local_dir) == 2
    _one_line(capsys, "--model local-dir:", "could not load it")


@pytest.mark.parametrize("model", ["local-dir:.", "hf-hub:org/name"])
@pytest.mark.parametrize("pretrained", ["no-such-file.pt", "openai", __file__])
def test_weights_beside_a_model_with_its_own(model, pretrained, photos, tmp_path, capsys):
    assert _run(photos, tmp_path / "out", "--model", model, "--pretrained", pretrained) == 2
    _one_line(capsys, f"--pretrained {pretrained}", f"--model {model}", "leave it out")


def test_results_are_written_run_by_run(tiny_clip, photos, tmp_path, monkeypatch, capsys):
    output, run_one = tmp_path / "out", finetune_clip.FineTuning.run

    def run(self):
        assert _results(output)["runs"][0]["method"] == "zero-shot"
        if self.method == "full":
            raise KeyboardInterrupt
        return run_one(self)

    monkeypatch.setattr(finetune_clip.FineTuning, "run", run)
    assert _run(photos, output, *tiny_clip) == 130
    results = _results(output)
    assert [run["method"] for run in results["runs"]] == ["zero-shot", "saft"]
    assert [row["method"] for row in results["summary"]] == ["zero-shot", "saft"]
    assert results["complete"] is False
    monkeypatch.undo()
    assert _run(photos, output, *tiny_clip, "--resume") == 0
    assert [run["method"] for run in _results(output)["runs"]] == ["zero-shot", "saft", "full"]
    assert _results(output)["complete"] is True


# ---- what is said meanwhile ----


def test_a_log_file_gets_a_line_per_phase_and_epoch(tiny_clip, photos, tmp_path, capsys):
    assert _run(photos, tmp_path / "out", *tiny_clip, "--shots", "4", "--seed", "3") == 0
    captured = capsys.readouterr()
    assert [line.partition(" of ")[0] for line in captured.err.splitlines()] == [
        "select(): reads 3 batches",
        f"select(): selected {_results(tmp_path / 'out')['runs'][1]['trained_parameters']}",
    ]
    assert "\r" not in captured.out + captured.err
    lines = iter(captured.out.splitlines())
    for expected in (
        "checking images: 32 images",
        "evaluating: 20 images",
        "saft, seed 3: 6 steps",
        "saft, seed 3: epoch 1/2, loss ",
        "saft, seed 3: epoch 2/2, loss ",
        "evaluating: 20 images",
        "full, seed 3: 6 steps",
        "full, seed 3: epoch 1/2, loss ",
        "full, seed 3: epoch 2/2, loss ",
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
    assert "saft, seed 0" in captured.err
    assert "evaluating" in captured.err
    assert "epoch 1/1" not in captured.out
    assert "evaluating" not in captured.out


def test_the_figure_does_not_blow_up_tenths_of_a_point():
    from matplotlib import pyplot as plt

    rows = [{"method": m} | {"val": {"mean": a, "std": 0.0}} for m, a in (("saft", 50), ("full", 50.1))]
    figure, axis = plt.subplots()
    finetune_report._plot_accuracy(axis, rows, ["val"])
    left, right = axis.get_xlim()
    assert 9.9 < right - left < 11
    plt.close(figure)


@pytest.mark.parametrize("spread", [0.0, 8.0])
def test_the_figure_ends_at_100_percent(spread):
    from matplotlib import pyplot as plt

    means = {"val": 100.0, "mean shifted": 97.0, "sketches": 97.0}
    rows = [{"method": "saft"} | {name: {"mean": mean, "std": spread} for name, mean in means.items()}]
    figure, axis = plt.subplots()
    finetune_report._plot_accuracy(axis, rows, ["val", "sketches"])
    assert axis.get_xlim()[1] == 100
    drawn = [point for bars in axis.collections for path in bars.get_segments() for point in path[:, 0]]
    assert len(drawn) == 6
    assert max(drawn) <= 100
    plt.close(figure)


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
    chosen = {file for file, _ in folders.few_shot(1, 0)}
    for file, _ in folders.train:
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
        (lambda path: (path / "results.json").mkdir(parents=True) or path, "expected to write a file"),
        (lambda path: (path / "saft.safetensors").mkdir(parents=True) or path, "expected to write a file"),
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


def test_one_class_alone(tiny_clip, photos, tmp_path, capsys):
    """There is nothing to tell it from; said before the model is built."""
    for name in CLASSES[1:]:
        for split in ("train", "val", "sketches"):
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
        (["--lr", "lora=1"], ["--lr", "'lora=1'"]),
        (["--lr", "-1"], ["--lr"]),
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
    loss = finetune_clip.Task.loss
    monkeypatch.setattr(finetune_clip.Task, "loss", lambda *batch: loss(*batch) * torch.nan)
    assert demo(tmp_path / "out", "--method", "saft") == 2
    _one_line(capsys, "finite")
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["results.json"]  # of zero-shot


# ---- pieces ----


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_:
        finetune_clip.main(["--help"])
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in ("examples:", "--resume", "train/<class>", "(default: 0.001)", "written to --output"):
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
    assert [len(split.labels) for split in splits] == [900, 300, 597]
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
    assert finetune_report.part_of(name) == part


def test_replacing_leaves_the_old_file_on_error(tmp_path):
    file = tmp_path / "results.json"
    file.write_text("old")

    def write_half() -> None:
        with finetune_report.replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text() == "old"
