"""The command saft-kernels: checkpoints of every kind in, the same kind out; one line and 1 for an error."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import assert_same_bits
from torch import Tensor

from saft_kernels import SparseDelta, SparseMask
from saft_kernels.cli import commands, main, report, summary
from saft_kernels.common import files as common_files
from saft_kernels.common import tensor_files

State = dict[str, Tensor]
MODELS = ("base.safetensors", "flat.bin", "nested.pt", "ddp.pth", "legacy.pt")


def states() -> tuple[State, State]:
    generator = torch.Generator().manual_seed(0)
    base = {}
    for i in range(3):
        base[f"visual.blocks.{i}.attn.weight"] = torch.randn(8, 6, generator=generator)
        base[f"visual.blocks.{i}.norm.bias"] = torch.randn(6, generator=generator)
    base["head.weight"] = torch.randn(4, 6, generator=generator).bfloat16()
    base["steps"] = torch.tensor(3)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for name, index in (("visual.blocks.0.attn.weight", 5), ("visual.blocks.2.norm.bias", 1), ("head.weight", 7)):
        tuned[name].view(-1)[index] += 1
    tuned["steps"] += 100
    return base, tuned


def write(path: Path, state: State) -> Path:
    """A checkpoint of the kind that its name says."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, {"format": "pt", "author": "me"})
    elif path.stem.endswith("nested"):
        torch.save({"epoch": 5, "model": OrderedDict(state), "optimizer": {"lr": 0.1, "exp_avg": torch.ones(2)}}, path)
    elif path.stem.endswith("ddp"):
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 5, "name": "run", "state_dict": wrapped}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not path.stem.endswith("legacy"))
    return path


def read(path: Path) -> tuple[Any, State]:
    """The whole content, and its state dict."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        return metadata, safetensors.torch.load_file(path)
    content = torch.load(path, weights_only=True)
    state = content.get("model", content.get("state_dict", content))
    return {k: v for k, v in content.items() if v is not state} if state is not content else None, state


def repr_of(content: Any) -> str:
    """Of what is no state dict; safetensors keeps no order of its metadata."""
    return repr(sorted(content.items()) if content is not None else None)


def same(a: State, b: State) -> None:
    assert list(a) == list(b)
    for name in b:
        assert_same_bits(a[name], b[name], name)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with the base as each kind of checkpoint, and tuned.safetensors."""
    base, tuned = states()
    for name in MODELS:
        write(tmp_path / name, base)
    write(tmp_path / "tuned.safetensors", tuned)
    return tmp_path


def run(folder: Path, command: str) -> int:
    """`saft-kernels` with file names relative to a folder."""
    words = [str(folder / word) if "." in word and "*" not in word else word for word in command.split()]
    return main.main(words)


