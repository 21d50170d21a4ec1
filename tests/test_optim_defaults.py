"""torch's default device and default dtype are the caller's own: the same bits come out under any of them.

Parameters are on the CPU. A default device of "meta" stands in for a GPU: a tensor made there has no memory.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_runs import (
    BF16,
    FP16,
    FP32,
    FP64,
    MODES,
    Run,
    differences,
    draw,
    make_mask,
    snapshot,
    undisturbed,
)
from processes import isolated
from test_backends import run_python
from torch import Tensor, nn
from training import backward, batches, loss_fn, train, two_towers

import saft_kernels
from saft_kernels import SparseAdamW, SparseDelta, SparseMask, ops, select, sparse_grad

Values = dict[str, Tensor]
BACKENDS = [name for name in ("cpu", "reference") if ops.why_unavailable(name, None, "cpu") is None]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(FP32)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, dict[str, Callable[[], Any]]] = {
    "device": {"set_default_device": lambda: default_device("meta"), "with_device": lambda: torch.device("meta")},
    "dtype": {str(dtype): lambda dtype=dtype: default_dtype(dtype) for dtype in (BF16, FP16, FP64)},
}


def same_under(default: str, build: Callable[[], Any], act: Callable[[Any], Values]) -> None:
    """`act` computes the same under other defaults. What it takes is built under torch's own."""
    expected = act(build())
    assert expected
    wrong = []
    for name, manager in DEFAULTS[default].items():
        inputs = build()
        with manager():
            actual = act(inputs)
        wrong += [f"{name}: {difference}" for difference in differences(actual, expected)]
    assert wrong == []


def numbered(tensors: Any) -> Values:
    return {str(i): tensor.detach() for i, tensor in enumerate(tensors)}


def prefixed(prefix: str, values: Values) -> Values:
    return {f"{prefix} {name}": value for name, value in values.items()}


# ---- the optimizer ----


def run_of_mode(mode: str) -> Values:
    """Steps, clipping, a checkpoint, a copy that goes on from it, another selection."""
    run, resumed = Run(mode), Run(mode)
    run.step(3)
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)  # else the default device
    resumed.optimizer.load_state_dict(saved)
    resumed.steps_done = 3
    for name, p in resumed.parameters.items():
        p.data.copy_(run.parameters[name].data)
    resumed.step(2)
    run.optimizer.zero_grad()
    run.backward()
    values = {"norm": run.optimizer.clip_grad_norm_(0.5)}
    values |= prefixed("selected", {name: run.optimizer.selected_grad(p).clone() for name, p in run.parameters.items()})
    run.optimizer.step()
    run.optimizer.reselect()
    run.step(2)
    return {**values, **prefixed("resumed", snapshot(resumed.optimizer)), **snapshot(run.optimizer)}


def compare_mode(default: str, mode: str) -> None:
    same_under(default, lambda: mode, run_of_mode)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_optimizer(mode: str, default: str) -> None:
    isolated(compare_mode, default, mode)


# ---- everything else ----


def build_towers() -> tuple[nn.Module, Any, SparseMask]:
    model = two_towers()
    return model, batches(3), select(two_towers(), batches(2), loss_fn, density=0.1, progress=False)


def run_ops(_: Any) -> Values:
    values: Values = {}
    for backend in BACKENDS:
        tensors = list(draw(3, {"a": (40, 5), "b": (7,), "c": ()}).values())
        indices, threshold, nonfinite = ops.topk_magnitude(tensors, 20, backend=backend)
        values |= prefixed(f"top {backend}", numbered(indices))
        assert (threshold > 0, nonfinite) == (True, 0)
        gathered = ops.gather(tensors, indices, backend=backend)
        values |= prefixed(f"gathered {backend}", numbered(gathered))
        state = [[value.abs() for value in gathered] for _ in range(2)]
        scalars = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 300}
        ops.sparse_adamw_(tensors, [t + 1 for t in tensors], *state, indices, backend=backend, **scalars)
        values |= prefixed(f"stepped {backend}", numbered([*tensors, *state[0], *state[1]]))
        ops.scatter_(tensors, indices, gathered, backend=backend)
        values |= prefixed(f"scattered {backend}", numbered(tensors))
        dy, x = draw(4, {"dy": (6, 8), "x": (6, 9)}).values()
        values[f"sddmm {backend}"] = ops.sddmm(dy, x, indices[0][:9] % 72, backend=backend)
    return values


