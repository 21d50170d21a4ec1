"""The compiled module, or why there is none."""

from __future__ import annotations

try:
    from .. import _C as _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    import_error: ImportError | None = error
else:
    import_error = None
