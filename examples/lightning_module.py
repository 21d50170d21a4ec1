"""A LightningModule with SparseAdamW, on made-up data. `docs/integrations.md`.

python examples/lightning_module.py      # seconds on a CPU
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import saft_kernels
from saft_kernels.integrations.lightning import SelectionCallback


class Classifier(pl.LightningModule):
    """A module like yours."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:  # noqa: D102
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:  # noqa: D102
        optimizer = saft_kernels.SparseAdamW(self.parameters(), lr=2e-2, density=0.05)  # was: torch.optim.AdamW
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


def loader() -> DataLoader:
    """The class of an input is the largest of its first four values."""
    inputs = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 16)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pl.seed_everything(0)
    selection = SelectionCallback()
    trainer = pl.Trainer(
        max_epochs=4,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        default_root_dir="runs/lightning_module",
        callbacks=[selection],  # new: select from all of the data, not from the first batch
        logger=False,
    )
    model = Classifier()
    trainer.fit(model, loader())
    print(selection.mask.summary())
