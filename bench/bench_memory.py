"""Peak training memory of a CLIP and a decoder, random weights: full fine-tuning, SparseAdamW in its modes, and peers.

Each method trains in a process of its own, with the same weights and batch. On a CPU the peak is the resident memory of
the process (VmHWM, reset before the model is built, less what was resident then): all that the method costs, weights,
gradients, state, activations and temporaries, counted by the kernel and not by anybody's bookkeeping. The process is an
ordinary one: malloc's settings are those of the environment that the bench is run in, and are in the rows. On a GPU it
is torch.cuda.max_memory_allocated. The rows called select are one selection, not training.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

import saft_kernels

MIB = 2**20
LORA = "PEFT LoRA r=16"
Loss = Callable[[nn.Module, Any], Tensor]


# ---- what is trained ----


@dataclass(frozen=True)
class Workload:
    """A model without its memory, until `model()`."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Loss
    adapted: str  # of LoRA and SHiRA: a pattern over names of nn.Linear modules
    size: str


def clip(args: argparse.Namespace, architecture: str = "ViT-B-32") -> Workload:
    import open_clip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        image, text, scale = model(*batch)
        return nn.functional.cross_entropy(scale * image @ text.T, torch.arange(len(image), device=image.device))

    def batch() -> Any:
        texts = open_clip.tokenize([f"a photo of thing number {i}" for i in range(args.batch)])
        return torch.randn(args.batch, 3, 224, 224), texts

    # nn.MultiheadAttention reads its weights past the module that PEFT would put in their place
    adapted = r".*\.(c_fc|c_proj)"
    return Workload(
        lambda: open_clip.create_model(architecture, device=torch.get_default_device()),
        batch,
        loss,
        adapted,
        f"{args.batch} images and texts",
    )


