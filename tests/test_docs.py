"""Every Python block of README and docs runs; diffs, names, links and numbers are those of the code and its rows."""

from __future__ import annotations

import ast
import copy
import csv
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from pages import PAGES, ROOT
from test_arrows import WINGS
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict

import saft_kernels
from saft_kernels.integrations import select_into
from saft_kernels.integrations.transformers import SelectionCallback

NEEDS_GPU = ("docs/cuda_graphs.md",)
FILE = re.compile(r"([\w./<>]+(?:\.py|\.cpp|\.cu|\.h|/))(?:: ([\w.]+))?")
ARGUMENT = re.compile(r"([a-z_]+)=(?!=)")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")

# ---- what a block finds in place of the reader's own ----


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def common() -> dict[str, Any]:
    torch.manual_seed(1)
    batches = [(torch.randn(6, 8), torch.randint(4, (6,))) for _ in range(4)]
    model = network()
    mask = saft_kernels.select(model, batches, loss_fn, density=0.1, progress=False)
    model.zero_grad()
    modules = {"torch": torch, "saft_kernels": saft_kernels}
    yours = {"model": model, "batches": batches, "my_share_of_the_data": batches, "loss_fn": loss_fn, "rank": 0}
    return {**modules, **yours, "mask": mask}


def trained(model: nn.Module, batches: Any) -> nn.Module:
    tuned = copy.deepcopy(model)
    optimizer = saft_kernels.SparseAdamW(tuned.named_parameters(), density=0.1)
    loss_fn(tuned, batches[0]).backward()
    optimizer.step()
    return tuned


def of_delta() -> dict[str, Any]:
    names = common()
    base = names["model"]
    tuned, other = trained(base, names["batches"]), trained(base, names["batches"][1:])
    cars, birds = (saft_kernels.SparseDelta.diff(base, model) for model in (tuned, other))
    birds.save("other.safetensors")
    masks = {name: (torch.rand(p.shape) < 0.1).float() for name, p in base.named_parameters()}
    torch.save({f"module.{name}": mask for name, mask in masks.items()}, "with_0.5.pt")
    deltas = {"SparseDelta": saft_kernels.SparseDelta, "delta": cars, "cars": cars, "birds": birds}
    return {**names, **deltas, "base": base, "tuned": tuned, "evaluate": lambda model: 0.5}


def of_distributed() -> dict[str, Any]:
    names = common()
    optimizer = saft_kernels.SparseAdamW(names["model"].named_parameters(), mask=names["mask"])
    return {**names, "optimizer": optimizer, "dcp": checkpoint, "folder": "checkpoint", **vars(state_dict)}


def of_start() -> dict[str, Any]:
    names = common()
    images, labels = names["batches"][0]
    return {**names, "images": images, "labels": labels}


def of_questions() -> dict[str, Any]:
    names = common()
    optimizer = saft_kernels.SparseAdamW(names["model"].named_parameters(), mask=names["mask"])
    return {**names, "optimizer": optimizer}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/delta.md": of_delta,
    "docs/files.md": of_delta,
    "docs/distributed.md": of_distributed,
    "docs/questions.md": of_questions,
    "docs/start.md": of_start,
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("one_rank")
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = [compile("\n" * block.line + block.source, page, "exec") for block in pages.blocks(page, "python")]
    if page in NEEDS_GPU and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    for block in code:
        exec(block, NAMES.get(page, common)())


# ---- names and arguments ----


