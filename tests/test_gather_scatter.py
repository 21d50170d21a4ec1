"""gather and scatter_: bits are copied, so every comparison is of bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import DEFAULTS, Backend, assert_message, assert_same_bits, other_default, sparse_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saft_kernels
from saft_kernels import gather, ops, scatter_

OP = "gather"

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# views of a flat tensor of 720 elements and more; none maps two elements to one place, so all can be written
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x,
    "step_3": lambda x: x[1::3],
    "matrix": lambda x: x[:720].view(24, 30),
    "transposed": lambda x: x[:720].view(24, 30).t(),
    "narrow_columns": lambda x: x[:720].view(24, 30)[:, 4:7],
    "channels_last": lambda x: x[:720].view(6, 4, 5, 6).permute(0, 3, 1, 2),
    "permuted_4d": lambda x: x[:720].view(4, 6, 5, 6)[1:, ::2, :, 1:].permute(3, 1, 0, 2),
    "size_1_dims": lambda x: x[None, ::2, None],
    "zero_dim": lambda x: x[3],
}


def random_values(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits the dtype has: NaN payloads, denormals, -0."""
    rng = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, numel).astype(np.bool_))
    values = torch.empty(numel, dtype=dtype)
    values.view(torch.uint8).copy_(torch.from_numpy(rng.integers(0, 256, numel * dtype.itemsize, dtype=np.uint8)))
    return values


