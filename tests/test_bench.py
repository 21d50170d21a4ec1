"""The benches' own parts, on tiny sizes: what they write where, and what they say of a disturbed measurement."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bench_distributed
import bench_host
import bench_memory
import bench_release_malloc
import bench_topk_magnitude
import bench_train_step
import harness
import profile_topk_magnitude

TINY = ["--numel", "4096", "--tensors", "3", "--share", "1e-3", "1e-2", "--data", "gaussian", "--repeats", "1"]
COLUMNS = {"op": "op", "device": "cpu", "dtype": "float32", "data": "d", "numel": 4, "num_tensors": 1, "k": 1}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for bench/results."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_topk_magnitude.py", *arguments])
    bench_topk_magnitude.main()


def test_other_sizes_do_not_replace_the_rows(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results.mkdir()
    rows = results / "topk_magnitude_cpu.csv"
    rows.write_text("as committed")
    for name in ([], ["--name", "topk_magnitude_cpu"], ["--output", str(results)]):
        with pytest.raises(SystemExit):
            run(monkeypatch, *TINY, *name)
        assert "holds rows of the default options, got --numel, --tensors" in capsys.readouterr().err
    assert rows.read_text() == "as committed"
    assert list(results.iterdir()) == [rows]


def test_rows_of_other_sizes_go_beside(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *TINY, "--name", "mine")
    run(monkeypatch, *TINY, "--output", str(tmp_path / "other"))
    rows = harness.read_rows(results / "mine.csv", harness.Row)
    assert len(rows) == len(harness.read_rows(tmp_path / "other" / "topk_magnitude_cpu.csv", harness.Row))
    assert {row.backend for row in rows} > {"torch.topk", "numpy.argpartition"}
    for row in rows:
        assert (row.numel, row.threads, row.torch) == (4096, torch.get_num_threads(), torch.__version__)
        assert row.malloc == harness.allocator()


def test_rows_say_what_the_environment_sets_of_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert "MALLOC_MMAP_THRESHOLD_=65536" in harness.allocator()
    assert "MALLOC_MMAP_THRESHOLD_=65536" in harness.environment()


def test_a_backend_that_fails_leaves_the_others_theirs(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(bench_topk_magnitude, "flat_kthvalue", lambda *_: broken)
    with pytest.raises(SystemExit, match=r"torch\.kthvalue"):
        run(monkeypatch, *TINY, "--name", "mine")
    rows = harness.read_rows(results / "mine.csv", harness.Row)
    failed = [row for row in rows if not harness.is_measured(row)]
    assert {(row.backend, row.note.split("; BUSY")[0]) for row in failed} == {
        ("torch.kthvalue", "failed: RuntimeError: no such kernel")
    }
    assert len(failed) == 2
    assert all(row.p50_ms > 0 for row in rows if row not in failed)
    timings = harness.interleave({"good": lambda: None, "bad": broken}, "cpu", 2)
    assert timings["good"].p50 >= 0
    assert timings["bad"].error == "RuntimeError: no such kernel"


Add = Callable[[float, list[float]], harness.Row]


@pytest.fixture
def add(results: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """The row of 1000 bytes in that time, under a roof that is measured to be those."""

    def add(seconds: float, roofs: list[float]) -> harness.Row:
        monkeypatch.setattr(harness.Roof, "_measure", lambda self: roofs.pop(0))
        timing = harness.Timing.of([seconds])
        return harness.Results("r", results).add(timing, harness.Roof("cpu", 4), 1000, backend="b", **COLUMNS)

    return add


def test_a_share_above_the_roof_is_measured_again_or_marked(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "load", lambda: 0.0)
    row = add(1e-3, [1e4, 2e6])
    assert (row.roof_fraction, row.note) == (0.5, "")
    row = add(1e-3, [1e4, 2e4, 5e4, 3e4])
    assert row.roof_fraction == 20
    assert row.note.startswith("ABOVE THE ROOF")


def test_rows_of_a_busy_machine_are_marked(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "load", lambda: 1000.0)
    assert "BUSY: load 1000.0" in add(1e-3, [2e6]).note
    monkeypatch.setattr(harness, "load", lambda: 1.0)
    assert add(1e-3, [2e6]).note == ""


MEASURED = {
    "bench_memory": {"dtype": "float32", "numel": 9, "trained": 1, "weights_mib": 1.0, "peak_mib": 2.0, "seconds": 0.1},
    "bench_release_malloc": {"gradients_mib": 1.0, "peak_mib": 2.0, "wall_ms": 1.0, "processor_ms": 1.0},
}


@pytest.mark.parametrize("module", [bench_memory, bench_release_malloc])
def test_processes_that_fail_or_were_disturbed_have_a_row_that_says_so(
    module: Any, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [(MEASURED[module.__name__], ""), ({}, "MemoryError: no room")]
    monkeypatch.setattr(harness, "run_worker", lambda command: answers.pop(0))
    monkeypatch.setattr(harness, "load", lambda: 1000.0)
    few = (
        ["--models", "8k", "--methods", "^torch|grads$"]
        if module is bench_memory
        else ["--rounds", "1", "--models", "layers"]
    )
    monkeypatch.setattr(sys, "argv", ["bench.py", *few, "--name", "mine"])
    with pytest.raises(SystemExit, match="failed: "):
        module.main()
    good, failed = harness.read_rows(results / "mine.csv", module.Row)
    assert (good.peak_mib, failed.peak_mib) == (2.0, None)
    assert good.note.startswith("BUSY: load 1000.0")
    assert failed.note.startswith("failed: MemoryError: no room; BUSY")
    assert all(harness.triton_version() == row.triton for row in (good, failed))


def test_what_the_host_pays_has_a_ratio_for_each_call(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_host.py", "--rounds", "2", "--repeats", "2", "--name", "mine"])
    threads = torch.get_num_threads()
    try:
        bench_host.main()
    finally:
        torch.set_num_threads(threads)
    rows = harness.read_rows(results / "mine.csv", bench_host.Row)
    assert len(rows) == len(bench_host.CASES)
    for row in rows:
        # of a difference, which may be anything on a busy machine
        assert row.least_ratio <= row.ratio <= row.largest_ratio, row.label
        assert row.peer_us > 0


def test_the_last_of_a_process_s_errors_is_its_row_s_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.run_worker([sys.executable, "-c", "print(1); print('{\"a\": 2}')"]) == ({"a": 2}, "")
    found = harness.run_worker([sys.executable, "-c", "raise ValueError('no  such\\tthing')"])
    assert found == ({}, "ValueError: no such thing")
    assert "Traceback" in capsys.readouterr().err


def test_on_a_gpu_the_host_gets_ahead_of_the_span_and_the_wall_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(f"sleep {cycles >= 2e9 * 1.5 * 0.01}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))

    def launch() -> None:
        calls.append("launch")
        time.sleep(0.01)

    timing = harness.measure(launch, "cuda", repeats=1, warmup=0)
    assert calls == ["wait", "launch", "wait", "sleep True", "event", "launch", "event", "wait"]
    assert timing.p50 == 0.007
    assert timing.wall is not None
    assert timing.wall >= 0.01


def test_a_training_step_that_fails_leaves_the_others_theirs(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench_train_step.saft_kernels, "sparse_grad", broken)
    tiny = [
        "--models",
        "decoder",
        "--hidden",
        "64",
        "--layers",
        "1",
        "--tokens",
        "8",
        "--rounds",
        "1",
        "--density",
        "0.01",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", *tiny, "--name", "mine"])
    with pytest.raises(SystemExit, match=r"failed: SparseAdamW, sparse_grad \(global mask\), SparseAdamW, sparse_grad"):
        bench_train_step.main()
    rows = {(row.way, row.mask): row for row in harness.read_rows(results / "mine.csv", bench_train_step.Row)}
    ways = [key for key in bench_train_step.WAYS if key[0] != bench_train_step.LORA or find_spec("peft")]
    assert list(rows) == [(way, "") for way in bench_train_step.SELECTIONS] + ways
    for (way, _), row in rows.items():
        assert harness.is_measured(row) == (way != "SparseAdamW, sparse_grad")
        assert (row.wall_ms is None) == (way == "SparseAdamW, sparse_grad")
        assert row.device_ms is None
    full = rows[bench_train_step.FULL, ""]
    assert (full.wall_of_full, full.trained) == (1.0, full.numel)
    assert rows["SparseAdamW, release_grads", "global"].trained == round(0.01 * full.numel)


def test_rows_of_a_gpu_say_where_they_were_measured() -> None:
    paths = sorted(harness.RESULTS.glob("*_h200.csv"))
    assert paths
    for path in paths:
        for row in csv.DictReader(path.read_text().splitlines()):
            assert (row["device"], row["torch"], row["triton"]) == ("NVIDIA H200", "2.11.0+cu130", "3.6.0"), path
            assert row["commit"].rstrip("+") == "ec6e920"


def test_the_roof_is_one_block_of_the_size_of_the_data() -> None:
    roof = harness.read_roof([torch.zeros(100, 10), torch.zeros(24, dtype=torch.bfloat16)])
    assert roof._numel == (4000 + 48) // 4
    assert roof.bytes_per_s > 0


def test_committed_rows_are_drawn_as_they_are() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    rows = harness.read_rows(harness.RESULTS / "topk_magnitude_cpu.csv", harness.Row)
    several = bench_topk_magnitude.draw(plt, harness.Results("r", rows=rows))
    one_size = [row for row in rows if row.numel == rows[0].numel]
    single = bench_topk_magnitude.draw(plt, harness.Results("r", rows=one_size))
    assert (len(several.axes), len(single.axes)) == (2, 1)
    names = [text.get_text() for text in several.axes[0].get_legend().get_texts()]
    assert "torch.topk, N = 1.6e+07" in names
    assert "cpu, structured, float32, N = 2.7e+08" in names
    plt.close("all")


def test_profiled_kernels_are_those_that_took_device_time() -> None:
    def event(name: str, device_time: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_time=device_time)

    kernel = "void saft::cuda_topk_magnitude::filter_kernel<float>(int)"
    events = [event("cudaLaunchKernel", 0), event(kernel, 3.0), event(kernel, 5.0), event("Memset (Device)", 2.0)]
    assert profile_topk_magnitude.per_run(events * 2, 2) == {"filter_kernel": (2, 8.0), "Memset (Device)": (1, 2.0)}
    for without in ([], [event(kernel, 0)]):
        with pytest.raises(RuntimeError, match=f"got {len(without)} events without"):
            profile_topk_magnitude.per_run(without, 2)


def test_selection_of_ranks_sends_counts(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three histograms of 16 KB, small numbers, and nothing in a step; gathering all sends all."""
    tiny = ["--ranks", "2", "--layers", "2", "--width", "256", "--density", "0.01", "--repeats", "1", "--name", "mine"]
    monkeypatch.setattr(sys, "argv", ["bench_distributed.py", *tiny])
    bench_distributed.main()
    rows = {row.call: row for row in harness.read_rows(results / "mine.csv", bench_distributed.Row)}
    numel = 2 * 256**2
    assert {row.numel for row in rows.values()} == {numel}
    assert rows["step()"].collectives == 0
    assert "3 x allreduce 16,384 B" in rows[bench_distributed.SELECTION].what
    assert 3 * 16384 / 2**20 <= rows[bench_distributed.SELECTION].mib < 3 * 17000 / 2**20
    assert rows[bench_distributed.GATHER_ALL].mib == 4 * numel / 2 / 2**20
    assert all(rows[call].p50_ms > 0 for call in bench_distributed.TIMED)


def test_committed_counts_are_those_of_any_number_of_ranks() -> None:
    rows = harness.read_rows(harness.RESULTS / "distributed_cpu.csv", bench_distributed.Row)
    assert {row.ranks for row in rows} == {1, 2, 4}
    for row in rows:
        if row.call == "step()":
            assert (row.collectives, row.mib) == (0, 0.0)
        if row.call == bench_distributed.SELECTION:
            assert "3 x allreduce 16,384 B" in row.what
            assert row.mib < 0.06
