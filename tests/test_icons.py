"""examples/icons_data.py and examples/pretrain_icons.py, on made-up packages of the shape of npm's."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip", reason="the examples need open_clip: pip install saft_kernels[icons]")
pytest.importorskip("resvg_py", reason="the examples need resvg_py: pip install saft_kernels[icons]")
pytest.importorskip("transformers", reason="open_clip needs transformers: pip install saft_kernels[icons]")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import icons_data
import open_clip
import pretrain_icons
from icons_data import Package
from PIL import Image

PRETRAINING = {
    "mdi": Package("1.0.0", "Apache-2.0", {"icon": ""}),
    "noto": Package("1.0.0", "Apache-2.0", {"emoji": ""}),
    "game-icons": Package("1.0.0", "CC-BY-3.0", {"game icon": ""}),
}
TASK_PACKAGES = {
    "twemoji": Package("1.0.0", "CC-BY-4.0", {"emoji": ""}),
    "emojione": Package("1.0.0", "CC-BY-4.0", {"emoji": ""}, "emojione"),
    "emojione-monotone": Package("1.0.0", "CC-BY-4.0", {"mono_emoji": ""}, "emojione"),
    "ph": Package("1.0.0", "MIT", {"glyph": "-fill$", "line": "(?<!-bold)$"}),
    "game-icons": Package("1.0.0", "CC-BY-3.0", {"engraving": ""}),
}
SHAPES = {
    "cat": '<path d="M2 14L4 3l4 4 4-4 2 11z"/>',
    "star": '<path d="M8 1l2 5h5l-4 3 2 6-5-4-5 4 2-6-4-3h5z"/>',
    "ice-cream": '<circle cx="8" cy="5" r="4"/><path d="M4 8h8l-4 8z"/>',
}
KINDS = ("", "black", "big", "red", "old", "new", "wild", "round")
COLOURS = {"twemoji": "#e33", "emojione": "#3b3", "noto": "#36e"}


def _drawing(package: str, shape: str, turn: int) -> str:
    colour = COLOURS.get(package, "currentColor")
    angle = 8 * turn + [*PRETRAINING, *TASK_PACKAGES].index(package)  # no two are alike
    return f'<g fill="{colour}" transform="rotate({angle} 8 8)">{SHAPES[shape]}</g>'


def write_package(folder: Path, package: str, expected: Package) -> None:
    """icons.json, info.json and package.json, as npm installs them."""
    icons = {}
    for shape in SHAPES:
        for turn, kind in enumerate(KINDS):
            name = f"{kind}-{shape}".lstrip("-")
            for ending in ("", "-fill", "-bold") if package == "ph" else ("",):
                icons[name + ending] = {"body": _drawing(package, shape, turn)}
    icons["star-off"] = icons["12"] = icons["cat-logo"] = {"body": SHAPES["star"]}
    icons["star-blank"] = {"body": ""}
    icons["old-star-hidden"] = {"body": SHAPES["star"], "hidden": True}
    if package in ("twemoji", "noto"):
        icons["cat-dark-skin-tone"] = {"body": SHAPES["cat"]}
    modules = folder / icons_data.MODULES / package
    modules.mkdir(parents=True)
    content = {"icons": icons, "aliases": {"kitten": {"parent": "cat"}}, "width": 16, "height": 16}
    info = {"license": {"spdx": expected.licence}, "author": {"name": f"Author of {package}", "url": "their page"}}
    for name, value in {"icons": content, "info": info, "package": {"version": expected.version}}.items():
        (modules / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture(autouse=True)
def _few_packages(monkeypatch):
    monkeypatch.setattr(icons_data, "PRETRAINING", PRETRAINING)
    monkeypatch.setattr(icons_data, "TASK_PACKAGES", TASK_PACKAGES)


@pytest.fixture(scope="module")
def npm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npm")
    for package, expected in (PRETRAINING | TASK_PACKAGES).items():
        write_package(folder, package, expected)
    return folder


@pytest.fixture(scope="module")
def data(npm, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons_data, "PRETRAINING", PRETRAINING)
        patch.setattr(icons_data, "TASK_PACKAGES", TASK_PACKAGES)
        out = tmp_path_factory.mktemp("data") / "icons"
        assert icons_data.main(["--out", str(out), "--npm", str(npm), "--shots", "2"]) == 0
    return out


def _files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _rows(task: Path) -> list[dict[str, str]]:
    with open(task / "images.csv", newline="") as file:
        return list(csv.DictReader(file))


def _one_line(capsys, *expected: str) -> None:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for text in expected:
        assert text in lines[0]


# ---- names ----


@pytest.mark.parametrize(
    ("name", "caption", "label"),
    [
        ("cat", "cat", "cat"),
        ("black-cat-bold-duotone", "black cat", "cat"),
        ("cat-face", "cat face", "cat"),
        ("book-open-24-regular", "book open", "book"),
        ("soft-ice-cream", "soft ice cream", "ice cream"),
        ("tshirt", "tshirt", "shirt"),
        ("home-2-line", "home", "house"),
        ("bell-off", "bell off", None),
        ("cat-tree-house-edit", "cat tree house edit", None),
        ("hot-dog", "hot dog", None),
        ("catalogue", "catalogue", None),
        ("line", "line", None),
    ],
)
def test_names(name, caption, label):
    assert icons_data.caption(name) == caption
    assert icons_data.class_of(name) == label


def test_licences_allow_redistribution():
    """Neither NonCommercial nor NoDerivatives."""
    allowed = {"Apache-2.0", "MIT", "ISC", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        packages = [p for table in (PRETRAINING, TASK_PACKAGES) for p in table.values()]
    assert {p.licence for p in packages} <= allowed


# ---- data ----


def test_folders_are_what_the_csv_says(data):
    for task in ("emoji", "line"):
        rows = _rows(data / task)
        named = {f"{r['set']}/{r['class'].replace(' ', '_')}/{r['package']}__{r['icon']}.png" for r in rows}
        assert len(named) == len(rows)
        assert named | {"images.csv"} == _files(data / task).keys()
        assert {r["class"] for r in rows if r["set"] == "train"} == {"cat", "star", "ice cream"}
        assert all(r["licence"] == TASK_PACKAGES[r["package"]].licence for r in rows)
        others = {"emoji", "line", "glyph", "engraving", "mono_emoji"} - {task}
        assert {r["set"] for r in rows} == {"train", "select", "val"} | others
        for name in ("cat", "star", "ice cream"):
            numbers = [sum(r["set"] == s and r["class"] == name for r in rows) for s in ("train", "select", "val")]
            assert numbers[0] == 2
            assert min(numbers) >= 1
    with Image.open(next((data / "emoji").rglob("*.png"))) as image:
        assert (image.size, image.mode) == ((icons_data.SIZE, icons_data.SIZE), "RGB")


def test_a_drawing_is_in_one_split(data):
    """Neither emojione's cat in train and its monotone one in a shifted set, nor ph's line and glyph of one name."""
    for task in ("emoji", "line"):
        where = defaultdict(set)
        for row in _rows(data / task):
            family = TASK_PACKAGES[row["package"]].family or row["package"]
            where[family, icons_data.caption(row["icon"])].add(row["set"])
        shared = [sets for sets in where.values() if len(sets) > 1]
        assert all(not sets & {"train", "select"} for sets in shared)
        assert any(sets & {"train", "select"} for sets in where.values())


def test_pairs_and_tasks_share_nothing(data):
    pairs = [json.loads(line) for line in (data / "pretrain" / "captions.jsonl").read_text().splitlines()]
    tested = {(r["package"], r["icon"]) for task in ("emoji", "line") for r in _rows(data / task)}
    assert {pair["package"] for pair in pairs} == set(PRETRAINING)
    assert not tested & {(pair["package"], pair["icon"]) for pair in pairs}
    names = {pair["icon"] for pair in pairs if pair["package"] == "mdi"}
    assert {"cat", "old-star", "star-off"} <= names
    assert not names & {"12", "cat-logo", "star-blank", "old-star-hidden"}
    kitten = next(p for p in pairs if (p["package"], p["icon"]) == ("mdi", "cat"))
    assert kitten == {"package": "mdi", "icon": "cat", "kind": "icon", "captions": ["cat", "kitten"]}


def test_a_pair_with_the_pixels_of_a_test_image_is_left_out(npm, tmp_path, data):
    shutil.copytree(npm, tmp_path / "npm")
    file = tmp_path / "npm" / icons_data.MODULES / "mdi" / "icons.json"
    content = json.loads(file.read_text())
    content["icons"]["copied-cat"] = {"body": _drawing("ph", "cat", 0)}
    file.write_text(json.dumps(content))
    assert icons_data.main(["--out", str(tmp_path / "out"), "--npm", str(tmp_path / "npm"), "--shots", "2"]) == 0
    captions = [(folder / "pretrain" / "captions.jsonl").read_text() for folder in (tmp_path / "out", data)]
    assert captions[0] == captions[1]


def test_same_arguments_same_files_and_another_seed_other_splits(npm, data, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--npm", str(npm), "--shots", "2"]
    assert icons_data.main(arguments) == 0
    assert _files(tmp_path) == _files(data)
    assert icons_data.main([*arguments, "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "kept as it is" in printed
    assert "CC-BY-4.0" in printed
    assert _rows(tmp_path / "emoji") != _rows(data / "emoji")
    assert _files(tmp_path / "pretrain") == _files(data / "pretrain")
    assert not list(tmp_path.glob(".*"))
    licences = (tmp_path / "LICENSES.txt").read_text()
    assert all(f"{p} 1.0.0: {of.licence}, Author of {p} their page" in licences for p, of in TASK_PACKAGES.items())


def test_shots(npm, tmp_path):
    """As many as there are, but half of them at most."""
    for shots, expected in ((1, 1), (4, 4), (16, 8)):
        assert icons_data.main(["--out", str(tmp_path), "--npm", str(npm), "--shots", str(shots)]) == 0
        train = [r["class"] for r in _rows(tmp_path / "emoji") if r["set"] == "train"]
        assert train == [name for name in ("cat", "ice cream", "star") for _ in range(expected)]


def _remove_package(npm: Path) -> None:
    shutil.rmtree(npm / icons_data.MODULES / "ph")


def _edit(name: str, **values: object):
    def edit(npm: Path) -> None:
        (npm / icons_data.MODULES / "ph" / name).write_text(json.dumps(values) if values else "{")

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove_package, ["expected @iconify-json/ph@1.0.0", "install npm", "--npm"]),
        (_edit("package.json", version="9.0.0"), ["expected version 1.0.0, got 9.0.0", "remove the folder"]),
        (_edit("info.json", license={"spdx": "CC-BY-NC-4.0"}), ["expected licence MIT, got CC-BY-NC-4.0"]),
        (_edit("icons.json"), ["icons.json", "expected JSON"]),
    ],
)
def test_bad_packages(npm, tmp_path, capsys, monkeypatch, damage, said):
    shutil.copytree(npm, tmp_path / "npm")
    damage(tmp_path / "npm")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert icons_data.main(["--out", str(tmp_path / "out"), "--npm", str(tmp_path / "npm")]) == 2
    _one_line(capsys, str(tmp_path / "npm"), *said)
    assert not (tmp_path / "out").exists()


def test_npm_installs_what_is_missing(npm, tmp_path, capsys, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "npm error network\n")

    monkeypatch.setattr(shutil, "which", lambda _: "npm")
    monkeypatch.setattr(subprocess, "run", run)
    assert icons_data.main(["--out", str(tmp_path)]) == 2
    _one_line(capsys, "npm could not install", "npm error network")
    assert calls[0][:3] == ["npm", "install", "--ignore-scripts"]
    assert calls[0][5:7] == ["--prefix", str(tmp_path / "npm")]
    assert "@iconify-json/twemoji@1.0.0" in calls[0]


def test_shots_below_one(capsys, tmp_path):
    assert icons_data.main(["--out", str(tmp_path / "out"), "--shots", "0"]) == 2
    _one_line(capsys, "--shots", "at least 1, got 0")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_folder_leaves_the_old_one(tmp_path):
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "old").touch()

    def write_half() -> None:
        with icons_data.replacing_folder(tmp_path / "emoji") as temporary:
            (temporary / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [f.name for f in tmp_path.rglob("*")] == ["emoji", "old"]


# ---- pre-training ----


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The model is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pretrain(data, tmp_path):
    """Pre-trains on the made-up pairs; arguments given override. Returns the folder of the model."""
    shutil.copytree(data, tmp_path / "icons")

    def run(*arguments: str) -> int:
        small = ["--steps", "5", "--save-every", "2", "--threads", "1"]
        return pretrain_icons.main(["--data", str(tmp_path / "icons"), *small, *arguments])

    run.data = tmp_path / "icons"
    return run


def test_resumed_pretraining_is_bit_equal(pretrain, monkeypatch, capsys):
    assert pretrain() == 0
    straight = _files(pretrain.data / "model")
    save = pretrain_icons.Pretraining.save

    def interrupted(self, file):
        save(self, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_icons.Pretraining, "save", interrupted)
        assert pretrain() == 130
        assert "repeat the command" in capsys.readouterr().err
        assert pretrain() == 130  # steps 3 and 4
    assert pretrain() == 0
    assert _files(pretrain.data / "model") == straight
    assert not list(pretrain.data.glob("*checkpoint*"))


@pytest.mark.parametrize("tower", pretrain_icons.TOWERS)
def test_open_clip_loads_the_folder(pretrain, capsys, tower):
    """Weights, tokenizer and preprocessing are those that were trained with."""
    assert pretrain("--tower", tower) == 0
    folder = pretrain.data / ("model-vit" if tower == "vit" else "model")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = ["an icon of a cat.", "An icon of a   CAT.", "unheardof strange words", "star " * 30, "ice cream"]
    own = pretrain_icons.build_tokenizer([])
    ids = tokenizer(texts)
    assert torch.equal(ids[0], ids[1])
    assert ids.shape == (5, pretrain_icons.CONTEXT_LENGTH)
    assert ids.max(dim=1).values.unique().tolist() == [model.vocab_size - 1]
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert own.get_vocab().keys() <= vocabulary.keys()
    unknown, full_stop = vocabulary["<unknown>"], vocabulary["."]
    assert ids[2, :4].tolist() == [vocabulary["<start>"], unknown, unknown, unknown]
    assert ids[0, 6:].tolist() == [full_stop, vocabulary["<end>"], *[vocabulary["<pad>"]] * 2]
    classes, sets = pretrain_icons.read_sets(pretrain.data / "emoji")
    assert classes == ["cat", "ice_cream", "star"]
    images, labels = sets["val"]
    files = sorted((pretrain.data / "emoji" / "val").glob("*/*.png"))
    assert len(files) == len(images) == len(labels)
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as opened:
            assert torch.allclose(preprocess(opened), pretrain_icons.normalise(image), atol=1e-5)
    model.eval()
    with torch.no_grad():
        prompts = tokenizer([pretrain_icons.TEST_TEMPLATE.format(c.replace("_", " ")) for c in classes])
        text = model.encode_text(prompts, normalize=True)
        predicted = (model.encode_image(pretrain_icons.normalise(images), normalize=True) @ text.T).argmax(1)
    assert f"val {100 * (predicted == labels).float().mean().item():.1f}" in capsys.readouterr().out


def test_pretraining_learns(data, capsys):
    """To tell what it has seen: shapes by their names."""
    pairs = pretrain_icons.Pairs(data / "pretrain", object_share=1.0)
    recipe = pretrain_icons.Recipe(steps=20, decay_steps=10, warmup_steps=3, batch_size=32, short_share=1.0)
    training = pretrain_icons.Pretraining(recipe, pairs)
    losses = [training.train_step() for _ in range(recipe.steps)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(
    ("damage", "arguments", "said"),
    [
        (lambda data: (data / "model.checkpoint.pt").write_bytes(b"?"), [], ["expected a checkpoint"]),
        (lambda data: (data / "pretrain" / "images.npy").unlink(), [], ["expected the pairs of icons_data.py"]),
        (lambda data: (data / "pretrain" / "captions.jsonl").write_text("{}\n"), [], ["got 1", "remove the folder"]),
        (lambda data: None, ["--steps", "0"], ["--steps", "at least 1"]),
    ],
)
def test_bad_pretraining_input(pretrain, capsys, damage, arguments, said):
    damage(pretrain.data)
    assert pretrain(*arguments) == 2
    _one_line(capsys, *said)
    assert not (pretrain.data / "model").exists()


def test_checkpoint_of_another_recipe(pretrain, capsys, monkeypatch):
    monkeypatch.setattr(pretrain_icons.Pretraining, "export", lambda *_: pytest.fail("trained"))
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_icons, "report", lambda *_: exec("raise KeyboardInterrupt"))
        assert pretrain() == 130
    before = (pretrain.data / "model.checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert pretrain("--seed", "1") == 2
    _one_line(capsys, "model.checkpoint.pt", "expected seed 1, got 0")
    assert (pretrain.data / "model.checkpoint.pt").read_bytes() == before


def test_batch(data):
    """Every image has a text of its own, every text an image; what shares a word is neither positive nor negative."""
    pairs = pretrain_icons.Pairs(data / "pretrain", 0.7)
    first, again = (pairs.batch(30, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    images, texts, positive, left_out = first
    assert torch.equal(images, again[0])
    assert texts == again[1]
    assert positive.shape == left_out.shape == (len(images), len(texts))
    assert positive.any(dim=0).all()
    assert positive.any(dim=1).all()
    assert not (positive & left_out).any()
    assert left_out.any()
    assert 0 <= images.min() < images.max() <= 1 + 1e-6


def test_contrastive_loss():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], requires_grad=True)
    positive = torch.tensor([[True, False, False], [False, True, True]])
    left_out = torch.tensor([[False, True, False], [False, False, False]])
    loss = pretrain_icons.contrastive_loss(logits, positive, left_out)
    kept = torch.tensor([[2.0, -torch.inf, 0.0], [0.0, 3.0, 1.0]])
    rows, columns = kept.log_softmax(1), kept.log_softmax(0)
    by_image = -(rows[0, 0] + (rows[1, 1] + rows[1, 2]) / 2) / 2
    by_text = -(columns[0, 0] + columns[1, 1] + columns[1, 2]) / 3
    assert loss.item() == pytest.approx(((by_image + by_text) / 2).item())
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0