def run_select(inputs: Any) -> Values:
    model, data, _ = inputs
    values: Values = {}
    cases: list[dict[str, Any]] = [{"streaming": way} for way in (False, True, "host", "blocks")]
    cases += [{"scope": scope, "streaming": way} for scope in ("tensor", "row") for way in (False, "host")]
    cases += [{"score": s} for s in ("mean_abs_grad", "fisher", "relative_grad", "grad_times_weight")]
    for case in cases:
        some = data[:1] if case.get("streaming") is True else data
        mask = select(model, some, loss_fn, density=0.1, progress=False, **case)
        values |= prefixed(str(case), dict(mask))
    for score in ("weight", "random"):
        torch.manual_seed(0)
        values |= prefixed(score, dict(select(model, score=score, density=0.1)))
    return values


def run_mask(inputs: Any) -> Values:
    model, _, mask = inputs
    with tempfile.TemporaryDirectory() as folder:
        mask.save(Path(folder) / "mask.safetensors")
        loaded = SparseMask.load(Path(folder) / "mask.safetensors")
    assert loaded == mask
    assert mask.iou(loaded) == 1.0
    assert "logit_scale" in str(loaded.summary())
    dense = mask.to_dense()
    bound = mask.bind(model.named_parameters())
    return {**dict(SparseMask.from_dense(dense)), **prefixed("dense", dense), **prefixed("bound", numbered(bound))}


def run_delta(inputs: Any) -> Values:
    model, data, _ = inputs
    untrained = copy.deepcopy(model)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = SparseAdamW(model.named_parameters(), lr=0.05, density=0.1)
    originals = saft_kernels.Originals(optimizer)
    train(model, optimizer, data)
    delta = SparseDelta.diff(base, model, whole=True)
    assert SparseDelta.from_optimizer(optimizer, originals).k == delta.k
    with tempfile.TemporaryDirectory() as folder:
        delta.save(Path(folder) / "delta.safetensors", include_original=True)
        loaded = SparseDelta.load(Path(folder) / "delta.safetensors")
    assert loaded == delta
    composed = SparseDelta.compose([delta, loaded], on_conflict="sum")
    values = {**prefixed("delta", delta.values), **prefixed("composed", composed.delta.values)}
    loaded.revert_(model, verify="whole")
    values |= prefixed("reverted", {name: value.clone() for name, value in model.state_dict().items()})
    loaded.interpolate_(model, 0.3)
    values |= prefixed("interpolated", {name: value.clone() for name, value in model.state_dict().items()})
    loaded.apply_(model)
    with tempfile.TemporaryDirectory() as folder:
        rest = delta.to_shira(Path(folder) / "shira", untrained, partial=True)
        adapter = SparseDelta.from_shira(Path(folder) / "shira", untrained)
    assert rest.k + adapter.k == delta.k
    return {**values, **prefixed("shira", adapter.values), **model.state_dict()}


def run_sparse_grad(inputs: Any) -> Values:
    model, data, mask = inputs
    optimizer = SparseAdamW(model.named_parameters(), lr=0.05, mask=mask, release_grads=True)
    with sparse_grad(model, optimizer) as handle:
        assert handle.sparse
        train(model, optimizer, data)
        optimizer.zero_grad()
        backward(model, data[0])
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return {"norm": norm.detach(), **snapshot(optimizer)}


