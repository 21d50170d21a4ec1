"""`python -m saft_kernels.integrations.open_clip_train`: open_clip's training script, with SparseAdamW.

Takes the arguments of `python -m open_clip_train.main`, and runs it, with `--opt timm/sparseadamw`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..mask import SparseMask
from ..optim.sparse_adamw import SparseAdamW
from .select_into import name_parameters
from .timm import NAME, register_timm

_HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m saft_kernels.integrations.open_clip_train", add_help=False, allow_abbrev=False
    )
    options = parser.add_argument_group("SparseAdamW, beside the arguments of open_clip_train")
    options.add_argument("--density", type=float, help="selected share of the parameters (default: 1e-3)")
    options.add_argument("--k", type=int, help="number of selected parameters, in place of --density")
    options.add_argument("--scope", choices=["global", "tensor", "row"], help="one budget over all, or one for each")
    options.add_argument(
        "--selection-steps", type=int, help="select from the mean gradient of that many steps, which do not update"
    )
    options.add_argument("--mask", metavar="FILE", help="a file written by SparseMask.save, in place of all of these")
    return parser


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs open_clip_train's own main; returns what it returns.

    Args:
        argv: Its arguments and ours; those of the command line where None.

    Raises:
        ImportError: open_clip_train, or what it needs, is not installed.
        ValueError: Another optimizer than SparseAdamW in `--opt`, or an option that it does not take. Nothing has
            been built or written.
    """
    return _train(*_checked(argv))


def command() -> Any:
    """`main` on the command line's arguments: what is wrong with them is said in one line."""
    try:
        checked = _checked(None)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"saft_kernels.integrations.open_clip_train: error: {error}")
    return _train(*checked)


def _checked(argv: Sequence[str] | None) -> tuple[list[str], dict[str, Any], SparseMask | None]:
    """The arguments of open_clip_train, SparseAdamW's, and a mask."""
    ours, theirs = _parser().parse_known_args(argv)
    if {"-h", "--help"} & set(theirs):
        _parser().print_help()
        print()
    try:
        import open_clip_train.main  # type: ignore[import-untyped]  # noqa: F401, what it needs is looked for now
        from open_clip_train.params import parse_args  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"open_clip_train needs more ({error}); pip install 'open_clip_torch[training]'") from error

    chosen = parse_args(theirs).opt
    if chosen.lower() not in ("adamw", f"timm/{NAME}"):
        raise ValueError(f"--opt: expected none, or timm/{NAME}, got {chosen!r}; run open_clip_train.main for others")
    options = {name: value for name, value in vars(ours).items() if value is not None}
    mask = SparseMask.load(options.pop("mask")) if ours.mask else None
    if mask is not None and options:
        extra = next(iter(options)).replace("_", "-")
        raise ValueError(f"--mask: expected it alone, got --{extra} beside it; drop one")
    # open_clip fills in its hyperparameters for its own optimizer only
    filled = parse_args([*theirs, "--opt", "adamw"])
    theirs += ["--opt", f"timm/{NAME}"]
    for name in _HYPERPARAMETERS:
        theirs += [f"--{name}", repr(getattr(filled, name))]
    # on parameters without memory: what is wrong with any model is found before one is built, and logs/NAME is made
    hyperparameters = {"lr": filled.lr, "betas": (filled.beta1, filled.beta2), "eps": filled.eps}
    SparseAdamW(
        [torch.empty(2**40, device="meta", requires_grad=True)],
        weight_decay=filled.wd,
        **hyperparameters,
        **options,
    )
    return theirs, options, mask


def _train(theirs: list[str], options: dict[str, Any], mask: SparseMask | None) -> Any:
    from open_clip_train.main import main as train

    register_timm(**options)
    with _names_kept(mask):
        return train(theirs)


@contextmanager
def _names_kept(mask: SparseMask | None) -> Iterator[None]:
    """open_clip hands the model to timm, which hands on groups without names; a mask and what is logged need them."""
    import timm.optim

    factory: Any = timm.optim
    create: Callable[..., SparseAdamW] = factory.create_optimizer_v2

    def create_with_names(model: nn.Module, *args: Any, **kwargs: Any) -> SparseAdamW:
        optimizer = create(model, *args, **kwargs)
        name_parameters(optimizer, model)
        if mask is not None:
            optimizer.use_mask(mask)
        return optimizer

    with mock.patch.object(factory, "create_optimizer_v2", create_with_names):
        yield


if __name__ == "__main__":
    sys.exit(command())
