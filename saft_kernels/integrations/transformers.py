"""For the Trainer of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..mask import SparseMask
from .select_into import FirstBatches, check_max_batches, select_into, unwrapped

__all__ = ["SelectionCallback"]


class SelectionCallback(TrainerCallback):
    """Selects before the first step, from the mean gradient over the training data, for the Trainer's SparseAdamW.

    `Trainer(..., optimizer_cls_and_kwargs=(SparseAdamW, {...}), callbacks=[SelectionCallback()])`. Without it the
    first step selects from its own gradient. A selection that is there, from a checkpoint or a mask, stays.

    Args:
        loss_fn: `loss_fn(model, batch)` returns the scalar mean loss; None takes `model(**batch).loss`. With a custom
            loss or label smoothing, `trainer.add_callback(SelectionCallback(trainer.compute_loss))`.
        max_batches: Take that many batches of the training data; None takes all. Needed for an IterableDataset of
            unknown length and for one that can be read only once.
        progress: Shows how far it is and what it has selected, as `saft_kernels.select` does.

    Attributes:
        mask: What was selected, under the model's names; None before, and where a selection was there.
    """

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        max_batches: int | None = None,
        progress: bool = True,
    ) -> None:
        self.loss_fn = loss_fn or _loss_of_model
        check_max_batches(max_batches)
        self.max_batches = max_batches
        self.progress = progress
        self.mask: SparseMask | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer once a checkpoint to resume from is loaded."""
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        if unwrapped(optimizer).mask is None:
            loader = kwargs["train_dataloader"]
            try:
                length = len(loader)
            except TypeError:
                length = None
            batches = FirstBatches(loader, self.max_batches, length, getattr(loader, "dataset", None))
            model.train()
            self.mask = select_into(optimizer, model, batches, self.loss_fn, progress=self.progress)


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ValueError(
            f"`loss_fn`: expected one, or a model that returns a loss, got {type(model).__name__} without a loss for "
            f"{', '.join(batch)}; pass loss_fn, or give the model its labels"
        )
    return loss
