"""The pages of the documentation, as the tests read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in _FILES)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


class Block(NamedTuple):
    """What stands between two fences, and the line before it."""

    language: str
    source: str
    line: int


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[Block]:
    """Those of a language; "" for blocks that name none, which hold commands."""
    text = read(page)
    found = [Block(match[1], match[2], text.count("\n", 0, match.start(2))) for match in _FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def spans(page: str) -> Iterator[str]:
    """Code within the text, on one line each."""
    for match in _SPAN.finditer(_FENCE.sub("", read(page))):
        yield " ".join(match[1].split())


def patched(block: Block) -> tuple[str, str]:
    """What a diff makes something of, and what it makes."""
    lines = block.source.splitlines()
    before, after = ([line[1:] for line in lines if line[:1] in ("", " ", sign)] for sign in "-+")
    return "\n".join(before), "\n".join(after)
