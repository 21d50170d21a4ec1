"""SparseDelta: a fine-tune as the elements it changed; applied, reverted, interpolated, composed, saved."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..common.names import Model, listing, memory, named_tensors
from ..mask import SparseMask
from ..optim.sparse_adamw import SparseAdamW
from ..selection.parts import here, local, part_of, ranks_of
from ..selection.ranks import together
from . import file, shira
from .changes import Changes, check_alpha
from .compose import Conflicts, Policy, compose
from .difference import comparable, difference, ties
from .originals import Originals, optimizer_parameters, whole_changes
from .targets import Copies, Targets, Verify, check_apart, check_state, check_verify, other_base, take_originals

__all__ = ["Composed", "SparseDelta"]


class SparseDelta:
    """The elements of a model that a fine-tune changed, and their new values.

    Make one with `diff`, `from_optimizer`, `load`, `compose` or `from_shira`. It puts a model, in place, into one of
    two states: the base (`revert_`) or the tuned model (`apply_`), bit for bit in every dtype; or between them
    (`interpolate_`). Each costs time in proportion to the k changed elements, and first checks everything: names,
    shapes, dtypes, and that the k elements have the values of one of those states. An error leaves the model as it was.

    Models are modules (parameters and persistent buffers) or state dicts, whose tensors are then written. Names lose
    what DistributedDataParallel and torch.compile add. Tied tensors are stored once and written under all their names.

    Originals, the k values before: known from `diff`, `from_optimizer` and files saved with `include_original=True`;
    otherwise learned from the first base that passes `apply_`'s check, or by `take_originals`. `revert_` and
    `interpolate_` need them. A checksum of them per tensor is always there.
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
        """From its parts.

        Args:
            mask: The changed elements; its names are those of the delta.
            values: Their new values, one tensor (k_name,) per name.
            originals: Their values before, alike; None: not known, `checksums` must then be given.
            checksums: `changes.checksum` of the originals per name; None: computed.
            rest: `changes.checksum` of each whole tensor with its changed elements set to zero, or nothing.
            tied: Further names of tensors, name -> name in the mask.
            numel: Elements of the model; None: those of the mask.
        """
        self._hold(Changes(mask, values, originals, checksums=checksums, rest=rest, tied=tied, numel=numel))

    @classmethod
    def _of(cls, changes: Changes) -> SparseDelta:
        delta = cls.__new__(cls)
        delta._hold(changes)
        return delta

    def _hold(self, changes: Changes) -> None:
        self.changes = changes
        """What it holds, as data."""
        self._alphas: list[float] = []
        self._copies = Copies()

    def __repr__(self) -> str:
        return f"SparseDelta(k={self.k:,}, density={self.density:.3%}, tensors={len(self.mask)})"

    def __eq__(self, other: object) -> bool:
        """Same elements, values and base. Whether the originals are known does not count."""
        return self.changes == other.changes if isinstance(other, SparseDelta) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def mask(self) -> SparseMask:
        """The changed elements; its names are those of the delta."""
        return self.changes.mask

    @property
    def values(self) -> dict[str, Tensor]:
        """Their new values, (k_name,) per name."""
        return self.changes.values

    @property
    def originals(self) -> dict[str, Tensor] | None:
        """The values before, per name; None: not known."""
        return self.changes.originals

    @property
    def checksums(self) -> dict[str, str]:
        """Checksum of the originals, per name."""
        return self.changes.checksums

    @property
    def rest(self) -> dict[str, str]:
        """Checksum of each whole tensor with its changed elements set to zero; empty: not taken."""
        return self.changes.rest

    @property
    def tied(self) -> dict[str, str]:
        """Further names of tensors, to the name in `mask`."""
        return self.changes.tied

    @property
    def numel(self) -> int:
        """Elements of the model that it was made on."""
        return self.changes.numel

    @property
    def k(self) -> int:
        """Changed elements."""
        return self.mask.k

    @property
    def density(self) -> float:
        """k / numel."""
        return self.k / self.numel if self.numel else 0.0

    # ---- making one ----

    @classmethod
    def diff(
        cls,
        base: Model,
        tuned: Model,
        *,
        exclude: Sequence[str] | str = (),
        whole: bool = False,
        progress: bool = False,
    ) -> SparseDelta:
        """What changed between two models: every element whose bits differ (NaN by payload, -0 from +0).

        Args:
            base: The model before. One read of both models; 16 MiB beside them, and what has changed.
            tuned: The model after: the same names, shapes and dtypes.
            exclude: Glob or globs (fnmatch) over names to leave out, in both.
            whole: Take checksums of all other elements too, for `verify="whole"`. They go into the file, some 30 B
                per tensor, with an entry for every tensor that has not changed.
            progress: Shows a tqdm bar, where tqdm is installed.

        Raises:
            ValueError: The models differ in names, shapes or dtypes; a glob matches nothing.
            TypeError: Something that is no tensor, no model, or of a dtype that safetensors files do not hold.
        """
        before, after = named_tensors("base", base), named_tensors("tuned", tuned)
        names = comparable(before, after, exclude)
        before, after = ({name: tensors[name] for name in names} for tensors in (before, after))
        keys = ({name: memory(named[name]) for name in names if named[name].numel()} for named in (before, after))
        return cls._of(_difference(before, after, *ties(*keys), whole, progress))

    @classmethod
    def from_optimizer(
        cls, optimizer: SparseAdamW, base: Model | Originals, *, model: nn.Module | None = None
    ) -> SparseDelta:
        """What training has changed in the optimizer's parameters.

        Where parameters are split over ranks, all of them call it, and get the same: k values of the whole.

        Args:
            optimizer: With its parameters in their trained state.
            base: The model before training, or its state dict; or `Originals(optimizer)`, made before the first
                step, which cost k values. With a model the whole parameters are compared, so what else has written
                them (a clamp) is in the delta; with `Originals`, what the optimizer has ever selected.
            model: Names the parameters, where the optimizer was built without names.

        Raises:
            ValueError: Parameters without names, or `base` does not cover them.
        """
        parameters = optimizer_parameters(optimizer, model)
        ranks = ranks_of(map(part_of, parameters.values()))
        with together(ranks, "SparseDelta.from_optimizer()"):
            if not isinstance(base, Originals):
                before = named_tensors("base", base)
                if missing := [name for name in parameters if name not in before]:
                    raise ValueError(
                        f"`base`: expected the optimizer's parameters, got none of {listing(missing)}; pass the model "
                        "that training started from"
                    )
                before = {name: before[name] for name in parameters}
                comparable(before, parameters, ())
                before = {name: here(before[name], parameter) for name, parameter in parameters.items()}
                after = {name: local(parameter) for name, parameter in parameters.items()}
                changes = _difference(before, after, {}, (), False, False)
                if ranks is None:
                    return cls._of(changes)
                assert changes.originals is not None
                found = dict(changes.mask), changes.originals, changes.values
            else:
                found = base.changes(optimizer, parameters)
            indices, originals, values = whole_changes(parameters, *found)
        mask = SparseMask(indices, {name: parameters[name].shape for name in indices})
        return cls(mask, values, originals, numel=sum(p.numel() for p in parameters.values()))

    @staticmethod
    def compose(deltas: Sequence[SparseDelta], *, base: Model | None = None, on_conflict: Policy = "error") -> Composed:
        """Several fine-tunes of one base as one delta, and a report of the elements that more than one changed.

        Args:
            deltas: At least one. Their originals must be known, or `base` given.
            base: The model that all of them were made on.
            on_conflict: For elements with different new values: "error"; "first" or "last" of `deltas` wins; "sum"
                adds up the differences to the base of every delta that changed the element, in fp32 (fp64 for
                fp64), as in task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089).

        Returns:
            Composed(delta, conflicts). Nothing is mutated but originals that `base` made known.

        Raises:
            ValueError: Conflicts, with on_conflict="error"; deltas of different bases.
        """
        for delta in deltas:
            if base is not None:
                delta.take_originals(base)
        changes, conflicts = compose([delta.changes for delta in deltas], on_conflict)
        return Composed(SparseDelta._of(changes), conflicts)

    # ---- files ----

    def save(self, path: str | os.PathLike[str], *, include_original: bool = False) -> None:
        """Writes a .safetensors file, whole or not at all; docs/delta.md has the format.

        Args:
            path: The file.
            include_original: Also write the originals, so that the file alone can revert a tuned model.

        Raises:
            ValueError: `include_original`, and they are not known.
        """
        what = "save(include_original=True)"
        file.write(path, self.changes, self.changes.known_originals(what) if include_original else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Reads a file written by `save`. Raises ValueError when it is something else, or has been altered."""
        return cls._of(file.read(path))

    def to_shira(self, folder: str | os.PathLike[str], base: nn.Module, *, partial: bool = False) -> SparseDelta:
        """Writes the changes to nn.Linear weights as a SHiRA adapter for PEFT. See `saft_kernels.delta.shira.save`.

        Originals that are not known are taken from `base`.
        """
        if self.originals is None:
            self.take_originals(base)
        return SparseDelta._of(shira.save(self.changes, folder, base, partial=partial))

    @classmethod
    def from_shira(cls, folder: str | os.PathLike[str], base: Model) -> SparseDelta:
        """Reads a SHiRA adapter that PEFT saved. See `saft_kernels.delta.shira.load`."""
        return cls._of(shira.load(folder, base))

    # ---- models ----

    def apply_(self, model: Model, *, verify: Verify = "selected") -> None:
        """Writes the new values: `model` becomes the tuned model, bit for bit.

        Args:
            model: The base, or where this delta's methods have left it; mutated at the k elements alone.
            verify: "selected": the k elements have the values of the base, of the tuned model, or of an alpha that
                this delta has interpolated to; or another process, where the originals are known and the alpha is a
                decimal of up to four digits or a fraction of up to 64ths. "whole": also all other elements of all
                tensors, by the checksums that `diff(whole=True)` took; reads the whole model. "none": names, shapes
                and dtypes alone.

        Raises:
            ValueError: Another model, or another state of it; nothing was written.
        """
        self._move(model, 1.0, verify)

    def revert_(self, model: Model, *, verify: Verify = "selected") -> None:
        """Writes the originals: `model` becomes the base, bit for bit. Arguments and errors as for `apply_`."""
        self._move(model, 0.0, verify)

    def interpolate_(self, model: Model, alpha: float, *, verify: Verify = "selected") -> None:
        """Writes base + alpha * (tuned - base): WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903).

        Always from the two endpoints, so calls do not accumulate error; alpha 0 and 1 are exactly they. In fp32 (fp64
        for fp64), rounded once. Integers and bools are the base's below 0.5, else the tuned model's.

        Args:
            model: As for `apply_`.
            alpha: 0 is the base, 1 the tuned model; any number of fp32's range.
            verify: As for `apply_`.

        Raises:
            ValueError: As for `apply_`; the originals are not known, and `model` is not the base.
        """
        check_alpha(alpha)
        self._move(model, float(alpha), verify)

    def take_originals(self, base: Model) -> None:
        """Reads the originals from the base, which must have their checksums; `base` is not changed."""
        take_originals(self.changes, self._targets("base", base))

    def _move(self, model: Model, alpha: float, verify: Verify) -> None:
        changes = self.changes
        check_verify(changes, verify)
        targets = self._targets("model", model)
        if verify == "whole" and (odd := targets.odd_rests(changes.rest)):
            raise other_base("model", odd)
        if verify != "none":
            check_state(changes, targets, self._alphas)
        if alpha:
            check_apart(zip(targets.names, map(memory, targets.tensors), strict=True), changes)
        values = changes.at(alpha)
        # all is checked: from here on it is written
        targets.scatter_(values, {0.0: "originals", 1.0: "values"}.get(alpha))
        if alpha not in (0.0, 1.0):
            self._alphas = [alpha, *(other for other in self._alphas if other != alpha)]

    def _targets(self, argument: str, model: Model) -> Targets:
        return Targets.of_model(argument, model, self.changes, self._copies)


class Composed(NamedTuple):
    """What `SparseDelta.compose` returns."""

    delta: SparseDelta
    conflicts: Conflicts


def _difference(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    tied: Mapping[str, str],
    untied: Collection[str],
    whole: bool,
    progress: bool,
) -> Changes:
    own = [name for name in before if name not in tied]
    pairs = ((name, before[name], after[name]) for name in _bar(own, "comparing", progress))
    numel = sum(before[name].numel() for name in own)
    return difference(pairs, own, tied=tied, untied=untied, whole=whole, numel=numel)


def _bar(items: Sequence[str], description: str, enabled: bool) -> Iterable[str]:
    if not enabled:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, unit="tensor", leave=False, disable=None)  # type: ignore[no-any-return]
