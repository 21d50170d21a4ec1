"""A WiSE-FT / FLYP loop with SparseAdamW: fine-tune like pre-training, then interpolate. `docs/integrations.md`.

python examples/wise_ft_loop.py          # a tiny CLIP on made-up data, seconds on a CPU
"""

import argparse
import copy

import open_clip
import torch
from torch import nn

import saft_kernels

VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 6, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}


def batches(count: int, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images, and captions whose third token says how bright they are."""
    data = []
    for _ in range(count):
        brightness = torch.randperm(size)
        images = (brightness / size - 0.5).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) + 0.1 * torch.randn(size, 3, 16, 16)
        data.append((images, torch.stack([torch.tensor([1, 5, 10 + int(b), 39, 0, 0]) for b in brightness])))
    return data


def flyp_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """FLYP: the contrastive loss of pre-training."""
    image_features, text_features, logit_scale = model(*batch)
    return open_clip.ClipLoss()(image_features, text_features, logit_scale.mean())


def interpolated(zeroshot: nn.Module, finetuned: nn.Module, alpha: float) -> nn.Module:
    """WiSE-FT: (1 - alpha) * zero-shot + alpha * fine-tuned."""
    model = copy.deepcopy(zeroshot)
    tuned = finetuned.state_dict()
    model.load_state_dict({name: value.lerp(tuned[name], alpha) for name, value in model.state_dict().items()})
    return model


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    model, data = open_clip.CLIP(32, VISION, TEXT), batches(8)
    zeroshot = copy.deepcopy(model)
    mask = saft_kernels.select(model, data, flyp_loss, density=0.02)  # new
    model = nn.DataParallel(model)
    optimizer = saft_kernels.SparseAdamW(model.named_parameters(), lr=1e-2, mask=mask)  # was: torch.optim.AdamW
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * len(data))
    for batch in data * 4:
        optimizer.zero_grad()
        flyp_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for alpha in (0.0, 0.5, 1.0):
        print(f"alpha {alpha}: loss {flyp_loss(interpolated(zeroshot, model.module, alpha), data[0]).item():.3f}")
