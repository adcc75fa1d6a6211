"""The pages' links work: every relative link and anchor exists, and the site has every page.

`make docs` builds the site; these tests do not need its generator.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/tiny/README.md", "examples/smollm2/README.md")
"""Pages that the site takes from outside docs/ (`docs/stage.py`)."""
PAGES = [ROOT / name for name in OUTSIDE] + sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
BLOCK = re.compile(r"\s*(?:[-*] |\d+\. |\|)")
"""A line of a list or a table."""


@cache
def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-"))
    return found


def is_documented(page: Path, name: str) -> bool:
    """Whether the API reference has a module or class. It is generated (`::: MODULE`), with the full name as the anchor."""
    modules = re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    module, _, member = name.rpartition(".")
    if name in modules or module not in modules:
        return name in modules
    path = ROOT / module.replace(".", "/")
    source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    return re.search(rf"^(?:class|def) {member}\b", source.read_text(encoding="utf-8"), flags=re.MULTILINE) is not None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in LINK.findall(prose(page)):
        path = (page.parent / target).resolve() if target else page
        exists = path.exists() and path.is_relative_to(ROOT)
        if not exists or (anchor and anchor not in anchors(path) and not is_documented(path, anchor)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lists_and_tables_stand_apart(page: Path) -> None:
    """The site's Markdown recognises a list or a table only after an empty line."""
    lines = [""]
    glued = []
    for line in prose(page).splitlines():
        starts = BLOCK.match(line) is not None and not line.startswith("    ")
        before = lines[-1]
        if starts and before.strip() and not BLOCK.match(before) and not before.startswith(("#", " ")):
            glued.append(line)
        lines.append(line)
    assert glued == []


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = re.findall(r": (\S+\.md)$", navigation, flags=re.MULTILINE)
    staged = (ROOT / "docs" / "stage.py").read_text(encoding="utf-8")
    outside = dict(re.findall(r'"(\S+\.md)": "(\S+\.md)"', staged))
    assert sorted(outside) == sorted(OUTSIDE)
    inside = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(named) == sorted([*inside, *outside.values()])