def random_index(numel: int, count: int, dtype: torch.dtype = torch.int64, seed: int = 0) -> Tensor:
    """Distinct positions in no order."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(numel)[:count]).to(dtype)


def elements(tensor: Tensor) -> list[bytes]:
    """The bytes of every element in logical order, one by one: as plain as an oracle gets."""
    flat = tensor.detach().cpu().reshape(-1)
    raw = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat).view(torch.uint8).numpy().tobytes()
    size = flat.dtype.itemsize
    return [raw[i : i + size] for i in range(0, len(raw), size)]


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](backend.to(random_values(1_000, dtype)))
    source = elements(tensor)
    for index_dtype in (torch.int32, torch.int64):
        index = random_index(len(source), len(source) // 2 + 1, index_dtype)
        (values,) = backend.gather([tensor], [backend.to(index)])
        assert values.dtype == dtype
        assert values.device == tensor.device
        assert values.shape == index.shape
        assert values.is_contiguous()
        assert elements(values) == [source[i] for i in index.tolist()]
    assert elements(tensor) == source


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """The chosen elements get the values; all others, those between the strides included, keep their bits."""
    for index_dtype in (torch.int32, torch.int64):
        base = backend.to(random_values(1_000, dtype))
        tensor = LAYOUTS[layout](base)
        index = random_index(tensor.numel(), tensor.numel() // 2 + 1, index_dtype, seed=1)
        values = random_values(len(index), dtype, seed=2)
        # the same write on a copy, element by element, by position in the base
        expected = elements(base)
        places = LAYOUTS[layout](torch.arange(1_000)).reshape(-1)
        for position, value in zip(index.tolist(), elements(values), strict=True):
            expected[places[position]] = value
        assert backend.scatter_([tensor], [backend.to(index)], [backend.to(values)]) is None
        assert elements(base) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str)
def test_nan_payloads_and_signs_survive(backend: Backend, dtype: torch.dtype) -> None:
    real = torch.zeros(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize]
    exponent = torch.tensor(float("inf"), dtype=real).view(integer)
    patterns = torch.cat([exponent + torch.arange(1, 9, dtype=integer), torch.iinfo(integer).max - torch.arange(8)])
    patterns = torch.cat([patterns, patterns ^ torch.iinfo(integer).min]).to(integer)  # signalling, quiet, negative
    nans = patterns.view(real).view(dtype)
    assert bool(nans.isnan().all())
    index = random_index(len(nans), len(nans))
    tensor = backend.to(nans)
    (values,) = backend.gather([tensor], [backend.to(index)])
    assert elements(values) == [elements(nans)[i] for i in index.tolist()]
    target = backend.to(torch.zeros_like(nans))
    backend.scatter_([target], [backend.to(index)], [values])
    assert_same_bits(target, nans)


def test_many_tensors_of_any_dtype_at_once(backend: Backend) -> None:
    """Some empty, some without indices, one of many chunks; a round trip restores all of them."""
    rng = np.random.default_rng(3)
    names = list(LAYOUTS)
    tensors, indices = [], []
    for i in range(40):
        numel = [720, 1_000, 30_011, 0][i % 4]
        base = backend.to(random_values(numel, DTYPES[i % len(DTYPES)], seed=i))
        tensors.append(LAYOUTS[names[i % (len(names) - 1)]](base) if numel >= 720 else base.reshape(0, 3))
        size = tensors[-1].numel()
        index = random_index(size, int(rng.integers(0, size + 1)), [torch.int32, torch.int64][i % 2], seed=i)
        indices.append(backend.to(index))
    values = backend.gather(tuple(tensors), tuple(indices))
    before = [elements(t) for t in tensors]
    for value, source, index in zip(values, before, indices, strict=True):
        assert elements(value) == [source[i] for i in index.tolist()]

    marks = [backend.to(random_values(len(v), v.dtype, seed=99)) for v in values]
    backend.scatter_(tensors, indices, marks)
    for tensor, source, index, mark in zip(tensors, before, indices, marks, strict=True):
        expected = list(source)
        for position, value in zip(index.tolist(), elements(mark), strict=True):
            expected[position] = value
        assert elements(tensor) == expected
    backend.scatter_(tensors, indices, values)
    assert [elements(t) for t in tensors] == before


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(backend: Backend, num_threads: Callable[[int], None], threads: int) -> None:
    num_threads(threads)
    tensor = random_values(200_000, torch.float32)
    index = random_index(200_000, 150_001, torch.int32)
    target = backend.to(tensor)
    (values,) = backend.gather([target], [backend.to(index)])
    assert_same_bits(values, tensor.view(torch.int32)[index.long()].view(torch.float32))
    backend.scatter_([target], [backend.to(index)], [values.flip(0)])
    expected = tensor.view(torch.int32).clone()
    expected[index.long()] = values.cpu().flip(0).view(torch.int32)
    assert_same_bits(target, expected.view(torch.float32))


def test_strided_indices_and_values(backend: Backend) -> None:
    tensor = backend.to(torch.arange(10.0))
    index = backend.to(torch.tensor([7, 0, 2, 0, 5, 0]))[::2]
    assert backend.gather([tensor], [index])[0].tolist() == [7, 2, 5]
    values = backend.to(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))[:, 0]
    backend.scatter_([tensor], [index], [values])
    assert tensor.tolist() == [0, 1, 2, 3, 4, 3, 6, 1, 8, 9]


def test_gather_reads_expanded_tensors_and_repeated_indices(backend: Backend) -> None:
    tensor = backend.to(torch.tensor([1.0, 2.0, 3.0])).expand(4, 3)
    assert backend.gather([tensor], [backend.to(torch.tensor([11, 0, 3, 0, 4]))])[0].tolist() == [3, 1, 1, 1, 2]


def test_nothing_to_do(backend: Backend) -> None:
    assert backend.gather([], []) == []
    assert backend.scatter_([], [], []) is None
    tensor, index = backend.to(torch.ones(3)), backend.to(torch.empty(0, dtype=torch.int64))
    (values,) = backend.gather([tensor], [index])
    assert values.shape == (0,)
    backend.scatter_([tensor], [index], [values])
    assert tensor.tolist() == [1, 1, 1]


def test_parameters_and_autograd(backend: Backend) -> None:
    """A leaf that requires grad can be read and written; autograd learns of the write and of nothing else."""
    parameter = torch.nn.Parameter(backend.to(torch.ones(4)))
    index = backend.to(torch.tensor([1, 3]))
    (values,) = backend.gather([parameter], [index])
    assert not values.requires_grad
    loss = (parameter * parameter).sum()
    version = parameter._version
    backend.scatter_([parameter], [index], [values * 5])
    assert parameter._version > version
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.tolist() == [1, 5, 1, 5]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors(backend: Backend) -> None:
    with torch.inference_mode():
        tensor, index = backend.to(torch.zeros(3)), backend.to(torch.tensor([2]))
        backend.scatter_([tensor], [index], [backend.to(torch.ones(1))])
        assert backend.gather([tensor], [index])[0].tolist() == [1]


def test_flat_indices_above_2_32(backend: Backend) -> None:
    if backend.device != "cpu":
        pytest.skip("memory that is not there is a CPU's privilege")
    tensor = sparse_memory(2**32 + 2**20, torch.uint8)
    positions = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 2**20 - 1, 7]
    index = torch.tensor(positions)
    values = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.uint8)
    backend.scatter_([tensor], [index], [values])
    assert [int(tensor[p]) for p in positions] == values.tolist()
    assert backend.gather([tensor], [index])[0].tolist() == values.tolist()
    columns = tensor.view(2**12, 2**20 + 2**8).t()  # a stride of 2^20 and more
    flat = (index % (2**20 + 2**8)) * 2**12 + index // (2**20 + 2**8)
    assert backend.gather([columns], [flat])[0].tolist() == values.tolist()


# ---- indices out of range, whatever their width and whenever they are ----

WIDE = 2**32 + 2**20  # elements: every negative int32 would be a position, were it unsigned


@pytest.mark.parametrize("bad", [-1, -7, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_negative_indices_of_wide_tensors(backend: Backend, dtype: torch.dtype, bad: int) -> None:
    if backend.device != "cpu":
        pytest.skip("memory that is not there is a CPU's privilege")
    tensor = sparse_memory(WIDE, torch.uint8)
    index = torch.tensor([3, bad, 2**31 - 1], dtype=dtype)
    with pytest.raises(IndexError) as gathered:
        backend.gather([tensor], [index])
    with pytest.raises(IndexError) as scattered:
        backend.scatter_([tensor], [index], [torch.ones(3, dtype=torch.uint8)])
    for caught in (gathered, scattered):
        assert_message(caught, ["`indices[0]`", f"[0, {WIDE})", f"{bad} to {2**31 - 1}"])
    assert not tensor[[3, 2**31 - 1, bad % 2**32]].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_one_index_out_of_range_wherever_it_is(backend: Backend, dtype: torch.dtype) -> None:
    """Behind thousands that are right; nothing is written."""
    for numel in (1, 5_000, 2**17):
        limits = torch.iinfo(dtype)
        for bad in (-1, numel, limits.min, limits.max):
            for at in (0, 1_023, 1_024, 4_095, 4_096, 20_000):
                index = torch.arange(20_001, dtype=dtype) % numel
                index[at] = bad
                tensor = backend.to(torch.zeros(numel))
                with pytest.raises(IndexError, match="`indices"):
                    backend.gather([tensor], [backend.to(index)])
                with pytest.raises(IndexError, match="`indices"):
                    backend.scatter_([tensor], [backend.to(index)], [backend.to(torch.ones(20_001))])
                assert not tensor.any()


RACE = """
import threading, time, torch
from saft_kernels import gather, scatter_
torch.set_num_threads(1)
tensor, values = torch.zeros(1_000), torch.ones(200_000)
index = torch.full((200_000,), 5, dtype=torch.{dtype})
stop = False
def write():
    while not stop:
        index.fill_({bad})
        index.fill_(5)
