"""A whole training step: forward, backward, optimizer step, zero_grad, for ways to fine-tune; and the selection before.

Random weights, random data. CLIP in fp32, on a GPU under bf16 autocast; the decoder, a Llama with checkpointed layers,
in bf16. Masks hold 0.1 % of the parameters: "global", the largest of all gradients, which with random weights sit in
few layers; and "tensor", the largest of each tensor, so that every layer has some. Ways are timed in turn, round by
round, one optimizer alive at a time: compare ratios. LoRA (PEFT) changes the MLPs of CLIP, and all linear layers of the
decoder. The peak is torch.cuda.max_memory_allocated; on a CPU, bench_memory.py measures it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
from bench_memory import MIB, Workload, clip, decoder, to_device
from torch import Tensor, nn

import saft_kernels

FULL = "full fine-tuning, torch AdamW fused"
LORA = "LoRA r=16, PEFT"
WAYS = [
    (FULL, ""),
    ("SparseAdamW, dense gradients", "global"),
    ("SparseAdamW, release_grads", "global"),
    ("SparseAdamW, sparse_grad", "global"),
    ("SparseAdamW, sparse_grad", "tensor"),
    (LORA, ""),
]
SELECTIONS: dict[str, dict[str, Any]] = {
    "select": {},
    "select, streaming": {"streaming": True},
    "select, of each tensor": {"scope": "tensor"},
}

WORKLOADS: dict[str, Callable[[argparse.Namespace], Workload]] = {
    "ViT-B-32": partial(clip, architecture="ViT-B-32"),
    "ViT-B-16": partial(clip, architecture="ViT-B-16"),
    "ViT-L-14": partial(clip, architecture="ViT-L-14"),
    "decoder": decoder,
}
SIZES: dict[str, dict[str, Any]] = {  # of the options, by device
    "cpu": {"models": ["ViT-B-32"], "batch": 16, "tokens": 64, "layers": 2, "hidden": 256, "rounds": 5},
    "cuda": {
        "models": ["ViT-B-16", "ViT-L-14", "decoder"],
        "batch": 96,
        "tokens": 8192,
        "layers": 32,
        "hidden": 4096,  # 6.8 B parameters
        "rounds": 1,
    },
}


@dataclass
class Row:
    """One way. Milliseconds per step, or of the selection; `device_ms` and `peak_mib` are a GPU's."""

    model: str
    way: str
    mask: str
    device: str
    dtype: str
    data: str
    numel: int
    trained: int
    wall_ms: float | None
    wall_of_full: float | None
    device_ms: float | None
    device_of_full: float | None
    peak_mib: float | None
    threads: int
    torch: str
    commit: str
    day: str
    malloc: str = ""
    triton: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """The way, and by which mask."""
        return f"{self.way}{f' ({self.mask} mask)' if self.mask else ''}"


# ---- a way ----


