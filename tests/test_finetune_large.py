"""examples/finetune_large.py: what it expects, what it chooses, and a training of each mode at tiny size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors", reason="the example writes safetensors: pip install saft_kernels[io]")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import finetune_large
import memory_plan
from memory_plan import Step, dry_run, parse_bytes, plans

from saft_kernels import SparseDelta, SparseMask
from saft_kernels.selection import streaming

TINY = ["--width", "64", "--layers", "2", "--tokens", "16", "--batch", "2", "--steps", "6", "--device", "cpu"]
MIB = 2**20


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- what a step takes ----


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 * 2**30), ("500 MB", 500 * MIB), ("1.5k", 1536), (".5g", 2**29), ("2tb", 2**41)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3", "1.2.3", "0", "4 apples", "100", "100B", "0GiB", "1.2.3GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()


def test_dry_run_counts_bytes() -> None:
    """Eight square layers on one row: activations are next to nothing, and the gradients add up, or do not."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))

    one = 256 * 256 * 4
    peaks = {}
    for mode in memory_plan.TRAINING:
        step = dry_run(build, lambda: torch.zeros(1, 256), loss_of, mode, 1e-3)
        assert (step.numel, step.weights) == (8 * 256 * 256, 8 * one)
        peaks[mode] = (step.peak - step.weights) / one
    assert 8 <= peaks["dense"] < 8.2
    assert 1 <= peaks["release"] < 1.2
    assert peaks["sparse_grad"] < 0.2
    # the selection may put more than a fifth of each layer's elements into it
    many = dry_run(build, lambda: torch.zeros(1, 256), loss_of, "sparse_grad", 0.1)
    assert (many.peak - many.weights) / one == peaks["release"]


@pytest.mark.parametrize("numels", [(9, 1, 1, 1), (1, 5, 1, 5, 4), (3,) * 10, (2, 2, 30, 2, 2)])
def test_largest_block_is_that_of_select(numels: tuple[int, ...]) -> None:
    parameters = {str(i): torch.empty(n, device="meta") for i, n in enumerate(numels)}
    for blocks in (1, 2, 4, 8):
        split = streaming._split(parameters, blocks)
        assert memory_plan.largest_block(numels, blocks) == max(sum(p.numel() for p in b.values()) for b in split)


def test_blocks_hold_the_sums_of_the_largest_parameter() -> None:
    step = Step((10, 900, 10, 80), 4000, 4000 + 3600 + 100)
    for blocks in (2, 4, 8):
        assert memory_plan.selection_bytes("blocks", blocks, step, 1, 4, "cpu") >= step.peak + 4 * 900


def test_dry_run_sees_activations_and_checkpoints() -> None:
    arguments = finetune_large.build_parser().parse_args(
        ["--width", "64", "--layers", "8", "--tokens", "512", "--batch", "8", "--device", "cpu", "--dtype", "float32"]
    )
    build = finetune_large.model_builder(arguments)
    peaks = [
        dry_run(
            lambda checkpointing=checkpointing: build(checkpointing, False),
            lambda: torch.zeros(8, 512, dtype=torch.long),
            finetune_large.loss_fn,
            "release",
            1e-3,
        ).peak
        for checkpointing in (False, True)
    ]
    hidden = 8 * 512 * 64 * 4
    assert peaks[0] > 8 * 8 * hidden  # each block keeps more than 8 times its input
    assert peaks[1] < peaks[0] / 2


def test_plans_come_fastest_first() -> None:
    """The first is what everybody does; the least memory comes last."""

    def steps(mode: str, checkpointing: bool) -> Step:
        activations = 10 if checkpointing else 100
        gradients = {"dense": 1000, "release": 100, "sparse_grad": 20}[mode]
        return Step((100,) * 10, 1000, 1000 + gradients + activations)

    everything = list(plans(steps, 1e-3, 4, "cpu"))
    assert (everything[0].mode, everything[0].streaming, everything[0].checkpointing) == ("dense", False, False)
    assert min(everything, key=lambda plan: plan.training).mode == "sparse_grad"
    assert everything[-1].checkpointing
    assert everything[-1].streaming is True
    assert not any(plan.streaming == "host" for plan in everything)  # it is the same memory
    assert any(plan.streaming == "host" for plan in plans(steps, 1e-3, 4, "cuda"))


# ---- the script ----


