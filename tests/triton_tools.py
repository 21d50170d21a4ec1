"""What the tests of the Triton kernels share: a process that interprets them, others that compile them.

TRITON_INTERPRET has to be set before triton is imported, and would change it for every other test. So, without a GPU,
a test file runs itself again in a process where the kernels are interpreted, and as a script, where it prints what
became of each kernel when compiled for GPUs that are not here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
ARCHS = [80, 90, 100]

Specs = dict[tuple[Any, ...], tuple[Any, dict[str, str], dict[str, int], int]]


def divide_tests(module: dict[str, Any], outside: Sequence[str]) -> None:
    """Leaves a test file the tests of this process: those `outside` the interpreter or on a GPU, or the others.

    With a GPU, all but the one that interprets.
    """
    for name in [name for name in module if name.startswith("test_")]:
        is_outside = name in outside or name.endswith("_gpu")
        keep = name != "test_interpreted" if DEVICE == "cuda" else is_outside != INTERPRETED
        if not keep:
            del module[name]


def run_interpreted(file: str, num_processes: int = 2) -> None:
    """The tests of a file, on CPU tensors, dealt out to processes."""
    command = [sys.executable, "-m", "pytest", "--quiet", "--exitfirst", "-p", "no:cacheprovider", "-p", __name__, file]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, _SHARE: f"{process} {num_processes}"},
        )
        for process in range(num_processes)
    ]
    try:
        for process in processes:
            output, _ = process.communicate()
            assert process.returncode == 0, output
            assert "passed" in output
            assert "skipped" not in output, output
    finally:
        for process in processes:
            process.kill()
            process.wait()


_SHARE = "SAFT_TEST_SHARE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In those processes, this module is a plugin of pytest."""
    if _SHARE in os.environ:
        process, num_processes = map(int, os.environ[_SHARE].split())
        items[:] = items[process::num_processes]


@contextlib.contextmanager
def recording(module: Any, *, run: bool) -> Iterator[tuple[list[str], Specs]]:
    """What `module` launches: names, and (kernel, signature, constants, warps) by what triton compiles apart."""
    names: list[str] = []
    specs: Specs = {}
    types = {torch.int64: "*i64", torch.int32: "*i32"}
    launch = module.launch

    def record(kernel: Any, num_programs: int, *args: torch.Tensor, num_warps: int, **constants: int) -> None:
        if num_programs <= 0:
            return
        names.append(kernel.fn.__name__)
        assert all(arg.data_ptr() % 16 == 0 for arg in args), f"{names[-1]}: an argument is not aligned"
        signature = {name: types[arg.dtype] for name, arg in zip(kernel.arg_names, args, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        assert list(signature) == list(kernel.arg_names)
        constants = {name: int(value) for name, value in constants.items()}
        specs[(names[-1], *signature.items(), *constants.items(), num_warps)] = (
            kernel,
            signature,
            constants,
            num_warps,
        )
        if run:
            launch(kernel, num_programs, *args, num_warps=num_warps, **constants)

    module.launch = record
    try:
        yield names, specs
    finally:
        module.launch = launch


# ---- ahead of time ----


def archs_to_compile_for(session: pytest.Session, module: str) -> list[int]:
    """Of the tests of `module` that will run."""
    name = "test_compiles_ahead_of_time["
    items = [item for item in session.items if item.name.startswith(name) and item.module.__name__ == module]
    return [item.callspec.params["arch"] for item in items]


def compile_facts(
    arch: int,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    unaligned: Sequence[str] = (),
) -> dict[str, Any]:
    """What became of a kernel, with the options of every launch. Arguments are multiples of 16, but the `unaligned`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from saft_kernels.ops.triton.launch import OPTIONS

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in unaligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, **OPTIONS})
    ptx = result.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "kernel": kernel.fn.__name__,
        "constants": {name: value if isinstance(value, int) else str(value) for name, value in constants.items()},
        "num_warps": num_warps,
        "shared": result.metadata.shared,
        **{name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")},
        "loads": sorted(re.findall(r"ld\.global\S*", ptx)),
        "stores": sorted(re.findall(r"st\.global\S*", ptx)),
        "local_accesses": len(re.findall(r"(?:ld|st)\.local", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "roots_and_quotients": sorted(re.findall(r"(?:sqrt|div)\.\S*f\d\d", ptx)),
        "flushes": len(re.findall(r"\.ftz\b", ptx)),
    }


def start_script(file: str, *arguments: object) -> subprocess.Popen[str]:
    """The test file as a script, in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    command = [sys.executable, file, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def printed_facts(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What the script printed, one JSON object a line."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]
