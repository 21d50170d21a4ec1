"""A loop under accelerate with SparseAdamW, on made-up data. `docs/integrations.md`.

python examples/accelerate_loop.py       # seconds on a CPU; a second run goes on from the saved state
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import saft_kernels

STATE, EPOCHS = Path("runs/accelerate_loop"), 4


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """The mean loss of a batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(accelerator: Accelerator, epochs: int = EPOCHS) -> tuple[nn.Module, list[float]]:
    """Goes on from STATE, where it is there."""
    torch.manual_seed(0)
    inputs = torch.randn(128, 16)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 16, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    mask = saft_kernels.select(model, loader, loss_fn, density=0.05)  # new: before prepare
    optimizer = saft_kernels.SparseAdamW(model.named_parameters(), lr=2e-2, mask=mask)  # was: torch.optim.AdamW
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    done = 0
    if STATE.exists():
        accelerator.load_state(STATE)
        done = int((STATE / "epochs").read_text())
    losses = []
    for epoch in range(done, epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.save_state(STATE)
        (STATE / "epochs").write_text(str(epoch + 1))
    return accelerator.unwrap_model(model), losses


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, losses = train(Accelerator(gradient_accumulation_steps=2))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else f"{EPOCHS} epochs were done; remove {STATE}")
