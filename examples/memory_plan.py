"""What fine-tuning will need in memory, found by running a step without any, and what it took.

python examples/memory_plan.py      # a 70 B decoder on 8 and 64 GPUs, on paper: the table of docs/distributed.md
"""

from __future__ import annotations

import gc
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
TRAINING = ("dense", "release", "sparse_grad")
MARGIN, OVERHEAD = 1.1, 16 * 2**20
"""What allocators and libraries take beyond the tensors of a step: a factor, and bytes. See docs/memory.md."""
DENSE_SHARE = 0.2  # sparse_grad leaves a weight to the dense product above it, docs/memory.md says
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def parse_bytes(text: str) -> int:
    """Of 16GiB or 500 MB (binary units, both)."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d*)?|\.\d+)\s*([kmgt])(?:i?b)?\s*", text.lower())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size == 0:
        raise ValueError(f"expected a size above 0 with its unit (KiB, MiB, GiB or TiB), such as 16GiB, got {text!r}")
    return size


def readable(size: float) -> str:
    """In MiB below one GiB."""
    return f"{size / 2**20:,.0f} MiB" if size < GIB else f"{size / GIB:,.2f} GiB"


def free_bytes(device: torch.device) -> int | None:
    """What the device, or the machine or its container (cgroup v2), has free now; None where neither says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    if MEMINFO.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())):
        found.append(int(match[1]) * 1024)
    limit, used, stat = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        files = re.search(r"^inactive_file (\d+)", stat.read_text(), re.MULTILINE)  # given up when memory is short
        found.append(int(most) - int(used.read_text()) + (int(files[1]) if files else 0))
    return max(1, min(found)) if found else None


# ---- a step without memory ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive, but for products with a size that is in `skip`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.skip: set[int] = set()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                skipped = func is torch.ops.aten.mm.default and tensor.numel() in self.skip
                self._count(tensor.untyped_storage(), skipped)
        return out

    def _count(self, storage: torch.UntypedStorage, skipped: bool) -> None:
        key, size = storage._cdata, 0 if skipped else storage.nbytes()
        if key not in self._known:  # else a view
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Step:
    """Elements of each parameter; bytes of the weights, and at the peak of a training step."""

    numels: tuple[int, ...]
    weights: int
    peak: int

    @property
    def numel(self) -> int:
        """Of all parameters."""
        return sum(self.numels)


def dry_run(
    build: Callable[[], nn.Module],
    make_batch: Callable[[], Any],
    loss_fn: Callable[..., Tensor],
    mode: str,
    density: float,
) -> Step:
    """Runs forward and backward on fake tensors, with gradients kept ("dense") or freed as they come."""
    tracker = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model = build()
        gc.collect()
        weights = tracker.peak = tracker.live
        parameters = [p for p in model.parameters() if p.requires_grad]
        numels = [p.numel() for p in parameters]
        if mode != "dense":
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        loss = loss_fn(model, make_batch())
        if mode == "sparse_grad":  # of a smaller layer so much may be selected that its gradient is computed densely
            linear = (module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
            tracker.skip = {n for n in linear if DENSE_SHARE * n >= density * sum(numels)}
        loss.backward()
    return Step(tuple(numels), weights, tracker.peak)


# ---- plans ----


def with_margin(size: float) -> int:
    """What to expect in place of that many bytes of tensors."""
    return round(MARGIN * size) + OVERHEAD


@dataclass(frozen=True)
class Plan:
    """How to train and select, and the bytes to expect at the peak of each."""

    mode: str
    checkpointing: bool
    streaming: bool | str
    blocks: int
    training: int
    selection: int

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.training, self.selection)

    def __str__(self) -> str:
        how = {False: "at once", True: "streaming, one batch", "host": "sums in host memory"}
        select = how.get(self.streaming, f"{self.blocks} blocks of parameters, one pass each")
        activations = "recomputed in backward" if self.checkpointing else "kept"
        return f"training: {self.mode}, activations {activations}; selection: {select}"


