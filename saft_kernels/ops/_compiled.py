"""The compiled module, or why there is none."""

from __future__ import annotations

__all__ = ["_C", "import_error"]

try:
    import saft_kernels._C as _C  # `from .. import _C` would blame a circular import where there is no module
except ImportError as error:
    _C = None  # type: ignore[assignment]
    import_error: ImportError | None = error
else:
    import_error = None
