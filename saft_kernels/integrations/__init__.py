"""Helpers for the libraries that people train with. Each module imports its library only when it is used."""

from .select_into import select_into

__all__ = ["select_into"]
