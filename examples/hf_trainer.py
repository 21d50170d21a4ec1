"""The Trainer of Hugging Face transformers with SparseAdamW: a tiny CLIP on made-up pairs. `docs/integrations.md`.

python examples/hf_trainer.py            # seconds on a CPU; a second run goes on from the last checkpoint
"""

import argparse

import torch
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from saft_kernels import SparseAdamW
from saft_kernels.integrations.transformers import SelectionCallback

OUTPUT = "runs/hf_trainer"


def tiny_clip() -> CLIPModel:
    """Random weights; yours come from CLIPModel.from_pretrained."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def pairs(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """The third token says how bright the image is."""
    images = [torch.full((3, 16, 16), i % 16 / 8 - 1) for i in range(count)]
    return [
        {"input_ids": torch.tensor([0, 5, 10 + i % 16, 1]), "pixel_values": image} for i, image in enumerate(images)
    ]


def collate(examples: list[dict[str, torch.Tensor]]) -> dict:
    """A batch; return_loss asks CLIPModel for its contrastive loss."""
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    return {**batch, "return_loss": True}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    arguments = TrainingArguments(
        OUTPUT,
        num_train_epochs=6,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to=[],
    )
    trainer = Trainer(
        tiny_clip(),
        arguments,
        train_dataset=pairs(),
        data_collator=collate,
        optimizer_cls_and_kwargs=(SparseAdamW, {"lr": arguments.learning_rate, "density": 0.02}),  # new
        callbacks=[SelectionCallback()],  # new: select from all of the data, not from the first batch
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(OUTPUT))
