"""open_clip's training script, run for real: every precision, accumulation, clamping, masks, and going on."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_message, assert_same_bits
from scripts import EXAMPLES, assert_only_selected_changed, load_example, mask_under, weights
from torch import nn

pytest.importorskip("open_clip_train.main", reason="needs open_clip_train: pip install 'open_clip_torch[training]'")
import open_clip
import open_clip_train.data
import timm.optim
from open_clip_train import main as script
from PIL import Image

import saft_kernels
from saft_kernels import SparseAdamW, SparseMask
from saft_kernels.integrations import open_clip_train as launcher

DENSITY = 0.01
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 6, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that open_clip knows by name, and the arguments that every run shares."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-clip.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / "tiny-clip.json")
    table = load_example("train_open_clip").captioned_images(folder)
    return (
        f"--train-data {table} --dataset-type csv --workers 0 --model tiny-clip --batch-size 4 --lr 0.01 --warmup 0 "
        "--epochs 2 --save-frequency 1 --log-every-n-steps 1 "
    )


@pytest.fixture(autouse=True)
def _as_in_distributed_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process of open_clip draws the order of its data from the global generator, which its checkpoints lack.

    In distributed runs the order follows from the epoch, and so it does here: else no resumed run, with any
    optimizer, is that of an uninterrupted one.
    """
    set_epoch = open_clip_train.data.DataInfo.set_epoch

    def seeded(self: Any, epoch: int) -> None:
        torch.manual_seed(epoch)
        set_epoch(self, epoch)

    monkeypatch.setattr(open_clip_train.data.DataInfo, "set_epoch", seeded)
    # the script sets up all loggers there are
    loggers = [
        logging.root,
        *(log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)),
    ]
    levels, handlers = [log.level for log in loggers], logging.root.handlers[:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.root.handlers[:] = handlers
    for log, level in zip(loggers, levels, strict=True):
        log.setLevel(level)


def run(arguments: str, logs: Path, name: str) -> dict[str, Any]:
    """Through the launcher: the last checkpoint."""
    assert launcher.main(shlex.split(f"{arguments} --logs {logs} --name {name}")) is None
    return checkpoint(logs, name)


def checkpoint(logs: Path, name: str) -> dict[str, Any]:
    paths = sorted((logs / name / "checkpoints").glob("epoch_*.pt"))
    return torch.load(paths[-1], weights_only=True)


def losses(logs: Path, name: str) -> list[float]:
    lines = (logs / name / "out.log").read_text().splitlines()
    return [float(line.rpartition(" Loss: ")[2].split()[0]) for line in lines if " Loss: " in line]


def new_model(precision: str) -> nn.Module:
    """As the script makes it."""
    script.random_seed(0, 0)
    return open_clip.create_model("tiny-clip", precision=precision, output_dict=True)


@torch.no_grad()
def clip_loss(model: nn.Module, data: str) -> float:
    """Of all pairs together."""
    table = Path(shlex.split(data)[1]).read_text().splitlines()[1:]
    paths, captions = zip(*(line.split("\t") for line in table), strict=True)
    preprocess = open_clip.image_transform(32, is_train=False)
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    features = model.float()(images, open_clip.get_tokenizer("tiny-clip")(captions))
    return float(open_clip.ClipLoss()(*(features[key] for key in ("image_features", "text_features", "logit_scale"))))


def selected(saved: dict[str, Any], model: nn.Module) -> SparseMask:
    """By the optimizer state of a checkpoint."""
    k = sum(state["exp_avg"].numel() for state in saved["optimizer"]["state"].values())
    saft_kernels.register_timm()
    optimizer = timm.optim.create_optimizer_v2(model, "sparseadamw", weight_decay=0.2, k=k)
    optimizer.load_state_dict(saved["optimizer"])
    return mask_under(model, optimizer)


@pytest.mark.parametrize(("precision", "accum_freq"), [("fp32", 2), ("amp", 1), ("amp_bf16", 2), ("pure_bf16", 1)])
def test_precisions(precision: str, accum_freq: int, data: str, tmp_path: Path) -> None:
    """Only the selected elements move, the loss goes down, and `--resume` gives an uninterrupted run's bits."""
    arguments = data + f"--precision {precision} --accum-freq {accum_freq} --density {DENSITY} --grad-clip-norm 1"
    whole = run(arguments, tmp_path, "whole")
    model = new_model(precision)
    before = weights(model)
    mask = selected(whole, model)
    # steps that bfloat16 rounds away are still in the fp32 master, and with float16 GradScaler skips some
    share = 0.9 if precision in ("fp32", "amp_bf16") else 0.3
    assert_only_selected_changed(before, whole["state_dict"], mask, DENSITY, share)
    steps = len(losses(tmp_path, "whole"))
    assert steps == 2 * 4 // accum_freq
    if precision == "amp":  # on a CPU too: float16, and a scaler that skips the steps that overflow
        assert whole["scaler"]["scale"] < 2.0**16
        steps = whole["scaler"]["_growth_tracker"]
    assert {float(s["step"]) for s in whole["optimizer"]["state"].values() if s["exp_avg"].numel()} == {steps}
    loss = clip_loss(model, data)
    model.load_state_dict(whole["state_dict"])
    assert clip_loss(model, data) < loss - 0.01

    groups = whole["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    for state in whole["optimizer"]["state"].values():
        assert {value.dtype for key, value in state.items() if key != "indices"} <= {torch.float32}
        assert ("master" in state) == (precision == "pure_bf16" and "exp_avg" in state)

    resumed = run(f"{arguments} --resume {tmp_path / 'whole' / 'checkpoints' / 'epoch_1.pt'}", tmp_path, "resumed")
    assert len(losses(tmp_path, "resumed")) == 4 // accum_freq
    for name, tensor in whole["state_dict"].items():
        assert_same_bits(resumed["state_dict"][name], tensor, name)
    for number, state in whole["optimizer"]["state"].items():
        for key, value in state.items():
            assert_same_bits(resumed["optimizer"]["state"][number][key], value, key)
    assert resumed.get("scaler") == whole.get("scaler")


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_clamped_logit_scale(precision: str, data: str, tmp_path: Path) -> None:
    """open_clip clamps it to [0, ln 100] after every step; the next one starts from there, whatever the master was."""
    logit_scale = new_model(precision).logit_scale.detach()
    mask = SparseMask.from_dense(
        {name: torch.full(p.shape, name == "logit_scale") for name, p in new_model(precision).named_parameters()}
    )
    mask.save(tmp_path / "mask.safetensors")
    arguments = data + f"--precision {precision} --mask {tmp_path / 'mask.safetensors'} --lr 3 --skip-scheduler"
    saved = run(arguments + " --epochs 1", tmp_path, "clamped")
    lines = (tmp_path / "clamped" / "out.log").read_text().splitlines()
    scales = [float(line.rpartition("Logit Scale: ")[2].split()[0]) for line in lines if "Logit Scale: " in line]
    # logged before each step: the first two are the start, and one step of lr further, clamped
    bound = {True: 100.0, False: 1.0}[scales[1] > scales[0]]
    assert scales[0] == pytest.approx(logit_scale.exp().item(), rel=1e-2)  # four digits, of bfloat16
    assert scales[1] == pytest.approx(bound, rel=1e-2)
    assert all(1.0 <= scale <= 100.5 for scale in scales)
    assert 0.0 <= saved["state_dict"]["logit_scale"] <= torch.tensor(math.log(100)).to(logit_scale.dtype)


def test_mask_file(data: str, tmp_path: Path) -> None:
    """The names of the file, though open_clip hands on groups without names; and then a resumed run without it."""
    model = new_model("fp32")
    dense = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    dense["visual.proj"][3] = dense["text_projection"][:, 2] = dense["logit_scale"][...] = True
    mask = SparseMask.from_dense(dense)
    mask.save(tmp_path / "mask.safetensors")
    arguments = data + f"--precision fp32 --mask {tmp_path / 'mask.safetensors'}"
    saved = run(arguments, tmp_path, "masked")
    model = new_model("fp32")
    before = weights(model)
    assert selected(saved, model) == SparseMask({n: mask[n] for n in selected(saved, model)}, dict(mask.shapes))
    assert_only_selected_changed(before, saved["state_dict"], mask, mask.density)
    log = (tmp_path / "masked" / "out.log").read_text()
    assert log.count(f"SparseAdamW: selected {mask.k} of") == 1
    assert f"density: {mask.density}, k: {mask.k}" in log
    # what timm's users call is as it was
    assert timm.optim.create_optimizer_v2.__module__.startswith("timm.")


def test_selection_steps(data: str, tmp_path: Path) -> None:
    """The mean gradient of an epoch: its steps do not update, the last of them excepted."""
    arguments = data + "--precision fp32 --selection-steps 4 --k 50"
    run(arguments, tmp_path, "selected")
    first = torch.load(tmp_path / "selected" / "checkpoints" / "epoch_1.pt", weights_only=True)
    steps = {float(state["step"]) for state in first["optimizer"]["state"].values() if state["exp_avg"].numel()}
    assert steps == {1.0}
    log = (tmp_path / "selected" / "out.log").read_text()
    assert log.count("SparseAdamW: selected 50 of") == 1
    assert "param." not in log  # the model's names
    mask = selected(first, new_model("fp32"))
    assert mask.k == 50


def test_hyperparameters_are_open_clips_own(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip fills them in by the model's name, for its own optimizer only."""
    made: list[dict[str, Any]] = []
    init = SparseAdamW.__init__

    def kept(self: SparseAdamW, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self.defaults)

    monkeypatch.setattr(SparseAdamW, "__init__", functools.wraps(init)(kept))
    arguments = data.replace("--lr 0.01 ", "").replace("--epochs 2", "--epochs 1")
    run(arguments + "--precision fp32 --opt timm/sparseadamw --beta2 0.9", tmp_path, "a")
    assert {key: made[-1][key] for key in ("lr", "betas", "eps")} == {"lr": 5e-4, "betas": (0.9, 0.9), "eps": 1e-8}

    # and without the launcher: open_clip gives eps=None
    saft_kernels.register_timm(density=DENSITY)
    argv = f"{arguments} --lr 0.01 --precision fp32 --opt timm/sparseadamw --logs {tmp_path} --name b"
    assert script.main(shlex.split(argv)) is None
    assert {key: made[-1][key] for key in ("lr", "betas", "eps")} == {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    assert selected(checkpoint(tmp_path, "b"), new_model("fp32")).density == pytest.approx(DENSITY, rel=1e-2)


@pytest.mark.usefixtures("data")
def test_synthetic_data(tmp_path: Path) -> None:
    """It repeats one image and caption, on which CLIP's loss has no gradient but rounding; SigLIP's has one."""
    arguments = "--dataset-type synthetic --train-num-samples 8 --batch-size 4 --workers 0 --model tiny-clip --lr 0.01"
    saved = run(f"{arguments} --warmup 0 --epochs 2 --precision fp32 --siglip --density 0.01", tmp_path, "siglip")
    script.random_seed(0, 0)
    model = open_clip.create_model("tiny-clip", init_logit_scale=math.log(10), init_logit_bias=-10)
    assert_only_selected_changed(weights(model), saved["state_dict"], selected(saved, model), 0.01)
    curve = losses(tmp_path, "siglip")
    assert curve[-1] < curve[0] - 0.05


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--opt timm/lion", ["--opt: expected none, or timm/sparseadamw, got 'timm/lion'"]),
        ("--mask {mask} --density 0.1", ["--mask: expected it alone, got --density"]),
        ("--density 2", ["`density`: expected a number in (0, 1], got 2.0"]),
        ("--k 0", ["`k`: expected a positive int, got 0"]),
        ("--k 5 --scope tensor", ["expected None with scope='tensor'"]),
        ("--selection-steps 0", ["`selection_steps`: expected a positive int, got 0"]),
        ("--mask {mask} --selection-steps 2", ["--mask: expected it alone, got --selection-steps"]),
    ],
)
def test_errors(arguments: str, parts: list[str], data: str, tmp_path: Path) -> None:
    SparseMask.from_dense({"w": torch.ones(2)}).save(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match="expected") as error:
        launcher.main(shlex.split(data + arguments.format(mask=tmp_path / "mask.safetensors")))
    assert_message(error, parts)
    assert not (tmp_path / "logs").exists()


def test_errors_are_one_line_on_the_command_line(data: str, tmp_path: Path) -> None:
    for arguments, message in {
        "--density 2": "`density`: expected a number",
        "--mask no.safetensors": "no.saf",
    }.items():
        ran = subprocess.run(
            [sys.executable, "-m", launcher.__name__, *shlex.split(data + arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 1
        last = ran.stderr.strip().splitlines()[-1]
        assert last.startswith("saft_kernels.integrations.open_clip_train: error: ")
        assert message in last
        assert "Traceback" not in ran.stderr
        assert not list(tmp_path.iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launcher.main(["--help"])
    shown = capsys.readouterr().out
    assert "--selection-steps" in shown
    assert "--accum-freq" in shown


def test_example_and_command_line(tmp_path: Path) -> None:
    """As a user runs it, in processes of its own: the example, and then further with `--resume latest`."""
    command = [sys.executable, str(EXAMPLES / "train_open_clip.py")]
    for more in ([], ["--resume", "latest", "--epochs", "9"]):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            command + more, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Created SparseAdamW (timm/sparseadamw)" in done.stderr
    logs = tmp_path / "runs" / "train_open_clip"
    curve = losses(logs, "logs")
    assert len(curve) == 2 * 9
    assert sum(curve[-6:]) < 0.95 * sum(curve[:6])