def decoder(args: argparse.Namespace, vocab_size: int = 32000) -> Workload:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        use_cache=False,
    )

    architecture = transformers.LlamaForCausalLM  # imports it, 100 MiB that are not the method's

    def model() -> nn.Module:
        torch.set_default_dtype(torch.bfloat16)
        try:
            return architecture(config)
        finally:
            torch.set_default_dtype(torch.float32)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result: Tensor = model(input_ids=batch, labels=batch).loss
        return result

    return Workload(
        model,
        lambda: torch.randint(config.vocab_size, (max(1, args.tokens // 2048), min(args.tokens, 2048))),
        loss,
        r".*\.(q|k|v|o|gate|up|down)_proj",
        f"{args.tokens} tokens",
    )


def to_device(batch: Any, device: str) -> Any:
    """A tensor, or a tuple of them, there."""
    return tuple(x.to(device) for x in batch) if isinstance(batch, tuple) else batch.to(device)


WORKLOADS: dict[str, Callable[[argparse.Namespace], Workload]] = {
    "CLIP ViT-B/32": clip,
    "decoder": decoder,
    # its largest matrix has 5 % of the parameters, not 15 %: nearer to a model of 7 B, where it has 2 %
    "decoder, 8k vocabulary": functools.partial(decoder, vocab_size=8192),
}


# ---- methods: each returns the model to train and its step ----

Method = Callable[[nn.Module, Workload, float], tuple[nn.Module, torch.optim.Optimizer]]


def random_mask(model: nn.Module, density: float) -> saft_kernels.SparseMask:
    """Spread evenly: the memory is the same wherever the selected elements are."""
    indices, shapes = {}, {}
    for name, p in model.named_parameters():
        indices[name] = torch.randint(max(p.numel(), 1), (round(density * p.numel()),)).unique()
        shapes[name] = p.shape
    return saft_kernels.SparseMask(indices, shapes)


def sparse(**options: Any) -> Method:
    def build(model: nn.Module, workload: Workload, density: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        mask = random_mask(model, density)
        return model, saft_kernels.SparseAdamW(model.named_parameters(), mask=mask, **options)

    return build


def sparse_weight_gradients(
    model: nn.Module, workload: Workload, density: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = sparse(release_grads=True)(model, workload, density)
    saft_kernels.sparse_grad(model, optimizer)
    return model, optimizer


def adamw(model: nn.Module, workload: Workload, density: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def adamw_8bit(model: nn.Module, workload: Workload, density: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    import bitsandbytes

    return model, bitsandbytes.optim.AdamW8bit(model.parameters())


def low_bit(name: str) -> Method:
    """Of torchao. Its step is compiled, for minutes on a CPU; there it runs as it is written, tensor by tensor."""

    def build(model: nn.Module, workload: Workload, density: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        import torchao.optim

        if next(model.parameters()).device.type == "cpu":
            torch.compiler.set_stance("force_eager")
        return model, getattr(torchao.optim, name)(model.parameters())

    return build


def galore(model: nn.Module, workload: Workload, density: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Rank 128 in the linear layers that the adapters are for, as its README does, AdamW in all others."""
    import galore_torch

    projected = [m.weight for name, m in model.named_modules() if re.fullmatch(workload.adapted, name)]
    inside = {id(p) for p in projected}
    others = [p for p in model.parameters() if id(p) not in inside]
    low_rank = {"params": projected, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return model, galore_torch.GaLoreAdamW([{"params": others}, low_rank], no_deprecation_warning=True)


def peft(make_config: Callable[[Any, str], Any]) -> Method:
    def build(model: nn.Module, workload: Workload, density: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        import peft

        adapted = peft.get_peft_model(model, make_config(peft, workload.adapted))
        trained = [p for p in adapted.parameters() if p.requires_grad]
        return adapted, torch.optim.AdamW(trained, fused=True)

    return build


METHODS: dict[str, Method] = {
    "torch AdamW fused": adamw,
    "SparseAdamW": sparse(),
    "SparseAdamW release_grads": sparse(release_grads=True),
    "SparseAdamW release_grads, sparse_grad": sparse_weight_gradients,
    LORA: peft(lambda peft, names: peft.LoraConfig(r=16, target_modules=names)),
    "PEFT SHiRA r=16": peft(lambda peft, names: peft.ShiraConfig(r=16, target_modules=names)),
    "bitsandbytes AdamW8bit": adamw_8bit,  # minutes on a CPU
    "torchao AdamW8bit": low_bit("AdamW8bit"),
    "torchao AdamW4bit": low_bit("AdamW4bit"),
    "GaLore r=128": galore,
}
SELECTIONS: dict[str, Any] = {
    "select": False,
    "select streaming=True": True,
    "select streaming='blocks'": "blocks",
    "select streaming='host'": "host",
}


# ---- one process: one method ----


_MCL_CURRENT, _MCL_ONFAULT = 1, 4  # of Linux


class Peak:
    """Bytes above what was in use when it was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            # pages of libraries stay resident, where that is allowed: the system may drop and reread them at any time
            ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_ONFAULT)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        self.base = self._read("VmRSS")

    def _read(self, key: str) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() if key == "VmHWM" else torch.cuda.memory_allocated()
        match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None
        return int(match[1]) * 1024

    def bytes(self) -> int:
        """Since then, at the most."""
        return self._read("VmHWM") - self.base


PACKAGES = {"PEFT": "peft", "bitsandbytes": "bitsandbytes", "torchao": "torchao.optim", "GaLore": "galore_torch"}


def package_of(method: str) -> str | None:
    """What it needs beside torch and us."""
    return PACKAGES.get(method.split()[0])


def warm_up(method: str, device: str) -> None:
    """Libraries load what they load on first use, 100 MiB and more, which is not the method's."""
    layer = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        optimizers = [torch.optim.AdamW(layer.parameters()), saft_kernels.SparseAdamW(layer.parameters())]
        layer.to(dtype)(torch.randn(8, 64, device=device, dtype=dtype)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        layer.zero_grad()
    if package := package_of(method):
        importlib.import_module(package)


def work(args: argparse.Namespace) -> dict[str, Any]:
    name, method = args.worker
    workload = WORKLOADS[name](args)
    warm_up(method, args.device)
    torch.manual_seed(0)
    peak = Peak(args.device)
    model = workload.model().to(args.device)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    numel = sum(p.numel() for p in model.parameters())
    batch = to_device(workload.batch(), args.device)
    seconds = []
    trained = numel
    if method in SELECTIONS:
        start = time.perf_counter()
        saft_kernels.select(
            model,
            [batch],
            workload.loss,
            density=args.density,
            streaming=SELECTIONS[method],
            progress=False,
        )
        seconds.append(time.perf_counter() - start)
    else:
        model, optimizer = METHODS[method](model, workload, args.density)
        if isinstance(optimizer, saft_kernels.SparseAdamW):
            assert optimizer.mask is not None
            trained = optimizer.mask.k
        else:
            trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        for _ in range(args.steps):
            start = time.perf_counter()
            workload.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "dtype": dtype,
        "data": workload.size,
        "numel": numel,
        "trained": trained,
        "weights_mib": round(weights / MIB, 1),
        "peak_mib": round(peak.bytes() / MIB, 1),
        "seconds": round(statistics.median(seconds[1:] or seconds), 2),
    }


# ---- all of them ----


@dataclass
class Row:
    """One method. `seconds` per step, or of the selection; `of_lora` is the peak relative to LoRA's on that model."""

    model: str
    method: str
    device: str
    dtype: str
    data: str
    numel: int
    trained: int
    weights_mib: float
    peak_mib: float | None
    of_lora: float | None
    seconds: float | None
    threads: int
    torch: str
    commit: str
    day: str
    malloc: str = ""
    triton: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """What was measured of what."""
        return f"{self.method} ({self.model})"


UNMEASURED = {
    "dtype": "",
    "data": "",
    "numel": 0,
    "trained": 0,
    "weights_mib": 0.0,
    "peak_mib": None,
    "seconds": None,
}


def why_not(method: str) -> str | None:
    """Why a method cannot run here."""
    try:
        if package := package_of(method):
            importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return None


def run(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    methods = [method for method in (*METHODS, *SELECTIONS) if re.search(args.methods, method)]
    cases = [(model, method) for model in WORKLOADS if re.search(args.models, model) for method in methods]
    for model, method in harness.progress(cases, "memory"):
        if reason := why_not(method):
            print(f"{method}: left out, {reason}")
            continue
        # its own process: peaks do not mix, and what Python keeps does not add up
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", model, method]
        measured, error = harness.run_worker(command)
        results.append(
            Row(
                model=model,
                method=method,
                of_lora=None,
                note=harness.notes(error),
                **harness.provenance(args.device),
                **(UNMEASURED | measured),
            )
        )
        lora = {row.model: row.peak_mib for row in results.rows if row.method == LORA and row.peak_mib}
        for row in results.rows:
            if row.model in lora and row.method in METHODS and row.peak_mib:
                row.of_lora = round(row.peak_mib / lora[row.model], 3)
        results.write()
    return results


def report(results: harness.Results) -> None:
    for model in dict.fromkeys(row.model for row in results.rows):
        rows = [row for row in results.rows if row.model == model and harness.is_measured(row)]
        if not rows:
            continue
        harness.table(
            ["method", "trained", "peak MiB", "beyond the weights", "of LoRA's", "s", "note"],
            (
                (
                    row.method,
                    f"{row.trained:,}",
                    f"{row.peak_mib:,.0f}",
                    f"{row.peak_mib - row.weights_mib:,.0f}",
                    "" if row.of_lora is None else f"{row.of_lora:.2f}",
                    f"{row.seconds:.1f}",
                    row.note,
                )
                for row in rows
            ),
            title=f"{model}: {rows[0].numel:,} parameters, {rows[0].dtype}, {rows[0].data}, {rows[0].device}",
        )


def draw(plt: Any, results: harness.Results) -> Any:
    """Peak per method, the weights in another colour."""
    models = list(dict.fromkeys(row.model for row in results.rows))
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 4.2 * len(models)), squeeze=False)
    for axis, model in zip(axes[:, 0], models, strict=True):
        rows = [row for row in results.rows if row.model == model]
        labels = [row.method for row in rows]
        axis.barh(labels, [row.weights_mib for row in rows], color="lightgray", label="weights")
        beyond = [row.peak_mib - row.weights_mib for row in rows]
        bars = axis.barh(labels, beyond, left=[row.weights_mib for row in rows], label="all else, at the peak")
        axis.bar_label(bars, [f"{row.peak_mib:,.0f} MiB" for row in rows], padding=3)
        axis.set(xlabel="peak memory, MiB (lower is better)")
        sparse = next((row for row in rows if row.method.startswith("Sparse")), None)
        density = f", density {sparse.trained / sparse.numel:.2g}" if sparse else ""
        axis.set_title(
            f"{model}: N = {rows[0].numel:,}, {rows[0].dtype}, {rows[0].data}{density}\n{rows[0].device}",
            loc="left",
            fontsize=9,
        )
        axis.invert_yaxis()
        axis.margins(x=0.18)
    # beside the first title: inside, it covers whatever bar comes to lie there
    axes[0, 0].legend(loc="lower right", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)
    return figure


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--models", default="", help="regular expression over model names (default: all)")
    parser.add_argument("--methods", default="", help="regular expression over method names (default: all)")
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=2, help="training steps (the second has the peak)")
    parser.add_argument("--batch", type=int, default=2, help="images and texts of the CLIP batch")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the decoder batch")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default 12: 220 M parameters)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args)))
    else:
        harness.main(parser, "memory", run, report, draw, row_class=Row)


if __name__ == "__main__":
    main()
