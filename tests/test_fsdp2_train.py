"""examples/fsdp2_train.py: two ranks under torchrun, one and three that go on; docs/distributed.md's model on paper."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES, load_example
from torch import distributed

from saft_kernels import OptimizerState, SparseAdamW, SparseDelta, SparseMask

sys.path.insert(0, str(EXAMPLES))

import memory_plan as plan

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")

OPTIONS = ["--batch", "12", "--log-every", "1", "--save-every", "3", "--density", "0.01"]


def torchrun(ranks: int, *arguments: str) -> str:
    """What it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(EXAMPLES / "fsdp2_train.py"), *OPTIONS, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step .*: loss ([\d.]+),", text, re.MULTILINE)]


def test_any_number_of_ranks_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example: Any = load_example("fsdp2_train")
    whole, two, three = (tmp_path / name for name in ("whole", "two", "three"))
    expected = example.main([*OPTIONS, "--steps", "6", "--output", str(whole)])
    assert sum(expected[3:]) < sum(expected[:3]) - 0.1

    text = torchrun(2, "--steps", "4", "--output", str(two))
    assert losses(text) == pytest.approx(expected[:4], abs=1e-3)  # printed with four digits
    assert [path.name for path in sorted(two.glob("step_*"))] == ["step_3", "step_4"]
    shutil.copytree(two, three)

    capsys.readouterr()
    rest = example.main([*OPTIONS, "--steps", "6", "--output", str(two)])
    assert "goes on from" in capsys.readouterr().out
    assert rest == pytest.approx(expected[4:], abs=1e-4)  # sums over ranks in another order

    text = torchrun(3, "--steps", "6", "--output", str(three))
    assert losses(text) == pytest.approx(expected[4:], abs=1e-3)
    (sizes,) = re.findall(r"optimizer state, KiB per rank: (.*)", text)
    assert len(sizes.split(", ")) == 3
    # 12 bytes per selected element, and a step count of 4 per parameter and rank
    numel = sum(p.numel() for p in example.new_model(example.parse_args([])).parameters())
    assert sum(map(float, sizes.split(", "))) * 1024 < 12.5 * 0.01 * numel + 3 * 4 * 40

    masks = [SparseMask.load(folder / "mask.safetensors") for folder in (whole, two, three)]
    assert masks[0] == masks[1] == masks[2]
    model = example.new_model(example.parse_args([]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    SparseDelta.load(three / "tuned.safetensors").apply_(model)
    for name, selected in masks[0].to_dense().items():
        moved = before[name] != model.get_parameter(name)
        assert not (moved & ~selected).any()
    assert any((before[name] != p).any() for name, p in model.named_parameters())

    capsys.readouterr()
    assert example.main([*OPTIONS, "--steps", "6", "--output", str(two)]) == []
    assert "6 steps were done" in capsys.readouterr().out


def test_bfloat16(tmp_path: Path) -> None:
    found = load_example("fsdp2_train").main([*OPTIONS, "--steps", "6", "--bf16", "--output", str(tmp_path)])
    assert sum(found[3:]) < sum(found[:3]) - 0.1


# ---- a model on paper ----

ROOT = EXAMPLES.parent


def test_the_docs_have_what_the_script_computes() -> None:
    text = (ROOT / "docs" / "distributed.md").read_text()
    assert plan.sharded_table() in text
    gathered = 3 * 2 * plan.LLAMA_70B.block, 2 * 2 * plan.LLAMA_70B.vocabulary * plan.LLAMA_70B.hidden
    for number in (f"{plan.LLAMA_70B.numel:,}", f"{plan.LLAMA_70B.lora(16):,}", *map(plan.readable, gathered)):
        assert number in text
    with open(ROOT / "bench" / "results" / "topk_magnitude_probe_h200.csv") as file:
        rows = [row for row in csv.DictReader(file) if (row["numel"], row["k"]) == ("1000000000", "1000000")]
    for itemsize, dtype in ((4, "float32"), (2, "bfloat16")):
        assert plan.MS_PER_BILLION[itemsize] in [
            float(row["p50_ms"]) for row in rows if (row["backend"], row["dtype"]) == ("cuda", dtype)
        ]


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_sums_are_those_of_an_optimizer(dtype: torch.dtype, itemsize: int) -> None:
    """State in memory and in a checkpoint, of a model of one shape."""
    shape = plan.Shape(hidden=64, mlp=128, kv=16, layers=1, vocabulary=100)
    sizes = [shape.vocabulary * shape.hidden] * 2 + [a * b for a, b in shape.linears] + [shape.hidden] * 3
    assert sum(sizes) == shape.numel
    model = torch.nn.ParameterList(torch.randn(size, dtype=dtype) for size in sizes)
    optimizer = SparseAdamW(model.named_parameters(), density=0.1, release_grads=True)
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    k = round(0.1 * shape.numel)
    state = sum(v.nbytes for s in optimizer.state.values() for name, v in s.items() if name != "step")
    values = sum(optimizer.selected_grad(parameter).numel() for parameter in model) * 4
    _, dense, released, _ = plan.sharded(shape, 1, itemsize, density=0.1)
    assert values == 4 * k
    assert dense.training == 2 * itemsize * shape.numel + state
    assert released.training == itemsize * shape.numel + state + values
    packed = OptimizerState(model, optimizer).state_dict()["packed"]
    assert released.saved == sum(values.nbytes for values in packed.values())
