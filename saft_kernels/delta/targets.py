"""The tensors of a model that a delta reads and writes, and the operations on their changed elements."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..common.names import Model, check_same_kind, listing, named_tensors
from ..ops.dtypes import as_bits
from .changes import Changes, checksum, rest_checksum, same_bits

Named = Mapping[str, Tensor]
Verify = Literal["selected", "whole", "none"]
VERIFY: tuple[Verify, ...] = ("selected", "whole", "none")


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


def matched(argument: str, tensors: Named, changes: Changes) -> list[tuple[str, str]]:
    """Names of the changes, each with a name of the model that carries it; a tied one once per name of the model's.

    Raises:
        ValueError: A tensor is missing, of another shape or dtype, or has elements that share memory.
    """
    aliases: dict[str, list[str]] = {name: [name] for name in changes.mask}
    for name, owner in changes.tied.items():
        aliases[owner].append(name)
    if missing := [name for name in aliases if not any(alias in tensors for alias in aliases[name])]:
        raise ValueError(
            f"`{argument}`: expected the tensors of this delta, got a model without {listing(missing)}; load the "
            "architecture that it was made on"
        )
    pairs = [(name, alias) for name in aliases for alias in aliases[name] if alias in tensors]
    for name, alias in pairs:
        tensor = tensors[alias]
        check_same_kind(argument, alias, tensor, changes.mask.shapes[name], changes.values[name].dtype)
        if _may_overlap(tensor):
            raise ValueError(
                f"`{argument}`: expected one memory location per element of {alias!r}, got an expanded tensor with "
                f"strides {tensor.stride()}; clone it first"
            )
    return pairs


def check_apart(pairs: Iterable[tuple[str, Hashable]], changes: Changes) -> None:
    """Raises ValueError where one tensor is to become two.

    Args:
        pairs: Names of the changes, each with what is equal for names of one tensor of the model that is written.
        changes: Say what the tensors become.
    """
    first: dict[Hashable, str] = {}
    for name, key in pairs:
        other = first.setdefault(key, name)
        if not changes.alike(other, name):
            raise ValueError(
                f"`model`: expected {other!r} and {name!r} apart, as in the tuned model, which differs in them, got "
                "one tensor by both names; untie them first: clone one"
            )


class Targets:
    """Tensors of a model, each with the name it has in the changes; and where the changes have elements of them."""

    def __init__(self, tensors: Sequence[tuple[str, Tensor]], indices: Named, copies: Copies) -> None:
        self.names = [name for name, _ in tensors]
        self.tensors = [tensor for _, tensor in tensors]
        self._indices = indices
        self._copies = copies
        self._rows: dict[torch.device, list[int]] = {}
        for row, tensor in enumerate(self.tensors):
            self._rows.setdefault(tensor.device, []).append(row)

    @classmethod
    def of_model(cls, argument: str, model: Model, changes: Changes, copies: Copies) -> Targets:
        """The tensors of `model` that the changes have. Raises what `named_tensors` and `matched` raise."""
        tensors = named_tensors(argument, model)
        pairs = [(name, tensors[alias]) for name, alias in matched(argument, tensors, changes)]
        return cls(pairs, changes.mask, copies)

    def gather(self) -> list[Tensor]:
        """The changed elements as they are now, per target, on its device."""
        current: list[Tensor] = [torch.empty(0, device="cpu")] * len(self.tensors)
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


def check_verify(changes: Changes, verify: str) -> None:
    """Raises ValueError for what is no way to verify, or none of these changes."""
    if verify not in VERIFY:
        raise ValueError(f"`verify`: expected one of {', '.join(VERIFY)}, got {verify!r}")
    if verify == "whole" and changes.rest.keys() != set(changes.mask):
        raise ValueError(
            "`verify`: expected 'selected' or 'none' for this delta, got 'whole', whose checksums it does not "
            "have; make it with diff(whole=True)"
        )


def other_base(argument: str, names: Sequence[str]) -> ValueError:
    """The error for a model that differs where these changes have nothing."""
    return ValueError(
        f"`{argument}`: expected the base of this delta, got other values outside the changed elements in "
        f"{listing(names)}; load the model that it was made from"
    )


def check_state(changes: Changes, targets: Targets, alphas: Sequence[float]) -> float | None:
    """Checks that the changed elements are those of the base, the tuned model or an alpha between.

    Args:
        changes: Learn their originals where the elements are the base's.
        targets: Of the model.
        alphas: Those that this delta has put models to. Others are found where they have few digits.

    Returns:
        The alpha, where it is another than 0 and 1.

    Raises:
        ValueError: Other values.
    """
    current = targets.gather()
    if changes.originals is None:
        strange = targets.odd_checksums(current, changes.checksums)
        if not strange:
            _learn(changes, targets, current)
    else:
        strange = targets.differing(current, changes.originals, "originals")
    if not strange or not targets.differing(current, changes.values, "values"):
        return None
    if changes.originals is not None:
        for alpha in _alphas(changes, targets, current, alphas):
            if not targets.differing(current, changes.at(alpha), None):
                return alpha
    remedy = "load the model that it was made from"
    if changes.originals is None:
        remedy += "; one at an alpha is recognised by its base: delta.take_originals(base), or --base of the command"
    raise ValueError(
        f"`model`: expected the base of this delta, or where the delta has left it, got other values in "
        f"{listing(strange)}; {remedy}"
    )


def _alphas(
    changes: Changes, targets: Targets, current: Sequence[Tensor], remembered: Sequence[float]
) -> Iterator[float]:
    yield from remembered
    yield from changes.possible_alphas({n: values.cpu() for n, values in zip(targets.names, current, strict=True)})


def take_originals(changes: Changes, targets: Targets) -> None:
    """Learns the originals from the base. Raises ValueError for another model."""
    current = targets.gather()
    if odd := targets.odd_checksums(current, changes.checksums):
        raise ValueError(
            f"`base`: expected the base of this delta, got other values in {listing(odd)}; pass the model that it "
            "was made from"
        )
    _learn(changes, targets, current)


def _learn(changes: Changes, targets: Targets, current: Sequence[Tensor]) -> None:
    changes.originals = {name: values.cpu() for name, values in zip(targets.names, current, strict=True)}


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may lie in one place: true of expanded tensors, false of any slice or permutation."""
    reach = 0
    if not tensor.numel():
        return False
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
