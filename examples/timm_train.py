"""timm's factory, scheduler, scaler and checkpoints with SparseAdamW, on made-up data. `docs/integrations.md`.

python examples/timm_train.py            # a tiny ViT, seconds on a CPU; a second run goes on from the checkpoint
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, NativeScaler
from torch import nn

import saft_kernels

OUTPUT, EPOCHS = Path("runs/timm_train"), 4


def train(epochs: int = EPOCHS) -> tuple[nn.Module, list[float]]:
    """Goes on from the checkpoint, where there is one."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )
    saft_kernels.register_timm()  # new
    # was: "adamw"
    optimizer = create_optimizer_v2(model, "sparseadamw", lr=1e-2, weight_decay=0.05, density=0.02, selection_steps=4)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=EPOCHS)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=OUTPUT, recovery_dir=OUTPUT, max_history=1)
    start = 0
    if (OUTPUT / "last.pth.tar").exists():
        start = resume_checkpoint(model, str(OUTPUT / "last.pth.tar"), optimizer, log_info=False)
        schedule.step(start)

    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = images.mean((2, 3)).argmax(1)
    scaler, losses = NativeScaler(device="cpu"), []
    for epoch in range(start, epochs):
        for batch, target in zip(images.split(16), labels.split(16), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(batch), target)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            losses.append(loss.item())
        schedule.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    return model, losses


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    _, losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else f"{EPOCHS} epochs were done; remove {OUTPUT}")
