"""Imports run one way: no folder imports one that stands above it, and `ops` is private to itself."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "saft_kernels"
# from the ground up; a wing may import those before it
WINGS = ("_version", "_C", "common", "ops", "mask", "selection", "optim", "layers", "delta", "integrations", "cli")
ABOVE_ALL = ("__init__", "__main__")
OPEN_OPS = ("saft_kernels.ops", "saft_kernels.ops.dtypes", "saft_kernels.ops.adamw")


def wing(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def arrows() -> list[tuple[str, str]]:
    """Importing and imported module, by full name, of every import within the package, wherever in a file it stands."""
    modules = {
        ".".join(("saft_kernels", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in sorted(ROOT.rglob("*.py"))
    }
    found = []
    for module, path in modules.items():
        package = module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                target = ".".join(filter(None, (base, node.module)))
                for name in node.names:
                    full = f"{target}.{name.name}"
                    is_module = full in modules or f"{full}.__init__" in modules or name.name == "_C"
                    found.append((module, full if is_module else target))
            elif isinstance(node, ast.Import):
                found += [(module, name.name) for name in node.names]
    return [(importer, imported) for importer, imported in found if imported.split(".")[0] == "saft_kernels"]


def test_every_folder_is_a_wing() -> None:
    assert {wing(importer) for importer, _ in arrows()} <= {*WINGS, *ABOVE_ALL}


def test_imports_run_one_way() -> None:
    up = [
        f"{importer} -> {imported}"
        for importer, imported in arrows()
        if wing(importer) in WINGS and WINGS.index(wing(importer)) < WINGS.index(wing(imported))
    ]
    assert up == []


def test_ops_are_private() -> None:
    inside = [
        f"{importer} -> {imported}"
        for importer, imported in arrows()
        if wing(imported) == "ops" and wing(importer) != "ops" and imported not in OPEN_OPS
    ]
    assert inside == []


def test_no_circle() -> None:
    """Within a folder, too; TYPE_CHECKING hides none, for its imports count."""
    targets: dict[str, set[str]] = {}
    for importer, imported in arrows():
        if not importer.endswith("__init__"):  # a folder's front door imports what is behind it
            targets.setdefault(importer, set()).add(imported)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in targets.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in targets:
        visit(module, ())


def test_backends_do_not_import_each_other() -> None:
    """All may take from the reference, which is the definition."""
    backends = {"cpu", "cuda", "triton"}
    pairs = [(a.split(".")[2:3], b.split(".")[2:3]) for a, b in arrows() if wing(a) == wing(b) == "ops"]
    assert [(a, b) for a, b in pairs if a != b and {*a} <= backends and {*b} & backends and a and b] == []