def run(capsys: pytest.CaptureFixture[str], *arguments: str, tiny: Sequence[str] = TINY) -> tuple[int, str, str]:
    status = finetune_large.main([*tiny, *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("mode", memory_plan.TRAINING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains_in_each_mode(mode: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys,
        "--mode",
        mode,
        "--dtype",
        dtype,
        "--memory-budget",
        "8GiB",
        "--density",
        "0.01",
        "--output",
        str(tmp_path),
    )
    assert status == 0, err
    assert f"training: {mode}" in out
    for word in ("expected", "measured", "selection", "training"):
        assert word in out
    mask = SparseMask.load(tmp_path / "mask.safetensors")
    arguments = finetune_large.build_parser().parse_args([*TINY, "--dtype", dtype])
    model = finetune_large.model_builder(arguments)(False, True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    SparseDelta.load(tmp_path / "tuned.safetensors").apply_(model)
    changed = 0
    for name, parameter in model.named_parameters():
        different = (parameter != before[name]).flatten()
        changed += int(different.sum())
        assert not different.index_fill(0, mask[name].long(), False).any()
    # rounding to bf16 keeps some where they were
    assert changed > 0.5 * mask.k


def test_modes_train_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in memory_plan.TRAINING:
        run(capsys, "--mode", mode, "--memory-budget", "8GiB", "--output", str(tmp_path / mode))
    models = []
    for mode in memory_plan.TRAINING:
        model = finetune_large.model_builder(finetune_large.build_parser().parse_args([*TINY, "--dtype", "float32"]))(
            False, True
        )
        SparseDelta.load(tmp_path / mode / "tuned.safetensors").apply_(model)
        models.append(model)
    for dense, *others in zip(*(model.parameters() for model in models), strict=True):
        for other in others:
            torch.testing.assert_close(other, dense)  # norms for clipping, and sddmm, add up in another order


SCRIPT = """
import sys, finetune_large
finetune_large.VOCABULARY = int(sys.argv.pop(1))
finetune_large.return_freed_blocks()
sys.exit(finetune_large.main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("vocabulary", "arguments"),
    [
        ("256", "--width 256 --layers 4 --batch 2 --tokens 16 --memory-budget 1GiB --density 0.6 --mode release"),
        ("256", "--width 128 --layers 4 --batch 2 --tokens 16 --memory-budget 1GiB --density 1 --output OUTPUT"),
        # two parameters of half the model each: 8 blocks of them have the sums of 2
        ("400000", "--width 64 --layers 1 --batch 1 --tokens 4 --memory-budget 376MiB"),
    ],
    ids=["large k", "large k, written", "large embedding"],
)
def test_expected_is_not_exceeded(vocabulary: str, arguments: str, tmp_path: Path) -> None:
    """In a process of its own: what other tests have freed would count as free."""
    arguments = arguments.replace("OUTPUT", str(tmp_path)) + " --device cpu --dtype float32 --steps 2"
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, vocabulary, *arguments.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for stage in ("selection", "training"):
        found = re.search(rf"^{stage} +([\d,]+) MiB +([\d,]+) MiB", ran.stdout, re.MULTILINE)
        assert found, ran.stdout
        expected, measured = (int(size.replace(",", "")) for size in found.groups())
        assert measured <= expected, ran.stdout


def test_budget_decides(capsys: pytest.CaptureFixture[str]) -> None:
    """Less and less memory: another selection, another mode, checkpointing, and a refusal that says what is needed."""
    size = ["--width", "128", "--layers", "4", "--tokens", "64", "--batch", "4", "--device", "cpu", "--dry-run"]
    seen = []
    for budget in ("36MiB", "31.5MiB", "26MiB", "24.5MiB", "100KiB"):
        status, out, err = run(capsys, "--memory-budget", budget, tiny=size)
        seen.append((status, next((line for line in out.splitlines() if line.startswith("training: ")), err)))
    assert [status for status, _ in seen] == [0, 0, 0, 0, 2]
    assert "dense" in seen[0][1]
    assert "at once" in seen[0][1]
    assert len({line for _, line in seen}) == 5
    assert "dense, activations kept; selection: 2 blocks" in seen[1][1]
    assert "dense, activations recomputed" in seen[2][1]
    assert "release, activations recomputed" in seen[3][1]
    assert "--memory-budget: expected at least" in seen[4][1]
    assert seen[4][1].count("\n") == 1


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    status, out, _ = run(capsys, "--data", str(text), "--memory-budget", "8GiB", "--density", "0.05")
    assert status == 0
    losses = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--data", "missing.txt"], "--data: expected a text file"),
        (["--data", "missing.txt", "--dry-run"], "--data: expected a text file"),
        (["--data", ".", "--dry-run"], "--data: expected a text file"),
        (["--output", "/dev/null/below", "--dry-run"], "--output: expected a folder to write to"),
        (["--device", "nowhere"], "--device"),
        (["--mode", "sparse_grad", "--memory-budget", "1k"], "--m"),
    ],
)
def test_errors_are_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert part in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory-budget", "much"],
        ["--memory-budget", "100"],
        ["--lr", "inf"],
        ["--density", "2"],
        ["--steps", "0"],
        ["--tokens", "1"],
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        finetune_large.main(arguments)
    assert exit_status.value.code == 2
    assert "--help" in capsys.readouterr().err


def cpu_allocator(*_: object) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def cuda_allocator(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nDetails")


def python(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("fail", [cpu_allocator, cuda_allocator, python])
@pytest.mark.parametrize(
    ("stage", "place", "remedy"),
    [
        ("training", "finetune_large.warm_up", "--mode release --memory-budget 18MiB (training: release"),
        (
            "selection",
            "saft_kernels.selection.select_mask._accumulate",
            "--mode dense --memory-budget 18MiB (training: dense",
        ),
    ],
)
def test_out_of_memory_is_one_line(
    fail: Callable[..., None],
    stage: str,
    place: str,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, fail)
    status, _, err = run(capsys, "--memory-budget", "8GiB")
    assert status == 1
    assert f"out of memory in {stage}" in err
    assert remedy in err
    assert "Details" not in err
    assert err.count("\n") == 1


def test_other_errors_are_not_called_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(finetune_large, "warm_up", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        finetune_large.main([*TINY, "--memory-budget", "8GiB"])


def test_out_of_memory_with_nothing_lighter() -> None:
    plan = memory_plan.Plan("sparse_grad", True, True, 1, 0, 0)
    assert finetune_large.LESS in finetune_large.out_of_memory(MemoryError(), plan, iter(()))


@pytest.mark.parametrize(
    ("meminfo", "limit", "used", "free"),
    [
        ("MemFree: 1 kB\nMemAvailable: 900 kB\n", "max", "0", 900 * 1024),
        ("MemAvailable: 900 kB\n", "204800", "102400", 112400),  # 10,000 of it files that can go
        ("MemAvailable: 9 kB\n", "204800", "102400", 9 * 1024),
        (None, "204800", "102400", 112400),
        (None, None, None, None),
    ],
)
def test_free_bytes(
    meminfo: str | None,
    limit: str | None,
    used: str | None,
    free: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the machine, of its container, and where neither is told: a line that asks for the option."""
    files = {"meminfo": meminfo, "memory.max": limit, "memory.current": used}
    for name, text in {**files, "memory.stat": "file 3\ninactive_file 10000\n"}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory_plan, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_plan, "CGROUP", tmp_path)
    assert memory_plan.free_bytes(torch.device("cpu")) == free
    if free is None:
        status, _, err = run(capsys)
        assert status == 2
        assert err.startswith("error: --memory-budget: expected one")


def test_output_is_checked_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_large.saft_kernels, "select", pytest.fail)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = run(capsys, "--memory-budget", "8GiB", "--output", str(folder))
        assert status == 2
        assert f"--output: expected a folder to write to, got {folder}" in err
        assert err.count("\n") == 1
    (tmp_path / "out" / "tuned.safetensors").mkdir(parents=True)
    status, _, err = run(capsys, "--memory-budget", "8GiB", "--output", str(tmp_path / "out"))
    assert (status, err.count("\n")) == (2, 1)
    assert "got a folder; name another" in err


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--memory-budget", "8GiB", "--dry-run", "--output", str(tmp_path / "new" / "er"))
    assert status == 0, err
    assert not list(tmp_path.iterdir())


def test_budget_without_a_unit_names_the_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune_large.main(["--memory-budget", "100"])
    assert "KiB, MiB, GiB or TiB), such as 16GiB, got '100'" in capsys.readouterr().err


def test_a_log_file_gets_lines_at_once_and_no_bars(tmp_path: Path) -> None:
    """Of a process whose output is no terminal."""
    ran = subprocess.run(
        [sys.executable, finetune_large.__file__, *TINY, "--memory-budget", "8GiB", "--selection-batches", "2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stderr.splitlines()
    assert first == "select(): reads 2 batches"
    assert second.startswith("select(): selected ")
    for line in ("training for 6 steps", "step 6/6"):
        assert line in ran.stdout
    assert "\r" not in ran.stdout + ran.stderr


@pytest.mark.parametrize("width", ["1", "65", "200"])
def test_any_width(width: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--width", width, "--memory-budget", "8GiB", "--dry-run")
    assert status == 0, err


def test_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """What was passed over, what each stage takes, and which option stands in the way."""
    size = ["--width", "128", "--layers", "4", "--tokens", "64", "--batch", "4", "--device", "cpu", "--dry-run"]
    _, out, _ = run(capsys, "--memory-budget", "31.5MiB", tiny=size)
    why = "fastest way that fits: training: dense, activations kept; selection: at once would take 33 MiB, in selection"
    assert why in out
    assert re.search(
        r"^expected at the peak: selection \d+ MiB, training \d+ MiB \(full fine-tuning", out, re.MULTILINE
    )
    status, _, err = run(capsys, "--memory-budget", "24.5MiB", "--mode", "dense", tiny=size)
    assert status == 2
    assert "leave out --mode dense" in err
    assert err.count("\n") == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune_large.main(["--help"])
    out = capsys.readouterr().out
    for word in ("release_grads=True", "streaming=", "examples:", "--dry-run", "tuned.safetensors"):
        assert word in out


def test_a_transformers_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="--model takes a transformers model")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=256
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    status, out, err = run(capsys, "--model", str(tmp_path / "model"), "--mode", "release", "--memory-budget", "8GiB")
    assert status == 0, err
    assert "training: release" in out