writer = threading.Thread(target=write)
writer.start()
done = refused = 0
end = time.monotonic() + 1.5
try:
    while time.monotonic() < end or not (done and refused):
        try:
            {call}
            done += 1
        except IndexError as error:
            assert "`indices[0]`: expected flat positions" in str(error), error
            refused += 1
        assert time.monotonic() < end + 60, (done, refused)
finally:
    stop = True
    writer.join()
assert tensor.count_nonzero() <= 1, tensor.nonzero()
print("fine")
"""
CALLS = {"gather": "gather([tensor], [index])", "scatter_": "scatter_([tensor], [index], [values])"}


@pytest.mark.skipif(ops.why_unavailable("cpu") is not None, reason=f"cpu: {ops.why_unavailable('cpu')}")
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(("dtype", "bad"), [("int32", 2**31 - 1), ("int64", -(2**50))])
def test_indices_that_another_thread_writes_meanwhile(op: str, dtype: str, bad: int) -> None:
    """An error at most: what was checked of an index is what is used. In a process of its own: else it dies."""
    program = RACE.format(dtype=dtype, bad=bad, call=CALLS[op])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def check_left_out(gather: Callable[..., None], scatter_: Callable[..., None], backend: Backend) -> None:
    """Of a GPU's functions, behind the checks: an index out of range is neither read nor written through."""
    for layout in ("matrix", "transposed"):
        for dtype in (torch.int32, torch.int64):
            base = backend.to(torch.zeros(3_000))
            tensor = LAYOUTS[layout](base[1_000:2_000])
            index = backend.to(torch.tensor([5, -1, 719, 720, -900, 1_900, 6], dtype=dtype))
            scatter_([tensor], [index], [backend.to(torch.arange(1.0, 8))])
            assert tensor.reshape(-1)[[5, 719, 6]].tolist() == [1, 3, 7]
            assert base.count_nonzero() == 3
            values = backend.to(torch.zeros(7))
            gather([tensor], [index], [values])
            assert values[[0, 2, 6]].tolist() == [1, 3, 7]