def training_bytes(mode: str, step: Step, k: int, itemsize: int, device: str, writes: bool) -> int:
    """Tensors at the peak of a training step or, if it `writes` the fine-tune, after it; on the device."""
    state = k * (12 + 4 * (itemsize == 2))  # indices, two moments, masters of 16-bit parameters
    if mode != "dense":
        state += 4 * k  # the released values
    if mode == "sparse_grad":
        state += 16 * min(k, int(DENSE_SHARE * max(step.numels)))  # entries, sums and values of one layer
    if device == "cpu":
        state += (8 + itemsize) * k  # Originals, with int64 indices; in host memory
    return state + max(step.peak, step.weights + 80 * k if writes and device == "cpu" else 0)


def largest_block(numels: Sequence[int], blocks: int) -> int:
    """Elements of the largest of the blocks into which select(..., streaming="blocks") splits parameters."""
    sizes, done = [0] * blocks, 0
    for numel in numels:
        sizes[min(blocks - 1, int((done + numel / 2) * blocks / sum(numels)))] += numel
        done += numel
    return max(sizes)


def selection_bytes(streaming: bool | str, blocks: int, released: Step, k: int, itemsize: int, device: str) -> int:
    """Tensors at the peak of select(), on the device: in a backward pass, or where it takes the top-k."""
    per_element = max(4, itemsize) + (2 if itemsize == 2 else 0)  # sums; 16-bit gradients beside them
    if streaming == "host" and device != "cpu":
        return released.peak
    if streaming in (False, "host"):
        top_k = (12 if device == "cpu" else 8) * k  # int64 indices, and the mask's int32 ones in host memory
        return per_element * released.numel + max(released.peak, released.weights + top_k)
    summed = largest_block(released.numels, blocks) if streaming == "blocks" else 0
    return per_element * summed + released.peak + 48 * k  # candidates, 8 bytes each, and their top-k


def plans(
    steps: Callable[[str, bool], Step], density: float, itemsize: int, device: str, writes: bool = False
) -> Iterator[Plan]:
    """What could be done, the fastest and most exact first."""
    for checkpointing in (False, True):
        for mode in TRAINING:
            gradients = mode if density < 1 else "dense"  # of wholly selected parameters they stay
            step, released = steps(gradients, checkpointing), steps("release", checkpointing)
            k = round(density * step.numel)
            training = with_margin(training_bytes(gradients, step, k, itemsize, device, writes))
            ways: list[tuple[bool | str, int]] = [(False, 1)] + [("host", 1)] * (device != "cpu")
            ways += [("blocks", blocks) for blocks in (2, 4, 8)] + [(True, 1)]
            for streaming, blocks in ways:
                selection = with_margin(selection_bytes(streaming, blocks, released, k, itemsize, device))
                yield Plan(mode, checkpointing, streaming, blocks, training, selection)


# ---- a decoder that fully_shard splits over GPUs, on paper ----


