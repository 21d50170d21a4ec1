"""Layers that compute only the selected entries of their weight gradients: `sparse_grad()`."""

from .sparse_grad import SparseGrad, sparse_grad

__all__ = ["SparseGrad", "sparse_grad"]
