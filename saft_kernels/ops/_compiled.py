"""The compiled module, or why there is none; its reader of torch's tensors, where this torch has what it reads by."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter

__all__ = ["_C", "import_error", "reader"]

try:
    import saft_kernels._C as _C  # `from .. import _C` would blame a circular import where there is no module
except ImportError as error:
    _C = None  # type: ignore[assignment]
    import_error: ImportError | None = error
else:
    import_error = None

reader: _C.TensorReader | None = None if _C is None else _C.TensorReader(Tensor, Parameter)
if reader is not None and not reader.is_available:
    reader = None