@dataclass(frozen=True)
class Shape:
    """Of a decoder with grouped queries and a gated MLP, bias-free, embedding and output layer apart."""

    hidden: int
    mlp: int
    kv: int
    layers: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a block."""
        attention = [(self.hidden, self.hidden)] * 2 + [(self.hidden, self.kv)] * 2
        return attention + [(self.hidden, self.mlp)] * 2 + [(self.mlp, self.hidden)]

    @property
    def block(self) -> int:
        """Elements of a block."""
        return sum(a * b for a, b in self.linears) + 2 * self.hidden

    @property
    def numel(self) -> int:
        """Of all parameters."""
        return self.layers * self.block + 2 * self.vocabulary * self.hidden + self.hidden

    def lora(self, rank: int) -> int:
        """Elements of adapters of all linear layers of the blocks."""
        return self.layers * rank * sum(a + b for a, b in self.linears)


LLAMA_70B = Shape(8192, 28672, 1024, 80, 128256)
MS_PER_BILLION = {4: 1.202, 2: 0.757}
"""Of selection, by the bytes of an element: on an H200 at density 1e-3, bench/results/topk_magnitude_probe_h200.csv."""


@dataclass(frozen=True)
class Sharded:
    """Bytes per GPU, without activations and what fully_shard gathers; milliseconds of select()'s read; bytes of all
    optimizer state in a checkpoint.
    """

    method: str
    training: float
    selecting: float
    selection_ms: float
    saved: int


def sharded(shape: Shape, ranks: int, itemsize: int, density: float = 1e-3, rank: int = 16) -> list[Sharded]:
    """By method, for weights and gradients of `itemsize` bytes. docs/distributed.md explains the sums."""
    n, k, a = shape.numel, round(density * shape.numel), shape.lora(rank)
    state = 4 + 8 + (4 if itemsize == 2 else 0)  # indices, moments, masters of 16-bit weights
    saved = (state + 4) * k  # indices of 8 bytes
    selecting = (itemsize + 4 + (2 if itemsize == 2 else 0)) * n / ranks  # weights, sums, 16-bit gradients
    ms = MS_PER_BILLION[itemsize] * n / ranks / 1e9
    dense, released = 2 * itemsize * n + state * k, itemsize * n + (state + 4) * k
    return [
        Sharded("AdamW", 4 * itemsize * n / ranks, 0, 0, 2 * itemsize * n),
        Sharded("`SparseAdamW`", dense / ranks, selecting, ms, saved),
        Sharded("`SparseAdamW(release_grads=True)`", released / ranks, selecting, ms, saved),
        Sharded(f"LoRA, r={rank}, AdamW", (itemsize * n + 16 * a) / ranks, 0, 0, 8 * a),
    ]


def sharded_table(shape: Shape = LLAMA_70B, ranks: Sequence[int] = (8, 64)) -> str:
    """Markdown."""
    columns = [f"{what}, {p} GPUs" for what in ("GiB", "GiB selecting", "ms selecting") for p in ranks]
    lines = ["| weights | method | " + " | ".join(columns) + " | state saved, GiB |", "|---" * (3 + len(columns)) + "|"]
    for itemsize, name in ((4, "fp32"), (2, "bf16")):
        for found in zip(*(sharded(shape, p, itemsize) for p in ranks), strict=True):
            cells = [each.training / GIB for each in found] + [each.selecting / GIB for each in found]
            cells += [each.selection_ms for each in found] + [found[0].saved / GIB]
            numbers = (f"{cell:.1f}" if cell else "" for cell in cells)
            lines.append(f"| {name} | {found[0].method} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


# ---- what it took ----


def return_freed_blocks() -> None:
    """What is freed goes back to the system at once: what is resident is what is in use. For glibc."""
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 16)


class Peak:
    """Bytes in use at the most since `restart()`, above what was in use when it was made.

    On a CPU, without the pages of files: the code of libraries, which the system maps, drops and rereads as it likes.
    What it has dropped since the peak is in VmHWM still, so the larger of their sizes before and after is taken off.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._base = device, 0
        self.restart()
        self._base = self.bytes() or 0

    def restart(self) -> None:
        """Forgets the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is resident now
        self._files = _status("RssFile") or 0

    def bytes(self) -> int | None:
        """None where it cannot be measured."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._base
        peak = _status("VmHWM")
        return None if peak is None else peak - max(self._files, _status("RssFile") or 0) - self._base


def _status(key: str) -> int | None:
    status = Path("/proc/self/status")
    match = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else None


if __name__ == "__main__":
    print(f"{LLAMA_70B.numel:,} parameters, {LLAMA_70B.lora(16):,} of LoRA")
    gathered = 3 * 2 * LLAMA_70B.block, 2 * 2 * LLAMA_70B.vocabulary * LLAMA_70B.hidden
    print(f"gathered in bf16: blocks {readable(gathered[0])}, embedding and output layer {readable(gathered[1])}")
    print(sharded_table())
