"""SparseMask: a set of flat indices per tensor, and its file."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import assert_message
from torch import Tensor, nn

from saft_kernels import SparseMask
from saft_kernels.common import files, tensor_files

LARGE = (2**16, 2**16)  # 2^32 elements: a shape alone, no memory


def a_mask() -> SparseMask:
    indices = {
        "matrix": torch.tensor([0, 5, 11], dtype=torch.int32),
        "scalar": torch.tensor([0], dtype=torch.int32),
        "frozen": torch.empty(0, dtype=torch.int32),
        "large": torch.tensor([3, 2**31 + 5, 2**32 - 1]),
        "empty": torch.empty(0, dtype=torch.int64),
    }
    return SparseMask(indices, {"matrix": (3, 4), "scalar": (), "frozen": (2, 2), "large": LARGE, "empty": (0, 7)})


def random_masks(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.rand(shape, generator=generator) < 0.3 for i, shape in enumerate([(5, 7), (), (0,), (40,)])}


def test_it_is_a_mapping_of_indices() -> None:
    mask = a_mask()
    assert list(mask) == ["matrix", "scalar", "frozen", "large", "empty"]
    assert len(mask) == 5
    assert mask["large"].tolist() == [3, 2**31 + 5, 2**32 - 1]
    assert {name: index.dtype for name, index in mask.items()} == {
        **dict.fromkeys(["matrix", "scalar", "frozen", "empty"], torch.int32),
        "large": torch.int64,
    }
    assert mask.shapes["scalar"] == ()
    assert mask.k == 7
    assert mask.numel == 12 + 1 + 4 + 2**32
    assert mask.density == 7 / mask.numel
    assert repr(mask) == "SparseMask(k=7, density=0.000%, tensors=5)"


def test_int32_up_to_2_31() -> None:
    below = SparseMask({"w": torch.tensor([2**31 - 2])}, {"w": (2**31 - 1,)})
    above = SparseMask({"w": torch.tensor([2**31 - 1])}, {"w": (2**31,)})
    assert (below["w"].dtype, above["w"].dtype) == (torch.int32, torch.int64)
    assert (below["w"].item(), above["w"].item()) == (2**31 - 2, 2**31 - 1)


def test_it_is_a_copy() -> None:
    index = torch.tensor([1, 2], dtype=torch.int32)
    mask = SparseMask({"w": index}, {"w": (5,)})
    index[0] = 0
    assert mask["w"].tolist() == [1, 2]


def test_equality() -> None:
    assert a_mask() == a_mask()
    dense = random_masks(0)
    mask = SparseMask.from_dense(dense)
    dense["w0"][0, 0] = ~dense["w0"][0, 0]
    assert mask != SparseMask.from_dense(dense)
    assert mask != SparseMask.from_dense({name: value.reshape(-1) for name, value in random_masks(0).items()})
    assert mask != "a mask"
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert copied == mask


def test_dense_round_trip() -> None:
    dense = random_masks(1)
    mask = SparseMask.from_dense(dense)
    assert mask.k == sum(int(value.sum()) for value in dense.values())
    back = mask.to_dense()
    assert list(back) == list(dense)
    for name, value in dense.items():
        assert back[name].dtype == torch.bool
        assert torch.equal(back[name], value)
    # the flat order is that of the logical tensor, whatever the memory order
    transposed = SparseMask.from_dense({"w0": dense["w0"].t().contiguous().t()})
    assert torch.equal(transposed["w0"], mask["w0"])
    assert SparseMask.from_dense({"w": torch.tensor([0.0, 2.0, -1.0])})["w"].tolist() == [1, 2]


def test_a_dense_mask_takes_memory_for_what_is_selected() -> None:
    """2^33 elements would be 8 GiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dense = SparseMask({"w": torch.tensor([5, 2**33 - 1])}, {"w": (2**20, 2**13)}).to_dense()["w"]
    assert dense.shape == (2**20, 2**13)
    assert [bool(dense.view(-1)[i]) for i in (4, 5, 6, -2, -1)] == [False, True, False, False, True]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    for shape in ((2**45,), (2**62,), (2**31, 2**31, 4)):
        with pytest.raises(torch.OutOfMemoryError, match="expected it to fit in memory") as error:
            SparseMask({"w": torch.tensor([5])}, {"w": shape}).to_dense()
        assert_message(error, [f"dense mask of 'w', {math.prod(shape):,} elements", "use its indices: mask['w']"])


