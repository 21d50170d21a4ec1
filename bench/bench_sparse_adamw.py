"""`optimizer.step()` as a whole on CLIP tensors, density 0.1 %, beside torch.optim.AdamW and the usual ways to mask it.

Coordinates are spread uniformly at random, or selected from a real CLIP gradient (random weights, random images). All
optimizers are timed in turn, round by round, in one run: compare ratios. Bytes are those of the sparse step for every
row, so GB/s of the dense peers is what they would need to move to keep up.

With --device cuda, the step itself instead, on the shapes of CLIP ViT-L/14 (no open_clip needed), fp32. eager:
gradients move as zero_grad(set_to_none=True) makes them. graph: a replay, lr and step in tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

import saft_kernels
from saft_kernels.ops import prepare_sparse_adamw
from saft_kernels.ops.adamw import AdamWHyper, AdamWSegment

FUSED = "torch.AdamW fused"


def make_model(name: str, device: str) -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    return open_clip.create_model(name).to(device)


def clip_gradient(model: nn.Module, batch: int = 4) -> None:
    """Leaves the gradient of one contrastive batch in p.grad."""
    import open_clip

    device = next(model.parameters()).device
    size = model.visual.image_size  # type: ignore[union-attr]
    height, width = size if isinstance(size, tuple) else (size, size)  # type: ignore[misc]
    texts = open_clip.tokenize([f"a photo of thing number {i}" for i in range(batch)]).to(device)
    image, text, scale = model(torch.randn(batch, 3, height, width, device=device), texts)
    nn.functional.cross_entropy(scale * image @ text.T, torch.arange(batch, device=device)).backward()


def uniform_mask(model: nn.Module, density: float) -> saft_kernels.SparseMask:
    named = dict(model.named_parameters())
    numel = sum(p.numel() for p in named.values())
    chosen = torch.randperm(numel)[: round(density * numel)].sort().values
    indices, first = {}, 0
    for name, parameter in named.items():
        inside = chosen[(chosen >= first) & (chosen < first + parameter.numel())] - first
        indices[name] = inside
        first += parameter.numel()
    return saft_kernels.SparseMask(indices, {name: p.shape for name, p in named.items()})


def masks(model: nn.Module, density: float) -> list[tuple[str, saft_kernels.SparseMask]]:
    """A uniformly random one, and the one that p.grad selects."""
    named = dict(model.named_parameters())
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in named.values()]
    top = saft_kernels.topk_magnitude(grads, round(density * sum(g.numel() for g in grads))).indices
    selected = saft_kernels.SparseMask(dict(zip(named, top, strict=True)), {n: p.shape for n, p in named.items()})
    return [("uniform", uniform_mask(model, density)), ("clip", selected)]


def masked_dense(params: list[nn.Parameter], mask: saft_kernels.SparseMask) -> Callable[[], object]:
    """The usual way: mask the gradients, step densely, put the frozen values back."""
    dense = [m.to(params[0].device) for m in mask.to_dense().values()]
    optimizer = torch.optim.AdamW(params)

    @torch.no_grad()
    def step() -> None:
        kept = [p.clone() for p in params]
        for p, m in zip(params, dense, strict=True):
            if p.grad is not None:
                p.grad.mul_(m)
        optimizer.step()
        for p, old, m in zip(params, kept, dense, strict=True):
            p.copy_(torch.where(m, p, old))

    return step


def indexed(params: list[nn.Parameter], mask: saft_kernels.SparseMask) -> Callable[[], object]:
    """Plain torch on the selected values: index_select, AdamW on the k values, index_copy_."""
    chosen = [(p, mask[name].long().to(p.device)) for name, p in zip(mask, params, strict=True) if mask[name].numel()]
    values = [nn.Parameter(p.detach().view(-1).index_select(0, i)) for p, i in chosen]
    optimizer = torch.optim.AdamW(values)

    @torch.no_grad()
    def step() -> None:
        for v, (p, i) in zip(values, chosen, strict=True):
            if p.grad is not None:
                v.grad = p.grad.view(-1).index_select(0, i)
        optimizer.step()
        for v, (p, i) in zip(values, chosen, strict=True):
            p.detach().view(-1).index_copy_(0, i, v)

    return step


def installed_peers(params: list[nn.Parameter]) -> dict[str, Callable[[], Callable[[], object]]]:
    """8-bit dense AdamW, where it is installed: less state, the same traffic of parameters and gradients."""
    peers: dict[str, Callable[[], Callable[[], object]]] = {}
    with contextlib.suppress(ImportError):
        import bitsandbytes

        peers["bitsandbytes AdamW8bit"] = lambda: bitsandbytes.optim.AdamW8bit(params).step
    if params[0].is_cuda:  # on a CPU, torchao's step is compiled and run for minutes
        with contextlib.suppress(ImportError):
            import torchao.optim

            peers["torchao AdamW8bit"] = lambda: torchao.optim.AdamW8bit(params).step
    return peers


def candidates(model: nn.Module, mask: saft_kernels.SparseMask) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name -> a function that builds the optimizer and returns its step."""
    params = list(model.parameters())
    named = list(model.named_parameters())
    return {
        "saft_kernels": lambda: saft_kernels.SparseAdamW(named, mask=mask).step,
        "saft_kernels density 1.0": lambda: saft_kernels.SparseAdamW(named, density=1.0).step,
        FUSED: lambda: torch.optim.AdamW(params, fused=True).step,
        "torch.AdamW foreach": lambda: torch.optim.AdamW(params, foreach=True).step,
        "masked dense AdamW": lambda: masked_dense(params, mask),
        "torch index_select": lambda: indexed(params, mask),
        **installed_peers(params),
    }


