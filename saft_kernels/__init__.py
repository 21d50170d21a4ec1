"""SAFT fine-tuning: exact top-k selection by gradient magnitude, and AdamW on the selected elements alone."""

from ._originals import Originals
from ._version import __version__
from .delta import SparseDelta
from .integrations.timm import register_timm
from .mask import SparseMask
from .ops import TopK, gather, scatter_, sddmm, sparse_adamw_, topk_magnitude
from .optim import SparseAdamW
from .selection import select
from .sparse_grad import SparseGrad, sparse_grad

__all__ = [
    "Originals",
    "SparseAdamW",
    "SparseDelta",
    "SparseGrad",
    "SparseMask",
    "TopK",
    "__version__",
    "gather",
    "register_timm",
    "scatter_",
    "sddmm",
    "select",
    "sparse_adamw_",
    "sparse_grad",
    "topk_magnitude",
]