class Names(ast.NodeVisitor):
    """Looks up what code says of saft_kernels: its names, and the arguments of its calls.

    Args:
        strict: Whether calls have to be complete.
    """

    def __init__(self, *, strict: bool) -> None:
        names = common()
        optimizer = saft_kernels.SparseAdamW(names["model"].named_parameters(), mask=names["mask"])
        delta = saft_kernels.SparseDelta.diff(names["model"], names["model"])
        public = {name: getattr(saft_kernels, name) for name in saft_kernels.__all__}
        ours = {"optimizer": optimizer, "mask": names["mask"], "delta": delta, "saft_kernels": saft_kernels}
        self.known: dict[str, Any] = {**public, **ours}
        self.strict = strict
        self.found: list[str] = []  # of which something was checked

    def value(self, node: ast.AST) -> Any:
        """What a name or an attribute of one stands for; None where that is not ours to know."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if not isinstance(node, ast.Attribute) or (owner := self.value(node.value)) is None:
            return None
        self.found.append(ast.unparse(node))
        assert hasattr(owner, node.attr), f"{ast.unparse(node)}: there is no {node.attr}"
        return getattr(owner, node.attr)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if str(node.module).split(".")[0] == "saft_kernels":
            module = importlib.import_module(str(node.module))
            self.known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
            self.found += [alias.name for alias in node.names]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.value(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
        if callable(function := self.value(node.func)):
            self.found.append(ast.unparse(node.func))
            signature = inspect.signature(function)
            is_open = len(keywords) < len(node.keywords) or any(isinstance(arg, ast.Starred) for arg in node.args)
            bind = signature.bind if self.strict and not is_open else signature.bind_partial
            try:
                bind(*(arg for arg in node.args if not isinstance(arg, ast.Starred)), **keywords)
            except TypeError as error:
                raise AssertionError(f"{ast.unparse(node)}: {error}") from error
        elif any(isinstance(arg, ast.Constant) and arg.value == "sparseadamw" for arg in node.args):
            self.check_keywords(saft_kernels.SparseAdamW, keywords)
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        """The Trainer takes (class, its keywords)."""
        if len(node.elts) == 2 and isinstance(node.elts[1], ast.Dict) and callable(self.value(node.elts[0])):
            keys = [key.value for key in node.elts[1].keys if isinstance(key, ast.Constant)]
            self.check_keywords(self.value(node.elts[0]), dict.fromkeys(map(str, keys)))
        self.generic_visit(node)

    def check_keywords(self, function: Callable[..., Any], keywords: dict[str, None]) -> None:
        unknown = keywords.keys() - inspect.signature(function).parameters.keys()
        assert not unknown, f"{function.__name__} has no {', '.join(unknown)}"


def arguments() -> set[str]:
    """What the public functions and methods take."""
    public = [getattr(saft_kernels, name) for name in saft_kernels.__all__ if name != "__version__"]
    functions = [select_into, SelectionCallback, *public]
    for cls in filter(inspect.isclass, public):
        functions += [getattr(cls, name) for name in vars(cls) if not name.startswith("_")]
    return {name for function in functions if callable(function) for name in inspect.signature(function).parameters}


def is_command(code: str) -> bool:
    return re.match(r"(python|torchrun|saft-kernels|pip|make) ", code) is not None


@pytest.mark.parametrize("page", PAGES)
def test_diffs_are_of_this_package(page: str) -> None:
    """Before and after they are Python, and what they add is there, with the arguments that it takes."""
    scripts = [pages.patched(block) for block in pages.blocks(page, "diff")]
    if page in NEEDS_GPU:
        scripts += [("", block.source) for block in pages.blocks(page, "python")]
    for before, after in scripts:
        if is_command(after):
            continue  # test_docs_commands.py
        ast.parse(before)
        names = Names(strict=True)
        names.visit(ast.parse(after))
        assert names.found, f"nothing of saft_kernels in {after}"


# of arguments
OF_TORCH = {"error_if_nonfinite", "fullgraph", "set_to_none", "weights_only"}
OF_TRANSFORMERS = {"fsdp", "optimizer_cls_and_kwargs", "optimizers"}


@pytest.mark.parametrize("page", PAGES)
def test_code_within_the_text_is_of_this_package(page: str) -> None:
    for span in pages.spans(page):
        if FILE.fullmatch(span):
            continue
        if match := ARGUMENT.match(span):
            assert match[1] in arguments() | OF_TORCH | OF_TRANSFORMERS, f"{span}: an argument of what?"
        try:
            tree = ast.parse(span)
        except SyntaxError:
            continue
        Names(strict=False).visit(tree)


# ---- a map of the code ----

# of which a path is written short; `<op>` is any of them
ROOTS = ("", "saft_kernels", "csrc/sparse_adamw", "tests", "bench")
WORDS = {"saft-kernels", "saft_kernels._C", "__init__", ".grad", *WINGS, "ops.dtypes", "ops.adamw"}


def defined(path: Path, name: str) -> bool:
    """Whether a file defines it: `function`, `Class.method`, a constant; in C++, whether it says the word."""
    if path.suffix != ".py":
        return re.search(rf"\b{name}\b", path.read_text()) is not None
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        named: dict[str, ast.stmt] = {}
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                named[node.name] = node
            elif isinstance(node, ast.Assign):
                named |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                named[node.target.id] = node
        if part not in named:
            return False
        body = getattr(named[part], "body", [])
    return True


def test_the_map_of_the_code_is_of_this_code() -> None:
    """Every file and function that it names is there, and it names every wing."""
    walked: list[str] = []
    for span in pages.spans("docs/code_map.md"):
        if match := FILE.fullmatch(span):
            places = [found for root in ROOTS for found in (ROOT / root).glob(match[1].replace("<op>", "*"))]
            assert places, span
            if match[2]:
                assert defined(places[0], match[2]), span
                walked += match[2].split(".")
        elif span not in {*WORDS, *walked} and not ARGUMENT.match(span):
            names = Names(strict=False)
            names.visit(ast.parse(span))
            assert names.found or span in names.known, f"{span}: neither a file, nor a public name"
    assert len(set(walked)) > 20
    graph = pages.blocks("docs/code_map.md", "text")[0].source
    assert set(WINGS) - {"_version"} == set(re.findall(r"\w+", graph)) & set(WINGS)


# ---- numbers ----


def rows_of(name: str) -> list[dict[str, str]]:
    with open(ROOT / "bench/results" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_benchmarks_say_where_their_rows_are_from() -> None:
    """The line above a table names files of bench/results, the commit and hardware that are in these."""
    text = pages.read("docs/benchmarks.md")
    tables = re.findall(r"^Rows: .*\n\n\|", text, re.MULTILINE)
    assert len(tables) > 7
    for line in re.findall(r"^Rows: .*$", text, re.MULTILINE):
        files = re.findall(r"\[(\w+\.csv)\]", line)
        commit = re.search(r"commit (\w+\+?)", line)
        assert files, line
        assert commit is not None, line
        for file in files:
            rows = rows_of(file)
            assert {row["commit"] for row in rows} == {commit[1]}, file
            if "device" in rows[0]:
                assert {row["device"] in line for row in rows} == {True}, file
                assert {f"torch {row['torch'].split('+')[0]}" in line for row in rows} == {True}, file


def test_the_picture_of_the_overview_is_of_rows() -> None:
    drawn = re.findall(r">(?:the weights: )?([\d,]+)<", pages.read("docs/pictures/peak.svg"))
    rows = [row for row in rows_of("memory_cpu.csv") if row["model"] == "CLIP ViT-B/32"]
    measured = {f"{float(row[column]):,.0f}" for row in rows for column in ("peak_mib", "weights_mib")}
    assert len(drawn) == 7
    assert set(drawn) <= measured


# ---- links ----


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Files are there, and headings of pages."""
    for file, anchor in LINK.findall(pages.read(page)):
        if "://" in file:
            continue
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in {slug(heading) for heading in headings}, file + anchor


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
