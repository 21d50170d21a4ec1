"""SAFT fine-tuning: exact top-k selection by gradient magnitude, and AdamW on the selected elements alone."""

from ._version import __version__
from .ops import TopK, gather, scatter_, sddmm, sparse_adamw_, topk_magnitude
from .optim import SparseAdamW
from .selection import SparseMask, select
from .sparse_grad import SparseGrad, sparse_grad

__all__ = [
    "SparseAdamW",
    "SparseGrad",
    "SparseMask",
    "TopK",
    "__version__",
    "gather",
    "scatter_",
    "sddmm",
    "select",
    "sparse_adamw_",
    "sparse_grad",
    "topk_magnitude",
]