def run(args: argparse.Namespace) -> harness.Results:
    return run_cuda(args) if args.device == "cuda" else run_cpu(args)


def run_cpu(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    model = make_model(args.model, args.device)
    clip_gradient(model)
    named = dict(model.named_parameters())
    numel = sum(p.numel() for p in named.values())
    roof = harness.read_roof([p.detach() for p in named.values()])
    for data, mask in harness.progress(masks(model, args.density), "sparse_adamw"):
        builders = candidates(model, mask).items()
        # the ratios are to the fused one
        steps = {name: build() for name, build in builders if name == FUSED or re.search(args.optimizers, name)}
        timings = harness.interleave(steps, args.device, args.rounds)
        fused = timings[FUSED].p50
        for name, timing in timings.items():
            state = ""
            if name.startswith("saft"):
                state = f"; state {state_bytes(steps[name]) / (numel if '1.0' in name else mask.k):.1f} B per element"
            results.add(
                timing,
                roof,
                harness.sparse_adamw_bytes(mask.k),
                op="sparse_adamw",
                backend=name,
                device=harness.device_name(args.device),
                dtype="float32",
                data=data,
                numel=numel,
                num_tensors=len(named),
                k=mask.k,
                note=f"{fused / timing.p50:.2f}x torch fused{state}",
            )
    return results


# ---- on a GPU ----


def clip_vit_l_14_shapes() -> list[tuple[int, ...]]:
    """The 446 parameters of CLIP ViT-L/14, 427.6 M elements."""

    def blocks(count: int, width: int) -> list[tuple[int, ...]]:
        norm = [(width,), (width,)]
        attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
        return (norm + attention + norm + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]) * count

    image = [(1024,), (257, 1024), (1024, 3, 14, 14), (1024,), (1024,), *blocks(24, 1024), (1024,), (1024,)]
    text = [(49408, 768), (77, 768), *blocks(12, 768), (768,), (768,), (768, 768), ()]
    return [*image, (1024, 768), *text]


class PreparedStep:
    """`prepare_sparse_adamw` on uniformly chosen coordinates, or, with k None, on all."""

    def __init__(self, params: list[Tensor], k: int | None, backend: str) -> None:
        numel = sum(p.numel() for p in params)
        chosen = None if k is None else torch.randperm(numel, device="cuda")[:k].sort().values
        self.params, segments, first = [], [], 0
        for p in params:
            index = None
            if chosen is not None:
                low, high = torch.searchsorted(chosen, torch.tensor([first, first + p.numel()], device="cuda")).tolist()
                index = (chosen[low:high] - first).int()
            first += p.numel()
            like = p if index is None else index
            if like.numel():
                state = [torch.zeros(like.shape, device="cuda") for _ in range(2)]
                segments.append(AdamWSegment(p, *state, index))
                self.params.append(p)
        self.plan = prepare_sparse_adamw(segments, backend=backend)
        self.lr, self.count = torch.tensor(1e-6, device="cuda"), torch.tensor(1.0, device="cuda")

    def eager(self) -> None:
        """One step, with numbers."""
        grads = [p.grad for p in self.params if p.grad is not None]
        self.plan.step(grads, [AdamWHyper(1e-6, 0.9, 0.999, 1e-8, 1e-2, 1)])

    def capturable(self) -> None:
        """One step, with lr and step in tensors."""
        grads = [p.grad for p in self.params if p.grad is not None]
        self.plan.step(grads, [AdamWHyper(self.lr, 0.9, 0.999, 1e-8, 1e-2, self.count)])


