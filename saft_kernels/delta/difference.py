"""Two models, tensor by tensor, as the changes between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .. import ops
from ..common.names import short
from ..mask import SparseMask
from ..ops.dtypes import as_bits
from .changes import DTYPES, Changes, rest_checksum


def difference(
    pairs: Iterable[tuple[str, Tensor, Tensor]], *, tied: Mapping[str, str], whole: bool, numel: int
) -> Changes:
    """Every element whose bits differ.

    Args:
        pairs: Name, tensor before and tensor after, alike in shape and dtype; each pair is let go before the next.
        tied: Further names of tensors in `pairs`, name -> name there.
        whole: Take checksums of all other elements, and an entry for tensors without a change.
        numel: Elements of the model.

    Raises:
        TypeError: A dtype that safetensors files do not hold.
    """
    indices, originals, values, rest, shapes = {}, {}, {}, {}, {}
    for name, old, new in pairs:
        if old.dtype not in DTYPES:
            raise TypeError(
                f"`base`: expected dtypes that safetensors files hold, got {short(old.dtype)} for {name!r}; exclude it"
            )
        new = new.to(old.device)
        index = (as_bits(old) != as_bits(new)).reshape(-1).nonzero().flatten()
        if index.numel() or whole:
            indices[name], shapes[name] = index, tuple(old.shape)
            ((originals[name],), (values[name],)) = ops.gather([old], [index]), ops.gather([new], [index])
        if whole:
            rest[name] = rest_checksum(old, index)
    return Changes(
        SparseMask(indices, shapes),
        values,
        originals,
        rest=rest,
        tied={name: owner for name, owner in tied.items() if owner in indices},
        numel=numel,
    )
