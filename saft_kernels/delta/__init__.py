"""Fine-tunes as the elements they changed: `SparseDelta`, `Originals`."""

from .compose import Composed
from .originals import Originals
from .sparse_delta import SparseDelta

__all__ = ["Composed", "Originals", "SparseDelta"]
