"""What a training step will need, found by running it without memory, and how to fit it into a budget."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
TRAINING = ("dense", "release", "sparse_grad")
MARGIN, OVERHEAD = 1.1, 16 * 2**20
"""What allocators and libraries take beyond the tensors of a step: a factor, and bytes. See docs/memory.md."""


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


def free_bytes(device: torch.device) -> int:
    """What the device, or the machine, has free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else 0


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
    """Bytes of the weights, of the dense gradients and the largest of them, and at the peak of forward and backward."""

    numel: int
    weights: int
    gradients: int
    largest_gradient: int
    peak: int


def dry_run(
    build: Callable[[], nn.Module], make_batch: Callable[[], Any], loss_fn: Callable[..., Tensor], mode: str
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
        gradients = [p.numel() * p.itemsize for p in model.parameters() if p.requires_grad]
        if mode != "dense":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        loss = loss_fn(model, make_batch())
        linear.update(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        loss.backward()
        numel = sum(p.numel() for p in model.parameters())
    return Step(numel, weights, sum(gradients), max(gradients), tracker.peak)


# ---- plans ----


@dataclass(frozen=True)
class Plan:
    """How to train and select, and the bytes expected for each. `parts` add up to `training`."""

    mode: str
    checkpointing: bool
    streaming: bool | str
    blocks: int
    training: int
    selection: int
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.training, self.selection)

    def __str__(self) -> str:
        how = {False: "at once", True: "streaming, one batch", "host": "sums in host memory"}
        select = how.get(self.streaming, f"{self.blocks} blocks of parameters, one pass each")
        activations = "recomputed in backward" if self.checkpointing else "kept"
        return f"training: {self.mode}, activations {activations}; selection: {select}"


def plan_training(mode: str, step: Step, k: int, itemsize: int) -> tuple[int, dict[str, int]]:
    """Bytes at the peak, and what they are for."""
    state = k * (12 + 4 * (itemsize == 2))  # indices, two moments, masters of 16-bit parameters
    gradients = step.gradients
    if mode != "dense":
        gradients = min(step.largest_gradient, step.peak - step.weights)
        state += 4 * k  # the buffer
    parts = {"weights": step.weights, "gradients": gradients, "optimizer state": state}
    # where the peak is, not all activations are there any more
    parts["activations, temporaries"] = max(0, step.peak - step.weights - gradients)
    return round(MARGIN * sum(parts.values())) + OVERHEAD, parts


def plan_selection(streaming: bool | str, blocks: int, released: Step, k: int, itemsize: int, device: str) -> int:
    """Bytes at the peak of select(), on the device."""
    per_element = max(4, itemsize) + (2 if itemsize == 2 else 0)  # sums; 16-bit gradients beside them
    sums = per_element * released.numel
    more = {False: sums, "blocks": sums // blocks, True: 36 * k, "host": sums if device == "cpu" else 0}
    return round(MARGIN * (released.peak + more[streaming])) + OVERHEAD


def plans(steps: Callable[[str, bool], Step], density: float, itemsize: int, device: str) -> Iterator[Plan]:
    """What could be done, the fastest and most exact first."""
    for checkpointing in (False, True):
        for mode in TRAINING:
            step, released = steps(mode, checkpointing), steps("release", checkpointing)
            k = round(density * step.numel)
            training, parts = plan_training(mode, step, k, itemsize)
            ways: list[tuple[bool | str, int]] = [(False, 1)] + [("host", 1)] * (device != "cpu")
            ways += [("blocks", blocks) for blocks in (2, 4, 8)] + [(True, 1)]
            for streaming, blocks in ways:
                selection = plan_selection(streaming, blocks, released, k, itemsize, device)
                yield Plan(mode, checkpointing, streaming, blocks, training, selection, parts)


# ---- what it took ----


def return_freed_blocks() -> None:
    """What is freed goes back to the system at once: what is resident is what is in use. For glibc."""
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 16)


class Peak:
    """Bytes in use at the most since `restart()`, above what was in use when it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()
        self._base = self._read("VmRSS")

    def restart(self) -> None:
        """Forgets the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS

    def bytes(self) -> int | None:
        """None where it cannot be measured."""
        now = self._read("VmHWM")
        return None if now is None or self._base is None else now - self._base

    def _read(self, key: str) -> int | None:
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated if key == "VmHWM" else torch.cuda.memory_allocated
            return used(self.device)
        status = Path("/proc/self/status")
        match = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return int(match[1]) * 1024 if match else None