def test_iou() -> None:
    a, b = (SparseMask.from_dense(random_masks(seed)) for seed in (2, 3))
    both = sum(int((x & y).sum()) for x, y in zip(random_masks(2).values(), random_masks(3).values(), strict=True))
    either = sum(int((x | y).sum()) for x, y in zip(random_masks(2).values(), random_masks(3).values(), strict=True))
    assert 0 < both < either
    assert a.iou(b) == b.iou(a) == both / either
    assert a.iou(a) == 1.0
    inverse = SparseMask.from_dense({name: ~value for name, value in random_masks(2).items()})
    assert a.iou(inverse) == 0.0
    nothing = SparseMask.from_dense({"w": torch.zeros(3)})
    assert nothing.iou(nothing) == 1.0
    with pytest.raises(ValueError, match=r"'w0' has shape \(5, 7\) here and None there"):
        a.iou(nothing)
    scalar, one = (SparseMask.from_dense({"w": torch.ones(shape)}) for shape in ((), (1,)))
    with pytest.raises(ValueError, match=r"'w' has shape \(\) here and \(1,\) there"):
        scalar.iou(one)


def test_summary() -> None:
    summary = a_mask().summary()
    assert [(row.name, row.shape, row.numel, row.k) for row in summary.rows] == [
        ("matrix", (3, 4), 12, 3),
        ("scalar", (), 1, 1),
        ("frozen", (2, 2), 4, 0),
        ("large", LARGE, 2**32, 3),
        ("empty", (0, 7), 0, 0),
    ]
    assert [row.density for row in summary.rows[:3]] == [0.25, 1.0, 0.0]
    assert summary.rows[4].density == 0.0
    lines = str(summary).splitlines()
    assert [line.split() for line in lines] == [
        ["tensor", "selected", "numel", "density", "share"],
        ["matrix", "3", "12", "25.000%", "42.86%"],
        ["scalar", "1", "1", "100.000%", "14.29%"],
        ["large", "3", "4,294,967,296", "0.000%", "42.86%"],
        ["total", "7", "4,294,967,313", "0.000%", "100%"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert "total" in str(SparseMask({}, {}).summary())


# ---- arguments ----


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        (torch.tensor([0, 12]), ValueError, "expected flat positions in [0, 12), got 0 to 12;"),
        (torch.tensor([-1, 3]), ValueError, "expected flat positions in [0, 12), got -1 to 3;"),
        (torch.tensor([3, 1]), ValueError, "expected ascending and distinct"),
        (torch.tensor([3, 3]), ValueError, "expected ascending and distinct"),
        (torch.tensor([[3]]), TypeError, "expected one-dimensional int32 or int64, got int64 of shape (1, 1);"),
        (torch.tensor([1.0]), TypeError, "expected one-dimensional int32 or int64, got float32 of shape (1,);"),
        (torch.tensor([True]), TypeError, "got bool of shape (1,); SparseMask.from_dense takes bool tensors"),
    ],
)
def test_bad_indices(index: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        SparseMask({"w": index}, {"w": (3, 4)})
    assert_message(error, ["indices of 'w'", message])


def test_names_of_shapes() -> None:
    with pytest.raises(ValueError, match=r"`shapes`: expected the names of `indices`, got a difference: 'b'"):
        SparseMask({"a": torch.tensor([0])}, {"a": (2,), "b": (2,)})


def test_bind() -> None:
    mask = a_mask()
    small = {name: shape for name, shape in mask.shapes.items() if name != "large"}
    mask = SparseMask({name: mask[name] for name in small}, small)
    model = {name: nn.Parameter(torch.zeros(shape)) for name, shape in reversed(small.items())}
    bound = mask.bind(model.items())
    assert [index.tolist() for index in bound] == [mask[name].tolist() for name in model]
    # a part of the model will do, where nothing is selected in the rest
    assert len(mask.bind([(name, p) for name, p in model.items() if name != "frozen"])) == 3
    assert mask.bind([(n, p.to("meta")) for n, p in model.items()])[0].device.type == "meta"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["frozen", "scalar"], "got a mask for another one: 'matrix' not in the model; pass"),
        (["matrix", "scalar", "a", "b", "c", "d"], "'a', 'b', 'c' and 1 more not in the mask; pass"),
        (["other.matrix", "scalar"], "'matrix' not in the model, 'other.matrix' not in the mask; pass"),
    ],
)
def test_bind_to_other_names(names: list[str], message: str) -> None:
    shapes = {"matrix": (3, 4), "scalar": (), "frozen": (2, 2)}
    mask = SparseMask({name: a_mask()[name] for name in shapes}, shapes)
    with pytest.raises(ValueError, match="`mask`") as error:
        mask.bind((name, torch.zeros(shapes.get(name, (3, 4)))) for name in names)
    assert_message(error, [message, "model.named_parameters()"])


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]
)
@pytest.mark.parametrize("inner", ["", "block._checkpoint_wrapped_module."])
def test_bind_to_a_wrapped_model(prefix: str, inner: str) -> None:
    """A mask of the bare model, for the wrapped one, and the other way round."""
    names = {"block.w": (3, 4), "head": (5,)}
    bare = SparseMask.from_dense({name: torch.arange(math.prod(s)).view(s) % 2 for name, s in names.items()})
    wrapped = {prefix + name.replace("block.", inner or "block."): name for name in names}
    bound = bare.bind([(name, torch.zeros(names[own])) for name, own in wrapped.items()])
    assert [index.tolist() for index in bound] == [bare[name].tolist() for name in names]
    other = SparseMask(
        {name: bare[own] for name, own in wrapped.items()}, {n: names[own] for n, own in wrapped.items()}
    )
    bound = other.bind([(name, torch.zeros(shape)) for name, shape in names.items()])
    assert [index.tolist() for index in bound] == [bare[name].tolist() for name in names]


