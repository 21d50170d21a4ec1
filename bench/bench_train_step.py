"""A whole training step of CLIP: forward, backward, optimizer step, zero_grad, for ways to fine-tune it.

Random weights, random images. Masks hold 0.1 % of the parameters: "global", the largest of all gradients, which with
random weights sit in few layers; and "tensor", the largest of each tensor, so that every layer has some. All ways are
timed in turn, round by round: compare ratios. LoRA and SHiRA (PEFT) change the linear layers of the MLPs, LoRA also
attention, which SHiRA does not know. Bytes are those of the gradients that `p.grad` holds when backward is done.
"""

from __future__ import annotations

import argparse
import collections
import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import harness
import torch
from bench_sparse_adamw import make_model
from torch import Tensor, nn

import saft_kernels
from saft_kernels.optim.release import SelectedGrad

FULL = "full fine-tuning, torch AdamW fused"


class Batch:
    """One contrastive batch and its loss."""

    def __init__(self, model: nn.Module, size: int, device: str) -> None:
        import open_clip

        image_size = model.visual.image_size  # type: ignore[union-attr]
        height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)  # type: ignore[misc]
        self.images = torch.randn(size, 3, height, width, device=device)
        self.texts = open_clip.tokenize([f"a photo of thing number {i}" for i in range(size)]).to(device)
        self.labels = torch.arange(size, device=device)

    def backward(self, model: nn.Module) -> None:
        """Forward and backward."""
        image, text, scale = model(self.images, self.texts)
        nn.functional.cross_entropy(scale * image @ text.T, self.labels).backward()


def masks(model: nn.Module, batch: Batch, density: float) -> dict[str, saft_kernels.SparseMask]:
    batch.backward(model)
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    model.zero_grad()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    numel = sum(g.numel() for g in grads.values())
    top = saft_kernels.topk_magnitude(list(grads.values()), round(density * numel)).indices
    each = [saft_kernels.topk_magnitude([g], max(1, round(density * g.numel()))).indices[0] for g in grads.values()]
    return {
        "global": saft_kernels.SparseMask(dict(zip(grads, top, strict=True)), shapes),
        "tensor": saft_kernels.SparseMask(dict(zip(grads, each, strict=True)), shapes),
    }


Step = tuple[nn.Module, torch.optim.Optimizer]


def adapted(model: nn.Module, kind: str) -> Step:
    """PEFT's LoRA of rank 16, or SHiRA with as many values per layer as rank 1 of LoRA (PEFT's smallest)."""
    import peft

    layers = ["c_fc", "c_proj"]
    if kind == "LoRA":
        attention = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
        config = peft.LoraConfig(r=16, target_modules=layers + attention)
    else:
        config = peft.ShiraConfig(r=1, target_modules=layers)
    wrapped = peft.inject_adapter_in_model(config, model)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return wrapped, torch.optim.AdamW(trained, fused=True)


def build(name: str, model: nn.Module, mask: saft_kernels.SparseMask | None) -> Step:
    """A copy of the model and its optimizer."""
    model = copy.deepcopy(model)
    if name == FULL:
        return model, torch.optim.AdamW(model.parameters(), fused=True)
    if mask is None:
        return adapted(model, name.split()[0])
    release = name != "SparseAdamW, dense gradients"
    optimizer = saft_kernels.SparseAdamW(model.named_parameters(), mask=mask, release_grads=release)
    if name == "SparseAdamW, sparse_grad":
        ways = saft_kernels.sparse_grad(model, optimizer).ways.values()
        for way, count in collections.Counter(way.split(" of ")[0] for way in ways).items():
            print(f"{name}: {count} weights, {way}")
    return model, optimizer


WAYS = [
    (FULL, ""),
    ("SparseAdamW, dense gradients", "global"),
    ("SparseAdamW, release_grads", "global"),
    ("SparseAdamW, sparse_grad", "global"),
    ("SparseAdamW, sparse_grad", "tensor"),
    ("LoRA r=16, PEFT", ""),
    ("SHiRA r=1, PEFT", ""),
]


def gradient_bytes(model: nn.Module) -> int:
    values = [p.grad.selected.values if type(p.grad) is SelectedGrad else p.grad for p in model.parameters()]
    return sum(v.numel() * v.itemsize for v in values if isinstance(v, Tensor))


def run(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    model = make_model(args.model, args.device)
    batch = Batch(model, args.batch_size, args.device)
    by_name = masks(model, batch, args.density)
    numel = sum(p.numel() for p in model.parameters())
    roof = harness.read_roof([p.detach() for p in model.parameters()])
    ways = [key for key in WAYS if "PEFT" not in key[0] or find_spec("peft")]
    steps = {(name, mask): build(name, model, by_name.get(mask)) for name, mask in ways}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    held, trained = {}, {}

    def step_of(key: tuple[str, str]) -> Callable[[], None]:
        tuned, optimizer = steps[key]

        def step() -> None:
            batch.backward(tuned)
            held[key] = gradient_bytes(tuned)
            optimizer.step()
            optimizer.zero_grad()

        return step

    for key, (tuned, _) in steps.items():
        step_of(key)()  # states, caches
        count = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        trained[key] = by_name[key[1]].k if key[1] else count
    for _ in harness.progress(list(range(args.rounds)), "train_step"):
        for key in steps:
            samples[key].append(harness.measure(step_of(key), args.device, repeats=1, warmup=0).p50)
    full = harness.Timing.of(samples[FULL, ""]).p50
    for (name, mask), seconds in samples.items():
        timing = harness.Timing.of(seconds)
        results.add(
            timing,
            roof,
            held[name, mask],
            op="train_step",
            backend=name,
            device=harness.device_name(args.device),
            dtype="float32",
            data=f"{args.model}, batch {args.batch_size}" + (f", {mask} mask" if mask else ""),
            numel=numel,
            num_tensors=len(list(model.parameters())),
            k=trained[name, mask],
            note=f"{timing.p50 / full:.3f} of full fine-tuning's time; {held[name, mask] / 2**20:.1f} MiB of gradients",
        )
    return results


def report(results: harness.Results) -> None:
    harness.table(
        ["way", "mask", "trained", "ms p20", "ms p50", "ms p80", "note"],
        (
            (row.backend, row.data.split(", ")[-1] if "mask" in row.data else "", f"{row.k:,}")
            + (*harness.times(row, 0), row.note)
            for row in results.rows
        ),
        title=f"a whole training step, {results.rows[0].data}, {results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """Time per step of each way."""
    rows = results.rows
    labels = [row.backend + (f" ({row.data.split(', ')[-1]})" if "mask" in row.data else "") for row in rows]
    values = [f"{row.p50_ms:.0f} ms, {row.p50_ms / rows[0].p50_ms:.2f}x" for row in rows]
    return harness.bars(plt, labels, rows, values, title=f"a training step, {rows[0].data}, {rows[0].device}")


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip model name (default ViT-B-32)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=5)
    harness.main(parser, "train_step", run, report, draw)


if __name__ == "__main__":
    main()
