"""Fine-tune a model that is split over several GPUs by fully_shard (FSDP2), with SparseAdamW. `docs/distributed.md`.

torchrun --nproc-per-node 2 examples/fsdp2_train.py              # two ranks: of GPUs (NCCL), else of CPUs (gloo)
torchrun --nproc-per-node 3 examples/fsdp2_train.py --steps 60   # goes on from step 40, now with three
python examples/fsdp2_train.py --steps 80                        # and now with one process: seconds on a CPU

The model is a small transformer with random weights, the data are made up. Every rank takes its share of each batch,
and keeps its shard of the weights, of the gradients, and of the state of what is selected. Checkpoints go to
OUTPUT/step_<n>, through torch.distributed.checkpoint: any number of ranks goes on from what any other number saved. At
the end the fine-tune is written to OUTPUT/tuned.safetensors, a SparseDelta for the model it started from.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import saft_kernels

VOCABULARY, TOKENS = 64, 32


class Transformer(nn.Module):
    """A language model."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, max(1, width // 32), 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss of the next token, of ids (batch, TOKENS + 1)."""
        x = self.embedding(ids[:, :-1]) + self.position.weight
        future = nn.Transformer.generate_square_subsequent_mask(TOKENS, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, future, is_causal=True)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def new_model(args: argparse.Namespace) -> nn.Module:
    """The same on every rank. Yours comes from a file."""
    torch.manual_seed(0)
    return Transformer(args.width, args.layers)


def batch_of(step: int, args: argparse.Namespace, device: torch.device) -> Tensor:
    """This rank's share of the batch of a step, the same for any number of ranks. Each token tells the next."""
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(VOCABULARY, (args.batch, 1), generator=generator)]
    for _ in range(TOKENS):
        ids.append((5 * ids[-1] + 3) % VOCABULARY)
    return torch.cat(ids, 1)[distributed.get_rank() :: distributed.get_world_size()].to(device)


def mean_over_ranks(value: Tensor) -> float:
    """All ranks call it."""
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value.item() / distributed.get_world_size()


@torch.no_grad()
def evaluate(model: nn.Module, args: argparse.Namespace, device: torch.device) -> float:
    """The mean loss of batches that are not trained on."""
    batches = [batch_of(-1 - i, args, device) for i in range(8)]
    return mean_over_ranks(torch.stack([model(batch) for batch in batches]).mean())


def local_bytes(tensors: list[Tensor]) -> list[int]:
    """What each rank has of tensors, DTensors or not, in bytes."""
    mine = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
    found = [0] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found


def say(*words: object) -> None:
    """One rank speaks for all."""
    if distributed.get_rank() == 0:
        print(*words, flush=True)


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Steps and folders of those that are complete: what describes a checkpoint is written last."""
    folders = [path.parent for path in output.glob("step_*/.metadata")]
    return sorted((int(folder.name.removeprefix("step_")), folder) for folder in folders)


def train(args: argparse.Namespace, device: torch.device) -> list[float]:
    """The loss of every step that was made, over the whole batch."""
    model = new_model(args)
    numel = sum(p.numel() for p in model.parameters())
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": precision} if args.bf16 else {}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = saft_kernels.SparseAdamW(  # was: torch.optim.AdamW(model.parameters(), lr=args.lr)
        model.named_parameters(), lr=args.lr, density=args.density, release_grads=True
    )

    first = 0
    if found := checkpoints(args.output):
        first, folder = found[-1]
        state = {"model": get_model_state_dict(model), "optimizer": saft_kernels.OptimizerState(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        say(f"goes on from {folder}")

    losses = []
    before = evaluate(model, args, device)
    for step in range(first, args.steps):
        loss = model(batch_of(step, args, device))
        loss.backward()
        norm = optimizer.clip_grad_norm_(1.0)  # over all ranks
        optimizer.step()  # the first one selects
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            say(f"step {done:4} of {args.steps}: loss {losses[-1]:.4f}, gradient norm {norm.item():.3f}")
        if done % args.save_every == 0 or done == args.steps:
            state = {"model": get_model_state_dict(model), "optimizer": saft_kernels.OptimizerState(model, optimizer)}
            dcp.save(state, checkpoint_id=args.output / f"step_{done}")
    if not losses:
        say(f"{first} steps were done; pass more --steps, or remove {args.output}")
        return losses

    mask = optimizer.mask  # of the whole model; all ranks ask for it, as for state_dict() and clip_grad_norm_()
    states = [value for state in optimizer.state.values() for value in state.values()]
    sizes = {"weights": local_bytes([*model.parameters()]), "optimizer state": local_bytes(states)}
    after = evaluate(model, args, device)
    delta = saft_kernels.SparseDelta.from_optimizer(optimizer, new_model(args))  # all ranks: k values, the same on each
    if distributed.get_rank() == 0:
        mask.save(args.output / "mask.safetensors")
        delta.save(args.output / "tuned.safetensors")
    say(f"\n{mask.summary()}\n")
    say(f"loss of batches that were not trained on: {before:.4f} -> {after:.4f}")
    for what, of_ranks in sizes.items():
        say(f"{what}, KiB per rank: {', '.join(f'{size / 1024:,.1f}' for size in of_ranks)}")
    say(f"AdamW's state would have {8 * numel / 1024 / distributed.get_world_size():,.1f}")
    return losses


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="in all, those of a checkpoint included (default 40)")
    parser.add_argument("--batch", type=int, default=24, help="sequences per step, over all ranks (default 24)")
    parser.add_argument("--width", type=int, default=64, help="of the model, a multiple of 32 (default 64)")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default 2)")
    parser.add_argument("--density", type=float, default=1e-3, help="share of the elements that is trained")
    parser.add_argument("--lr", type=float, default=3e-2, help="learning rate (default 0.03)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights and averages stay fp32")
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="(default 10)")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS", help="and after the last (default 20)")
    parser.add_argument("--output", type=Path, default=Path("runs/fsdp2_train"), help="(default runs/fsdp2_train)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    """Starts the process group, trains, ends it."""
    args = parse_args(argv)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if has_gpu else "gloo"
    if "RANK" in os.environ:  # of torchrun
        distributed.init_process_group(backend)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    if args.batch % distributed.get_world_size():
        raise SystemExit(f"--batch: expected a multiple of {distributed.get_world_size()} ranks, got {args.batch}")
    losses = train(args, device)
    distributed.barrier()
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
