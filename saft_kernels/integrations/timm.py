"""`sparseadamw`: SparseAdamW as a name for timm, and so for open_clip_train."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from ..optim.sparse_adamw import SparseAdamW

__all__ = ["register_timm"]

# timm keeps what follows the last "_" of a name
NAME = "sparseadamw"


def register_timm(**defaults: Any) -> None:
    """Makes "sparseadamw" a name of timm's optimizer factory.

    Then `timm.optim.create_optimizer_v2(model, "sparseadamw", ...)` and open_clip_train's `--opt timm/sparseadamw`
    build a SparseAdamW. Calling it again replaces the defaults.

    Args:
        defaults: Keyword arguments of SparseAdamW that hold where the caller of timm gives none, such as
            `density=1e-2` or `selection_steps=100`.

    Raises:
        ImportError: timm is not installed.
        TypeError: A default that SparseAdamW does not take.
    """
    if unknown := [name for name in defaults if name not in _known()]:
        raise TypeError(f"register_timm(): expected arguments of SparseAdamW, got {unknown[0]!r}; it takes {_known()}")
    from timm.optim._optim_factory import OptimInfo, default_registry

    # timm warns of a name that is registered again
    default_registry._optimizers.pop(NAME, None)
    default_registry.register(
        OptimInfo(
            name=NAME,
            opt_class=TimmSparseAdamW,
            description="saft_kernels.SparseAdamW: AdamW on the parameters of largest gradient alone",
            has_betas=True,
            defaults=defaults or None,
        )
    )


class TimmSparseAdamW(SparseAdamW):
    """What timm calls; it makes a SparseAdamW, which logs and pickles show as that.

    open_clip_train passes eps=None where its user gives none, as timm's own scripts do with betas: defaults then hold.

    Raises:
        TypeError: An argument of timm's optimizers that SparseAdamW does not take, such as `caution`.
    """

    def __new__(cls, params: Iterable[Any], **options: Any) -> SparseAdamW:  # type: ignore[misc]
        """See the class."""
        options = {name: value for name, value in options.items() if value is not None}
        if unknown := [name for name in options if name not in _known()]:
            raise TypeError(
                f"sparseadamw: expected arguments of SparseAdamW, got {unknown[0]!r}; drop it"
                + (": the cautious variants are timm's own (cadamw)" if unknown[0] == "caution" else "")
            )
        return SparseAdamW(params, **options)


def _known() -> list[str]:
    """What SparseAdamW takes."""
    return [*inspect.signature(SparseAdamW).parameters][1:]
