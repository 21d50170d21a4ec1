"""The command `saft-kernels`."""

from .main import main

__all__ = ["main"]
