"""The site is made of the files that a clone has: README and its sisters become pages, examples and rows go along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
ALONG = ("examples/*.py", "bench/*.py", "bench/results/*.csv", "bench/results/**/*.json*", "bench/results/*.png")
LINK = re.compile(r"(\]\()((?!\w+:)[^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds what lies outside of docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_relinked((ROOT / name).read_text(), ROOT)))
    for pattern in ALONG:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links of pages in docs/."""
    return markdown if page.file.src_uri in PAGES.values() else _relinked(markdown, ROOT / "docs")


def _relinked(markdown: str, folder: Path) -> str:
    """Links to files of the clone, from `folder`, as links from the site's root."""

    def relinked(link: re.Match[str]) -> str:
        name = (folder / link[2]).resolve().relative_to(ROOT).as_posix()
        return link[1] + PAGES.get(name, name.removeprefix("docs/"))

    return LINK.sub(relinked, markdown)
