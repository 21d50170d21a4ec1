"""The tensors of a model that a delta reads and writes, and the operations on their changed elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import ops
from ..common.names import Model, check_same_kind, listing, named_tensors
from ..ops.dtypes import as_bits
from .changes import Changes, checksum, rest_checksum, same_bits

Named = Mapping[str, Tensor]


class Copies:
    """Tensors on a device, moved as one copy per dtype, and kept under a key for the next time."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.device], Named] = {}

    def on(self, device: torch.device, tensors: Named, key: str | None) -> Named:
        """The tensors on `device`; `key` names what they always are, None keeps nothing."""
        if device.type == "cpu":
            return tensors
        if key is not None and (key, device) in self._kept:
            return self._kept[key, device]
        moved: dict[str, Tensor] = {}
        for dtype in {tensor.dtype for tensor in tensors.values()}:
            names = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
            flat = torch.cat([as_bits(tensors[name]) for name in names]).to(device).view(dtype)
            moved.update(zip(names, flat.split([tensors[name].numel() for name in names]), strict=True))
        if key is not None:
            self._kept[key, device] = moved
        return moved


class Targets:
    """Names of a delta, each with a tensor of the model that carries it; a tied one once per name of the model's.

    Raises:
        ValueError: A tensor is missing, or of another shape or dtype; TypeError: it is no strided tensor in memory.
    """

    def __init__(
        self,
        argument: str,
        model: Model,
        changes: Changes,
        copies: Copies,
    ) -> None:
        tensors = named_tensors(argument, model)
        aliases: dict[str, list[str]] = {name: [name] for name in changes.mask}
        for name, owner in changes.tied.items():
            aliases[owner].append(name)
        if missing := [name for name in aliases if not any(alias in tensors for alias in aliases[name])]:
            raise ValueError(
                f"`{argument}`: expected the tensors of this delta, got a model without {listing(missing)}; load the "
                "architecture that it was made on"
            )
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        for name in aliases:
            for alias in (alias for alias in aliases[name] if alias in tensors):
                tensor = tensors[alias]
                check_same_kind(argument, alias, tensor, changes.mask.shapes[name], changes.values[name].dtype)
                if _is_expanded(tensor):
                    raise ValueError(
                        f"`{argument}`: expected one memory location per element of {alias!r}, got an expanded tensor "
                        f"with strides {tensor.stride()}; clone it first"
                    )
                self.names.append(name)
                self.tensors.append(tensor)
        self._indices: Named = changes.mask
        self._copies = copies
        self._rows: dict[torch.device, list[int]] = {}
        for row, tensor in enumerate(self.tensors):
            self._rows.setdefault(tensor.device, []).append(row)

    def gather(self) -> list[Tensor]:
        """The changed elements as they are now, per target, on its device."""
        current: list[Tensor] = [torch.empty(0)] * len(self.tensors)
        for device, rows in self._rows.items():
            indices = self._copies.on(device, self._indices, "indices")
            picked = ops.gather([self.tensors[row] for row in rows], [indices[self.names[row]] for row in rows])
            for row, values in zip(rows, picked, strict=True):
                current[row] = values
        return current

    def scatter_(self, values: Named, key: str | None) -> None:
        """Writes the changed elements; values and key as in `Copies.on`."""
        for device, rows in self._rows.items():
            indices, moved = self._copies.on(device, self._indices, "indices"), self._copies.on(device, values, key)
            names = [self.names[row] for row in rows]
            tensors = [self.tensors[row] for row in rows]
            ops.scatter_(tensors, [indices[name] for name in names], [moved[name] for name in names])

    def differing(self, current: Sequence[Tensor], values: Named, key: str | None) -> list[str]:
        """Names whose current elements have other bits than `values`."""
        odd: list[str] = []
        for device, rows in self._rows.items():
            there = self._copies.on(device, values, key)
            for dtype in {current[row].dtype for row in rows}:
                alike = [row for row in rows if current[row].dtype == dtype]
                # one comparison: hundreds of tensors of a few hundred elements each are the usual case
                now, then = [current[row] for row in alike], [there[self.names[row]] for row in alike]
                if not same_bits(torch.cat(now), torch.cat(then)):
                    odd += [self.names[row] for row, a, b in zip(alike, now, then, strict=True) if not same_bits(a, b)]
        return odd

    def odd_checksums(self, current: Sequence[Tensor], checksums: Mapping[str, str]) -> list[str]:
        """Names whose current elements have another checksum."""
        return [n for n, values in zip(self.names, current, strict=True) if checksum(values) != checksums[n]]

    def odd_rests(self, rests: Mapping[str, str]) -> list[str]:
        """Names whose other elements have another checksum. Reads every tensor."""
        pairs = zip(self.names, self.tensors, strict=True)
        return [
            name
            for name, tensor in pairs
            if rest_checksum(tensor, self._indices[name].to(tensor.device)) != rests[name]
        ]


def _is_expanded(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return 0 in strides and any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, strides, strict=True))
