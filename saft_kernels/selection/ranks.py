"""`Ranks`: what the ranks of a split model tell each other; an error of one of them is an error of all."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

_DONE, _SUM, _GATHER, _FAILED = range(4)
"""What a rank comes for."""

_PATIENCE = 10.0
"""Seconds after which a rank that waits for others says so."""


class _Call:
    """What the ranks of a group are in together.

    Attributes:
        key: In the ranks' key-value store: where one of them writes why it has left.
        is_over: All ranks know of an error, or one has left: nobody waits for this rank any more.
    """

    def __init__(self, what: str, key: str) -> None:
        self.what = what
        self.key = key
        self.is_over = False


class _Here(threading.local):
    """By group: how many calls this rank has begun, as many as the others have; the one that it is in; and why it has
    left one that the others may still be in, after which there is no other.
    """

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.calls: dict[str, _Call] = {}
        self.parted: dict[str, str] = {}


_here = _Here()


class Ranks:
    """The ranks that a model is split over. All of them have to call each method, in the same order.

    Before each exchange they tell each other what they have come for. So a rank that fails inside `together` can say so
    wherever the others are, and ranks that are in different calls raise.
    """

    def __init__(self, group: Any, device_type: str) -> None:
        self._group = group
        self.numbers: tuple[int, ...] = tuple(distributed.get_process_group_ranks(group))
        self._device = torch.device(device_type)
        if device_type != "cpu":
            self._device = torch.device(device_type, torch.accelerator.current_device_index())

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.numbers)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all in what all of them have."""
        return distributed.get_rank() == self.numbers[0]

    # ---- errors ----

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Inside, an error of one rank raises on all of them, within seconds: RuntimeError, which has its text.

        A rank that is interrupted leaves without a word to the others' exchanges, which may have begun: it writes that
        to the key-value store, where ranks that wait for more than a second look. After that the ranks have parted, and
        all later calls raise.

        Args:
            what: The call, in which all ranks are. One inside another belongs to that.
        """
        name = self._group.group_name
        if name in _here.calls:
            yield
            return
        _here.begun[name] += 1
        call = _Call(what, f"saft_kernels/{name}/{_here.begun[name]}")
        if name in _here.parted:
            _store().set(call.key, _here.parted[name])
            raise RuntimeError(_here.parted[name])
        _here.calls[name] = call
        try:
            yield
            self.agree()
        except Exception as error:
            if not call.is_over:
                self._meet(_FAILED, error=error)
            raise
        except BaseException as error:
            self._leave(error)
            raise
        finally:
            del _here.calls[name]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside `together`, for code whose own collectives may be pending where it fails: as if interrupted."""
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise

    def agree(self) -> None:
        """Waits for all ranks, and raises where one has failed: what cannot fail comes after."""
        self._meet(_DONE)

    def _leave(self, error: BaseException) -> None:
        call = _here.calls.get(self._group.group_name)
        if call is not None and not call.is_over:
            call.is_over = True
            _store().set(call.key, self._failure(call.what, error))

    def _failure(self, what: str, error: BaseException) -> str:
        return f"{what}: rank {distributed.get_rank()} failed: {type(error).__name__}: {_shortened(str(error))}"

    def _meet(self, kind: int, size: int = 0, error: BaseException | None = None) -> list[int]:
        """The sizes that all ranks come with. Raises on all of them where one has failed, or comes for something else.

        It does not raise on a rank that comes with its own error.
        """
        call = _here.calls.get(self._group.group_name)
        what = "" if call is None else call.what
        with self.apart():
            which = zlib.crc32(f"{what} {_here.begun[self._group.group_name]}".encode())
            rows = self._gather(integers([kind, size, which]))
        kinds, sizes, calls = zip(*torch.stack(rows).tolist(), strict=True)
        has_failed = _FAILED in kinds
        if not has_failed and len({*kinds}) == len({*calls}) == 1 and (kind != _SUM or len({*sizes}) == 1):
            return list(sizes)
        if not has_failed:
            self._check_left()
        texts = self._texts(what or "an exchange" if error is None else self._failure(what, error))
        if call is not None:
            call.is_over = True
        if error is not None:
            return list(sizes)
        if has_failed:
            raise RuntimeError("; ".join(text for text, its in zip(texts, kinds, strict=True) if its == _FAILED))
        other = next(i for i in range(self.size) if (kinds[i], calls[i], sizes[i]) != (kinds[0], calls[0], sizes[0]))
        raise ValueError(
            f"expected the same call on all ranks, got {texts[0]} on rank {self.numbers[0]}, and {texts[other]} on "
            f"rank {self.numbers[other]}, with something else to exchange; call the same on all, in the same order"
        )

    def _gather(self, mine: Tensor) -> list[Tensor]:
        """What all ranks have, alike in shape, where it is here."""
        shared = mine.to(self._device)
        found = [torch.empty_like(shared) for _ in self.numbers]
        self._wait(distributed.all_gather(found, shared, self._group, async_op=True))
        return [some.to(mine.device) for some in found]

    def _texts(self, text: str) -> list[str]:
        """The texts of all ranks."""
        with self.apart():
            mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            lengths = torch.cat(self._gather(integers([mine.numel()]))).tolist()
            found = self._gather(nn.functional.pad(mine, (0, max(lengths) - mine.numel())))
        return [bytes(some[:n].tolist()).decode() for some, n in zip(found, lengths, strict=True)]

    def _wait(self, work: Any) -> None:
        """Until all ranks have come. Raises where one of them has left."""
        start, pause, look = time.monotonic(), 1e-5, 1.0
        while not work.is_completed():
            if time.monotonic() - start > look:
                self._look(look)
                look += 1.0
            time.sleep(pause)
            pause = min(1.5 * pause, 0.01)
        try:
            work.wait()
        except RuntimeError:  # a rank is gone
            self._check_left()
            raise

    def _look(self, seconds: float) -> None:
        self._check_left()
        call = _here.calls.get(self._group.group_name)
        if call is not None and seconds == _PATIENCE:
            logging.getLogger("saft_kernels").warning(
                "%s: rank %d has waited %d s for others of ranks %s, all of which have to call it",
                *(call.what, distributed.get_rank(), seconds, [*self.numbers]),
            )

    def _check_left(self) -> None:
        """Raises where a rank has left this call."""
        call = _here.calls.get(self._group.group_name)
        if call is not None and _store().check([call.key]):
            call.is_over = True
            _here.parted[self._group.group_name] = text = _store().get(call.key).decode()
            raise RuntimeError(text)

    # ---- exchanges ----

    def sum(self, numbers: Tensor) -> Tensor:
        """Of each number, the sum over all ranks, where the numbers are. They may be overwritten."""
        return self._reduce(numbers, distributed.ReduceOp.SUM)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether any rank has it."""
        return [bool(flag) for flag in self.max(integers(flags)).tolist()]

    def max(self, numbers: Tensor) -> Tensor:
        """Of each number, the largest of all ranks, where the numbers are. They may be overwritten."""
        return self._reduce(numbers, distributed.ReduceOp.MAX)

    def _reduce(self, numbers: Tensor, op: Any) -> Tensor:
        shared = numbers.contiguous().to(self._device)
        self._meet(_SUM, shared.numel())
        with self.apart():  # the others are in it: too late to say anything else
            self._wait(distributed.all_reduce(shared, op, self._group, async_op=True))
        return shared.to(numbers.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The one-dimensional values of each rank, of any length, in the order of ranks."""
        values_here = values.to(self._device)
        lengths = self._meet(_GATHER, values.numel())
        with self.apart():
            mine = torch.zeros(max(lengths), dtype=values.dtype, device=self._device)
            mine[: values.numel()] = values_here
            found = self._gather(mine)
        return [some[:length].to(values.device) for some, length in zip(found, lengths, strict=True)]

    def check_same(self, what: str, facts: Mapping[str, object]) -> None:
        """Raises ValueError on every rank where a fact is not the same on all. Its keys have to be.

        Digests are compared first: they have one length, whatever the ranks disagree on.
        """
        texts = [f"{name} {fact}" for name, fact in facts.items()]
        digests = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=7).digest(), "big") for t in texts]
        by_rank = torch.stack(self.gather(integers(digests)))
        for at in (by_rank != by_rank[0]).any(0).nonzero().flatten().tolist():
            found = self._texts(_shortened(texts[at]))
            other = next(i for i, row in enumerate(by_rank) if row[at] != by_rank[0, at])
            raise ValueError(
                f"{what}: expected the same on all ranks, got {found[0]} on rank {self.numbers[0]}, and {found[other]} "
                f"on rank {self.numbers[other]}; build the same model and optimizer on every rank"
            )


def together(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """`Ranks.together`, where a model is split."""
    return nullcontext() if ranks is None else ranks.together(what)


def integers(numbers: Iterable[int]) -> Tensor:
    """Them, in int64, on the CPU."""
    return torch.tensor([*numbers], dtype=torch.int64, device="cpu")


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
