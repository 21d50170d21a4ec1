"""examples/fsdp2_train.py: two ranks under torchrun, and one and three that go on from their checkpoint."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import EXAMPLES, load_example
from torch import distributed

from saft_kernels import SparseDelta, SparseMask

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
