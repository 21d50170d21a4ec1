"""Which backend runs: the argument, SAFT_BACKEND, the device; and what is said when one cannot."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import BACKENDS, Backend
from torch import Tensor

import saft_kernels
from saft_kernels import __main__, ops
from saft_kernels.cli import report as cli_report
from saft_kernels.ops import backends

CALLS: dict[str, Any] = {
    "topk_magnitude": lambda x, **kw: ops.topk_magnitude([x], 2, **kw),
    "topk_magnitude_rows": lambda x, **kw: ops.topk_magnitude_rows(torch.stack([x, x]), 2, **kw),
    "gather": lambda x, **kw: ops.gather([x], [torch.tensor([1])], **kw),
    "scatter_": lambda x, **kw: ops.scatter_([x], [torch.tensor([1])], [x[:1].clone()], **kw),
    "sparse_adamw_": lambda x, **kw: ops.sparse_adamw_(
        [x],
        [x.clone()],
        [x.clone()],
        [x.abs()],
        [None],
        step=1,
        lr=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        **kw,
    ),
}
every_op = pytest.mark.parametrize("op", CALLS)
cpu_compiled = pytest.mark.skipif(ops.why_unavailable("cpu") is not None, reason=f"cpu: {ops.why_unavailable('cpu')}")


def tensor() -> Tensor:
    return torch.tensor([3.0, -1.0, 2.0])


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFT_BACKEND", raising=False)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends whose kernels run, in order."""
    names: list[str] = []
    for name in backends.BACKENDS:
        module = backends._module(name)
        if not isinstance(module, ModuleType):
            continue
        for op in ("topk_magnitude", "topk_magnitude_rows", "gather", "scatter_", "prepare_sparse_adamw"):
            original = getattr(module, op, None)

            def run(*args: Any, name: str = name, original: Any = original) -> Any:
                names.append(name)
                return original(*args)

            if original is not None:
                monkeypatch.setattr(module, op, run)
    return names


@pytest.fixture
def unwarned() -> Iterator[None]:
    """The once-per-process warning is due again."""
    backends._warn_slow.cache_clear()
    yield
    backends._warn_slow.cache_clear()


# ---- the choice ----


@cpu_compiled
@every_op
def test_a_cpu_tensor_gets_the_compiled_backend(called: list[str], op: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[op](tensor())
    assert called == ["cpu"]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=cpu_compiled)])
