"""`SparseAdamW`: torch.optim.AdamW on the selected elements alone."""

from .sparse_adamw import SparseAdamW

__all__ = ["SparseAdamW"]
