"""Reports as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import itertools
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

import kuea_mllm
from kuea_mllm.io import write_text
from kuea_mllm.reporting.blocks import Block, Box, Example, Flips, Report, Section
from kuea_mllm.reporting.dark import adapt_to_dark
from kuea_mllm.reporting.pages import quickstart_report
from kuea_mllm.reporting.text import clean, shorten

TINY_PIXELS = 128


@dataclass(frozen=True)
class Picture:
    """An image as HTML needs it.

    Args:
        uri: The image itself, as a data URI.
        width: Width in pixels, if known.
        height: Height in pixels, if known.
        is_drawing: Whether it is an SVG.
    """

    uri: str
    width: int | None = None
    height: int | None = None
    is_drawing: bool = False

    @property
    def is_tiny(self) -> bool:
        """Whether it must be enlarged to be seen, with its pixels kept sharp."""
        return self.width is not None and self.width <= TINY_PIXELS


@dataclass(frozen=True)
class Mark:
    """Whether an answer was right, in a word, a symbol and a colour."""

    word: str
    symbol: str
    tone: str


def write_quickstart_report(
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    summary: Sequence[Block] = (),
    sections: Sequence[Section],
    provenance: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a report that is put together from sections, with where it came from at its end."""
    report = quickstart_report(
        title=title, subtitle=subtitle, summary=summary, sections=sections, provenance=provenance
    )
    write_report(path, report)


def write_report(path: Path, report: Report) -> None:
    """Write a report; a report that cannot be finished leaves no file behind.

    Raises:
        EnvironmentFailure: If the disk is full.
    """
    text = render_html(report)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def render_html(report: Report) -> str:
    """Render a report as one HTML document; equal reports give equal documents."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kuea_mllm.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        clean=clean,
        commands=_mark_commands,
        breakable=_breakable,
        shorten=shorten,
        picture=make_picture,
        mark=make_mark,
        kind=_kind,
        overlap=_overlap_text,
    )
    numbers = itertools.count(1)
    return environment.get_template("report.html").render(
        report=report,
        version=kuea_mllm.__version__,
        next_id=lambda: f"table-{next(numbers)}",
        flip_columns=_count_flip_columns(report.sections),
    )


def make_picture(image: str | bytes) -> Picture:
    """Turn SVG text, a PNG or a JPEG into a picture.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(image, str):
        if "<svg" not in image[:2000]:
            raise ValueError("the text of a figure is not SVG.")
        return Picture(_data_uri("image/svg+xml", adapt_to_dark(image).encode()), is_drawing=True)
    if image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) >= 24:
        width, height = struct.unpack(">II", image[16:24])
        return Picture(_data_uri("image/png", image), width, height)
    if image.startswith(b"\xff\xd8\xff"):
        return Picture(_data_uri("image/jpeg", image))
    raise ValueError("an image is neither SVG nor PNG nor JPEG.")


def make_mark(score: float | None, note: str = "") -> Mark:
    """Judge an answer by its score; None means that there was no answer to judge.

    Args:
        score: From 0 to 1.
        note: What to say instead, where the score is no share of what is right.
    """
    if note:
        return Mark(note, "", "unclear")
    if score is None:
        return Mark("not scored", "–", "unclear")  # noqa: RUF001 - a dash, meant as one
    if score >= 1:
        return Mark("right", "✓", "better")
    if score <= 0:
        return Mark("wrong", "✗", "worse")
    return Mark(f"partly right ({score:.2f})", "◐", "unclear")


def _mark_commands(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # one backtick too many: shown as they are
        return Markup("`").join(parts)
    marked = [Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)]
    return Markup("").join(marked)


def _breakable(html: Markup) -> Markup:
    """Let names in a table break behind their underscores, where there is too little room."""
    return Markup(re.sub(r"(?<=\w)_(?=\w)", "_<wbr>", html))  # noqa: S704 - escaped before


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _kind(block: Block) -> str:
    return type(block).__name__


def _overlap_text(box: Box, example: Example) -> str:
    """Say how well a box fits the expected one, where both are there."""
    target = next((other for other in example.boxes if other.role == "expected"), None)
    if target is None or box.role == "expected":
        return ""
    return f"IoU {_overlap(box.corners, target.corners):.2f}"


def _overlap(first: Sequence[float], second: Sequence[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (first, second)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


def _count_flip_columns(sections: Sequence[Section]) -> int:
    """Return the most columns that a gallery of flipped questions has, for the filter's rules."""
    found = [len(b.columns) for s in sections for b in s.blocks if isinstance(b, Flips)]
    found += [_count_flip_columns(section.sections) for section in sections]
    return max(found, default=0)