@contextlib.contextmanager
def built(
    way: str, model: nn.Module, adapted: str, mask: saft_kernels.SparseMask | None
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """The model to train and its optimizer; afterwards the model is a plain one again."""
    with contextlib.ExitStack() as undo:
        if way == FULL:
            yield model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        elif way == LORA:
            import peft

            config = peft.LoraConfig(r=16, target_modules=adapted)
            tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
            undo.callback(model.requires_grad_, True)
            undo.callback(tuned.unload)
            trained = [p for p in tuned.parameters() if p.requires_grad]
            yield tuned, torch.optim.AdamW(trained, lr=1e-6, fused=True)
        else:
            release = way != "SparseAdamW, dense gradients"
            optimizer = saft_kernels.SparseAdamW(model.named_parameters(), lr=1e-6, mask=mask, release_grads=release)
            if way == "SparseAdamW, sparse_grad":
                undo.enter_context(saft_kernels.sparse_grad(model, optimizer))
            yield model, optimizer


class Bench:
    """One model, its batch and masks, and what was measured of it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.device, self.density = name, args.device, args.density
        torch.manual_seed(0)
        self.workload = WORKLOADS[name](args)
        with torch.device(args.device):
            self.model = self.workload.model()
        if name == "decoder":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.train()
        self.batch = to_device(self.workload.batch(), args.device)
        self.numel = sum(p.numel() for p in self.model.parameters())
        self.masks: dict[str, saft_kernels.SparseMask] = {}
        self.timings: dict[tuple[str, str], list[harness.Timing]] = {}
        self.trained: dict[tuple[str, str], int] = {}
        self.peaks: dict[tuple[str, str], float | None] = {}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The workload's, in the precision it is trained in."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda" and self.name != "decoder"):
            return self.workload.loss(model, batch)

    def measure(self, key: tuple[str, str], run: Callable[[], object]) -> harness.Timing:
        """Times `run` after calls that make states and fill caches, on a GPU with their peak."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
        if self.device == "cuda":
            run()
            self.peaks[key] = round(torch.cuda.max_memory_allocated() / MIB, 1)
        return harness.measure(run, self.device, repeats=3 if self.device == "cuda" else 1, warmup=0)

    def select(self, way: str) -> None:
        """Times a selection, and keeps its mask."""
        options = {"density": self.density, "progress": False, **SELECTIONS[way]}
        scope = options.get("scope", "global")

        def run() -> None:
            self.masks[scope] = saft_kernels.select(self.model, [self.batch], self.loss, **options)
            self.trained[way, ""] = self.masks[scope].k

        self.keep((way, ""), partial(self.measure, (way, ""), run))

    def train(self, key: tuple[str, str]) -> None:
        """Times a training step."""
        way, mask = key

        def timed() -> harness.Timing:
            selected = self.masks[mask] if mask else None
            with built(way, self.model, self.workload.adapted, selected) as (model, optimizer):

                def step() -> None:
                    self.loss(model, self.batch).backward()
                    optimizer.step()
                    optimizer.zero_grad()

                count = sum(p.numel() for p in model.parameters() if p.requires_grad)
                self.trained[key] = count if selected is None else selected.k
                return self.measure(key, step)

        self.keep(key, timed)

    def keep(self, key: tuple[str, str], timed: Callable[[], harness.Timing]) -> None:
        """A way that failed once is not tried again."""
        timings = self.timings.setdefault(key, [])
        if not any(timing.error for timing in timings):
            timings.append(harness.Timing.attempt(timed))
        self.model.zero_grad()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def rows(self) -> list[Row]:
        """Of what was measured so far."""
        return [self.row(key) for key in self.timings]

    def row(self, key: tuple[str, str]) -> Row:
        """Beside full fine-tuning, once that has been timed."""
        full, timing = self.timing((FULL, "")), self.timing(key)
        wall, device = self.milliseconds(timing)
        full_wall, full_device = self.milliseconds(full) if full and key[0] not in SELECTIONS else (None, None)
        return Row(
            model=self.name,
            way=key[0],
            mask=key[1],
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            data=self.workload.size,
            numel=self.numel,
            trained=self.trained.get(key, 0),
            wall_ms=wall,
            wall_of_full=None if not wall or not full_wall else round(wall / full_wall, 3),
            device_ms=device,
            device_of_full=None if not device or not full_device else round(device / full_device, 3),
            peak_mib=self.peaks.get(key),
            note=harness.notes(timing.error if timing else ""),
            **harness.provenance(self.device),
        )

    def timing(self, key: tuple[str, str]) -> harness.Timing | None:
        """Over the rounds, or of the one that failed."""
        timings = self.timings.get(key)
        if not timings:
            return None
        return next((t for t in timings if t.error), None) or harness.Timing.across(timings)

    def milliseconds(self, timing: harness.Timing | None) -> tuple[float | None, float | None]:
        """Wall and device time."""
        if timing is None or timing.error:
            return None, None
        if self.device == "cuda":
            return harness.milliseconds(timing.wall), harness.milliseconds(timing.p50)
        return harness.milliseconds(timing.p50), None


# ---- all of them ----


def run(args: argparse.Namespace) -> harness.Results:
    for name, value in SIZES[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    results = harness.Results(args.name, args.output)
    for name in args.models:
        try:
            bench = Bench(name, args)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        before = results.rows
        ways = [key for key in WAYS if key[0] != LORA or not missing("peft")]
        tasks = [partial(bench.select, way) for way in SELECTIONS]
        tasks += [partial(bench.train, key) for _ in range(args.rounds) for key in ways]
        for task in harness.progress(tasks, name):
            task()
            results.rows = [*before, *bench.rows()]
            results.write()
        del bench, tasks, task
        gc.collect()
    return results


def missing(package: str) -> bool:
    """Says so."""
    try:
        __import__(package)
    except ImportError as error:
        print(f"left out, {error}")
        return True
    return False


def report(results: harness.Results) -> None:
    for model, rows in by_model(results).items():
        harness.table(
            ["way", "trained", "ms wall", "of full", "ms device", "of full", "peak MiB", "note"],
            (
                (
                    *(row.label, f"{row.trained:,}"),
                    *(cell(row.wall_ms, ".1f"), cell(row.wall_of_full, ".2f")),
                    *(cell(row.device_ms, ".1f"), cell(row.device_of_full, ".2f")),
                    *(cell(row.peak_mib, ",.0f"), row.note),
                )
                for row in rows
            ),
            title=title(model, rows[0]),
        )


def by_model(results: harness.Results) -> dict[str, list[Row]]:
    """In the order they came."""
    found: dict[str, list[Row]] = {}
    for row in results.rows:
        found.setdefault(row.model, []).append(row)
    return found


def cell(value: float | None, form: str) -> str:
    """Empty where there is no number."""
    return "" if value is None else format(value, form)


def title(model: str, row: Row) -> str:
    return f"a training step, {model}: N = {row.numel:,}, {row.data}, {row.dtype}"


def draw(plt: Any, results: harness.Results) -> Any:
    """Wall time per step of each way, a panel per model."""
    models = by_model(results)
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 3.6 * len(models)), squeeze=False)
    for axis, (model, rows) in zip(axes[:, 0], models.items(), strict=True):
        rows = [row for row in rows if row.way not in SELECTIONS and row.wall_ms is not None]
        axis.barh([row.label for row in rows], [row.wall_ms for row in rows])
        values = [f"{row.wall_ms:.0f} ms" + (f", {row.wall_of_full:.2f}x" if row.wall_of_full else "") for row in rows]
        axis.bar_label(axis.containers[0], labels=values, padding=3, fontsize=9)
        axis.set_xlim(0, 1.3 * max(row.wall_ms or 0 for row in rows))
        axis.set(xlabel="ms (lower is better)")
        density = next((f", density {row.trained / row.numel:.2g}" for row in rows if row.mask and row.trained), "")
        axis.set_title(f"{title(model, rows[0])}{density}\n{rows[0].device}", fontsize=9)
        axis.invert_yaxis()
    return figure


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, help="default: ViT-B-32; on a GPU all the others")
    parser.add_argument("--batch", type=int, help="images and texts of the CLIP batch (default 16; on a GPU 96)")
    parser.add_argument("--tokens", type=int, help="of the decoder's batch (default 64; on a GPU 8192)")
    parser.add_argument("--layers", type=int, help="of the decoder (default 2; on a GPU 32)")
    parser.add_argument("--hidden", type=int, help="width of the decoder (default 256; on a GPU 4096)")
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, help="default 5; on a GPU 1")
    harness.main(parser, "train_step", run, report, draw, row_class=Row)


if __name__ == "__main__":
    main()