@pytest.mark.parametrize("how", ["argument", "environment"])
@every_op
def test_forced(monkeypatch: pytest.MonkeyPatch, called: list[str], op: str, how: str, backend: str) -> None:
    """Without a warning, even for the slow one: it was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "environment":
            monkeypatch.setenv("SAFT_BACKEND", backend)
            CALLS[op](tensor())
        else:
            CALLS[op](tensor(), backend=backend)
    assert called == [backend]


def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    monkeypatch.setenv("SAFT_BACKEND", "cuda")
    CALLS["gather"](tensor(), backend="reference")
    assert called == ["reference"]


@cpu_compiled
def test_an_empty_environment_variable_means_automatic(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    monkeypatch.setenv("SAFT_BACKEND", "")
    CALLS["gather"](tensor())
    assert called == ["cpu"]


@every_op
def test_an_unknown_backend(monkeypatch: pytest.MonkeyPatch, called: list[str], op: str) -> None:
    with pytest.raises(ValueError, match=r"^`backend`: expected one of cuda, triton, cpu, reference, got 'tpu'$"):
        CALLS[op](tensor(), backend="tpu")
    monkeypatch.setenv("SAFT_BACKEND", "CPU")
    with pytest.raises(ValueError, match=r"environment variable SAFT_BACKEND: expected one of .*, got 'CPU'$"):
        CALLS[op](tensor())
    assert called == []


@every_op
def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, called: list[str], op: str) -> None:
    """cuda never runs on a CPU tensor, whatever is installed."""
    what = r"backend 'cuda' cannot run \w+ here: .+; leave it unset to choose automatically$"
    with pytest.raises(RuntimeError, match=rf"^`backend`: {what}"):
        CALLS[op](tensor(), backend="cuda")
    monkeypatch.setenv("SAFT_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=rf"^the environment variable SAFT_BACKEND: {what}"):
        CALLS[op](tensor())
    assert called == []


@cpu_compiled
def test_the_cpu_backend_names_the_device_it_does_not_run_on() -> None:
    with pytest.raises(RuntimeError, match="it runs on CPU tensors, got meta"):
        CALLS["topk_magnitude"](tensor().to("meta"), backend="cpu")


@cpu_compiled
@pytest.mark.usefixtures("unwarned")
def test_an_op_the_backend_lacks_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """A backend may implement some of the ops; the warning comes once."""
    monkeypatch.delattr(backends._module("cpu"), "gather")
    with pytest.warns(RuntimeWarning, match="reference backend .* for cpu tensors: no faster backend has this op"):
        CALLS["gather"](tensor())
    CALLS["topk_magnitude"](tensor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS["gather"](tensor())
    assert called == ["reference", "cpu", "reference"]
    with pytest.raises(RuntimeError, match="it does not implement gather"):
        CALLS["gather"](tensor(), backend="cpu")


def test_why_unavailable() -> None:
    assert ops.why_unavailable("reference") is None
    assert ops.why_unavailable("reference", "gather", "meta") is None
    assert ops.why_unavailable("reference", "flood_fill") == "it does not implement flood_fill"
    assert ops.BACKENDS == ("cuda", "triton", "cpu", "reference")


def test_every_backend_is_tested() -> None:
    """One entry in conftest.py per backend, and one per instruction set of the compiled one."""
    assert {b.name for b in BACKENDS} == set(ops.BACKENDS)
    assert len({b.id for b in BACKENDS}) == len(BACKENDS)


@cpu_compiled
def test_isas_are_those_the_tests_know() -> None:
    from conftest import CPU_ISAS

    from saft_kernels import _C

    assert tuple(_C.isas()) == CPU_ISAS[: len(_C.isas())]


def test_the_answer_has_the_device_of_the_tensors(backend: Backend) -> None:
    x = backend.to(tensor())
    assert backend.topk_magnitude([x], 1).indices[0].device == x.device
    assert backend.gather([x], [backend.to(torch.tensor([0]))])[0].device == x.device


FACTORIES = ("arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")


def test_factories_name_device_and_dtype() -> None:
    """torch.set_default_device and torch.set_default_dtype are the caller's: see other_default in conftest.py."""
    calls = [
        (path, node)
        for path in Path(ops.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in [f"torch.{name}" for name in FACTORIES]
    ]
    assert len(calls) > 10
    for path, node in calls:
        named = {keyword.arg for keyword in node.keywords}
        assert {"device", "dtype"} <= named, f"{path}:{node.lineno}: {ast.unparse(node)}"


# ---- python -m saft_kernels ----


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


def test_report_lists_versions_and_backends() -> None:
    lines = __main__.report().splitlines()
    start = lines.index("backends, in order of preference")
    assert lines[0].split() == ["saft_kernels", saft_kernels.__version__]
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines[:start])
    listed = [line.split(maxsplit=1) for line in lines[start + 1 : lines.index("", start)]]
    assert [name for name, _ in listed] == list(ops.BACKENDS)
    for name, state in listed:
        device = "cuda" if name in ("cuda", "triton") else None
        reason = ops.why_unavailable(name, device_type=device)
        assert state == f"not available: {reason}" if reason else state.startswith("available")
    assert listed[-1] == ["reference", "available"]
    assert "what you can rely on" in lines


