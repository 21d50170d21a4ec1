"""Every Python block of README and docs runs; links lead somewhere."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict

import saft_kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINING = "...  # train as ever", "loss_fn(model, batches[0]).backward(); optimizer.step()"
NEEDS_GPU = ("docs/cuda_graphs.md",)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")

# ---- what a block finds in place of the reader's own ----


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def common() -> dict[str, Any]:
    torch.manual_seed(1)
    batches = [(torch.randn(6, 8), torch.randint(4, (6,))) for _ in range(4)]
    model = network()
    mask = saft_kernels.select(model, batches, loss_fn, density=0.1, progress=False)
    model.zero_grad()
    modules = {"torch": torch, "saft_kernels": saft_kernels}
    yours = {"model": model, "batches": batches, "my_share_of_the_data": batches, "loss_fn": loss_fn, "rank": 0}
    return {**modules, **yours, "mask": mask}


def trained(model: nn.Module, batches: Any) -> nn.Module:
    tuned = copy.deepcopy(model)
    optimizer = saft_kernels.SparseAdamW(tuned.named_parameters(), density=0.1)
    loss_fn(tuned, batches[0]).backward()
    optimizer.step()
    return tuned


def of_delta() -> dict[str, Any]:
    names = common()
    base = names["model"]
    tuned, other = trained(base, names["batches"]), trained(base, names["batches"][1:])
    cars, birds = (saft_kernels.SparseDelta.diff(base, model) for model in (tuned, other))
    birds.save("other.safetensors")
    masks = {name: (torch.rand(p.shape) < 0.1).float() for name, p in base.named_parameters()}
    torch.save({f"module.{name}": mask for name, mask in masks.items()}, "with_0.5.pt")
    deltas = {"SparseDelta": saft_kernels.SparseDelta, "delta": cars, "cars": cars, "birds": birds}
    return {**names, **deltas, "base": base, "tuned": tuned, "evaluate": lambda model: 0.5}


def of_distributed() -> dict[str, Any]:
    names = common()
    optimizer = saft_kernels.SparseAdamW(names["model"].named_parameters(), mask=names["mask"])
    return {**names, "optimizer": optimizer, "dcp": checkpoint, "folder": "checkpoint", **vars(state_dict)}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {"docs/delta.md": of_delta, "docs/distributed.md": of_distributed}


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("one_rank")
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    blocks = [(text.count("\n", 0, block.start(1)), block[1]) for block in BLOCK.finditer(text)]
    code = [compile("\n" * line + source.replace(*TRAINING), page, "exec") for line, source in blocks]
    if page in NEEDS_GPU and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    for block in code:
        exec(block, NAMES.get(page, common)())


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Files are there, and headings of pages."""
    for file, anchor in LINK.findall((ROOT / page).read_text()):
        if "://" in file:
            continue
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in {slug(heading) for heading in headings}, file + anchor


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
