"""A whole training step as one CUDA graph, beside the same loop without: times, and whether the bits are the same.

python examples/cuda_graph_loop.py                                   # a small model; without a GPU, the loop alone
python examples/cuda_graph_loop.py --width 768 --layers 12 --batch 32  # the size of a ViT-B/16

A graph replays forward, backward and optimizer.step() with one launch, where the host is what a step waits for: small
batches, many tensors, slow CPU cores. `docs/cuda_graphs.md` says what may change between replays. The model is an
MLP-Mixer on made-up images, because all its kernels give the same bits from run to run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import saft_kernels

WAYS = ("dense", "release_grads", "sparse_grad")
WARM_UP = 3  # steps: they compile, allocate, and make the optimizer's state


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021): patches, then MLPs over patches and over channels in turn."""

    def __init__(self, width: int, layers: int, size: int, classes: int = 10, patch: int = 16) -> None:
        super().__init__()
        self.patch, tokens = patch, (size // patch) ** 2
        self.embed = nn.Linear(3 * patch * patch, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(n, hidden), nn.GELU(), nn.Linear(hidden, n))
            for n, hidden in [(tokens, width // 2), (width, 4 * width)] * layers
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, classes)."""
        batch, channels, size, _ = images.shape
        grid = size // self.patch
        patches = images.view(batch, channels, grid, self.patch, grid, self.patch).permute(0, 2, 4, 1, 3, 5)
        x = self.embed(patches.reshape(batch, grid * grid, -1))
        for i, mlp in enumerate(self.mlps):
            x = x + (mlp(self.norms[i](x).mT).mT if i % 2 == 0 else mlp(self.norms[i](x)))
        return self.head(self.norms[-1](x).mean(1))


def on_side_stream(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Steps before a capture run on a stream of their own, as torch wants it."""
    stream = torch.cuda.Stream()

    def run() -> Tensor:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = step()
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    return run


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a graph. A capture runs nothing: the first replay is the next step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def run() -> Tensor:
        graph.replay()
        return loss

    return run


def train(
    way: str, args: argparse.Namespace, device: torch.device, *, graphed: bool, backend: str | None = None
) -> tuple[list[Tensor], dict[str, Tensor], float]:
    """The loss of every step, the weights, and the seconds of a step after the warm-up."""
    torch.manual_seed(0)
    model = Mixer(args.width, args.layers, args.size).to(device)
    labels = torch.randint(10, (WARM_UP + args.steps, args.batch), device=device)
    images = torch.randn(*labels.shape, 3, args.size, args.size, device=device) + labels[..., None, None, None] / 10
    image, label = torch.empty_like(images[0]), torch.empty_like(labels[0])  # the memory that the graph reads

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    mask = saft_kernels.select(model, [(images[0], labels[0])], loss_fn, density=args.density, progress=False)
    optimizer = saft_kernels.SparseAdamW(
        model.named_parameters(),
        lr=torch.tensor(1e-2, device=device),  # a tensor: the schedule writes to it, and replays read it
        mask=mask,
        capturable=True,  # step counts on the device
        release_grads=way != "dense",
        backend=backend,
    )
    if way == "sparse_grad":
        saft_kernels.sparse_grad(model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WARM_UP + args.steps)

    def step() -> Tensor:
        loss = loss_fn(model, (image, label))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # a capture finds none, and makes them in the graph's own memory
        return loss.detach()

    losses = []
    run = on_side_stream(step) if graphed else step
    for i in range(WARM_UP + args.steps):
        if i == WARM_UP:
            run = capture(step) if graphed else step
            start = now(device)
        image.copy_(images[i])
        label.copy_(labels[i])
        losses.append(run().clone())  # the next replay overwrites it
        schedule.step()
    seconds = (now(device) - start) / args.steps
    return losses, {name: p.detach() for name, p in model.named_parameters()}, seconds


def now(device: torch.device) -> float:
    """The time at which the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals itself, and 0 is not -0."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def compare(args: argparse.Namespace) -> bool:
    """Prints the table; whether every graph gave the bits of the loop without."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    if not has_gpu:
        print("No GPU, so no CUDA graph: this is the loop that would be captured, run eagerly.")
    print(f"{'gradients':15}{'loss':>18}{'eager, ms':>12}{'graph, ms':>12}  same bits")
    all_same = True
    for way in args.ways:
        losses, weights, seconds = train(way, args, device, graphed=False)
        line = f"{way:15}{losses[0].item():8.3f} -> {losses[-1].item():.3f} {1e3 * seconds:11.2f}"
        if has_gpu and not args.eager:
            graph_losses, graph_weights, graph_seconds = train(way, args, device, graphed=True)
            same = all(map(same_bits, losses, graph_losses))
            same = same and all(same_bits(w, graph_weights[name]) for name, w in weights.items())
            all_same &= same
            line += f"{1e3 * graph_seconds:12.2f}  {'yes' if same else 'NO'}"
        print(line, flush=True)
    return all_same


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what becomes of gradients")
    parser.add_argument("--eager", action="store_true", help="capture nothing: the loop alone")
    parser.add_argument("--density", type=float, default=1e-2, help="share of the elements that is trained")
    parser.add_argument("--steps", type=int, default=20, help=f"after {WARM_UP} to warm up (default 20)")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--size", type=int, default=64, help="of an image, a multiple of 16 (default 64)")
    parser.add_argument("--width", type=int, default=64, help="of the model (default 64)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if not compare(parse_args()):
        raise SystemExit("a graph gave other bits than the loop without")