def replay_time(step: Callable[[], object], rounds: int) -> harness.Timing:
    """Of one replay of the captured step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return harness.measure(graph.replay, "cuda", repeats=3 * rounds)


def run_cuda(args: argparse.Namespace) -> harness.Results:
    results = harness.Results(args.name, args.output)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in clip_vit_l_14_shapes()]
    grads = [[torch.randn_like(p) for p in params] for _ in range(2)]
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g
    numel = sum(p.numel() for p in params)
    k = round(args.density * numel)
    roof = harness.read_roof(grads[0])
    backends = [
        b for b in ("cuda", "triton") if not saft_kernels.ops.why_unavailable(b, "prepare_sparse_adamw", "cuda")
    ]
    sets = itertools.cycle(grads)

    def move_grads() -> None:
        for p, g in zip(params, next(sets), strict=True):
            p.grad = g

    cases: list[tuple[str, str, int, Callable[[], Callable[[], object]]]] = []
    for backend in backends:
        for name, chosen in (("saft_kernels", k), ("saft_kernels whole", None)):
            for kind in ("eager", "graph"):
                attribute = "eager" if kind == "eager" else "capturable"
                cases.append(
                    (
                        f"{name} {backend}",
                        kind,
                        k if chosen else numel,
                        lambda chosen=chosen, backend=backend, attribute=attribute: getattr(
                            PreparedStep(params, chosen, backend), attribute
                        ),
                    )
                )
    cases += [
        ("saft_kernels.SparseAdamW", "eager", k, lambda: saft_kernels.SparseAdamW(params, k=k).step),
        ("torch.AdamW fused", "eager", numel, lambda: torch.optim.AdamW(params, lr=1e-6, fused=True).step),
        ("torch.AdamW foreach", "eager", numel, lambda: torch.optim.AdamW(params, lr=1e-6, foreach=True).step),
        (
            "torch.AdamW fused",
            "graph",
            numel,
            lambda: torch.optim.AdamW(params, lr=torch.tensor(1e-6, device="cuda"), fused=True, capturable=True).step,
        ),
    ]
    for name, kind, count, build in harness.progress(cases, "sparse_adamw"):

        def timed(build: Callable[[], Callable[[], object]] = build, kind: str = kind) -> harness.Timing:
            step = build()
            if kind == "graph":
                return replay_time(step, args.rounds)
            return harness.measure(step, "cuda", repeats=3 * args.rounds, warmup=4, setup=move_grads)

        results.add(
            harness.Timing.attempt(timed),  # whose state is gone before the next one's is made
            roof,
            harness.sparse_adamw_bytes(count, line=32) if count == k else 28 * count,
            op="sparse_adamw",
            backend=name,
            device=harness.device_name("cuda"),
            dtype="float32",
            data=kind,
            numel=numel,
            num_tensors=len(params),
            k=count,
        )
    return results


def state_bytes(step: Callable[[], object]) -> int:
    """Storage behind the optimizer's state, each once."""
    optimizer = step.__self__  # type: ignore[attr-defined]
    storages = {}
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def report(results: harness.Results) -> None:
    harness.table(
        ["data", "optimizer", "k", "ms p20", "ms p50", "ms p80", "ms wall", "note"],
        (
            (row.data, row.backend, f"{row.k:,}", *harness.times(row, 3), harness.wall(row, 3), row.note)
            for row in results.rows
        ),
        title=f"optimizer.step(), {results.rows[0].numel:,} parameters in {results.rows[0].num_tensors} tensors, "
        f"{results.rows[0].device}",
    )


def draw(plt: Any, results: harness.Results) -> Any:
    """Step time per optimizer, points on a logarithmic axis."""
    rows = [row for row in results.rows if row.data in ("clip", "graph")]
    labels, values = [row.backend for row in rows], [f"{row.p50_ms:.2f} ms" for row in rows]
    row = rows[0]
    model, mask = (
        (results.subject, ", the mask of a gradient") if row.data == "clip" else ("CLIP ViT-L/14's shapes", "")
    )
    k = min(r.k for r in rows)
    title = f"optimizer.step(), {model}: N = {row.numel:,}, density {k / row.numel:.2g}{mask}\n{row.device}"
    return harness.bars(plt, labels, rows, values, title=title, xscale="log")


def main() -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip model name (default ViT-B-16)")
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument(
        "--optimizers", default="", metavar="REGEX", help="on a CPU, those to time beside torch's fused"
    )
    parser.add_argument("--rounds", type=int, default=7)
    harness.main(parser, "sparse_adamw", run, report, draw)


if __name__ == "__main__":
    main()