def run_groups(inputs: Any) -> Values:
    """A head that is dense, a group that comes later, several steps before a selection, tensors as hyperparameters."""
    model, data, _ = inputs
    named = dict(model.named_parameters())
    later = [(name, named.pop(name)) for name in ("text.weight", "norm.weight")]
    head = [(name, named.pop(name)) for name in ("logit_scale", "norm.bias")]
    groups = [{"params": list(named.items())}, {"params": head, "density": 1.0, "amsgrad": True}]
    lr = torch.full((), 0.05, dtype=FP32, device="cpu")
    optimizer = SparseAdamW(groups, lr=lr, density=0.2, selection_steps=2)
    train(model, optimizer, data)
    optimizer.add_param_group({"params": later, "density": 0.3})
    train(model, optimizer, [*data, *data])
    return snapshot(optimizer)


def run_scaler(inputs: Any) -> Values:
    model, data, mask = inputs
    values: Values = {}
    for fused in (None, True):
        optimizer = SparseAdamW(model.named_parameters(), lr=0.05, mask=mask, fused=fused, capturable=bool(fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for batch in data:
            optimizer.zero_grad()
            scaler.scale(loss_fn(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        values |= prefixed(f"fused {fused}", snapshot(optimizer))
    return values


def run_all_reduce(_: Any) -> Values:
    from torch import distributed

    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            values: Values = {}
            for mode in ("mask", "released_bf16", "dense"):
                run = Run(mode)
                for _ in range(2):
                    run.optimizer.zero_grad()
                    run.backward()
                    run.optimizer.all_reduce_grads()
                    run.optimizer.step()
                values |= prefixed(mode, snapshot(run.optimizer))
            return values
        finally:
            distributed.destroy_process_group()


ACTS = {"select": run_select, "mask": run_mask, "delta": run_delta, "sparse_grad": run_sparse_grad}
ACTS |= {"ops": run_ops, "groups": run_groups, "scaler": run_scaler, "all_reduce": run_all_reduce}


def compare(default: str, act: str) -> None:
    same_under(default, build_towers, ACTS[act])


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("act", ACTS)
def test_everything_else(act: str, default: str) -> None:
    isolated(compare, default, act)


# ---- counts ----


def count_to_300(default: str) -> None:
    """bfloat16 counts exactly to 256 alone; float16 to 2048."""
    for name, manager in DEFAULTS[default].items():
        numels = {"a": (5,)}
        gradient, parameter = draw(1, numels)["a"], nn.Parameter(draw(0, numels)["a"])
        with manager():
            optimizer = SparseAdamW([parameter], k=2, selection_steps=300)
            for step in range(1, 301):
                parameter.grad = gradient.clone()
                optimizer.step()
                saved = optimizer.state_dict()["state"].get(0, {})
                assert ("num_grads" in saved) == (step < 300), (name, step)
                assert step == 300 or float(saved["num_grads"]) == step, (name, step, saved["num_grads"])
                if step == 259:
                    optimizer.load_state_dict(optimizer.state_dict())
        assert saved["indices"].tolist() == sorted(gradient.abs().topk(2).indices.tolist())


@pytest.mark.parametrize("default", DEFAULTS)
def test_selection_steps_are_counted_exactly(default: str) -> None:
    isolated(count_to_300, default)


def test_imported_under_another_default_device(tmp_path: Path) -> None:
    """Scripts call torch.set_default_device first: what a module makes when it is imported stays."""
    code = f"""
        import sys, torch
        torch.set_default_device("meta")
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from optimizer_runs import Run, snapshot
        run = Run("global")
        run.step(3)
        torch.save(snapshot(run.optimizer), {str(tmp_path / "snapshot.pt")!r})
    """
    done = run_python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert differences(torch.load(tmp_path / "snapshot.pt"), undisturbed("global", 3)) == []


def test_the_defaults_of_this_process_are_torchs() -> None:
    """The runs above have processes of their own."""
    assert torch.get_default_dtype() == FP32
    assert torch.empty(0).device.type == "cpu"
    assert make_mask({"a": (5,)}).k == 1
