"""SAFT fine-tuning: exact top-k selection by gradient magnitude, and AdamW on the selected elements alone."""

from ._version import __version__
from .delta.originals import Originals
from .delta.sparse_delta import SparseDelta
from .integrations.timm import register_timm
from .layers.sparse_grad import SparseGrad, sparse_grad
from .mask import SparseMask
from .ops import TopK, gather, scatter_, sddmm, sparse_adamw_, topk_magnitude
from .optim.optimizer_state import OptimizerState
from .optim.sparse_adamw import SparseAdamW
from .selection.select_mask import select

__all__ = [
    "OptimizerState",
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
