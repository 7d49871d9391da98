"""The documents: what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "web" / "docs").glob("*.md"),
    ]
)
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(<?([^)\s>]+)|\b(?:src|href)=\"([^\"]+)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)


def links(text: str) -> list[str]:
    """Relative ones, without the place in the page."""
    found = ["".join(match) for match in _LINK.findall(_CODE.sub("", text))]
    return [unquote(re.split(r"[#?]", link)[0]) for link in found if not _ELSEWHERE.match(link)]


def test_links_are_found() -> None:
    text = '[a](b.md#c) ![d](<e/f.png>) [g](https://h/i.md) [j](#k) `[l](m)` <img src="n.png">\n```\n[o](p)\n```\n[q](r%20s.md)'
    assert links(text) == ["b.md", "e/f.png", "n.png", "r s.md"]
    assert links((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(page: Path) -> None:
    missing = [link for link in links(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing
