"""The tables of the compiled backends: every struct has the fields that csrc/ declares, in order, under its names."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from saft_kernels.ops import tables
from saft_kernels.ops.dtypes import DTYPE_CODES

SOURCES = sorted((Path(__file__).resolve().parents[1] / "csrc").rglob("*.h"))
STRUCTS = {
    "TensorDesc": tables.TENSOR_DESC,
    "AdamWSegment": tables.ADAMW_SEGMENT,
    "AdamWHyper": tables.ADAMW_HYPER,
    "AdamWCudaHyper": tables.ADAMW_CUDA_HYPER,
    "GatherSegment": tables.GATHER_SEGMENT,
    "TopKRows": tables.TOPK_ROWS,
    "SddmmFactor": tables.SDDMM_FACTOR,
    "SddmmParams": tables.SDDMM_PARAMS,
}


def declared(struct: str) -> list[tuple[str, str]]:
    """Name and type of each member, as a header has them."""
    (body,) = [
        found[1]
        for source in SOURCES
        if (found := re.search(rf"\nstruct {struct} {{\n(.*?)\n}};", source.read_text(), flags=re.DOTALL))
    ]
    members = []
    for declaration in re.sub(r"//[^\n]*", "", body).split(";")[:-1]:
        kind, names = re.match(r"\s*(?:const )?(\w+\*?)\s+(.*)", declaration, flags=re.DOTALL).groups()
        for name in names.split(","):
            members.append((name.strip(" *"), "pointer" if "*" in kind + name else kind))
    return members


@pytest.mark.parametrize("struct", STRUCTS)
def test_fields_are_those_of_the_struct(struct: str) -> None:
    dtype = STRUCTS[struct]
    expected = declared(struct)
    assert list(tables.names(dtype)) == [name for name, _ in expected]
    for name, kind in expected:
        if kind in STRUCTS:
            assert dtype[name] == STRUCTS[kind], name
        else:
            assert dtype[name] == (np.float64 if kind == "double" else np.int64), name
            assert kind in ("double", "pointer", "index_t", "ScalarType"), name
    offsets = [dtype.fields[name][1] for name in tables.names(dtype)]
    sizes = [dtype[name].itemsize for name in tables.names(dtype)]
    assert offsets == np.cumsum([0, *sizes[:-1]]).tolist()  # no padding, as every member is 64 bits wide
    assert dtype.itemsize == sum(sizes)


def test_codes_are_those_of_the_enum() -> None:
    (header,) = [source for source in SOURCES if source.name == "common.h" and source.parent.name == "csrc"]
    (body,) = re.findall(r"enum class ScalarType : int64_t {(.*?)};", header.read_text())
    codes = dict(member.strip().removeprefix("k").lower().split(" = ") for member in body.split(","))
    assert codes == {str(dtype).removeprefix("torch."): str(code) for dtype, code in DTYPE_CODES.items()}


def test_packed_rows_are_rows_of_the_struct() -> None:
    """Every field from the attribute of its name, those of nested structs included."""

    class Source:
        def __init__(self, row: np.dtype[np.void], first: int = 1) -> None:
            for value, name in enumerate(tables.names(row), first):
                setattr(self, name, Source(row[name], 100) if row[name].names else value)

    packed = tables.packer(tables.ADAMW_CUDA_HYPER)(Source(tables.ADAMW_CUDA_HYPER))
    (row,) = np.frombuffer(packed, tables.ADAMW_CUDA_HYPER)
    assert row["number"].tolist() == tuple(range(100, 109))
    assert row.tolist()[1:] == tuple(range(2, 10))


def test_fields_of_sddmm_params() -> None:
    """They are packed by position."""
    dy, x = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(7, 5, dtype=torch.float64).t()
    indices, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float64)
    (row,) = np.frombuffer(tables.sddmm_params(dy, x, indices, out, True), tables.SDDMM_PARAMS)
    assert row["dy"].tolist() == (dy.data_ptr(), 3, 1)
    assert row["x"].tolist() == (x.data_ptr(), 1, 5)
    assert row["dtype"] == DTYPE_CODES[torch.float64]
    assert (row["num_tokens"], row["num_outputs"], row["num_inputs"]) == (5, 3, 7)
    assert (row["indices"], row["index_bytes"], row["values"]) == (indices.data_ptr(), 4, out.data_ptr())
    assert (row["k"], row["accumulate"]) == (2, 1)


def test_layouts_outlive_what_they_describe() -> None:
    layouts = tables.Layouts()
    tensors = [
        torch.zeros(3, 4).t(),
        torch.zeros(5),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(7, 4, 3)[:, :2].mT,
        torch.zeros(2, 1),
    ]
    expected = [tables.layout(t) for t in tensors]
    table = tables.tensor_table(layouts, tensors)
    del tensors
    assert table["ndim"].tolist() == [2, 0, 1, 3, 0]
    for row, sizes_and_strides in zip(table, expected, strict=True):
        if sizes_and_strides:
            array = (ctypes.c_int64 * len(sizes_and_strides)).from_address(int(row["layout"]))
            assert tuple(array) == sizes_and_strides
        else:
            assert row["layout"] == 0
    layouts.write(table, [()] * 5)
    assert not table["ndim"].any()
    assert not table["layout"].any()