def test_report_says_what_was_measured_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(line.startswith("  NVIDIA H200: ") and "ec6e920" in line for line in __main__.report().splitlines())
    (tmp_path / "a_gpu.csv").write_text("device,commit\nG1,abc+\nG1,abc\nG2,def\n")
    (tmp_path / "b_gpu.csv").write_text("device,commit\nG1,def\n")
    (tmp_path / "other.csv").write_text("commit,ms\nabc,1\n")
    monkeypatch.setattr(cli_report, "_RESULTS", tmp_path)
    lines = __main__.report().splitlines()
    start = lines.index("measured (bench/results)")
    assert lines[start + 1 : start + 4] == ["  G1: a_gpu, b_gpu; commit abc, def", "  G2: a_gpu; commit def", ""]
    monkeypatch.setattr(cli_report, "_RESULTS", tmp_path / "of an installed package")
    assert "measured" not in __main__.report()


@cpu_compiled
def test_report_describes_what_was_compiled() -> None:
    from saft_kernels import _C

    (line,) = [line for line in __main__.report().splitlines() if line.startswith("  cpu ")]
    threads = f"{torch.get_num_threads()} threads" if _C.has_openmp else "single-threaded"
    assert _C.isas()[-1] in line
    assert threads in line


def test_command_line() -> None:
    done = run_python("-m", "saft_kernels")
    assert done.returncode == 0, done.stderr
    assert "backends, in order of preference" in done.stdout
    assert done.stderr == ""


# ---- without the compiled module ----

# An import hook stands in for a package that was installed without a compiler.
BLOCKED = """
    import sys, warnings

    class NoCompiledModule:
        def find_spec(self, name, path=None, target=None):
            if name == "saft_kernels._C":
                raise ImportError("blocked by the test", name=name)

    sys.meta_path.insert(0, NoCompiledModule())
    import torch, saft_kernels
    from saft_kernels import ops
"""


def test_without_the_compiled_module_the_reference_serves_after_one_warning() -> None:
    code = """
        def works():
            x = torch.tensor([3.0, -1.0, 2.0])
            assert ops.topk_magnitude([x], 2).indices[0].tolist() == [0, 2]
            assert ops.gather([x], [torch.tensor([1])])[0].tolist() == [-1]
            ops.scatter_([x], [torch.tensor([1])], [torch.tensor([5.0])])
            assert x.tolist() == [3, 5, 2]
            model = torch.nn.Linear(4, 3)
            before = [p.detach().clone() for p in model.parameters()]
            optimizer = saft_kernels.SparseAdamW(model.parameters(), lr=0.1, k=4)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
            changed = sum(int((p != b).sum()) for p, b in zip(model.parameters(), before))
            assert changed == 4, changed

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            works()
            works()
        (warning,) = caught
        assert warning.category is RuntimeWarning
        message = str(warning.message)
        assert "\\n" not in message
        for part in ("reference backend", "slower", "cpu tensors", "blocked by the test", "C++17 compiler"):
            assert part in message, message

        try:
            ops.gather([torch.ones(3)], [torch.tensor([1])], backend="cpu")
        except RuntimeError as error:
            message = str(error)
            assert "`backend`: backend 'cpu' cannot run gather here" in message, message
            assert "the compiled module is missing (blocked by the test)" in message, message
        else:
            raise AssertionError("cpu ran")

        from saft_kernels.__main__ import report
        (line,) = [line for line in report().splitlines() if line.startswith("  cpu ")]
        assert "not available: the compiled module is missing (blocked by the test)" in line, line
        print("fine")
    """
    done = run_python("-c", textwrap.dedent(BLOCKED) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def test_import_is_light() -> None:
    """No optional library is imported, nothing is printed, and no GPU is touched."""
    code = """
        import sys, torch
        before = set(sys.modules)
        import saft_kernels
        saft_kernels.register_timm
        heavy = {"triton", "timm", "open_clip", "open_clip_train", "transformers", "accelerate", "lightning"}
        heavy |= {"pytorch_lightning", "safetensors", "matplotlib"}
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert not new & heavy, new & heavy
        assert not torch.cuda.is_initialized()
    """
    done = run_python("-W", "error", "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
