"""Choosing the parameters to train: `select()`."""

from ..mask import SparseMask
from .select_mask import select

__all__ = ["SparseMask", "select"]
