"""What a training step will need, found by running it without memory, and how to fit it into a budget."""

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

from saft_kernels.layers.sparse_grad import DENSE_SHARE

GIB = 2**30
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
TRAINING = ("dense", "release", "sparse_grad")
MARGIN, OVERHEAD = 1.1, 16 * 2**20
"""What allocators and libraries take beyond the tensors of a step: a factor, and bytes. See docs/memory.md."""
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

Parts = dict[str, int]
"""What the bytes at a peak are for, without the margin."""


def parse_bytes(text: str) -> int:
    """Of 16GiB, 500 MB (binary units, both) or plain bytes."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if match is None or value <= 0:
        raise ValueError(f"expected a size such as 16GiB, got {text!r}")
    return int(value * UNITS[match[2]])


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
    """Counts the bytes of all tensors made inside that are alive. `ignore(func, tensor)` leaves some out."""

    def __init__(self, ignore: Callable[[Any, Tensor], bool] = lambda *_: False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._ignore = ignore
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._count(storage, 0 if self._ignore(func, tensor) else storage.nbytes())
        return out

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
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
    """Elements per parameter; bytes of the weights, the dense gradients, the largest of them, and at the peak."""

    numels: tuple[int, ...]
    weights: int
    gradients: int
    largest_gradient: int
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
    linear: set[int] = set()

    def is_linear_gradient(func: Any, tensor: Tensor) -> bool:
        return mode == "sparse_grad" and func is torch.ops.aten.mm.default and tensor.numel() in linear

    tracker = LiveBytes(is_linear_gradient)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model = build()
        gc.collect()
        weights = tracker.peak = tracker.live
        parameters = [p for p in model.parameters() if p.requires_grad]
        numels, gradients = [p.numel() for p in parameters], [p.nbytes for p in parameters]
        if mode != "dense":
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        loss = loss_fn(model, make_batch())
        modules = (module for module in model.modules() if isinstance(module, nn.Linear))
        # of a smaller one so much may be selected that its gradient is computed densely
        linear.update(n for n in (m.weight.numel() for m in modules) if DENSE_SHARE * n >= density * sum(numels))
        loss.backward()
    return Step(tuple(numels), weights, sum(gradients), max(gradients), tracker.peak)


# ---- plans ----


def with_margin(size: float) -> int:
    """What to expect in place of that many bytes of tensors."""
    return round(MARGIN * size) + OVERHEAD


@dataclass(frozen=True)
class Plan:
    """How to train and select, and the bytes at the peak of each."""

    mode: str
    checkpointing: bool
    streaming: bool | str
    blocks: int
    training_parts: Parts
    selection_parts: Parts

    @property
    def training(self) -> int:
        """Bytes expected."""
        return with_margin(total(self.training_parts))

    @property
    def selection(self) -> int:
        """Bytes expected."""
        return with_margin(total(self.selection_parts))

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.training, self.selection)

    @property
    def larger(self) -> str:
        """The one that takes more."""
        return "selection" if self.selection > self.training else "training"

    def __str__(self) -> str:
        how = {False: "at once", True: "streaming, one batch", "host": "sums in host memory"}
        select = how.get(self.streaming, f"{self.blocks} blocks of parameters, one pass each")
        activations = "recomputed in backward" if self.checkpointing else "kept"
        return f"training: {self.mode}, activations {activations}; selection: {select}"


def total(parts: Parts) -> int:
    """Bytes without the margin."""
    return sum(parts.values())


def plan_training(mode: str, step: Step, k: int, itemsize: int, device: str, writes: bool) -> Parts:
    """What is there at the peak of a training step or, if it `writes` the fine-tune, after it; on the device."""
    state = k * (12 + 4 * (itemsize == 2))  # indices, two moments, masters of 16-bit parameters
    gradients = step.gradients
    if mode != "dense":
        gradients = min(step.largest_gradient, step.peak - step.weights)
        state += 4 * k  # the buffer
    if mode == "sparse_grad":
        state += 16 * min(k, int(DENSE_SHARE * max(step.numels)))  # entries, sums and values of one layer
    parts = {"weights": step.weights, "gradients": gradients, "indices, optimizer state": state}
    if device == "cpu":
        parts["values before training"] = (8 + itemsize) * k  # Originals, with int64 indices; in host memory
    # where the peak is, not all activations are there any more
    training = {**parts, "activations, temporaries": max(0, step.peak - step.weights - gradients)}
    writing = {**parts, "gradients": 0, "writing the fine-tune": 80 * k if writes and device == "cpu" else 0}
    return max(training, writing, key=total)


def largest_block(numels: Sequence[int], blocks: int) -> int:
    """Elements of the largest of the blocks into which select(..., streaming="blocks") splits parameters."""
    sizes, done = [0] * blocks, 0
    for numel in numels:
        sizes[min(blocks - 1, int((done + numel / 2) * blocks / sum(numels)))] += numel
        done += numel
    return max(sizes)


def plan_selection(streaming: bool | str, blocks: int, released: Step, k: int, itemsize: int, device: str) -> Parts:
    """What is there at the peak of select(), on the device: in a backward pass, or where it takes the top-k."""
    per_element = max(4, itemsize) + (2 if itemsize == 2 else 0)  # sums; 16-bit gradients beside them
    numel, quota = released.numel, min(k, max(released.numels))
    # int64 indices of the top-k, and the mask's int32 ones in host memory
    summed, held, picked = numel, 0, (12 if device == "cpu" else 8) * k
    if streaming == "host" and device != "cpu":
        summed = picked = 0
    if streaming in (True, "blocks"):
        summed = largest_block(released.numels, blocks) if streaming == "blocks" else 0
        # candidates, 8 bytes each: at most 2 k, and those of one parameter more until the next top-k
        held, picked = 8 * min(2 * k, numel), 8 * min(2 * k + quota, numel) + 8 * k + 16 * quota
    parts = {"weights": released.weights, "gradient sums": per_element * summed}
    gradient = min(released.largest_gradient, released.peak - released.weights)
    passes = {
        **parts,
        "top-k": picked if streaming is True else held,
        "gradients": gradient,
        "activations, temporaries": released.peak - released.weights - gradient,
    }
    return max(passes, {**parts, "top-k": picked}, key=total)


def plans(
    steps: Callable[[str, bool], Step], density: float, itemsize: int, device: str, writes: bool = False
) -> Iterator[Plan]:
    """What could be done, the fastest and most exact first."""
    for checkpointing in (False, True):
        for mode in TRAINING:
            gradients = mode if density < 1 else "dense"  # of wholly selected parameters they stay
            step, released = steps(gradients, checkpointing), steps("release", checkpointing)
            k = round(density * step.numel)
            training = plan_training(gradients, step, k, itemsize, device, writes)
            ways: list[tuple[bool | str, int]] = [(False, 1)] + [("host", 1)] * (device != "cpu")
            ways += [("blocks", blocks) for blocks in (2, 4, 8)] + [(True, 1)]
            for streaming, blocks in ways:
                selection = plan_selection(streaming, blocks, released, k, itemsize, device)
                yield Plan(mode, checkpointing, streaming, blocks, training, selection)


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
        self.device = device
        self.restart()
        used = self._read("VmRSS")
        self._base = None if used is None else used - self._files

    def restart(self) -> None:
        """Forgets the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        self._files = self._read("RssFile") or 0

    def bytes(self) -> int | None:
        """None where it cannot be measured."""
        peak, files = self._read("VmHWM"), max(self._files, self._read("RssFile") or 0)
        return None if peak is None or self._base is None else peak - files - self._base

    def _read(self, key: str) -> int | None:
        if self.device.type == "cuda":
            used = {"VmHWM": torch.cuda.max_memory_allocated, "VmRSS": torch.cuda.memory_allocated}
            return used[key](self.device) if key in used else None
        status = Path("/proc/self/status")
        match = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return int(match[1]) * 1024 if match else None
