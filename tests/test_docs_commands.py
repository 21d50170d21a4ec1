"""Command lines of README and docs: scripts, options, targets and extras are there; pre-commit is what lint is."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pages
import pytest
from pages import PAGES, ROOT
from scripts import EXAMPLES
from torch.distributed.run import get_args_parser

import saft_kernels
from saft_kernels.cli import main as cli

MAKEFILE = (ROOT / "Makefile").read_text()
# not ours to know
OTHERS = ("apt", "npm", "npx", "git", "bash", ".venv/bin/pre-commit")
PLACEHOLDER = "..."


def commands(page: str) -> Iterator[str]:
    """What a reader types: lines of blocks, what a diff makes of one, and code within the text."""
    sources = [block.source for block in pages.blocks(page, "", "sh")]
    for block in pages.blocks(page, "diff"):
        after = pages.patched(block)[1]
        sources += [after] if is_ours(after) else []
    for source in sources:
        yield from source.replace("\\\n", " ").splitlines()
    yield from (span for span in pages.spans(page) if is_ours(span))


def is_ours(code: str) -> bool:
    return re.match(r"(\w+=\S+ )*(python|torchrun|saft-kernels|pip|make)( |$)", code) is not None


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    # an option may have it for a value; by itself it stands for what the reader has
    return [w for at, w in enumerate(words) if w != PLACEHOLDER or words[at - 1].startswith("--")]


# ---- what each takes ----


@functools.cache
def example(name: str) -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))  # they import each other
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def parsed(parse: Callable[[list[str]], Any], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Fails where a parser refuses."""
    try:
        return parse(arguments)
    except SystemExit as end:
        if end.code:
            raise AssertionError(capsys.readouterr().err) from None
        return None  # of --help


def check_script(script: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (ROOT / script).is_file(), f"{script}: no such file"
    if not arguments:
        return
    module = example(Path(script).stem)
    if hasattr(module, "build_parser"):
        parsed(module.build_parser().parse_args, arguments, capsys)
    elif hasattr(module, "parse_args"):
        parsed(module.parse_args, arguments, capsys)
    elif hasattr(module, "open_clip_train"):
        check_open_clip(arguments, capsys)
    else:
        raise AssertionError(f"{script} takes no arguments, got {arguments}")


def check_open_clip(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from open_clip_train.params import parse_args

    from saft_kernels.integrations.open_clip_train import _parser

    theirs = parsed(_parser().parse_known_args, arguments, capsys)[1]
    parsed(parse_args, theirs, capsys)


def check_python(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] != "-m":
        check_script(words[0], words[1:], capsys)
    elif words[1] == "saft_kernels":
        check_saft_kernels(words[2:], capsys)
    elif words[1] == "saft_kernels.integrations.open_clip_train":
        check_open_clip(words[2:], capsys)
    else:
        importlib.import_module(words[1])  # a reader's old line


def check_saft_kernels(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # a command by its name alone is one that the text speaks of
    parsed(cli._parser().parse_args, [*words, "--help"] if len(words) == 1 else words, capsys)


def check_torchrun(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = parsed(get_args_parser().parse_args, words, capsys)
    check_script(options.training_script, options.training_script_args, capsys)


def check_make(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^([a-z]+):.*##", MAKEFILE, re.MULTILINE)
    for word in words:
        name = word.split("=")[0]
        assert f"$({name})" in MAKEFILE if "=" in word else word in targets, f"make {word}: not in the Makefile"


def check_pip(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    for word in words:
        if match := re.fullmatch(r"(?:\.|saft_kernels)\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), f"{word}: pyproject.toml has {extras}"
        elif word.startswith("saft_kernels-"):
            assert word.startswith(f"saft_kernels-{saft_kernels.__version__}"), word


CHECKS: dict[str, Callable[[list[str], pytest.CaptureFixture[str]], None]] = {
    "python": check_python,
    "torchrun": check_torchrun,
    "saft-kernels": check_saft_kernels,
    "make": check_make,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", PAGES)
def test_command_lines(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
        words = words_of(command)
        if words and words[0] not in OTHERS:
            assert words[0] in CHECKS, f"{command}: of which program?"
            try:
                CHECKS[words[0]](words[1:], capsys)
            except AssertionError as error:
                raise AssertionError(f"{command}: {error}") from error


# ---- lint ----


def tools(lines: Sequence[str]) -> set[str]:
    """`ruff check`, `mypy`: the program, and what it is told to do."""
    found = (re.search(r"(?:\$\(BIN\)|\.venv/bin)/(\S+(?: [a-z]+)?)", line) for line in lines)
    return {match[1] for match in found if match is not None}


def test_pre_commit_runs_what_lint_runs() -> None:
    recipe = MAKEFILE.split("\nlint:")[1].split("\n\n")[0].splitlines()[1:]
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(recipe) == len(hooks)
    assert tools(recipe) == tools(hooks) == {"ruff check", "ruff format", "mypy", "clang-format"}


def test_the_site_fails_on_a_broken_link() -> None:
    """mkdocs counts the warnings that it logs: a quiet one is strict in name alone."""
    recipe = MAKEFILE.split("\ndocs:")[1].split("\n\n")[0]
    assert "--strict" in recipe
    assert "--quiet" not in recipe


def test_pre_commit_takes_the_sources_that_lint_takes() -> None:
    tags_from_path = pytest.importorskip("identify.identify").tags_from_path
    hooks = (ROOT / ".pre-commit-config.yaml").read_text().split("- id: ")[1:]
    types = {hook.split()[0]: set(re.findall(r"[\w+]+", hook.split("types_or:")[1].split("]")[0])) for hook in hooks}
    patterns = re.findall(r"\S+", MAKEFILE.split("CPP_FILES := $(wildcard ")[1].split(")")[0])
    for path in (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()):
        assert tags_from_path(str(path)) & types["clang-format"], path
    for path in (ROOT / "saft_kernels").rglob("*.py*"):
        if path.suffix != ".pyc":
            assert tags_from_path(str(path)) & types["ruff-check"] & types["ruff-format"] & types["mypy"], path
