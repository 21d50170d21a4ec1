"""Files as they are written and read: whole or not at all, equal bytes for equal content, memory of their own."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import assert_same_bits
from torch import Tensor

from saft_kernels.common import tensor_files
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
