"""Checkpoints as the command reads and writes them: shards, folders, archives; never all in memory, never as code."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import assert_same_bits
from torch import Tensor, nn

from saft_kernels import SparseDelta
from saft_kernels.cli import checkpoint_files, commands, main, progress
from saft_kernels.cli.checkpoint import Checkpoint
from saft_kernels.cli.checkpoint_files import TorchFile
from saft_kernels.common import tensor_files

State = dict[str, Tensor]


def states() -> tuple[State, State]:
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.{kind}": torch.randn(8, 6, generator=generator) for i in range(5) for kind in "ab"}
    base["lm_head.weight"] = torch.randn(4, 6, generator=generator).bfloat16()
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for i, tensor in enumerate(tuned.values()):
        tensor.view(-1)[i : 2 * i] += 1
    return base, tuned


def sharded(folder: Path, state: State, shards: int, kind: str = "safetensors") -> Path:
    """A folder as save_pretrained makes it: every shard, the index, a config; and what trainers leave beside."""
    folder.mkdir()
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = list(state)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: state[name] for name in names[i::shards]}
        weight_map.update(dict.fromkeys(part, file))
        if kind == "safetensors":
            safetensors.torch.save_file(part, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"pickled")
    (folder / "optimizer.pt").write_bytes(b"pickled")
    return folder


def run(*words: object) -> int:
    return main.main([str(word) for word in words])


def loaded(path: Path) -> State:
    """Without our own code."""
    if path.is_dir():
        (index,) = path.glob("*.index.json")
        state = {}
        for file in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            state.update(loaded(path / file))
        return state
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same_bits(actual[name], expected[name], name)


# ---- shards ----


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("as_index", [False, True])
def test_shards_there_and_back(kind: str, as_index: bool, tmp_path: Path) -> None:
    """Another number of shards on each side; a plain file on one."""
    base, tuned = states()
    model = sharded(tmp_path / "base", base, 3, kind)
    other = sharded(tmp_path / "tuned", tuned, 2)
    torch.save(tuned, tmp_path / "tuned.pt")
    given = next(model.glob("*.index.json")) if as_index else model
    assert run("diff", given, other, "-o", tmp_path / "d") == 0
    assert run("diff", given, tmp_path / "tuned.pt", "-o", tmp_path / "e") == 0
    assert (tmp_path / "d").read_bytes() == (tmp_path / "e").read_bytes()
    assert SparseDelta.load(tmp_path / "d") == SparseDelta.diff(base, tuned)
    assert run("apply", given, tmp_path / "d", "-o", tmp_path / "out") == 0
    same(loaded(tmp_path / "out"), tuned)
    assert run("revert", tmp_path / "out", tmp_path / "d", "-o", tmp_path / "back", "--base", given) == 0
    same(loaded(tmp_path / "back"), base)
    names = {path.name for path in model.iterdir()} - {"training_args.bin", "optimizer.pt"}
    for path in (tmp_path / "out", tmp_path / "back"):
        assert {entry.name for entry in path.iterdir()} == names
        assert (path / "config.json").read_text() == "{}"
    if kind == "safetensors":
        for name in names:
            assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_transformers_loads_the_output(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=8)
    base = transformers.GPT2LMHeadModel(config)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.transformer.h[1].mlp.c_fc.weight[3, 5] += 1
        tuned.transformer.wte.weight[7, 2] -= 1  # tied to lm_head.weight
    base.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="9KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    assert run("diff", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "d") == 0
    assert SparseDelta.load(tmp_path / "d").k == 2
    assert run("apply", tmp_path / "base", tmp_path / "d", "-o", tmp_path / "out") == 0
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    same(dict(model.state_dict()), dict(tuned.state_dict()))


def test_a_folder_with_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what stands beside it: settings are copied, weights in another format are not, they would be the base's."""
    base, tuned = states()
    folder = tmp_path / "base"
    (folder / "onnx").mkdir(parents=True)
    safetensors.torch.save_file(base, folder / "model.safetensors")
    torch.save(base, folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("tokens")
    (folder / "rng_state_0.pth").write_bytes(b"")
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    assert run("apply", folder, tmp_path / "d", "-o", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "tokenizer.json"}
    same(loaded(tmp_path / "out" / "model.safetensors"), tuned)
    captured = capsys.readouterr()
    assert "left out of the copy: 'onnx', 'pytorch_model.bin', 'rng_state_0.pth'" in captured.err
    assert "changed; " in captured.out


def test_folders_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = states()
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    model = sharded(tmp_path / "model", base, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file(base, tmp_path / "two" / name)
    index = json.loads((model / "model.safetensors.index.json").read_text())

    def broken(name: str, text: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in model.iterdir():
            if file.suffix == ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / "model.safetensors.index.json").write_text(text)
        return name

    elsewhere = {**index["weight_map"], "lm_head.weight": "../two/a.safetensors"}
    more = {**index["weight_map"], "new.weight": "model-00001-of-00002.safetensors"}
    gone = {**index["weight_map"], "new.weight": "model-00003-of-00002.safetensors"}
    for name, message in [
        ("empty", "got none; pass a file"),
        ("two", "got 2, 'a.safetensors', 'b.safetensors'; pass a file"),
        (broken("text", "no JSON"), "expected an index of shards with a weight_map"),
        (broken("list", "[1]"), "expected an index of shards with a weight_map"),
        (broken("nothing", '{"weight_map": {}}'), "expected file names in its weight_map"),
        (broken("elsewhere", json.dumps({"weight_map": elsewhere})), "of files beside it"),
        (broken("more", json.dumps({"weight_map": more})), "got none of 'new.weight'; get the checkpoint anew"),
        (broken("gone", json.dumps({"weight_map": gone})), "model-00003-of-00002.safetensors"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        assert run("apply", tmp_path / name, tmp_path / "d", "-o", tmp_path / "out") == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_is_new_and_no_input_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = states()
    model = sharded(tmp_path / "model", base, 2)
    index = model / "model.safetensors.index.json"
    other = sharded(tmp_path / "other", tuned, 2)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "hard.delta").hardlink_to(model / "model-00001-of-00002.safetensors")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    delta = tmp_path / "d"
    SparseDelta.diff(base, tuned).save(delta)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shard = model / "model-00001-of-00002.safetensors"
    for words, message in [
        (("apply", model, delta, "-o", model), "expected the name of a new folder"),
        (("apply", index, delta, "-o", model), "expected the name of a new folder"),
        (("apply", model, delta, "-o", tmp_path / "link"), "expected the name of a new folder"),
        (("apply", model, delta, "-o", other), "expected the name of a new folder"),
        (("apply", model, delta, "-o", tmp_path / "file"), "expected the name of a new folder"),
        (("apply", model, delta, "-o", tmp_path / "no" / "folder"), "expected an existing folder"),
        (("diff", model, other, "-o", shard), "which would be lost"),
        (("diff", index, other, "-o", shard), "which would be lost"),
        (("diff", other, model, "-o", model / "config.json"), "which would be lost"),
        (("diff", model, other, "-o", tmp_path / "hard.delta"), "which would be lost"),
        (("diff", model, other, "-o", tmp_path / "link" / shard.name), "which would be lost"),
        (("diff", model, other, "-o", model), "expected a file, got a folder"),
    ]:
        assert run(*words) == 1
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run("apply", model, delta, "-o", tmp_path / "empty") == 0
    same(loaded(tmp_path / "empty"), tuned)


def test_a_folder_is_no_delta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = states()
    model = sharded(tmp_path / "model", base, 2)
    for words in (("summary", model), ("compare", model, model), ("apply", model, model, "-o", tmp_path / "out")):
        assert run(*words) == 1
        assert "a delta, got a folder; of two checkpoints, `saft-kernels diff` makes a delta" in capsys.readouterr().err


def test_a_failed_folder_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second shard."""
    base, tuned = states()
    model = sharded(tmp_path / "model", base, 3)
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    write, written = checkpoint_files.SafetensorsFile.write, []

    def full(self: Any, file: Any, *rest: Any) -> None:
        written.append(file.name)
        if len(written) == 2:
            raise OSError(28, "No space left on device", file.name)
        write(self, file, *rest)

    monkeypatch.setattr(checkpoint_files.SafetensorsFile, "write", full)
    assert run("apply", model, tmp_path / "d", "-o", tmp_path / "out") == 1
    assert "out: expected to write it, got: No space left on device; free some space" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "model"]


KILLED = """
import os, signal, sys
from saft_kernels.cli import checkpoint_files, main
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint_files.SafetensorsFile.write = die
main.main(sys.argv[1:])
"""


def test_what_a_killed_process_leaves_of_a_folder(tmp_path: Path) -> None:
    base, tuned = states()
    model = sharded(tmp_path / "model", base, 2)
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    words = ["apply", str(model), str(tmp_path / "d"), "-o", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", KILLED, *words], check=False)
    (left,) = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert left.is_dir()
    assert not (tmp_path / "out").exists()
    assert run(*words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "model", "out"]


# ---- what is in memory ----


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path: Path) -> None:
    """Resident memory of the whole process, 1 GiB of shards, safetensors."""
    state = {f"layers.{i}.w": torch.full((2**24,), float(i)) for i in range(16)}
    model = sharded(tmp_path / "model", state, 4)
    for i in range(16):
        state[f"layers.{i}.w"][i] = -1
    sharded(tmp_path / "tuned", state, 4)
    words = [
        ["diff", str(model), str(tmp_path / "tuned"), "-o", str(tmp_path / "d")],
        ["apply", str(model), str(tmp_path / "d"), "-o", str(tmp_path / "out")],
    ]
    code = (
        "import resource, sys, json; from saft_kernels.cli import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main.main(json.loads(sys.argv[1])) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    for command in words:
        process = subprocess.run([sys.executable, "-c", code, json.dumps(command)], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert int(process.stdout.split()[-1]) < 400 * 1024  # KiB: a pair of tensors of 64 MiB, and what compares them
    same(loaded(tmp_path / "out"), state)


def test_values_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads headers; of an archive of torch.save's, another tensor's bytes never are."""
    base, _ = states()
    torch.save({"state_dict": base, "optimizer": {"exp_avg": torch.ones(100_000)}}, tmp_path / "a.pt")
    safetensors.torch.save_file(base, tmp_path / "a.safetensors")
    sizes: list[int] = []
    read = tensor_files.read_bytes

    def counted(file: Any, start: int, end: int) -> Tensor:
        sizes.append(end - start)
        return read(file, start, end)

    monkeypatch.setattr(tensor_files, "read_bytes", counted)
    for name in ("a.pt", "a.safetensors"):
        with Checkpoint(tmp_path / name) as checkpoint:
            assert sizes == []
            assert_same_bits(checkpoint.read("lm_head.weight"), base["lm_head.weight"])
            assert sizes == [4 * 6 * 2]
            sizes.clear()


# ---- archives of torch.save ----


def odd_views() -> State:
    """Slices, transposes, tied tensors, a parameter, all of one storage where they can be."""
    storage = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    return {
        "whole": storage,
        "tied": storage,
        "slice": storage[2:9:2, 1::3],
        "transposed": storage.t(),
        "scalar": storage[3, 4],
        "column": storage[:, 7],
        "parameter": nn.Parameter(torch.ones(3)),
        "empty": torch.zeros(0, 4),
        "bf16": torch.randn(7).bfloat16()[1:],
        "flags": torch.tensor([True, False]),
        "one": torch.randn(4)[::2][:1],
    }


@pytest.mark.parametrize("how", ["archive", "legacy", "compressed", "cut"])
def test_every_tensor_of_an_archive_is_what_torch_reads(how: str, tmp_path: Path) -> None:
    """Read by place, or through torch.load where the archive is not as torch writes it."""
    path = tmp_path / "a.pt"
    torch.save(odd_views(), path, _use_new_zipfile_serialization=how != "legacy")
    if how == "compressed":
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.infolist():
                target.writestr(entry.filename, source.read(entry))
        os.replace(tmp_path / "b", path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match=r"expected a file that torch\.load\(weights_only=True\) reads"):
            TorchFile(path)
        return
    file = TorchFile(path)
    assert (file._offsets is not None) == (how == "archive")
    expected = torch.load(path, weights_only=True)
    assert list(file.tensors) == list(expected)
    for name, tensor in expected.items():
        assert_same_bits(file.read(name), tensor.detach(), name)
        assert (file.tensors[name].shape, file.tensors[name].dtype) == (tensor.shape, tensor.dtype)
    assert file.memory("tied") == file.memory("whole")
    assert len({file.memory(name) for name in expected}) == len(expected) - 1
    file.close()


def test_views_of_one_storage_there_and_back(tmp_path: Path) -> None:
    base = odd_views()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned["whole"][2, 1] += 1  # in the slice, too
        tuned["bf16"][3] += 1
        tuned["one"][0] += 1
    torch.save(base, tmp_path / "base.pt")
    torch.save(tuned, tmp_path / "tuned.pt")
    assert run("diff", tmp_path / "base.pt", tmp_path / "tuned.pt", "-o", tmp_path / "d", "--include-original") == 0
    delta = SparseDelta.load(tmp_path / "d")
    assert delta.tied == {"tied": "whole"}
    assert run("apply", tmp_path / "base.pt", tmp_path / "d", "-o", tmp_path / "out.pt") == 0
    same(loaded(tmp_path / "out.pt"), loaded(tmp_path / "tuned.pt"))
    assert run("revert", tmp_path / "out.pt", tmp_path / "d", "-o", tmp_path / "back.pt") == 0
    same(loaded(tmp_path / "back.pt"), loaded(tmp_path / "base.pt"))


def test_timms_checkpoints(tmp_path: Path) -> None:
    """The training arguments are in them: an argparse.Namespace, which torch.load refuses on its own."""
    base, tuned = states()
    arguments = argparse.Namespace(lr=0.1, output=Path("runs/1"), opt_betas=(0.9, 0.95), model_kwargs={"a": [1, None]})
    for name, state in (("base", base), ("tuned", tuned)):
        content = {
            **{"epoch": 3, "arch": "vit", "state_dict": state, "optimizer": {"lr": 0.1}, "args": arguments},
            **{"metric": np.float64(71.5), "seen": np.int64(7), "version": 2},
        }
        torch.save(content, tmp_path / f"{name}.pth.tar")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "base.pth.tar", weights_only=True)
    assert run("diff", tmp_path / "base.pth.tar", tmp_path / "tuned.pth.tar", "-o", tmp_path / "d") == 0
    assert run("apply", tmp_path / "base.pth.tar", tmp_path / "d", "-o", tmp_path / "out.pth.tar") == 0
    found, expected = (torch.load(tmp_path / name, weights_only=False) for name in ("out.pth.tar", "tuned.pth.tar"))
    same(found.pop("state_dict"), expected.pop("state_dict"))
    assert found == expected
    assert found["args"] == arguments
    assert type(found["metric"]) is np.float64


def test_averages_of_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the weights they are said to be left alone; without the weights they are what is read."""
    base, tuned = states()
    torch.save({"state_dict": base, "state_dict_ema": tuned, "optimizer": {"state": {}}}, tmp_path / "both.pth.tar")
    torch.save({"epoch": 1, "model_ema": tuned}, tmp_path / "ema.pth")
    assert run("diff", tmp_path / "both.pth.tar", tmp_path / "ema.pth", "-o", tmp_path / "d") == 0
    note = f"{tmp_path / 'both.pth.tar'}: other weights in it are left alone: 'state_dict_ema'\n"
    assert capsys.readouterr().err == note
    assert SparseDelta.load(tmp_path / "d") == SparseDelta.diff(base, tuned)
    assert (
        run(
            "revert",
            tmp_path / "ema.pth",
            tmp_path / "d",
            "-o",
            tmp_path / "o.pth",
            "--base",
            tmp_path / "both.pth.tar",
        )
        == 0
    )
    same(torch.load(tmp_path / "o.pth")["model_ema"], base)
    capsys.readouterr()
    assert run("apply", tmp_path / "both.pth.tar", tmp_path / "d", "-o", tmp_path / "o.pth.tar") == 0
    assert capsys.readouterr().err == note


@pytest.mark.parametrize("kind", ["meta", "nested", "sparse"])
def test_tensors_that_have_no_plain_values(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {
        "meta": torch.empty(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "sparse": torch.eye(3).to_sparse(),
    }[kind]
    torch.save({"a": torch.ones(2), "x": odd}, tmp_path / "odd.pt")
    assert run("diff", tmp_path / "odd.pt", tmp_path / "odd.pt", "-o", tmp_path / "d") == 1
    err = capsys.readouterr().err
    assert "odd.pt: expected" in err
    assert "got 'x'" in err
    with pytest.raises(TypeError, match=r"`base`\['x'\]: expected a strided tensor in memory"):
        SparseDelta.diff({"x": odd}, {"x": odd})


def test_a_new_folder_in_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = states()
    model = sharded(tmp_path / "model", base, 2)
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    assert run("apply", model, tmp_path / "d", "-o", model / "tuned") == 0
    assert capsys.readouterr().err.endswith(": left out of the copy: 'optimizer.pt', 'training_args.bin'\n")
    same(loaded(model / "tuned"), tuned)


@pytest.mark.parametrize("name", ["untied.pt", "untied.safetensors"])
def test_one_head_of_a_tied_pair(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base has it once; the tuned model's other name kept its values."""
    weight = torch.zeros(4, 3)
    torch.save({"embed": weight, "head": weight}, tmp_path / "tied.pt")
    write = torch.save if name.endswith(".pt") else safetensors.torch.save_file
    write({"embed": weight.clone(), "head": weight + 1}, tmp_path / name)
    assert run("diff", tmp_path / "tied.pt", tmp_path / name, "-o", tmp_path / "d") == 0
    assert run("apply", tmp_path / "tied.pt", tmp_path / "d", "-o", tmp_path / "o.pt") == 1
    assert "expected 'embed' and 'head' apart, as in the tuned model" in capsys.readouterr().err
    assert not (tmp_path / "o.pt").exists()
    back = tmp_path / f"back{Path(name).suffix}"
    assert run("revert", tmp_path / name, tmp_path / "d", "-o", back, "--base", tmp_path / "tied.pt") == 0
    same(loaded(back), {"embed": weight, "head": weight})


class Runs:
    """Code that a pickle would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Runs.folder),)


@pytest.mark.parametrize("where", ["state_dict", "args", "beside"])
def test_no_code_of_a_file_is_run(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor inside what is allowed."""
    base, _ = states()
    Runs.folder = tmp_path / "ran"
    content: dict[str, Any] = {"state_dict": dict(base), "args": argparse.Namespace(lr=0.1)}
    if where == "state_dict":
        content["state_dict"]["extra"] = Runs()
    elif where == "args":
        content["args"].callback = Runs()
    else:
        content["other"] = Runs()
    torch.save(content, tmp_path / "a.pth.tar")
    safetensors.torch.save_file(base, tmp_path / "b.safetensors")
    assert run("diff", tmp_path / "b.safetensors", tmp_path / "a.pth.tar", "-o", tmp_path / "d") == 1
    message = capsys.readouterr().err
    assert "expected a file that torch.load(weights_only=True) reads" in message
    assert "unsupported GLOBAL posix.mkdir" in message
    assert not Runs.folder.exists()


# ---- files that change, tensors that lie ----


@pytest.mark.parametrize("how", ["written", "shorter"])
@pytest.mark.parametrize("command", ["diff", "apply", "revert"])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "folder"])
def test_an_input_that_changes_meanwhile(
    kind: str,
    command: str,
    how: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After it was opened, or between the check of its elements and the writing: an error, no output, no SIGBUS."""
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(50_000, generator=generator) for i in range(4)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor[7] += 1
    delta = tmp_path / "d"
    SparseDelta.diff(base, tuned).save(delta, include_original=True)
    model = tuned if command == "revert" else base
    if kind == "folder":
        path = sharded(tmp_path / "model", model, 2)
        file = path / "model-00002-of-00002.safetensors"
    else:
        file = path = tmp_path / f"model.{kind}"
        torch.save(model, path) if kind == "pt" else safetensors.torch.save_file(model, path)
    safetensors.torch.save_file(tuned, tmp_path / "tuned.safetensors")
    output = tmp_path / ("out" if kind == "folder" else f"out.{kind}")

    def change(*_: object) -> None:
        if how == "shorter":
            os.truncate(file, 100_000)
        else:
            with open(file, "r+b") as opened:
                opened.seek(300_000)
                opened.write(b"other")

    if command == "diff":
        output = tmp_path / "e"
        words = ["diff", path, tmp_path / "tuned.safetensors", "-o", output]
        compare = commands.comparable
        monkeypatch.setattr(commands, "comparable", lambda *given: (compare(*given), change())[0])
    else:
        words = [command, path, delta, "-o", output]
        check = commands.check_state
        monkeypatch.setattr(commands, "check_state", lambda *given: (check(*given), change())[0])
    assert run(*words) == 1
    message = capsys.readouterr().err
    assert str(file) in message
    assert message.count("\n") == 1
    if how == "written":
        assert "was written to while it was read" in message
    assert not output.exists()


@pytest.mark.parametrize("command", ["diff", "apply"])
def test_overlapping_elements_are_not_written(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One place in memory, two elements: writing one would change the other."""
    storage = torch.arange(20.0)
    base = {"w": torch.as_strided(storage, (3, 4), (2, 1)), "b": torch.ones(2)}
    torch.save(base, tmp_path / "base.pt")
    tuned = {"w": base["w"].clone(), "b": torch.zeros(2)}
    tuned["w"][1, 1] += 1
    torch.save(tuned, tmp_path / "tuned.pt")
    if command == "diff":  # to read them is no harm
        assert run("diff", tmp_path / "base.pt", tmp_path / "tuned.pt", "-o", tmp_path / "d") == 0
        assert SparseDelta.load(tmp_path / "d").k == 3
        return
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    assert run("apply", tmp_path / "base.pt", tmp_path / "d", "-o", tmp_path / "out.pt") == 1
    assert "expected one memory location per element of 'w'" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
    model = dict(base)
    with pytest.raises(ValueError, match="expected one memory location per element of 'w'"):
        SparseDelta.load(tmp_path / "d").apply_(model)
    assert storage.tolist() == list(range(20))


def test_a_small_file_does_not_ask_for_much_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2^33 elements expanded from one, in 1.3 KB."""
    for i in range(2):
        torch.save({"w": torch.full((1,), float(i)).expand(2**33)}, tmp_path / f"{i}.pt")
        torch.save(
            {"w": torch.full((1,), float(i)).expand(2**33)},
            tmp_path / f"old{i}.pt",
            _use_new_zipfile_serialization=False,
        )
    SparseDelta.diff({"w": torch.ones(2)}, {"w": torch.zeros(2)}).save(tmp_path / "d")
    for words in [
        ("diff", tmp_path / "0.pt", tmp_path / "1.pt", "-o", tmp_path / "e"),
        ("diff", tmp_path / "old0.pt", tmp_path / "old1.pt", "-o", tmp_path / "e"),
        ("apply", tmp_path / "0.pt", tmp_path / "d", "-o", tmp_path / "out.pt"),
        ("summary", tmp_path / "0.pt"),
        ("compare", tmp_path / "old0.pt", tmp_path / "1.pt"),
    ]:
        assert run(*words) == 1
        assert "got 'w' of 8,589,934,592 elements of float32 expanded from 1; clone it" in capsys.readouterr().err
    # a small one is a habit of some models
    torch.save({"w": torch.ones(1, 1).expand(3, 4)}, tmp_path / "base.pt")
    torch.save({"w": torch.zeros(3, 4)}, tmp_path / "tuned.pt")
    assert run("diff", tmp_path / "base.pt", tmp_path / "tuned.pt", "-o", tmp_path / "e") == 0
    assert SparseDelta.load(tmp_path / "e").k == 12


def test_a_dtype_that_torch_does_not_have_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And copied."""
    header = {
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [8, 11]},
    }
    text = json.dumps(header).encode()
    for name, values in (("base", (1.0, 2.0)), ("tuned", (1.0, 3.0))):
        content = len(text).to_bytes(8, "little") + text + np.array(values, "<f4").tobytes() + b"abc"
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    base, tuned, delta = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d"
    assert run("diff", base, tuned, "-o", delta) == 0
    assert "left out, no tensors: 'x'" in capsys.readouterr().err
    assert run("apply", base, delta, "-o", tmp_path / "out.safetensors") == 0
    assert (tmp_path / "out.safetensors").read_bytes() == tuned.read_bytes()


