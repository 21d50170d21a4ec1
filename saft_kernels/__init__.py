"""SAFT fine-tuning: exact top-k selection by gradient magnitude, and AdamW on the selected elements alone."""

from ._originals import Originals
from ._version import __version__
from .delta import SparseDelta
from .integrations.timm import register_timm
from .ops import TopK, gather, scatter_, sparse_adamw_, topk_magnitude
from .optim import SparseAdamW
from .selection import SparseMask, select

__all__ = [
    "Originals",
    "SparseAdamW",
    "SparseDelta",
    "SparseMask",
    "TopK",
    "__version__",
    "gather",
    "register_timm",
    "scatter_",
    "select",
    "sparse_adamw_",
    "topk_magnitude",
]