@settings(max_examples=60)
@given(data=st.data())
def test_property_round_trip(backend: Backend, data: st.DataObject) -> None:
    """scatter_ of what gather read changes nothing; scatter_ then gather returns the values."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(1, 7), max_size=4)))
    order = data.draw(st.permutations(range(len(shape))))
    numel = int(np.prod(shape))
    base = random_values(numel, dtype, seed=data.draw(st.integers(0, 99)))
    tensor = backend.to(base).reshape(shape).permute(tuple(order))
    index = torch.tensor(data.draw(st.lists(st.integers(0, numel - 1), unique=True)), dtype=torch.int32)
    index = backend.to(index)
    before = elements(tensor)
    (values,) = backend.gather([tensor], [index])
    assert elements(values) == [before[i] for i in index.tolist()]
    backend.scatter_([tensor], [index], [values])
    assert elements(tensor) == before
    other = backend.to(random_values(len(index), dtype, seed=100))
    backend.scatter_([tensor], [index], [other])
    assert elements(backend.gather([tensor], [index])[0]) == elements(other)
    rest = sorted(set(range(numel)) - set(index.tolist()))
    assert [elements(tensor)[i] for i in rest] == [before[i] for i in rest]


@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_of_torch_do_not_matter(backend: Backend, default: str) -> None:
    for dtypes in ([torch.float32], [torch.float16, torch.complex64, torch.uint8]):
        tensors = [backend.to(random_values(30, dtype)).view(5, 6).t() for dtype in dtypes]
        indices = [backend.to(torch.tensor([29, 3, 4], dtype=torch.int32)) for _ in dtypes]
        expected = backend.gather(tensors, indices)
        targets, wanted = ([torch.zeros_like(t) for t in tensors] for _ in range(2))
        backend.scatter_(wanted, indices, expected)
        with other_default(default):
            values = backend.gather(tensors, indices)
            backend.scatter_(targets, indices, values)
        for actual, right in zip(values + targets, expected + wanted, strict=True):
            assert actual.device == right.device
            assert_same_bits(actual, right)


# ---- errors: nothing has been read or written ----


def floats() -> Tensor:
    return torch.zeros(2, 3)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


GATHER_ERRORS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "one_tensor": (lambda: gather(floats(), [ints(1)]), TypeError, ["`tensors`", "list or tuple", "Tensor"]),
    "not_a_tensor": (lambda: gather([1.0], [ints(1)]), TypeError, ["`tensors[0]`", "float"]),
    "sparse": (lambda: gather([floats().to_sparse()], [ints(1)]), TypeError, ["`tensors[0]`", "strided", "to_dense"]),
    "lazy_conjugate": (
        lambda: gather([(floats() * 1j).conj()], [ints(1)]),
        TypeError,
        ["`tensors[0]`", "lazy", ".resolve_conj()"],
    ),
    "one_index_tensor": (lambda: gather([floats()], ints(1)), TypeError, ["`indices`", "list or tuple", "Tensor"]),
    "too_few": (lambda: gather([floats(), floats()], [ints(1)]), ValueError, ["`indices`", "2", "`tensors`", "got 1"]),
    "none": (lambda: gather([floats()], [None]), TypeError, ["`indices[0]`", "int32 or int64", "None"]),
    "list": (lambda: gather([floats()], [[1]]), TypeError, ["`indices[0]`", "int32 or int64", "[1]"]),
    "float": (lambda: gather([floats()], [floats()[0]]), TypeError, ["`indices[0]`", "int32 or int64", "float32"]),
    "bool_mask": (lambda: gather([floats()], [floats().bool()]), TypeError, ["`indices[0]`", "bool", "(2, 3)"]),
    "matrix": (lambda: gather([floats()], [ints(1, 2)[None]]), TypeError, ["one-dimensional", "(1, 2)"]),
    "negative": (lambda: gather([floats()], [ints(1, -1)]), IndexError, ["`indices[0]`", "[0, 6)", "-1 to 1"]),
    "too_large": (lambda: gather([floats()], [ints(0, 6)]), IndexError, ["`indices[0]`", "`tensors[0]`", "0 to 6"]),
    "of_nothing": (lambda: gather([floats()[:0]], [ints(0)]), IndexError, ["`indices[0]`", "[0, 0)", "0 to 0"]),
    "other_device": (lambda: gather([floats()], [ints(0).to("meta")]), ValueError, ["`indices[0]`", "cpu", "meta"]),
    "devices": (
        lambda: gather([floats(), floats().to("meta")], [ints(0), ints(0)]),
        ValueError,
        ["`tensors[1]`", "cpu", "meta"],
    ),
}


@pytest.mark.parametrize("case", GATHER_ERRORS)
def test_gather_errors(case: str) -> None:
    call, error, parts = GATHER_ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert_message(caught, parts)


target = torch.zeros(2, 3)
other_target = torch.zeros(4)


def write(index: object, value: object, *, tensors: object = None) -> None:
    scatter_([target] if tensors is None else tensors, index, value)  # type: ignore[arg-type]


SCATTER_ERRORS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "one_value_tensor": (lambda: write([ints(1)], torch.ones(1)), TypeError, ["`values`", "list or tuple", "Tensor"]),
    "too_few_values": (lambda: write([ints(1)], []), ValueError, ["`values`", "1", "`tensors`", "got 0"]),
    "too_many_indices": (lambda: write([ints(1)] * 2, [torch.ones(1)]), ValueError, ["`indices`", "1", "got 2"]),
    "none_index": (lambda: write([None], [torch.ones(1)]), TypeError, ["`indices[0]`", "None"]),
    "value_count": (lambda: write([ints(1)], [torch.ones(2)]), ValueError, ["`values[0]`", "(1,)", "(2,)"]),
    "value_dtype": (
        lambda: write([ints(1)], [torch.ones(1).double()]),
        ValueError,
        ["`values[0]`", "float32", "float64"],
    ),
    "value_device": (
        lambda: write([ints(1)], [torch.ones(1, device="meta")]),
        ValueError,
        ["`values[0]`", "cpu", "meta"],
    ),
    "out_of_range": (lambda: write([ints(1, 6)], [torch.ones(2)]), IndexError, ["`indices[0]`", "[0, 6)", "1 to 6"]),
    "second_out_of_range": (
        lambda: write([ints(1), ints(4)], [torch.ones(1), torch.ones(1)], tensors=[target, other_target]),
        IndexError,
        ["`indices[1]`", "[0, 4)", "`tensors[1]`", "4 to 4"],
    ),
    "expanded": (
        lambda: write([ints(1)], [torch.ones(1)], tensors=[target[:1].expand(5, 3)]),
        ValueError,
        ["`tensors[0]`", "one memory location", "(0, 1)", "clone"],
    ),
}


@pytest.mark.parametrize("case", SCATTER_ERRORS)
def test_scatter_errors_write_nothing(case: str) -> None:
    call, error, parts = SCATTER_ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert_message(caught, parts)
    assert not target.any()
    assert not other_target.any()


def test_public_names() -> None:
    assert saft_kernels.gather is gather
    assert saft_kernels.scatter_ is scatter_
