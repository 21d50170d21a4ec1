"""The fine-tune as data: which elements changed, to what values, and how their base is recognised."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Mapping

import torch
from torch import Tensor

from ..common.names import listing, short
from ..common.tensor_files import bytes_of
from ..mask import SparseMask
from ..ops.dtypes import as_bits

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
"""What safetensors files hold and torch can compare."""


class Changes:
    """What a fine-tune changed, per tensor: elements, new values, and the values before or their checksum.

    Tensors without a changed element are there for their `rest` alone.
    """

    def __init__(
        self,
        mask: SparseMask,
        values: Mapping[str, Tensor],
        originals: Mapping[str, Tensor] | None,
        *,
        checksums: Mapping[str, str] | None = None,
        rest: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        numel: int | None = None,
    ) -> None:
        """From its parts, which `SparseDelta` describes. Raises ValueError or TypeError for parts that do not fit."""
        self.mask = mask
        self.values: dict[str, Tensor] = {name: values[name].detach().cpu() for name in mask}
        for name, value in self.values.items():
            if value.dtype not in DTYPES:
                raise TypeError(
                    f"values of {name!r}: expected a dtype that safetensors files hold, got {short(value.dtype)}; "
                    "exclude the tensor"
                )
            if value.shape != mask[name].shape:
                raise ValueError(
                    f"values of {name!r}: expected shape {tuple(mask[name].shape)}, one per changed element, got "
                    f"{tuple(value.shape)}; gather them"
                )
        self.originals: dict[str, Tensor] | None = None
        if originals is not None or not mask.k:
            before = self.values if originals is None else originals
            self.originals = {name: before[name].detach().cpu() for name in mask}
            checksums = checksums or {name: checksum(value) for name, value in self.originals.items()}
        self.checksums: dict[str, str] = dict(checksums or {})
        if self.checksums.keys() != set(mask):
            raise ValueError(
                f"`checksums`: expected those of the originals of {listing(list(mask))}, got {len(self.checksums)}; "
                "pass them, or the originals"
            )
        self.rest: dict[str, str] = dict(rest or {})
        self.tied: dict[str, str] = dict(tied or {})
        if strangers := [name for name in (*self.rest, *self.tied.values()) if name not in mask]:
            raise ValueError(f"`rest`, `tied`: expected tensors of `mask`, got {listing(strangers)}; drop them")
        self.numel = mask.numel if numel is None else numel

    def __eq__(self, other: object) -> bool:
        """Same elements, values and base. Whether the originals are known does not count."""
        if not isinstance(other, Changes):
            return NotImplemented
        facts = (self.mask, self.checksums, self.rest, self.tied, self.numel)
        if facts != (other.mask, other.checksums, other.rest, other.tied, other.numel):
            return False
        return all(same_bits(value, other.values[name]) for name, value in self.values.items())

    __hash__ = None  # type: ignore[assignment]

    def alike(self, name: str, other: str) -> bool:
        """Whether two tensors have changed in the same elements, to the same values."""
        if name == other:
            return True
        return torch.equal(self.mask[name], self.mask[other]) and same_bits(self.values[name], self.values[other])

    def known_originals(self, what: str) -> dict[str, Tensor]:
        """The originals. Raises ValueError, saying `what` needs them, where they are not known."""
        if self.originals is None:
            raise ValueError(
                f"{what}: expected known originals, got a delta that was saved without them; call "
                "take_originals(base), or save it with include_original=True"
            )
        return self.originals

    def at(self, alpha: float) -> dict[str, Tensor]:
        """The values at base + alpha * (tuned - base); 0 and 1 are the originals and the values themselves."""
        if alpha == 1.0:
            return self.values
        originals = self.known_originals("revert_" if alpha == 0.0 else "interpolate_")
        if alpha == 0.0:
            return originals
        return {name: _between(originals[name], value, alpha) for name, value in self.values.items()}

    def possible_alphas(self, current: Mapping[str, Tensor]) -> list[float]:
        """Alphas that may have made these values, short numbers alone; `at` tells which of them has.

        Each element says within what its value's rounding leaves open; together they leave little.
        """
        originals = self.known_originals("possible_alphas")
        low, high = -math.inf, math.inf
        for name, value in self.values.items():
            if value.is_floating_point() and value.numel():
                start, end, now = (tensor.double() for tensor in (originals[name], value, current[name]))
                limits = torch.finfo(value.dtype)
                compute = torch.finfo(torch.float64 if value.dtype == torch.float64 else torch.float32)
                # the value is rounded once to its dtype, the terms of its sum to that of the computation
                error = now.abs() * limits.eps + (start.abs() + end.abs()) * 2 * compute.eps
                error += limits.smallest_normal * limits.eps
                change = end - start
                alpha, error = (now - start) / change, error / change.abs()
                known = alpha.isfinite() & error.isfinite()
                if bool(known.any()):
                    low = max(low, float((alpha - error)[known].max()))
                    high = min(high, float((alpha + error)[known].min()))
        return _alphas_within(low, high) if -math.inf < low <= high < math.inf else []


def check_alpha(alpha: object) -> None:
    """Raises ValueError for what is no number, or none that fp32 has."""
    if not isinstance(alpha, numbers.Real) or not abs(float(alpha)) <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"`alpha`: expected a finite number, within fp32's range, got {alpha!r}; 0 is the base, 1 the tuned model"
        )


def _alphas_within(low: float, high: float) -> list[float]:
    """Numbers that people write, the shortest first: decimals of up to four digits, fractions of up to 64ths."""
    found: dict[float, None] = {}
    for scale in (1, 10, 100, 1000, 10_000, *range(3, 65)):
        first, last = math.ceil(low * scale), math.floor(high * scale)
        found.update((number / scale, None) for number in range(first, min(last, first + 7) + 1))
    return list(found)


def checksum(values: Tensor) -> str:
    """The first 64 bits of SHA-256 over the little-endian values, in row-major order."""
    return hashlib.sha256(bytes_of(values)).hexdigest()[:16]


def rest_checksum(tensor: Tensor, index: Tensor) -> str:
    """Checksum of a tensor with the elements at `index` set to zero: base and tuned model share it."""
    zeroed = as_bits(tensor).reshape(-1).clone()
    zeroed[index.long()] = 0
    return checksum(zeroed)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one device hold the same bits."""
    return a.dtype == b.dtype and torch.equal(as_bits(a), as_bits(b))


def _between(original: Tensor, value: Tensor, alpha: float) -> Tensor:
    """original + alpha * (value - original), rounded once to their dtype."""
    if original.is_complex():
        return torch.lerp(original, value, alpha)
    if not original.is_floating_point():
        return value if alpha >= 0.5 else original
    dtype = torch.float64 if original.dtype == torch.float64 else torch.float32
    return torch.lerp(original.to(dtype), value.to(dtype), alpha).to(original.dtype)
