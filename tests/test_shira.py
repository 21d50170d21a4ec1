"""SHiRA adapters: what PEFT makes of ours, and what we make of PEFT's."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import assert_message, assert_same_bits
from torch import Tensor, nn

from saft_kernels import SparseDelta

try:
    import peft
except ImportError:
    peft = None

needs_peft = pytest.mark.skipif(peft is None, reason="peft is not installed")
quiet = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


class Model(nn.Module):
    """Linear layers, one of whose names ends like another's, and much that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.proj = nn.Linear(8, 12)
        self.block = nn.ModuleDict({"proj": nn.Linear(12, 16, bias=False)})

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.block["proj"](self.proj(x).tanh())


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LINEAR = ("proj.weight", "block.proj.weight")


def models(dtype: torch.dtype, names: tuple[str, ...]) -> tuple[Model, Model]:
    """A base, and a copy with a few elements of the named tensors changed by up to 40 %."""
    torch.manual_seed(0)
    base = Model().to(dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for i, name in enumerate(names):
            flat = tuned.get_parameter(name).view(-1)
            index = torch.randperm(flat.numel())[: 5 + 9 * i]
            flat[index] *= 1 + 0.4 * (2 * torch.rand(len(index)) - 1).to(dtype)
    return base, tuned


@needs_peft
@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_ours_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = models(dtype, LINEAR)
    delta = SparseDelta.diff(base, tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = delta.to_shira(tmp_path / "new" / "adapter", base)
    assert rest.k == 0
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new" / "adapter")
    with torch.no_grad():
        assert torch.equal(adapted(TOKENS), tuned.eval()(TOKENS))
    merged = adapted.merge_and_unload()
    for name, tensor in tuned.state_dict().items():
        assert_same_bits(merged.state_dict()[name], tensor, name)
    assert SparseDelta.from_shira(tmp_path / "new" / "adapter", base) == delta


@needs_peft
@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_load_pefts_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = models(dtype, ())
    config = peft.ShiraConfig(r=1, target_modules=["proj"], random_seed=0)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        adapted(TOKENS).float().square().mean().backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path)
    delta = SparseDelta.from_shira(tmp_path, base.state_dict())
    assert set(delta.mask) == {"proj.weight", "block.proj.weight"}
    assert delta.numel == sum(p.numel() for p in base.parameters())
    model = copy.deepcopy(base)
    delta.apply_(model)
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor, name)
    delta.revert_(model)
    assert_same_bits(model.proj.weight, base.proj.weight)


@needs_peft
@quiet
def test_the_rest_is_a_delta(tmp_path: Path) -> None:
    """PEFT's adapter does nothing in nn.MultiheadAttention, which reads its projection's weight."""
    names = (*LINEAR, "embed.weight", "attention.out_proj.weight", "proj.bias")
    base, tuned = models(torch.float32, names)
    delta = SparseDelta.diff(base, tuned)
    with pytest.raises(ValueError, match=r"expected changes in nn\.Linear weights alone") as error:
        delta.to_shira(tmp_path / "adapter", base)
    assert_message(error, ["`delta`", "'embed.weight', 'attention.out_proj.weight', 'proj.bias'", "partial=True"])
    assert not (tmp_path / "adapter").exists()
    rest = delta.to_shira(tmp_path / "adapter", base, partial=True)
    assert set(rest.mask) == set(names[2:])
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    model = adapted.merge_and_unload()
    rest.apply_(model)
    assert SparseDelta.diff(model, tuned).k == 0


def test_a_rounding_is_announced(tmp_path: Path) -> None:
    """1e-8 - 1e8 has no exact fp32 difference: the sum with the base is 0."""
    base = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        base[0].weight.fill_(1e8)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[1, 2] = 1e-8
        tuned[0].weight[0, 0] = 1.5e8
    delta = SparseDelta.diff(base, tuned)
    with pytest.warns(UserWarning, match="1 of 2 values are off by a rounding"):
        delta.to_shira(tmp_path, base)
    loaded = SparseDelta.from_shira(tmp_path, base)
    assert loaded.mask == delta.mask
    assert loaded.values["0.weight"].tolist() == [1.5e8, 0.0]


def test_padding_keeps_every_bit(tmp_path: Path) -> None:
    """Modules have r * (m + n) elements: those added change nothing, not even -0."""
    base = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 5, bias=False))
    with torch.no_grad():
        base[0].weight.fill_(-0.0)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.view(-1)[3] = 1.0
        tuned[1].weight.view(-1)[:12] += 1.0
    delta = SparseDelta.diff(base, tuned)
    delta.to_shira(tmp_path, base)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, "0|1")
    for module in ("0", "1"):
        rows, columns = tensors[f"base_model.model.{module}.shira_indices"].tolist()
        assert len(set(zip(rows, columns, strict=True))) == len(rows) == 2 * (5 + 6)
    assert SparseDelta.from_shira(tmp_path, base).k == 13