def fails(capsys: pytest.CaptureFixture[str], folder: Path, command: str, message: str) -> None:
    """One line on stderr, 1, and no file that was not there."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run(folder, command) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("saft-kernels: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_keeps_format_and_nesting(name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = states()
    suffix = Path(name).suffix
    content = (files / name).read_bytes()
    for option in ("", " --include-original", " --whole"):
        assert run(files, f"diff {name} tuned.safetensors -o d.delta{option}") == 0
        assert "d.delta: 4 of 187 elements (2.139%) changed" in capsys.readouterr().out
        assert run(files, f"apply {name} d.delta -o out{suffix}") == 0
        other, state = read(files / f"out{suffix}")
        before, original = read(files / name)
        assert list(state) == list(original)
        assert repr_of(other) == repr_of(before)
        plain = {key.removeprefix("module."): tensor for key, tensor in state.items()}
        same({key: plain[key] for key in tuned}, tuned)
        needs = "" if "original" in option else " --base base.safetensors"
        assert run(files, f"revert out{suffix} d.delta -o back{suffix}{needs}") == 0
        other, state = read(files / f"back{suffix}")
        assert repr_of(other) == repr_of(before)
        same(state, original)
    assert (files / name).read_bytes() == content
    same(dict(zip(base, original.values(), strict=True)) if suffix != ".safetensors" else base, base)


def test_alpha(files: Path) -> None:
    base, tuned = states()
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    assert run(files, "apply flat.bin d.delta -o half.pt --alpha 0.5".replace("0.5", "5e-1")) == 0
    expected = {name: tensor.clone() for name, tensor in base.items()}
    SparseDelta.diff(base, tuned).interpolate_(expected, 0.5)
    same(torch.load(files / "half.pt"), expected)


def test_in_place_and_excluded(files: Path) -> None:
    """The output may be the input; what is excluded stays."""
    _, tuned = states()
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta --exclude head* --exclude steps") == 0
    assert set(SparseDelta.load(files / "d.delta").mask) == {"visual.blocks.0.attn.weight", "visual.blocks.2.norm.bias"}
    assert run(files, "apply nested.pt d.delta -o nested.pt") == 0
    _, state = read(files / "nested.pt")
    assert_same_bits(state["visual.blocks.2.norm.bias"], tuned["visual.blocks.2.norm.bias"])
    assert int(state["steps"]) == 3


def test_what_is_no_tensor_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = states()
    torch.save({**base, "_extra_state": {"recipe": 1}}, files / "extra.pt")
    assert run(files, "diff base.safetensors extra.pt -o d.delta") == 0
    assert "extra.pt: left out, no tensors: '_extra_state'" in capsys.readouterr().err
    assert run(files, "apply extra.pt d.delta -o out.pt") == 0
    assert torch.load(files / "out.pt")["_extra_state"] == {"recipe": 1}


def test_errors(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tuned = states()
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    write(files / "other.safetensors", {**tuned, "head.weight": tuned["head.weight"] + 1})
    write(files / "renamed.pt", {f"x.{name}": tensor for name, tensor in tuned.items()})
    torch.save([torch.ones(2)], files / "list.pt")
    torch.save({"epoch": 1}, files / "none.pt")
    torch.save({"model": torch.nn.Linear(1, 1)}, files / "pickled.pt")
    (files / "text.safetensors").write_text("no tensors")
    (files / "delta.safetensors").write_bytes((files / "d.delta").read_bytes())
    (files / "short.delta").write_bytes((files / "d.delta").read_bytes()[:-3])
    capsys.readouterr()
    for command, message in [
        ("apply other.safetensors d.delta -o out.safetensors", "got other values in"),
        ("apply base.safetensors short.delta -o out.safetensors", "got another file or a damaged one"),
        ("apply base.safetensors d.delta -o out.pt", "expected a name that ends in .safetensors"),
        ("apply flat.bin d.delta -o out.safetensors", "the format of"),
        ("apply base.safetensors d.delta -o nowhere/out.safetensors", "expected an existing folder"),
        ("apply base.safetensors nowhere.delta -o out.safetensors", "nowhere.delta: No such file or directory"),
        ("apply base.safetensors d.delta -o out.safetensors --alpha nan", "`alpha`: expected a finite number"),
        ("revert tuned.safetensors d.delta -o out.safetensors", "pass --base"),
        ("revert tuned.safetensors d.delta -o out.safetensors --base other.safetensors", "`base`: expected the base"),
        ("diff base.safetensors renamed.pt -o e.delta", "only in `base`"),
        ("diff base.safetensors list.pt -o e.delta", "got list; save model.state_dict()"),
        ("diff base.safetensors none.pt -o e.delta", "got a dictionary of 'epoch'"),
        ("diff base.safetensors pickled.pt -o e.delta", "save a state dict of tensors"),
        ("diff base.safetensors text.safetensors -o e.delta", "expected a .safetensors file"),
        ("diff base.safetensors nowhere.pt -o e.delta", "nowhere.pt: expected a checkpoint, got no file and no folder"),
        ("diff base.safetensors ./nowhere -o e.delta", "nowhere: expected a checkpoint, got no file and no folder"),
        ("diff base.safetensors d.delta -o e.delta", "got '.delta'"),
        (
            "diff delta.safetensors tuned.safetensors -o e.delta",
            "delta.safetensors: expected a checkpoint, got a SparseD",
        ),
        ("apply delta.safetensors d.delta -o out.safetensors", "`saft-kernels apply` makes a checkpoint of the base"),
        ("apply base.safetensors d.delta -o out.safetensors --alpha 1e39", "within fp32's range, got 1e+39"),
        ("diff base.safetensors tuned.safetensors -o nowhere/e.delta", "expected an existing folder"),
        ("diff base.safetensors tuned.safetensors -o e.pt", "got '.pt'; name it e.safetensors"),
        ("diff base.safetensors tuned.safetensors -o e.delta --exclude x*", "got 'x*', which matches none of 8; they"),
        ("summary base.safetensors", "its format is 'pt'"),
        ("summary base.safetensors", "of two checkpoints, `saft-kernels diff` makes a delta"),
        ("summary flat.bin", "expected a dictionary of bool or 0/1 masks"),
        ("summary text.safetensors", "expected a mask or a delta"),
        ("summary d.delta --png nowhere/x.png", "expected an existing folder"),
    ]:
        fails(capsys, files, command, message)


def test_a_full_disk_leaves_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    capsys.readouterr()

    class FullDisk(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(memoryview(content)[:4])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(common_files, "open", FullDisk, raising=False)
    fails(capsys, files, "apply base.safetensors d.delta -o base.safetensors", "No space left")
    fails(capsys, files, "diff base.safetensors tuned.safetensors -o d.delta", "No space left")
    fails(capsys, files, "apply nested.pt d.delta -o nested.pt", "nested.pt: expected to write it, got: No space left")


INPUTS_AS_OUTPUTS = [
    "diff base.safetensors tuned.safetensors -o {base.safetensors}",
    "diff base.safetensors tuned.safetensors -o {tuned.safetensors}",
    "apply base.safetensors d.delta -o {d.delta}",
    "revert tuned.safetensors d.delta -o {d.delta}",
    "revert tuned.safetensors d.delta -o {base.safetensors} --base base.safetensors",
    "summary d.delta --png {d.delta}",
]


@pytest.mark.parametrize("way", ["itself", "dots", "link", "hard_link", "link_to_link"])
@pytest.mark.parametrize("command", INPUTS_AS_OUTPUTS)
def test_no_command_writes_over_its_input(
    command: str, way: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever name; and nothing is read before."""
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    capsys.readouterr()
    name = command[command.index("{") + 1 : command.index("}")]
    output = files / f"output{Path(name).suffix}"
    if way == "itself":
        output = files / name
    elif way == "dots":
        output = files / ".." / files.name / name
    elif way == "hard_link":
        output.hardlink_to(files / name)
    else:
        output.symlink_to(name)
        if way == "link_to_link":
            (files / "other").symlink_to(output)
            output = files / "other"
    monkeypatch.setattr(commands, "Checkpoint", None)  # what reads
    monkeypatch.setattr(commands, "SparseDelta", None)
    fails(capsys, files, command.replace(f"{{{name}}}", str(output)), "which would be lost; name another")


