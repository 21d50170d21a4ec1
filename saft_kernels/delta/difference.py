"""Two models, tensor by tensor, as the changes between them."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .. import ops
from ..common.names import check_same_kind, listing, same_keys, short
from ..mask import SparseMask
from ..ops.dtypes import as_bits
from .changes import DTYPES, Changes, rest_checksum

_BLOCK = 2**24  # elements compared at once: a byte for each


def comparable(before: Mapping[str, Tensor], after: Mapping[str, Tensor], exclude: Sequence[str] | str) -> list[str]:
    """Names to compare, in the order of `before`. Looks at names, shapes and dtypes alone.

    Raises:
        ValueError: A glob that matches nothing; names, shapes or dtypes that differ.
    """
    globs = [exclude] if isinstance(exclude, str) else list(exclude)
    both = {**before, **after}
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in both):
            raise ValueError(
                f"`exclude`: expected globs over tensor names, got {glob!r}, which matches none of {len(both)}; they "
                f"are called {listing(list(both))}"
            )
    left_out = {name for name in both if any(fnmatch.fnmatchcase(name, glob) for glob in globs)}
    only = [("base", before.keys() - after.keys() - left_out), ("tuned", after.keys() - before.keys() - left_out)]
    if any(names for _, names in only):
        raise ValueError(
            "`tuned`: expected the tensor names of `base`, got a difference: "
            + ", ".join(f"{listing(sorted(names))} only in `{which}`" for which, names in only if names)
            + "; leave them out with `exclude`, or pass the base it was tuned from"
        )
    names = [name for name in before if name not in left_out]
    for name in names:
        check_same_kind("tuned", name, after[name], tuple(before[name].shape), before[name].dtype)
    return names


def ties(before: Mapping[str, Hashable], after: Mapping[str, Hashable]) -> tuple[dict[str, str], set[str]]:
    """From what is equal for names of one tensor: names that are an earlier one in both, name -> that one's name; and
    names that share a tensor in `before` alone.
    """
    tied = same_keys({name: (key, after[name]) for name, key in before.items()})
    untied = same_keys({name: key for name, key in before.items() if name not in tied})
    return tied, {*untied, *untied.values()}


def _differing(old: Tensor, new: Tensor) -> Tensor:
    """Flat positions of the elements that differ; block by block, whatever the strides."""
    if old.numel() <= _BLOCK:
        return (old != new).reshape(-1).nonzero().flatten()
    axis = next(axis for axis, size in enumerate(old.shape) if size > 1)
    half = old.shape[axis] // 2
    parts = [
        (tensor.narrow(axis, 0, half), tensor.narrow(axis, half, tensor.shape[axis] - half)) for tensor in (old, new)
    ]
    first, second = (_differing(*pair) for pair in zip(*parts, strict=True))
    return torch.cat([first, second + parts[0][0].numel()])


def difference(
    pairs: Iterable[tuple[str, Tensor, Tensor]],
    names: Sequence[str],
    *,
    tied: Mapping[str, str],
    untied: Collection[str],
    whole: bool,
    numel: int,
) -> Changes:
    """Every element whose bits differ.

    Args:
        pairs: Name, tensor before and tensor after, alike in shape and dtype; each pair is let go before the next.
        names: Of the tensors in `pairs`, in the order that they shall have.
        tied: Further names of these tensors, name -> name in `names`.
        untied: Names that share a tensor before, and not after: they have an entry without a change, too, so that
            whoever writes one of them sees the other.
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
        index = _differing(as_bits(old), as_bits(new))
        if index.numel() or whole or name in untied:
            indices[name], shapes[name] = index, tuple(old.shape)
            ((originals[name],), (values[name],)) = ops.gather([old], [index]), ops.gather([new], [index])
        if whole:
            rest[name] = rest_checksum(old, index)
        del old, new  # before the next two are read
    return Changes(
        SparseMask({name: indices[name] for name in names if name in indices}, shapes),
        values,
        originals,
        rest=rest,
        tied={name: owner for name, owner in tied.items() if owner in indices},
        numel=numel,
    )