def test_what_shira_cannot_hold(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.add_(1)
    with pytest.raises(ValueError, match="it is too dense for SHiRA") as error:
        SparseDelta.diff(base, tuned).to_shira(tmp_path, base)
    assert_message(error, ["`delta`", "got r = 2, 12 elements, for '0.weight' of 9"])
    with torch.no_grad():
        tuned[0].weight.copy_(base[0].weight)
        tuned[1].weight.add_(1)
    with pytest.raises(ValueError, match=r"expected changes in nn\.Linear weights, got none"):
        SparseDelta.diff(base, tuned).to_shira(tmp_path, base, partial=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("shira_weight", torch.ones(9).long(), "got int64 (9,) and int32 (2, 9)"),
        ("shira_weight", torch.ones(3, 3), "got float32 (3, 3) and int32 (2, 9)"),
        ("shira_weight", torch.ones(8), "got float32 (8,) and int32 (2, 9)"),
        ("shira_weight", torch.tensor(1.0), "got float32 () and int32 (2, 9)"),
        ("shira_indices", torch.zeros(2, 9), "and float32 (2, 9)"),
        ("shira_indices", torch.zeros(9, 2).int(), "and int32 (9, 2)"),
        ("shira_indices", torch.tensor(0), "and int64 ()"),
        ("shira_indices", torch.zeros(2, 9).long(), "got some twice"),
        ("shira_indices", torch.full((2, 9), -1), "expected row and column within (5, 4)"),
        ("shira_indices", torch.full((2, 9), 2**62), "expected row and column within (5, 4)"),
        ("other", torch.ones(1), "expected shira_weight and shira_indices per module"),
    ],
)
def test_damaged_adapters(part: str, value: Tensor, message: str, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 5))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[0, 0] += 1
    SparseDelta.diff(base, tuned).to_shira(tmp_path, base)
    weights = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file({**safetensors.torch.load_file(weights), f"base_model.model.0.{part}": value}, weights)
    with pytest.raises(ValueError, match="expected") as error:
        SparseDelta.from_shira(tmp_path, base)
    assert_message(error, [str(tmp_path), message])


def test_bases_that_do_not_fit(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 5))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[0, 0] += 1
    delta = SparseDelta.diff(base, tuned)
    with pytest.raises(TypeError, match="`base`: expected a module") as error:
        delta.to_shira(tmp_path / "new", base.state_dict())
    assert_message(error, ["got OrderedDict; pass the model"])
    assert not (tmp_path / "new").exists()
    delta.to_shira(tmp_path, base)
    with pytest.raises(ValueError, match="expected floats") as error:
        SparseDelta.from_shira(tmp_path, {"0.weight": torch.zeros(5, 4, dtype=torch.int64)})
    assert_message(error, ["for '0.weight', int64 (5, 4)"])
    for config in ("[1]", "\xff", '{"peft_type": ["SHIRA"]}'):
        (tmp_path / "adapter_config.json").write_text(config, encoding="latin-1")
        with pytest.raises(ValueError, match="expected a"):
            SparseDelta.from_shira(tmp_path, base)


@pytest.mark.parametrize("when", ["before", "model.safetensors", "config.json"])
def test_a_killed_process_leaves_no_mixed_adapter(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old or new as a whole, or what nothing loads: never weights with the other's config."""
    base, first = models(torch.float32, LINEAR[:1])
    _, second = models(torch.float32, LINEAR[1:])
    old, new = SparseDelta.diff(base, first), SparseDelta.diff(base, second)
    folder = tmp_path / "adapter"
    old.to_shira(folder, base)
    (folder / "README.md").write_text("mine")

    class Killed(BaseException):
        pass

    def dying(function: Callable[..., None], file: str, which: int) -> Callable[..., None]:
        def die(*arguments: Any, **options: Any) -> None:
            if Path(arguments[which]).name == file:
                raise Killed
            function(*arguments, **options)

        return die

    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(Path, "unlink", dying(Path.unlink, "adapter_config.json", 0))
        else:
            patch.setattr(os, "replace", dying(os.replace, f"adapter_{when}", 1))
        with pytest.raises(Killed):
            new.to_shira(folder, base)
    if when == "before":
        assert SparseDelta.from_shira(folder, base) == old
    else:
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
            SparseDelta.from_shira(folder, base)
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_model.safetensors"]
    new.to_shira(folder, base)
    assert SparseDelta.from_shira(folder, base) == new
    assert len(list(folder.iterdir())) == 3


def test_other_adapters(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 5))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[0, 0] += 1
    SparseDelta.diff(base, tuned).to_shira(tmp_path, base)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, good_config = safetensors.torch.load_file(weights), config.read_text()
    with pytest.raises(ValueError, match=r"got a model without '0\.weight'"):
        SparseDelta.from_shira(tmp_path, {"1.weight": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match=r"expected row and column within \(2, 2\)"):
        SparseDelta.from_shira(tmp_path, {"0.weight": torch.zeros(2, 2)})
    safetensors.torch.save_file({**good, "base_model.model.1.weight": torch.ones(4)}, weights)
    with pytest.raises(ValueError, match="modules_to_save are not supported"):
        SparseDelta.from_shira(tmp_path, base)
    config.write_text(good_config.replace("SHIRA", "LORA"))
    with pytest.raises(ValueError, match="expected an adapter with peft_type 'SHIRA', got 'LORA'"):
        SparseDelta.from_shira(tmp_path, base)
    config.write_text("{")
    with pytest.raises(ValueError, match="expected a SHiRA adapter, got another or damaged files"):
        SparseDelta.from_shira(tmp_path, base)
    with pytest.raises(FileNotFoundError):
        SparseDelta.from_shira(tmp_path / "nowhere", base)