def test_the_model_may_be_written_over(files: Path) -> None:
    """It is read whole before; also through a link, which stays one."""
    _, tuned = states()
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta --include-original") == 0
    (files / "link.safetensors").symlink_to("base.safetensors")
    (files / "base.safetensors").chmod(0o600)
    assert run(files, "apply base.safetensors d.delta -o link.safetensors") == 0
    assert (files / "link.safetensors").is_symlink()
    assert (files / "base.safetensors").stat().st_mode & 0o777 == 0o600
    found = read(files / "base.safetensors")[1]
    same({name: found[name] for name in tuned}, tuned)
    base, _ = states()
    assert run(files, "revert link.safetensors d.delta -o base.safetensors") == 0
    found = read(files / "base.safetensors")[1]
    same({name: found[name] for name in base}, base)


def test_outputs_that_cannot_be(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    (files / "folder.safetensors").mkdir()
    (files / "folder.png").mkdir()
    capsys.readouterr()
    before = {path.name for path in files.iterdir()}
    for command, message in [
        ("diff base.safetensors tuned.safetensors -o folder.safetensors", "expected a file, got a folder"),
        ("apply base.safetensors d.delta -o folder.safetensors", "expected a file, got a folder"),
        ("summary d.delta --png folder.png", "expected a file, got a folder"),
        ("summary d.delta --png where.jpg", "expected a name that ends in .png, got '.jpg'"),
    ]:
        assert run(files, command) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert message in captured.err
        assert {path.name for path in files.iterdir()} == before


@pytest.mark.parametrize("name", ["apply.{}.safetensors", "apply.{}.pt"])
def test_long_output_names(name: str, files: Path) -> None:
    _, tuned = states()
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    output = name.format("n" * (255 - len(name) + 2))
    assert len(output) == 255
    assert run(files, f"apply {'flat.bin' if name.endswith('.pt') else 'base.safetensors'} d.delta -o {output}") == 0
    found = read(files / output)[1]
    same({key: found[key] for key in tuned}, tuned)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", [*MODELS, "d.delta"])
def test_truncated_inputs(name: str, share: float, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said with the file's name, what was expected, and what to do."""
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    content = (files / name).read_bytes()
    (files / name).write_bytes(content[: int(share * len(content))])
    capsys.readouterr()
    output = "out.safetensors" if name.endswith((".safetensors", ".delta")) else "out.pt"
    model = "base.safetensors" if name == "d.delta" else name
    fails(capsys, files, f"apply {model} d.delta -o {output}", f"{files / name}: expected")
    if name != "d.delta":
        fails(capsys, files, f"diff tuned.safetensors {name} -o e.delta", f"{files / name}: expected")


def test_equal_outputs(files: Path) -> None:
    """Byte for byte, whatever they are called: of an archive of torch.save's, the file's name is no part."""
    for name in MODELS:
        outputs = set()
        for i in range(3):
            assert run(files, f"diff {name} tuned.safetensors -o {i}.delta") == 0
            assert run(files, f"apply {name} {i}.delta -o out{i}{Path(name).suffix}") == 0
            outputs.add(((files / f"{i}.delta").read_bytes(), (files / f"out{i}{Path(name).suffix}").read_bytes()))
        assert len(outputs) == 1


@pytest.fixture
def heeds_signals() -> Iterator[None]:
    """As in a terminal: who starts the tests in the background, or with nohup, has SIGINT or SIGHUP ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize(
    ("stopping", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda x: str(x)
)
def test_signals(
    stopping: signal.Signals,
    status: int,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of writing: one line, the shell's status for that signal, nothing left behind."""
    assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
    capsys.readouterr()

    def stopped(file: Any, *_: Any) -> None:
        file.write(b"half")
        os.kill(os.getpid(), stopping)
        time.sleep(60)

    monkeypatch.setattr(tensor_files, "write", stopped)
    before = {path: path.read_bytes() for path in files.iterdir()}
    handler = signal.getsignal(stopping)
    assert run(files, "diff base.safetensors tuned.safetensors -o e.delta") == status
    assert signal.getsignal(stopping) == handler
    captured = capsys.readouterr()
    assert captured.err.startswith("saft-kernels: ")
    assert captured.err.count("\n") == 1
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_ctrl_c_while_the_arguments_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_parser", interrupted)
    assert main.main(["info"]) == 130
    assert capsys.readouterr().err == "saft-kernels: interrupted\n"


def test_closed_streams(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a shell's `>&- 2>&-`."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    try:
        assert run(files, "diff base.safetensors tuned.safetensors -o d.delta") == 0
        assert run(files, "summary d.delta") == 0
        assert run(files, "summary nowhere.delta") == 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()


def test_a_bug_shows_its_traceback(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(SparseDelta, "load", bug)
    with pytest.raises(KeyError):
        run(files, "apply base.safetensors d.delta -o out.safetensors")


@pytest.mark.parametrize("words", [["fly"], ["diff", "a"], ["diff", "a", "b"], ["summary", "a", "--depth", "0"]])
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(words)
    assert exit.value.code == 2
    assert "usage: saft-kernels" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "info", "diff", "apply", "revert", "summary", "compare"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert f"\n  saft-kernels {command}" in capsys.readouterr().out


def test_alone_it_reports_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    alone = capsys.readouterr().out
    assert main.main(["info"]) == 0
    assert capsys.readouterr().out == alone
    assert "backends, in order of preference" in alone


def test_it_warns_of_versions_that_were_never_tested(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("2.11.0", "2.14.1+cu130", "2.14.2"):
        monkeypatch.setattr(torch, "__version__", version)
        assert main.main([]) == 0
        assert f"\ntorch            {version}\n" in capsys.readouterr().out
    for version in ("2.10.1", "2.15.0.dev20261126+cpu", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert main.main([]) == 0
        assert f"{version} (never tested: 2.11 to 2.14 are)\n" in capsys.readouterr().out


def test_what_is_tested_begins_where_the_package_does() -> None:
    """The newest is to be raised by whoever has run the tests with it."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for package in ("torch", "triton"):
        oldest = ".".join(map(str, report.TESTED[package][0]))
        assert f'"{package}>={oldest}' in project


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "saft_kernels", "summary", "nowhere.safetensors"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.startswith("saft-kernels: ")
    assert len(process.stderr.splitlines()) == 1


# ---- summary, compare ----


def test_summary(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "diff ddp.pth tuned.safetensors -o d.delta --include-original") == 0
    capsys.readouterr()
    assert run(files, "summary d.delta") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "d.delta: 4 of 187 elements (2.139%)"
    assert [line.split() for line in lines[1:-1]] == [
        ["tensor", "selected", "numel", "density", "share"],
        ["head.weight", "1", "24", "4.167%", "25.00%"],
        ["steps", "1", "1", "100.000%", "25.00%"],
        ["visual.blocks.0.attn.weight", "1", "48", "2.083%", "25.00%"],
        ["visual.blocks.2.norm.bias", "1", "6", "16.667%", "25.00%"],
        ["total", "4", "187", "2.139%", "100%"],
    ]
    assert re.fullmatch(r"delta of [\d,]+ bytes, [\d.]+ per value; original values included", lines[-1])
    assert run(files, "diff base.safetensors base.safetensors -o none.delta") == 0
    assert run(files, "summary none.delta") == 0
    assert re.fullmatch(r"delta of \d+ bytes; original values included", capsys.readouterr().out.splitlines()[-1])
    assert run(files, "summary d.delta --depth 2") == 0
    assert "visual.blocks         2" in capsys.readouterr().out


def test_compare(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = states()
    SparseDelta.diff(base, tuned).save(files / "a.delta")
    other = {**tuned, "head.weight": base["head.weight"], "steps": tuned["steps"] + 1}
    other["visual.blocks.10.norm.bias"] = base["visual.blocks.1.norm.bias"] + 1
    more = {**base, "visual.blocks.10.norm.bias": base["visual.blocks.1.norm.bias"]}
    SparseDelta.diff(more, other).save(files / "b.delta")
    assert run(files, "compare a.delta b.delta") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "IoU 0.3000: 3 elements in both, 10 in either"
    assert [line.split() for line in lines[1:-1]] == [
        ["tensor", "A", "B", "both", "IoU"],
        ["head.weight", "1", "0", "0", "0.0000"],
        ["steps", "1", "1", "1", "1.0000"],
        ["visual.blocks.0.attn.weight", "1", "1", "1", "1.0000"],
        ["visual.blocks.2.norm.bias", "1", "1", "1", "1.0000"],
        ["visual.blocks.10.norm.bias", "0", "6", "0", "0.0000"],
        ["total", "4", "9", "3", "0.3000"],
    ]
    assert lines[-1] == "same new value in 2 of the 3 elements in both"
    # a mask of its own format, and one that someone else saved with torch.save
    dense = {f"module.{name}": (tensor == base[name]).logical_not().float() for name, tensor in tuned.items()}
    torch.save(dense, files / "salun.pt")
    SparseMask.from_dense({n.removeprefix("module."): m for n, m in dense.items()}).save(files / "mask.safetensors")
    for pair in ("salun.pt mask.safetensors", "a.delta salun.pt"):
        assert run(files, f"compare {pair} --depth 1") == 0
        assert "IoU 1.0000: 4 elements in both, 4 in either" in capsys.readouterr().out
    SparseMask.from_dense({"head.weight": torch.ones(6, 4)}).save(files / "shape.safetensors")
    SparseMask.from_dense({"x": torch.ones(2)}).save(files / "names.safetensors")
    fails(capsys, files, "compare mask.safetensors shape.safetensors", "expected shape (4, 6) for 'head.weight'")
    fails(capsys, files, "compare mask.safetensors names.safetensors", "got 'x'; compare masks of one model")


@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_gets_richs_table(
    rich: bool, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(files, "diff base.safetensors tuned.safetensors -o d.delta")
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    if not rich:
        without(monkeypatch, "rich")
    assert run(files, "summary d.delta") == 0
    out = capsys.readouterr().out
    assert ("─" in out) == rich
    assert "visual.blocks.2.norm.bias" in out


def test_names_break_after_dots() -> None:
    """No piece is wider than it may be, as long as there are dots, and nothing is lost."""
    name = "visual.transformer.resblocks.11.attn.in_proj_weight"
    assert summary.broken(name, 60) == name
    assert summary.broken(name, 34) == "visual.transformer.resblocks.11.\n  attn.in_proj_weight"
    for width in range(22, 60):
        lines = summary.broken(name, width).split("\n")
        assert max(map(len, lines)) <= width
        assert "".join(line.strip() for line in lines) == name
    assert summary.broken("nodots" * 9, 20) == "nodots" * 9
    assert summary.broken("...a", 2) in ("...a", ".\n  ..a", "..\n  .a", "...\n  a")


def test_a_table_fits_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model, with long names."""
    names = [f"visual.transformer.resblocks.{i}.attn.in_proj_weight" for i in range(11)]
    mask = SparseMask({name: torch.arange(10_000) for name in names}, dict.fromkeys(names, (10**5, 10**5)))
    mask.save(tmp_path / "mask.safetensors")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(tmp_path, "summary mask.safetensors") == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[4:6]] == ["visual.transformer.resblocks.0.", "attn.in_proj_weight"]


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed."""
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize("state", ["stacks", "flat", "single", "many", "long"])
def test_png(state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture for models with blocks, without, of one tensor, and of very many."""
    shapes = {
        "stacks": [f"text.blocks.{i}.{kind}.weight" for i in range(12) for kind in ("attn", "mlp", "norm")] + ["head"],
        "flat": ["conv.weight", "fc.weight"],
        "single": ["w"],
        "long": ["encoder." * 40 + "weight"],
        "many": [f"stage{i}.{j}.{kind}" for i in range(9) for j in range(3) for kind in "abcdefghijklmnopqrstuv"]
        + [f"w{i}" for i in range(60)],
    }
    masks = {name: torch.arange(40) < 3 + i % 5 for i, name in enumerate(shapes[state])}
    SparseMask.from_dense(masks).save(tmp_path / "mask.safetensors")
    assert run(tmp_path, "summary mask.safetensors --png where.png") == 0
    assert "where.png: written" in capsys.readouterr().out
    content = (tmp_path / "where.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_a_stack_without_selected_elements_is_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of text says so; where there is nothing but such, no map is drawn."""
    rows = [summary.Row(f"text.{i}.{kind}", 3 + i, 10) for i in range(4) for kind in "ab"]
    rows += [summary.Row(f"visual.{i}.{kind}", 0, 10) for i in range(4) for kind in "ab"]
    drawn: list[str] = []
    plot = summary._plot_stack

    def counted(axis: Any, stack: summary.Stack, norm: Any) -> Any:
        drawn.append(stack.name)
        return plot(axis, stack, norm)

    monkeypatch.setattr(summary, "_plot_stack", counted)
    summary.save_figure(tmp_path / "a.png", "a", rows, 160)
    assert drawn == ["text"]
    summary.save_figure(tmp_path / "b.png", "b", [summary.Row("head", 1, 5), *rows[8:]], 85)
    assert drawn == ["text"]
    assert (tmp_path / "b.png").stat().st_size < (tmp_path / "a.png").stat().st_size


def test_the_picture_covers_every_element() -> None:
    """Parts add up to the mask, by block where there is room, by stack where not."""
    rows = [summary.Row(f"a.{i}.{kind}", i + 1, 10) for i in range(5) for kind in ("w", "b")]
    rows.append(summary.Row("head", 3, 4))
    (stack,) = summary.stacks(rows)
    assert (stack.name, stack.depths, stack.kinds) == ("a", [0, 1, 2, 3, 4], ["b", "w"])
    parts = summary._parts(rows, [stack])
    assert [part.name for part in parts] == ["a.0", "a.1", "a.2", "a.3", "a.4", "head"]
    many = [summary.Row(f"a.{i}.w", 1, 10) for i in range(60)] + [summary.Row(f"w{i}", 1, 2) for i in range(60)]
    parts = summary._parts(many, summary.stacks(many))
    assert (parts[0].name, parts[-1].name) == ("a.*", "18 others")
    assert sum(part.k for part in parts) == 120


def test_png_needs_matplotlib(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(files, "diff base.safetensors tuned.safetensors -o d.delta")
    capsys.readouterr()
    without(monkeypatch, "matplotlib")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    assert run(files, "summary d.delta --png where.png") == 1
    assert "pip install 'saft_kernels[cli]'" in capsys.readouterr().err
    assert not (files / "where.png").exists()


def test_png_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SparseMask.from_dense({"w": torch.zeros(3)}).save(tmp_path / "mask.safetensors")
    assert run(tmp_path, "summary mask.safetensors --png where.png") == 1
    assert "expected selected elements, got none" in capsys.readouterr().err


# ---- examples ----


def test_examples_are_listed_and_written_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["examples"]) == 0
    listed = capsys.readouterr().out.splitlines()
    scripts = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
    assert [line.split()[0] for line in listed] == [script.name for script in scripts]
    assert all(len(line.split()) > 4 for line in listed)
    folder = tmp_path / "scripts"
    assert main.main(["examples", str(folder)]) == 0
    assert f"{folder}: {len(scripts)} scripts" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {s.name: s.read_bytes() for s in scripts}


def test_examples_overwrite_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "finetune_clip.py"
    mine.write_text("mine")
    assert main.main(["examples", str(tmp_path)]) == 1
    assert "expected the name of a new folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [mine.name]
    assert mine.read_text() == "mine"
