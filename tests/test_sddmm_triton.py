"""sddmm on Triton: the op's own tests through the interpreter, and the kernel compiled ahead of time.

Without a GPU, the tests run in a process of their own, where the kernels are interpreted: TRITON_INTERPRET has to be
set before triton is imported, and would change it for every other test. Compiling needs another: this file as a script
prints what became of the kernel for some architectures, a line of JSON per dtype.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

pytest.importorskip("triton", reason="triton is not installed")

import test_sddmm
from conftest import Backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
ARCHS = [80, 90, 100]


# ---- the op's tests, interpreted (on a GPU tests/test_sddmm.py runs them) ----

if INTERPRETED:

    @pytest.fixture(params=["triton"])
    def backend() -> Backend:
        return Backend("triton", "triton", device=DEVICE)

    for name in [name for name in vars(test_sddmm) if name.startswith("test_") and "thread_counts" not in name]:
        if "backend" in vars(test_sddmm)[name].__code__.co_varnames:
            globals()[name] = vars(test_sddmm)[name]

elif DEVICE == "cpu":

    def test_interpreted() -> None:
        command = [sys.executable, "-m", "pytest", "--quiet", "--exitfirst", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        assert done.returncode == 0, done.stdout
        assert "passed" in done.stdout
        assert "skipped" not in done.stdout, done.stdout


# ---- ahead of time ----


def compile_all(arch: int) -> Iterator[dict[str, Any]]:
    """The kernel for every dtype, as it is launched, compiled for `arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from saft_kernels.ops.triton.launch import OPTIONS

    module = importlib.import_module("saft_kernels.ops.triton.sddmm")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for dtype, opmath in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        types = [f"*{dtype}", f"*{dtype}", "*i32", f"*{opmath}", "i32", "i32", "i32"]
        names = module.dot_kernel.arg_names
        language = importlib.import_module("triton.language")
        constants = {
            "ACCUMULATE": False,
            "OPMATH": language.float64 if opmath == "fp64" else language.float32,
            "ENTRIES": module.TUNING.entries,
            "TOKENS": module.TUNING.tokens,
        }
        signature = {**dict(zip(names, types, strict=False)), **dict.fromkeys(constants, "constexpr")}
        assert list(signature) == list(names)
        aligned = [*range(4), names.index("padded_tokens")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(fn=module.dot_kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": module.TUNING.num_warps, **OPTIONS}
        result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.asm["cubin"])
            file.flush()
            command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ptx = result.asm["ptx"]
        yield {
            "arch": arch,
            "dtype": dtype,
            "shared": result.metadata.shared,
            **{name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")},
            "loads": sorted(set(re.findall(r"ld\.global\S*", ptx))),
            "local_accesses": len(re.findall(r"(?:ld|st)\.local", ptx)),
        }


if not INTERPRETED:

    @pytest.fixture(scope="module", autouse=True)
    def compiler() -> Iterator[subprocess.Popen[str]]:
        """It works while the other tests run."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, __file__, *map(str, ARCHS)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, env=environment, **pipes)
        yield process
        process.kill()
        process.wait()

    def test_compiles_ahead_of_time(compiler: subprocess.Popen[str]) -> None:
        output, errors = compiler.communicate()
        assert compiler.returncode == 0, errors
        facts = [json.loads(line) for line in output.splitlines()]
        assert [fact["dtype"] for fact in facts] == ["fp32", "bf16", "fp16", "fp64"] * len(ARCHS)
        for fact in facts:
            assert fact["stack"] == fact["local"] == fact["local_accesses"] == 0, fact  # nothing spilled
            assert fact["reg"] <= 128, fact  # 4 blocks of 4 warps on a multiprocessor
            assert fact["shared"] <= 4 * 1024, fact
            # both factors by vectors of 16 B
            wide = "ld.global.v2.b64" if fact["dtype"] == "fp64" else "ld.global.v4.b32"
            assert wide in fact["loads"], fact


if __name__ == "__main__":
    for number in sys.argv[1:]:
        for fact in compile_all(int(number)):
            print(json.dumps(fact), flush=True)
