"""Pages as the tests look at them."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "rect", "wbr"}


class Page(HTMLParser):
    """Everything the tests ask about a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self.inputs_without_label = 0
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "input" and "label" not in self._open:
            self.inputs_without_label += 1
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def require_accessible(page: Page) -> None:
    """Check what can be checked without a browser."""
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(image.get("alt") for image in page.all("img"))
    assert all(drawing.get("aria-hidden") == "true" for drawing in page.all("svg"))
    assert all(cell.get("scope") in {"col", "row"} for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(len(row) > 1 and row[0].strip() for row in page.cells)
    assert page.inputs_without_label == 0
    assert len(page.all("legend")) == len(page.all("fieldset"))
    assert len(page.all("summary")) == len(page.all("details"))
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {str(a["aria-labelledby"]) for _, a in page.tags if "aria-labelledby" in a}
    links = {str(link["href"]).removeprefix("#") for link in page.all("a")}
    assert "main" in links
    assert named | links <= set(ids)
    # What scrolls by itself can be scrolled by keyboard.
    scrolled = [a for _, a in page.tags if "scroll" in str(a.get("class")).split()]
    assert all(a.get("tabindex") == "0" and a.get("role") == "region" for a in scrolled)


def require_self_contained(text: str, page: Page) -> None:
    """Check that a page loads nothing and runs nothing."""
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "form", "base"}
    assert all(str(image["src"]).startswith("data:image/") for image in page.all("img"))
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert "url(" not in text and "@import" not in text
