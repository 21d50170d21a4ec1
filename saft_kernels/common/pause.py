"""A pause of gradient release: `select()` needs whole gradients of a model that an optimizer is training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

_pauses: dict[Tensor, int] = {}  # how many hold each parameter


def is_paused(parameter: Tensor) -> bool:
    """Whether the gradient of this parameter stays dense for now."""
    return bool(_pauses) and parameter in _pauses


@contextmanager
def releasing_paused(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the gradients of these parameters stay dense, in every thread; those of other models do not notice."""
    parameters = list(parameters)
    for parameter in parameters:
        _pauses[parameter] = _pauses.get(parameter, 0) + 1
    try:
        yield
    finally:
        for parameter in parameters:
            _pauses[parameter] -= 1
            if not _pauses[parameter]:
                del _pauses[parameter]