# ---- options ----


def test_alpha_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In another process, from a file at 0.5: with the originals, or the base."""
    base, tuned = states()
    for name, state in (("base", base), ("tuned", tuned)):
        torch.save(state, tmp_path / f"{name}.pt")
    SparseDelta.diff(base, tuned).save(tmp_path / "with", include_original=True)
    SparseDelta.diff(base, tuned).save(tmp_path / "without")
    assert run("apply", tmp_path / "base.pt", tmp_path / "without", "-o", tmp_path / "half.pt", "--alpha", 0.5) == 0
    for delta, extra in (("with", ()), ("without", ("--base", tmp_path / "base.pt"))):
        for command, expected in (("apply", tuned), ("revert", base)):
            output = tmp_path / "out.pt"
            assert run(command, tmp_path / "half.pt", tmp_path / delta, "-o", output, *extra) == 0
            same(loaded(output), expected)
            assert run(command, tmp_path / "half.pt", tmp_path / delta, "-o", output, *extra, "--verify", "none") == 0
            same(loaded(output), expected)
    capsys.readouterr()
    assert run("apply", tmp_path / "half.pt", tmp_path / "without", "-o", tmp_path / "new.pt") == 1
    assert "got other values in" in capsys.readouterr().err
    assert run("revert", tmp_path / "half.pt", tmp_path / "without", "-o", tmp_path / "new.pt") == 1
    assert "pass --base" in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = states()
    base["frozen"] = tuned["frozen"] = torch.ones(3)
    model = sharded(tmp_path / "model", {**base, "frozen": torch.tensor([1.0, 1, 2])}, 2)
    other = sharded(tmp_path / "other", {**base, "lm_head.weight": base["lm_head.weight"] + 1}, 2)
    SparseDelta.diff(base, tuned).save(tmp_path / "d")
    SparseDelta.diff(base, tuned, whole=True).save(tmp_path / "whole")

    def status(path: Path, delta: str, *words: str) -> tuple[int, str]:
        result = run("apply", path, tmp_path / delta, "-o", tmp_path / "out", "--dry-run", *words)
        assert not (tmp_path / "out").exists()
        captured = capsys.readouterr()
        return result, captured.err or captured.out

    assert status(model, "d")[0] == 0
    assert status(model, "d", "--verify", "whole") == (
        1,
        "saft-kernels: `verify`: expected 'selected' or 'none' for this "
        "delta, got 'whole', whose checksums it does not have; make it with diff(whole=True)\n",
    )
    assert "outside the changed elements in 'frozen'" in status(model, "whole")[1]
    assert status(model, "whole", "--verify", "selected")[0] == 0
    assert "got other values in 'lm_head.weight'" in status(other, "d")[1]
    code, text = status(other, "d", "--verify", "none")
    assert code == 0
    assert text.endswith("changed; not written\n")


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All checks, no output; what is refused is refused."""
    base, tuned = states()
    for name, state in (("base", base), ("tuned", tuned)):
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    model, other, delta = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d"
    assert run("diff", model, other, "-o", delta, "--dry-run") == 0
    assert capsys.readouterr().out == f"{delta}: 55 of 504 elements (10.913%) changed; not written\n"
    assert not delta.exists()
    assert run("diff", model, other, "-o", delta) == 0
    content = model.read_bytes()
    assert run("apply", model, delta, "-o", model, "--dry-run") == 0
    assert run("revert", other, delta, "-o", tmp_path / "new.safetensors", "--base", model, "--dry-run") == 0
    assert model.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "d", "tuned.safetensors"]
    assert run("apply", model, delta, "-o", delta, "--dry-run") == 1


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line per phase where it takes long and stderr is no terminal; a bar where it is one."""
    base, tuned = states()
    torch.save(base, tmp_path / "base.pt")
    torch.save(tuned, tmp_path / "tuned.pt")
    words = ["diff", tmp_path / "base.pt", tmp_path / "tuned.pt", "-o", tmp_path / "d"]
    assert run(*words) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_LONG", 1)
    assert run(*words) == 0
    assert capsys.readouterr().err == "saft-kernels: comparing, 0.0 GiB\n"
    assert run("apply", tmp_path / "base.pt", tmp_path / "d", "-o", tmp_path / "out.pt") == 0
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"saft-kernels: checking {tmp_path / 'base.pt'}",
        "saft-kernels: writing",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*words) == 0
    err = capsys.readouterr().err
    assert "\rcomparing:   0%|" in err
    assert "saft-kernels" not in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no name here")
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_pipe_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="expected a file, got a pipe"):
        Checkpoint(tmp_path / name)
