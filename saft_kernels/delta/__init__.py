"""Fine-tunes as the elements they changed: `SparseDelta`, `Originals`."""

from .originals import Originals
from .sparse_delta import Composed, SparseDelta

__all__ = ["Composed", "Originals", "SparseDelta"]
