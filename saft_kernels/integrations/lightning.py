"""For the Trainer of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from ..mask import SparseMask
from ..optim.sparse_adamw import SparseAdamW
from .select_into import FirstBatches, check_max_batches, select_into

__all__ = ["SelectionCallback"]


class SelectionCallback(pl.Callback):
    """Selects before the first step, from the mean gradient over the training data, for the module's SparseAdamW.

    `Trainer(..., callbacks=[SelectionCallback()])`, with a SparseAdamW from `configure_optimizers`. Without it the
    first step selects from its own gradient. A selection that is there, from a checkpoint or a mask, stays.

    Args:
        loss_fn: `loss_fn(module, batch)` returns the scalar mean loss; None takes what `training_step` returns, whose
            logging is left out meanwhile.
        max_batches: Take that many batches of the training data; None takes what an epoch of the Trainer takes. Needed
            for an IterableDataset of unknown length and for one that can be read only once.
        progress: Shows how far it is and what it has selected, as `saft_kernels.select` does.

    Attributes:
        mask: What was selected, under the module's names; None before, and where a selection was there.
    """

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        max_batches: int | None = None,
        progress: bool = True,
    ) -> None:
        self.loss_fn = loss_fn
        check_max_batches(max_batches)
        self.max_batches = max_batches
        self.progress = progress
        self.mask: SparseMask | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Called by the Trainer once a checkpoint to resume from is loaded."""
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SparseAdamW)]
        if not optimizers:
            raise TypeError(
                f"SelectionCallback: expected a SparseAdamW from configure_optimizers, got "
                f"{', '.join(type(optimizer).__name__ for optimizer in trainer.optimizers)}; return one there"
            )
        if self.loss_fn is None and not pl_module.automatic_optimization:
            raise ValueError(
                "SelectionCallback: expected `loss_fn` with manual optimization, got none; training_step would step"
            )

        def loss_fn(_: nn.Module, numbered: tuple[Any, int, int]) -> Tensor:
            batch, number = numbered[0], numbered[1]
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            # float16 without a GradScaler would lose small gradients: in full precision, this once
            half = "16-mixed" in str(trainer.precision) and "bf16" not in str(trainer.precision)
            with nullcontext() if half else trainer.precision_plugin.train_step_context():
                if self.loss_fn is not None:
                    return self.loss_fn(pl_module, batch)
                output = pl_module.training_step(batch, number)
            return output["loss"] if isinstance(output, dict) else output  # type: ignore[no-any-return]

        length = trainer.num_training_batches
        for optimizer in optimizers:
            if optimizer.mask is None:
                loader = trainer.train_dataloader
                batches = FirstBatches(
                    CombinedLoader(loader),
                    self.max_batches,
                    None if length == float("inf") else length,
                    getattr(loader, "dataset", None),
                )
                with _without_logging(pl_module):
                    self.mask = select_into(optimizer, pl_module, batches, loss_fn, progress=self.progress)


@contextmanager
def _without_logging(module: Any) -> Iterator[None]:
    """Lightning refuses per-batch logs outside its own loop."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.log, module.log_dict
