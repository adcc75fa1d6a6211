"""Write the pages of the site to build/docs: those of docs/, and those that lie elsewhere, with the links between them.

    python docs/stage.py

The pages are written to be read in the repository, where a page outside docs/ has another address than on the site. A link to a
file that the site does not have leads to the repository, or is left as text where pyproject.toml has no address of it.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "docs"
OUTSIDE = {
    "README.md": "index.md",
    "examples/tiny/README.md": "tiny.md",
    "examples/smollm2/README.md": "smollm2.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""File in the repository -> its name on the site."""
LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Write everything anew."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", OUTPUT / "images")
    inside = {f"docs/{path.relative_to(ROOT / 'docs')}": path.relative_to(ROOT / "docs") for path in docs()}
    pages = {source: str(name) for source, name in inside.items()} | OUTSIDE
    address = repository()
    for source, name in pages.items():
        target = OUTPUT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(on_site((ROOT / source).read_text(encoding="utf-8"), source, pages, address), encoding="utf-8")


def docs() -> list[Path]:
    """The pages of docs/."""
    return sorted((ROOT / "docs").rglob("*.md"))


def repository() -> str | None:
    """The repository's address, where pyproject.toml has it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    return urls.get("Repository") or urls.get("Source")


def on_site(text: str, source: str, pages: dict[str, str], address: str | None) -> str:
    """A page with its links as they are on the site.

    Args:
        source: its file in the repository; links are relative to it.
        pages: file in the repository -> name on the site.
        address: of the repository.
    """

    def replaced(match: re.Match[str]) -> str:
        words, anchor = match[1], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        name = pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/images/") else None)
        if name is not None:
            return f"[{words}]({posixpath.relpath(name, posixpath.dirname(pages[source]) or '.')}{anchor})"
        return f"[{words}]({address.rstrip('/')}/blob/main/{target})" if address else words

    return LINK.sub(replaced, text)


if __name__ == "__main__":
    main()
