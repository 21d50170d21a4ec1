"""`Ranks`: what the ranks of a split model tell each other; an error of one of them is an error of all."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, distributed, nn

_DONE, _SUM, _GATHER, _FAILED = range(4)
"""What a rank comes for."""

_PATIENCE = 10.0
"""Seconds after which a rank that waits for others says so."""

_DIGEST = 32
"""Characters of a digest."""

_LONG = 60.0
"""Seconds after which it does not wait for those that may train alone."""


class _Call:
    """What some ranks are in together.

    Attributes:
        key: In the ranks' key-value store: where one of them writes why it has left.
        is_over: All ranks know of an error, or one has left: nobody waits for this rank any more.
    """

    def __init__(self, what: str, key: str) -> None:
        self.what = what
        self.key = key
        self.is_over = False


class _Line:
    """Over what some ranks talk: connections between their CPUs that nothing else uses.

    In the group that the model's own collectives use, a rank that asks where the others do not would be paired with
    their next collective, which reads its numbers as weights. It is no group that torch.distributed knows of, either:
    its groups have numbers, in which all ranks have to agree, and a model may be split over some of them.

    Attributes:
        begun: How many calls this rank has begun, as many as the others have.
        call: The one that it is in.
        parted: Why it has left one that the others may still be in, after which there is no other.
        compared: How often it has come to compare something; see `Ranks.compare`.
    """

    def __init__(self, numbers: tuple[int, ...], number: int) -> None:
        self.numbers = numbers
        self.begun = 0
        self.call: _Call | None = None
        self.parted: str | None = None
        self.compared: Counter[str] = Counter()
        self._name = _digest(f"{numbers} {number}")
        self._group: Any = None

    def key(self, of: object) -> str:
        """In the key-value store, of the ranks' own."""
        return f"saft_kernels/{self._name}/{of}"

    def group(self) -> Any:
        """The connections, made when all ranks are there to make them: else a rank would wait in vain, and mute."""
        if self._group is None:
            store, me = _store(), distributed.get_rank()
            store.set(self.key(f"here/{me}"), b"")
            keys = [self.key(f"here/{rank}") for rank in self.numbers]
            self.wait(lambda: store.check(keys))
            self._group = _connected(self.key("gloo"), self.numbers.index(me), len(self.numbers))
        return self._group

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Until all ranks have come; after a while it says that it waits.

        Raises:
            RuntimeError: One of them has left, or does not come in the time that init_process_group() gives them.
        """
        start, pause, look = time.monotonic(), 1e-5, 1.0
        limit = _store().timeout.total_seconds()
        while not is_done():
            if time.monotonic() - start > min(look, limit):
                self.check_left()
                what = "an exchange" if self.call is None else self.call.what
                text = (
                    f"{what}: rank {distributed.get_rank()} has waited {min(look, limit):.0f} s for others of ranks "
                    f"{[*self.numbers]}, all of which have to call it"
                )
                if look >= limit:
                    raise RuntimeError(text)
                if look == _PATIENCE:
                    logging.getLogger("saft_kernels").warning(text)
                look += 1.0
            time.sleep(pause)
            pause = min(1.5 * pause, 0.01)

    def check_left(self) -> None:
        """Raises where a rank has left this call."""
        if self.call is not None and _store().check([self.call.key]):
            self.call.is_over = True
            self.parted = _store().get(self.call.key).decode()
            raise RuntimeError(self.parted)


# how many lines there have been, by default process group, ranks, and this rank
_made: weakref.WeakKeyDictionary[Any, Counter[tuple[tuple[int, ...], int]]] = weakref.WeakKeyDictionary()


class _Here(threading.local):
    """The lines of this thread, of the torch.distributed that is initialized now."""

    def __init__(self) -> None:
        self._default_group: Callable[[], Any] = lambda: None
        self._lines: dict[tuple[int, ...], _Line] = {}

    def line(self, numbers: tuple[int, ...]) -> _Line:
        """Over which these ranks talk."""
        if not distributed.is_initialized():
            raise RuntimeError(
                f"parameters that are split over ranks {[*numbers]}: expected an initialized torch.distributed, got "
                "none; before destroy_process_group(), take optimizer.state_dict() and the whole weights on all ranks, "
                "and load them into a model and an optimizer of one process"
            )
        default_group = distributed.group.WORLD
        if self._default_group() is not default_group:
            self._default_group, self._lines = weakref.ref(default_group), {}
        if numbers not in self._lines:
            made, key = _made.setdefault(default_group, Counter()), (numbers, distributed.get_rank())
            self._lines[numbers] = _Line(numbers, made[key])
            made[key] += 1
        return self._lines[numbers]


_here = _Here()


class Ranks:
    """The ranks that a model is split over. All of them have to call each method, in the same order.

    Before each exchange they tell each other what they have come for. So a rank that fails inside `together` can say so
    wherever the others are, and ranks that are in different calls raise.

    Args:
        numbers: Of the ranks, in the order of their parts.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = tuple(numbers)

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.numbers)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all in what all of them have."""
        return distributed.get_rank() == self.numbers[0]

    @property
    def _line(self) -> _Line:
        return _here.line(self.numbers)

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
        line = self._line
        if line.call is not None:
            yield
            return
        line.begun += 1
        call = _Call(what, line.key(line.begun))
        if line.parted is not None:
            _store().set(call.key, line.parted)
            raise RuntimeError(line.parted)
        line.call = call
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
            line.call = None

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
        line, call = self._line, self._line.call
        if call is not None and not call.is_over:
            call.is_over = True
            line.parted = self._failure(call.what, error)
            _store().set(call.key, line.parted)

    def _failure(self, what: str, error: BaseException) -> str:
        return f"{what}: rank {distributed.get_rank()} failed: {type(error).__name__}: {_shortened(str(error))}"

    def _meet(self, kind: int, size: int = 0, error: BaseException | None = None) -> list[int]:
        """The sizes that all ranks come with. Raises on all of them where one has failed, or comes for something else.

        It does not raise on a rank that comes with its own error.
        """
        line, call = self._line, self._line.call
        what = "" if call is None else call.what
        with self.apart():
            which = zlib.crc32(f"{what} {line.begun}".encode())
            rows = self._gather(integers([kind, size, which]))
        kinds, sizes, calls = zip(*torch.stack(rows).tolist(), strict=True)
        has_failed = _FAILED in kinds
        if not has_failed and len({*kinds}) == len({*calls}) == 1 and (kind != _SUM or len({*sizes}) == 1):
            return list(sizes)
        if not has_failed:
            line.check_left()
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
        """What all ranks have, alike in shape, on the CPU."""
        found = [torch.empty_like(mine) for _ in self.numbers]
        self._wait(self._line.group().allgather([found], [mine]))
        return found

    def _texts(self, text: str) -> list[str]:
        """The texts of all ranks."""
        with self.apart():
            mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            lengths = torch.cat(self._gather(integers([mine.numel()]))).tolist()
            found = self._gather(nn.functional.pad(mine, (0, max(lengths) - mine.numel())))
        return [bytes(some[:n].tolist()).decode() for some, n in zip(found, lengths, strict=True)]

    def _wait(self, work: Any) -> None:
        """Until all ranks have come. Raises where one of them has left, or is gone."""
        line = self._line
        line.wait(work.is_completed)
        try:
            work.wait()
        except RuntimeError as error:
            line.check_left()
            what = "an exchange" if line.call is None else line.call.what
            raise RuntimeError(f"{what}: one of ranks {[*self.numbers]} has ended, or the network: {error}") from error

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
        shared = numbers.contiguous().cpu()
        self._meet(_SUM, shared.numel())
        options = distributed.AllreduceOptions()
        options.reduceOp = op
        with self.apart():  # the others are in it: too late to say anything else
            self._wait(self._line.group().allreduce([shared], options))
        return shared.to(numbers.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The one-dimensional values of each rank, of any length, in the order of ranks."""
        values_here = values.cpu()
        lengths = self._meet(_GATHER, values.numel())
        with self.apart():
            mine = torch.zeros(max(lengths), dtype=values.dtype, device="cpu")
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
                f"on rank {self.numbers[other]}; build the same model and optimizer, and load the same state, on every "
                "rank"
            )

    # ---- of ranks that may not come ----

    def compare(self, what: str, of: str, facts: Sequence[str], remedy: str) -> None:
        """Raises ValueError on every rank that comes, where a fact is not the same on all.

        Some may train alone, so that others never come: a minute after it has said what it knows, in the ranks'
        key-value store, this one warns and goes on.

        Args:
            what: Whose facts, for the error.
            of: What ranks come to compare. Where it differs, and each waits for the other, that is an error, too.
            facts: One line each.
            remedy: What to do.
        """
        store, me = _store(), distributed.get_rank()
        text = "\n".join(facts)
        if (places := self._come_to(_digest(of), text)) is None:
            return
        first, place = self.numbers[0], places[me]
        pair = next(((rank, where) for rank, where in places.items() if where != place), None)
        if pair is None:
            found = {rank: store.get(f"{place}/{rank}")[:_DIGEST] for rank in self.numbers}
            if len({*found.values()}) == 1:
                return
            pair = next(rank for rank in self.numbers if found[rank] != found[first]), place
        else:
            first = me
        store.set(f"{place}/{me}/facts", text)
        texts = [_facts_at(f"{where}/{rank}/facts") for rank, where in ((first, place), pair)]
        pairs = zip_longest(*texts, fillvalue="nothing")
        a, b = next((both for both in pairs if both[0] != both[1]), ("one", "another"))
        raise ValueError(
            f"{what}: expected the same selection on all ranks, got {a} on rank {first}, and {b} on rank {pair[0]}, "
            f"with which the replicas would drift apart; {remedy}"
        )

    def _come_to(self, name: str, text: str) -> dict[int, str] | None:
        """The places in the store where all ranks have left a digest, the same one, or each waits elsewhere for others.

        None: some do not come. Those that had come alone before meet where the one has come to that did so most often.
        What a rank has left that gave up on the others is good only for one that comes later, and finds nobody else.
        """
        line, store, me = self._line, _store(), distributed.get_rank()
        start, pause, look = time.monotonic(), 1e-4, 1.0
        before: dict[int, tuple[str, str]] = {}
        place, other, last = "", None, _LONG
        while True:
            if not place:
                place = f"{name}/{line.compared[name]}"
                store.set(line.key(f"{place}/{me}"), _digest(text))
                left = [line.key(f"{place}/{rank}") for rank in self.numbers]
            is_complete = store.check(left) and all(len(store.get(key)) == _DIGEST for key in left)
            waited = time.monotonic() - start
            if is_complete or waited > last:
                break
            if waited > look:
                store.set(line.key(f"at/{me}"), f"{place} {look}")  # it changes as long as this rank waits
                keys = {rank: line.key(f"at/{rank}") for rank in self.numbers if rank != me}
                texts = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
                now = {rank: (at.split(" ")[0], at) for rank, at in texts.items()}
                pairs = ((rank, before.get(rank, ("", "")), at) for rank, at in now.items())
                stay = {rank: new[0] for rank, old, new in pairs if old[0] == new[0] and old != new}
                elsewhere = {rank: at for rank, at in stay.items() if not at.startswith(name)}
                if elsewhere and other is None:
                    rank, at = next(iter(elsewhere.items()))
                    other, last = {me: line.key(place), rank: line.key(at)}, look + 3.0  # until they have seen it, too
                numbers = [int(at.rpartition("/")[2]) for at in stay.values() if at.startswith(name)]
                if max(numbers, default=0) > line.compared[name]:
                    line.compared[name], place = max(numbers), ""
                before, look = now, look + 1.0
            time.sleep(pause)
            pause = min(1.5 * pause, 0.01)
        line.compared[name] += 1
        if not is_complete:
            store.set(line.key(f"{place}/{me}/facts"), text)
            store.set(line.key(f"{place}/{me}"), f"{_digest(text)} of one that gave up")
        if not is_complete and other is not None:
            return other
        if is_complete or store.check(left):
            return dict.fromkeys(self.numbers, line.key(place))
        logging.getLogger("saft_kernels").warning(
            "SparseAdamW: not all ranks have come to compare what they selected or loaded: ranks %s have not; what "
            "changes the selection is called on all of them. If some train alone, ignore this",
            [rank for rank in self.numbers if not store.check([line.key(f"{place}/{rank}")])],
        )
        return None


def together(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """`Ranks.together`, where a model is split."""
    return nullcontext() if ranks is None else ranks.together(what)


def integers(numbers: Iterable[int]) -> Tensor:
    """Them, in int64, on the CPU."""
    return torch.tensor([*numbers], dtype=torch.int64, device="cpu")


def _connected(key: str, rank: int, size: int) -> Any:
    """A process group of gloo that torch.distributed does not list."""
    api: Any = distributed
    store = api.PrefixStore(key, _store())
    gloo = api.ProcessGroupGloo(store, rank, size, store.timeout)
    group = api.ProcessGroup(store, rank, size)
    group._set_default_backend(api.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), api.ProcessGroup.BackendType.GLOO, gloo)
    return group


def _facts_at(key: str) -> list[str]:
    """What a rank has written there, for those whose facts are others; nothing, where it has gone before."""
    try:
        _store().wait([key], timedelta(seconds=_PATIENCE))
    except Exception:  # torch.distributed has no type of its own for a timeout
        return []
    return _store().get(key).decode().split("\n")  # type: ignore[no-any-return]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST // 2).hexdigest()


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
