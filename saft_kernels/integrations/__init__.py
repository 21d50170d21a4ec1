"""Helpers for the libraries that people train with. Each module imports its library only when it is used."""

from ._selection import select_into

__all__ = ["select_into"]