def test_bind_takes_a_module_of_that_name_for_what_it_is() -> None:
    """`module.w` may be a parameter of the bare model, beside `w`."""
    mask = SparseMask.from_dense({"module.w": torch.tensor([1, 0]), "w": torch.tensor([0, 1])})
    assert [i.tolist() for i in mask.bind([("w", torch.zeros(2)), ("module.w", torch.zeros(2))])] == [[1], [0]]
    wrapped = [("module.w", torch.zeros(2)), ("module.module.w", torch.zeros(2))]
    assert [index.tolist() for index in mask.bind(wrapped)] == [[1], [0]]


def test_bind_to_another_shape() -> None:
    mask = SparseMask.from_dense({"w": torch.ones(3, 4)})
    with pytest.raises(ValueError, match="`mask`") as error:
        mask.bind([("w", torch.zeros(4, 3))])
    assert_message(error, ["expected shape (4, 3) for 'w', got (3, 4)", "a mask for another model"])


# ---- files ----


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask = a_mask()
    mask.save(path)
    loaded = SparseMask.load(str(path))
    assert loaded == mask
    assert list(loaded) == list(mask)
    assert loaded["large"].dtype == torch.int64
    assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]


def test_file_size(tmp_path: Path) -> None:
    """4 bytes per selected element, and a header of under 200 bytes per tensor."""
    dense = {
        f"layer.{i}.weight": torch.rand(300, 100, generator=torch.Generator().manual_seed(i)) < 0.1 for i in range(9)
    }
    mask = SparseMask.from_dense(dense)
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    assert mask.k > 20_000
    assert path.stat().st_size <= 4 * mask.k + 200 * len(mask)


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    before = os.umask(0o027)
    try:
        a_mask().save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.safetensors"
    old = SparseMask.from_dense({"w": torch.ones(3)})
    old.save(path)

    def disk_full(file: Any, tensors: Any, metadata: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_files, "write", disk_full)
    with pytest.raises(OSError, match="No space left"):
        a_mask().save(path)
    assert SparseMask.load(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.safetensors"
    old = SparseMask.from_dense({"w": torch.ones(3)})
    old.save(path)

    def refuse(source: Any, target: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(PermissionError):
        a_mask().save(path)
    monkeypatch.undo()
    assert SparseMask.load(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]


def other_files() -> dict[str, tuple[bytes, str]]:
    def file(tensors: dict[str, Tensor], **metadata: str) -> bytes:
        return safetensors.torch.save(tensors, metadata)

    ours = {"format": "saft_kernels.SparseMask", "version": "1"}
    index = {"w": torch.tensor([1, 2], dtype=torch.int32)}
    shapes = json.dumps({"w": [4]})
    good = file(index, **ours, shapes=shapes)
    torch_file = io.BytesIO()
    torch.save(index, torch_file)
    return {
        "nothing": (b"", ""),
        "text": (b"not a mask at all, whatever its name says", ""),
        "torch": (torch_file.getvalue(), ""),
        "truncated": (good[:-5], ""),
        "truncated_header": (good[:20], ""),
        "weights": (file({"w": torch.ones(3)}), "its format is None"),
        "another_format": (file(index, format="pt"), "its format is 'pt'"),
        "another_version": (file(index, **{**ours, "version": "2"}, shapes=shapes), "its version is '2'"),
        "no_shapes": (file(index, **ours), "shapes"),
        "bad_shapes": (file(index, **ours, shapes="[1"), ""),
        "shapes_of_no_mapping": (file(index, **ours, shapes="7"), ""),
        "negative_shape": (file(index, **ours, shapes='{"w": [-4, -4]}'), "expected sizes of 0 or more"),
        "index_out_of_range": (file(index, **ours, shapes='{"w": [2]}'), "expected flat positions in [0, 2)"),
        "unknown_tensor": (file(index, **ours, shapes='{"v": [2]}'), "expected the names of `indices`"),
        "floats": (file({"w": torch.ones(2)}, **ours, shapes=shapes), "got float32"),
    }


@pytest.mark.parametrize("case", other_files())
def test_other_files(case: str, tmp_path: Path) -> None:
    content, message = other_files()[case]
    path = tmp_path / f"{case}.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a mask saved by SparseMask\.save") as error:
        SparseMask.load(path)
    assert_message(error, [str(path), message])


def test_no_flipped_bit_makes_another_mask(tmp_path: Path) -> None:
    """Every bit of a file: each is noticed."""
    mask = SparseMask.from_dense({"w": torch.arange(40) % 3 == 0, "b": torch.ones(2), "frozen": torch.zeros(3)})
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    content = path.read_bytes()
    for at in range(8 * len(content)):
        altered = bytearray(content)
        altered[at // 8] ^= 1 << at % 8
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"expected a mask saved by SparseMask\.save"):
            SparseMask.load(path)


def test_files_of_and_for_the_version_before_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask = a_mask()
    old = {"format": "saft_kernels.SparseMask", "version": "1", "shapes": json.dumps(mask.shapes)}
    stored = {name: index for name, index in mask.items() if index.numel()}
    safetensors.torch.save_file(stored, path, old)
    assert SparseMask.load(path) == mask
    # what that version reads of a new file: other metadata than these it does not look at
    mask.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in old} == old
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    contents = set()
    for i in range(5):
        a_mask().save(tmp_path / f"{i}.safetensors")
        contents.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(contents) == 1


