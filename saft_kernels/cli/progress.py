"""How far a long command is: a bar on a terminal, a line per phase elsewhere, nothing for what takes no time."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

_LONG = 2**28  # bytes: about a second of reading and comparing


class Progress:
    """A context manager for one phase; call it with the number of bytes that are done."""

    def __init__(self, what: str, total: int) -> None:
        self._bar: Any = None
        if total < _LONG:
            return
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self._bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False)
                return
        print(f"saft-kernels: {what}, {total / 2**30:.1f} GiB", file=sys.stderr, flush=True)

    def __call__(self, count: int) -> None:
        """So many bytes more."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
