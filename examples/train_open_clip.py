"""open_clip's own training script with SparseAdamW, on images and captions made up here. `docs/integrations.md`.

    python examples/train_open_clip.py                       # a tiny CLIP, seconds on a CPU
    python examples/train_open_clip.py --resume latest --epochs 9   # goes on

With your data and model, no script is needed: `python -m saft_kernels.integrations.open_clip_train ARGUMENTS`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
from PIL import Image

from saft_kernels.integrations import open_clip_train

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}


def tiny_model(folder: Path) -> str:
    """A name for `--model`."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    return "tiny-clip"


def captioned_images(folder: Path) -> Path:
    """A table for `--train-data`."""
    rows = ["filepath\ttitle"]
    for left in COLORS:
        for right in COLORS:
            pixels = np.repeat(np.array([[COLORS[left]] * 20 + [COLORS[right]] * 20], np.uint8), 40, axis=0)
            Image.fromarray(pixels).save(folder / f"{left}-{right}.png")
            rows.append(f"{folder}/{left}-{right}.png\t{left} beside {right}")
    (folder / "train.tsv").write_text("\n".join(rows))
    return folder / "train.tsv"


if __name__ == "__main__":
    folder = Path("runs/train_open_clip")
    folder.mkdir(parents=True, exist_ok=True)
    data = ["--train-data", str(captioned_images(folder)), "--dataset-type", "csv", "--workers", "0"]
    model = ["--model", tiny_model(folder), "--batch-size", "8", "--epochs", "6", "--precision", "fp32"]
    schedule = ["--lr", "0.01", "--warmup", "0", "--logs", str(folder), "--name", "logs", "--log-every-n-steps", "2"]
    saft = ["--density", "0.01", "--selection-steps", "2"]
    sys.exit(open_clip_train.main([*data, *model, *schedule, *saft, *sys.argv[1:]]))
