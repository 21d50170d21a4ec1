"""Files as they are written and read: whole or not at all, equal bytes for equal content, memory of their own."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import assert_same_bits
from torch import Tensor

from saft_kernels.common import files, tensor_files
from saft_kernels.delta import file as delta_file

State = dict[str, Tensor]
NAMES = ["w", "layer.0.bias", "größe", 'quote"\\', "tab\t\n\x1f\x7f", ""]


def every_dtype() -> State:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for i, dtype in enumerate(delta_file.DTYPES):
        shape = [(3, 5), (), (0, 2), (7,)][i % 4]
        numel = torch.Size(shape).numel()
        raw = torch.randint(2 if dtype == torch.bool else 256, (numel * dtype.itemsize,), generator=generator)
        state[NAMES[i % len(NAMES)] + str(dtype)] = raw.to(torch.uint8).view(dtype).reshape(shape)
    return state


def written(path: Path, state: State, metadata: dict[str, str]) -> bytes:
    with open(path, "wb") as file:
        tensor_files.write(file, state, metadata)
    return path.read_bytes()


def same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same_bits(actual[name], expected[name], name)


def test_ours_are_theirs_and_theirs_are_ours(tmp_path: Path) -> None:
    """Every dtype and odd names, through the safetensors package in both directions."""
    state, metadata = every_dtype(), {name: name for name in reversed(NAMES)}
    same(safetensors.torch.load(written(tmp_path / "ours", state, metadata)), state)
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == metadata
    safetensors.torch.save_file(state, tmp_path / "theirs", metadata)
    found, tensors = tensor_files.read(tmp_path / "theirs")
    assert found == metadata
    same(tensors, state)
    # but for the order of the metadata it is the same file, which it has by chance alone
    assert len((tmp_path / "theirs").read_bytes()) == len((tmp_path / "ours").read_bytes())


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    state, metadata = every_dtype(), {str(i): str(i) for i in range(20)}
    other = {name: state[name] for name in reversed(state)}
    again = dict(reversed(metadata.items()))
    assert written(tmp_path / "a", state, metadata) == written(tmp_path / "b", other, again)


def file_of(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes and no header"),
        (struct.pack("<Q", 2**62) + b"{}", "no header that fits"),
        (struct.pack("<Q", 4) + b"{}", "no header that fits"),
        (file_of([1], b""), "no JSON object"),
        (file_of(b'{"a":' * 200_000, b""), "nested too deeply"),
        (file_of(b'{"a":1,"a":1}', b""), "a name twice"),
        (file_of({"__metadata__": {"a": 1}}, b""), "no texts"),
        (file_of({"__metadata__": [1]}, b""), "no texts"),
        (file_of(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""), "surrogates not allowed"),
        (file_of({"a": 1}, b""), "no dtype, shape and offsets"),
        (file_of({"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}, b"1"), "no sound entry"),
        (file_of({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"1"), "no number of 0 or more"),
        (file_of({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"1"), "no number of 0 or more"),
        (file_of({"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}, b"1"), "no number of 0 or more"),
        (file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "ask for 8"),
        (file_of({"a": {"dtype": "F4", "shape": [2], "data_offsets": [1, 0]}}, b""), "ask for 0"),
        (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12"), "speaks of"),
        (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b""), "speaks of"),
        (file_of({n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "ab"}, b"12"), "do not follow"),
    ],
)
def test_headers_that_lie(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tensor_files.read(tmp_path / "f")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(content)


def test_what_they_refuse_we_refuse(tmp_path: Path) -> None:
    """Altered bytes, lengths and numbers: never a file that the safetensors package does not read."""
    state = {"w": torch.arange(6.0).view(2, 3), "b": torch.arange(3, dtype=torch.int16), "e": torch.zeros(0, 4)}
    content = written(tmp_path / "f", state, {"format": "pt"})
    rng = random.Random(0)
    outcomes = {"both": 0, "neither": 0}
    for _ in range(3000):
        altered = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(len(altered))
            kind = rng.randrange(4)
            if kind == 0:
                altered[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del altered[at : at + rng.randrange(1, 9)]
            elif kind == 2:
                altered[at:at] = rng.choice((b"0", b"9", b"-", b",", b'"', b"{", b"[1]", b"\\u0041", bytes(3)))
            else:
                altered[at] = rng.choice(b'0123456789{}[]",: ')
            if not altered:
                break
        try:
            expected = safetensors.torch.load(bytes(altered))
        except Exception:
            expected = None
        path = tmp_path / "altered"
        path.write_bytes(altered)
        if expected is None:
            with pytest.raises(ValueError):  # noqa: PT011 - whatever is wrong with it
                tensor_files.read(path)
            outcomes["neither"] += 1
        else:
            same(tensor_files.read(path)[1], expected)
            outcomes["both"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    """It is a whole file; the tensor is an error where it is read."""
    (tmp_path / "f").write_bytes(file_of({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"123"))
    with open(tmp_path / "f", "rb") as file:
        assert tensor_files.read_header(file).entries["a"].end == (tmp_path / "f").stat().st_size
    with pytest.raises(ValueError, match="got F6_E2M3 for 'a'"):
        tensor_files.read(tmp_path / "f")


def test_names_that_no_file_can_hold(tmp_path: Path) -> None:
    for name, message in (("__metadata__", "got '__metadata__'"), ("w\udc80", "expected names that are text")):
        with pytest.raises(ValueError, match=message):
            written(tmp_path / "f", {name: torch.ones(1)}, {})


@pytest.mark.parametrize("how", ["shorter", "longer", "other", "touched"])
def test_a_file_that_changes_while_it_is_read(how: str, tmp_path: Path) -> None:
    """Between the header and the tensors."""
    path = tmp_path / "f"
    written(path, {"w": torch.arange(10_000.0)}, {})

    def change(_: object) -> None:
        if how == "shorter":
            os.truncate(path, 20_000)
        elif how == "longer":
            with open(path, "ab") as file:
                file.write(b"more")
        elif how == "other":
            with open(path, "r+b") as file:
                file.seek(30_000)
                file.write(b"other")
        os.utime(path, ns=(1, 1))

    with pytest.raises(ValueError, match="become shorter" if how == "shorter" else "written to while it was read"):
        tensor_files.read(path, change)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    """The old one is read to its end."""
    path = tmp_path / "f"
    written(path, {"w": torch.arange(10.0)}, {})

    def replace(_: object) -> None:
        written(tmp_path / "g", {"w": torch.zeros(10)}, {})
        os.replace(tmp_path / "g", path)

    assert tensor_files.read(path, replace)[1]["w"].tolist() == list(range(10))


# ---- writing ----


def put(path: Path, content: bytes) -> None:
    with files.replacing(path) as file:
        file.write(content)


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for mode in (0o600, 0o640, 0o664, 0o755):
        path.write_bytes(b"old")
        path.chmod(mode)
        with files.replacing(path) as file:
            # nobody else may read it before it is whole, either
            assert os.fstat(file.fileno()).st_mode & 0o777 == mode
            file.write(b"new")
        assert path.stat().st_mode & 0o777 == mode
        assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(0o640)
    os.chown(path, 12345, 23456)
    put(path, b"new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (12345, 23456, 0o640)


def test_a_group_that_cannot_be_kept_passes_nothing_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own group may do what everybody may, not what the old group might."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(0o674)
    old = os.stat_result((*path.stat()[:5], path.stat().st_gid + 1, *path.stat()[6:]))
    monkeypatch.setattr(files.os, "fchown", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with open(tmp_path / "g", "wb") as file:
        files._take_mode(file.fileno(), old)
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o644


def test_no_umask_of_the_process_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between setting it and setting it back, files of other threads would have it."""

    def umask(_: int) -> int:
        raise AssertionError("umask was set")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", umask)
            put(tmp_path / "f", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_a_link_is_written_through(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name, there in (("to_old", True), ("to_nothing", False)):
        if there:
            (folder / name).write_bytes(b"old")
        (tmp_path / name).symlink_to(Path("elsewhere") / name)
        (tmp_path / f"again_{name}").symlink_to(name)
        put(tmp_path / f"again_{name}", b"new")
        assert (tmp_path / f"again_{name}").is_symlink()
        assert (tmp_path / name).is_symlink()
        assert not (folder / name).is_symlink()
        assert (folder / name).read_bytes() == b"new"


def test_outputs_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, kind, message in [
        ("folder", IsADirectoryError, "expected a file, got a folder; name a file in it"),
        ("pipe", OSError, "expected a regular file, got"),
        ("loop", OSError, "expected a regular file, got a link to itself"),
        ("nowhere/f", FileNotFoundError, "expected an existing folder; make"),
        ("pipe/f", FileNotFoundError, "expected an existing folder; make"),
    ]:
        with pytest.raises(kind, match=message) as error:
            put(tmp_path / name, b"new")
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert ".saft-tmp" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    read, write = os.pipe()  # as /dev/stdout is, in a shell's pipe
    with (
        open(read),
        open(write),
        pytest.raises(OSError, match="expected a regular file, got a link to itself, a device"),
    ):
        put(Path(f"/dev/fd/{write}"), b"new")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_output(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, not a temporary file; root, whom nothing stops, is told that something would."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    refused = path if what == "file" else tmp_path
    monkeypatch.setattr(files.os, "access", lambda asked, _: Path(asked) != refused)
    with pytest.raises(PermissionError, match=f"expected a {what} that may be written") as error:
        put(path, b"new")
    assert str(error.value).startswith(f"{path}: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["n" * 242, "n" * 243, "n" * 255, "ü" * 127, "語" * 85])
def test_long_names(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, b"old")
    put(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def size_limit() -> Iterator[Callable[[int], None]]:
    """A file can become no larger than this: as on a full disk, a write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 100, 5_000, 40_050, 41_300])
@pytest.mark.parametrize("how", ["ours", "torch"])
def test_a_full_disk(how: str, limit: int, tmp_path: Path, size_limit: Callable[[int], None]) -> None:
    """In the header, in the data, and in torch's last bytes; the message names the output alone."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    state = {"w": torch.ones(10_000), "b": torch.ones(300)}

    def save() -> None:
        with files.replacing(path) as file:
            if how == "ours":
                tensor_files.write(file, state, {})
            else:
                torch.save(state, file)

    size_limit(limit)
    try:
        with pytest.raises(OSError, match="expected to write it, got: File too large; free some space") as error:
            save()
    finally:
        size_limit(resource.RLIM_INFINITY)
    assert str(error.value).startswith(f"{path}: ")
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    save()
    assert path.stat().st_size > 41_200


def test_an_error_that_is_not_about_the_output_stays_what_it_is(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "other"), RuntimeError("other"), KeyError("other")):
        with pytest.raises(type(error)) as raised, files.replacing(tmp_path / "f"):
            raise error
        assert raised.value is error
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from saft_kernels.common import files
with files.replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    signal.pause()
"""


def test_what_a_killed_process_leaves_the_next_one_removes(tmp_path: Path) -> None:
    """And not what a living one is writing, nor what belongs to another output."""
    path = tmp_path / ("n" * 250)
    alive, killed, other = (
        subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
        for target in (path, path, tmp_path / "other")
    )
    try:
        for process in (alive, killed, other):
            assert process.stdout.readline() == "writing\n"
        for process in (killed, other):
            process.kill()
            process.wait()
        assert len(list(tmp_path.iterdir())) == 3
        (tmp_path / f".{path.name[:9]}.mine.tmp").write_bytes(b"")
        put(path, b"new")
        assert path.read_bytes() == b"new"
        assert len(list(tmp_path.iterdir())) == 4  # of alive, of other, mine, the output
        put(tmp_path / "other", b"new")
        assert len(list(tmp_path.iterdir())) == 4
        alive.kill()
        alive.wait()
        put(path, b"newer")
        left = sorted(entry.name for entry in tmp_path.iterdir())
        assert left == sorted([f".{path.name[:9]}.mine.tmp", "other", path.name])
    finally:
        for process in (alive, killed, other):
            process.kill()
            process.wait()
            process.stdout.close()


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """The one that ends last wins; neither removes what the other is writing."""
    with files.replacing(tmp_path / "f") as first, files.replacing(tmp_path / "f") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "f").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_temporary_file_that_is_taken_for_abandoned_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its locking, another process may remove it."""
    lock, removed = files.fcntl.flock, []

    def remove_first(descriptor: int, how: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", remove_first)
    put(tmp_path / "f", b"new")
    assert len(removed) == 1
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_interrupt_at_any_line_leaves_nothing(what: str, tmp_path: Path) -> None:
    """Ctrl-C before each line in turn: the output is there whole or not at all, and nothing else is."""
    target, lines = tmp_path / "f", 0

    def stop(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in (files.__file__, contextlib.__file__):
            return None
        if event == "line":
            lines -= 1
            if lines == 0:
                raise KeyboardInterrupt
        return stop

    def work() -> None:
        if what == "file":
            put(target, b"new")
            return
        with files.new_folder(target) as folder:
            (folder / "f").write_bytes(b"new")

    for start in range(1, 500):
        lines = start
        interrupted = False
        before = sys.gettrace()
        gc.disable()  # what it finalizes would be traced, and interrupted in place of the work
        sys.settrace(stop)
        try:
            work()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
            gc.enable()
        left = {entry.name for entry in tmp_path.iterdir()}
        assert left <= {"f"}
        if left:
            assert (target if what == "file" else target / "f").read_bytes() == b"new"
            shutil.rmtree(target) if what == "folder" else target.unlink()
        if not interrupted:
            break
    assert start > 40
    assert not interrupted
