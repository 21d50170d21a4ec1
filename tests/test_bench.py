"""The benches' own parts, on tiny sizes: what they write where, and what they say of a disturbed measurement."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bench_topk_magnitude
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
    failed = [row for row in rows if not row.is_measured]
    assert {(row.backend, row.note.split("; BUSY")[0]) for row in failed} == {
        ("torch.kthvalue", "failed: RuntimeError: no such kernel")
    }
    assert len(failed) == 2
    assert all(row.p50_ms > 0 for row in rows if row not in failed)
    timings = harness.interleave({"good": lambda: None, "bad": broken}, "cpu", 2)
    assert timings["good"].p50 >= 0
    assert timings["bad"].error == "RuntimeError: no such kernel"


def add(seconds: float, roofs: list[float], monkeypatch: pytest.MonkeyPatch) -> harness.Row:
    """The row of 1000 bytes in that time, under a roof that is measured to be those."""
    monkeypatch.setattr(harness.Roof, "_measure", lambda self: roofs.pop(0))
    return harness.Results("r").add(harness.Timing.of([seconds]), harness.Roof("cpu", 4), 1000, backend="b", **COLUMNS)


def test_a_share_above_the_roof_is_measured_again_or_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "load", lambda: 0.0)
    row = add(1e-3, [1e4, 2e6], monkeypatch)
    assert (row.roof_fraction, row.note) == (0.5, "")
    row = add(1e-3, [1e4, 2e4, 5e4, 3e4], monkeypatch)
    assert row.roof_fraction == 20
    assert row.note.startswith("ABOVE THE ROOF")


def test_rows_of_a_busy_machine_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "load", lambda: 1000.0)
    assert "BUSY: load 1000.0" in add(1e-3, [2e6], monkeypatch).note
    monkeypatch.setattr(harness, "load", lambda: 1.0)
    assert add(1e-3, [2e6], monkeypatch).note == ""


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