def test_a_loaded_mask_does_not_follow_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask = SparseMask.from_dense({"w": torch.ones(100_000)})
    mask.save(path)
    loaded = SparseMask.load(path)
    os.truncate(path, 0)
    assert loaded == mask


def test_a_name_that_no_file_can_hold(tmp_path: Path) -> None:
    """It is an error where the mask is saved, not where it is loaded."""
    mask = SparseMask.from_dense({"w": torch.ones(2), "__metadata__": torch.ones(2)})
    with pytest.raises(ValueError, match="got '__metadata__'") as error:
        mask.save(tmp_path / "mask.safetensors")
    assert_message(error, ["rename that tensor"])
    assert not list(tmp_path.iterdir())
    unselected = SparseMask.from_dense({"w": torch.ones(2), "__metadata__": torch.zeros(2)})
    unselected.save(tmp_path / "mask.safetensors")
    assert SparseMask.load(tmp_path / "mask.safetensors") == unselected


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SparseMask.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError):
        a_mask().save(tmp_path / "nowhere" / "mask.safetensors")


# ---- dictionaries of masks, as SalUn and others save them ----


def test_from_dense_for_a_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    saved = {  # float 0/1, saved from DistributedDataParallel, without the norm's bias
        "module.1.weight": torch.tensor([0.0, 1.0]),
        "module.0.weight": torch.tensor([[1.0, 0, 0], [0, 0, 1]]),
        "module.0.bias": torch.tensor([False, True]),
    }
    torch.save(saved, tmp_path / "with_0.5.pt")
    masks = torch.load(tmp_path / "with_0.5.pt", map_location="cpu", weights_only=True)
    mask = SparseMask.from_dense(masks, model)
    assert list(mask) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [index.tolist() for index in mask.bind(model.named_parameters())] == [[0, 5], [1], [1], []]
    assert SparseMask.from_dense(masks, nn.DataParallel(model)).shapes.keys() == saved.keys() | {"module.1.bias"}
    assert SparseMask.from_dense({}, model).k == 0
    with pytest.raises(ValueError, match=r"got 'head\.weight'") as error:
        SparseMask.from_dense({"0.weight": torch.ones(2, 3), "head.weight": torch.ones(2)}, model)
    assert_message(error, ["`masks`", "they are called '0.weight', '0.bias', '1.weight' and 1 more"])
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\)") as error:
        SparseMask.from_dense({"module.0.weight": torch.ones(3, 2)}, model)
    assert_message(error, ["`masks`['module.0.weight']", "got (3, 2)"])
    with pytest.raises(TypeError, match="expected a tensor, got int") as error:
        SparseMask.from_dense({"epoch": 3})
    assert_message(error, ["`masks`['epoch']"])
