"""Figures for light and dark pages.

A figure is drawn once, on white. In a page its colours become names with two values each, of which
the reader's setting chooses one. In dark pages the hues stay and only the lightness changes, so a
caption that names a colour holds for both.
"""

from __future__ import annotations

import re

# Colour as drawn, and in dark pages. Those of lines are checked for contrast in the tests.
COLOURS = {
    "#ffffff": "#15181b",
    "#000000": "#e7eaed",
    "#0072b2": "#56b4e9",
    "#d55e00": "#ff9a5c",
    "#009e73": "#35c99b",
    "#aa4499": "#e08fd0",
    "#595959": "#a9b1b9",
    "#dddddd": "#3a4148",
    "#e3e3e3": "#343b42",
    "#cccccc": "#4a525a",
}
_NAMES = {colour: f"--c{index}" for index, colour in enumerate(COLOURS)}
_USE = re.compile(r"\b(fill|stroke|stop-color): (#[0-9a-fA-F]{6})\b")

_ATTRIBUTE = re.compile(r' fill="(#[0-9a-fA-F]{6})"')


def adapt_to_dark(svg: str) -> str:
    """Let the colours of an SVG follow the reader's choice of light or dark."""
    start = re.search(r"<svg\b[^>]*>", svg)
    if start is None:
        return svg
    light = ";".join(f"{_NAMES[colour]}:{colour}" for colour in COLOURS)
    dark = ";".join(f"{_NAMES[colour]}:{other}" for colour, other in COLOURS.items())
    style = (
        f"<style>:root{{{light};fill:var(--c1)}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    )
    # Hatched areas have the colour below their lines as an attribute.
    body = _ATTRIBUTE.sub(r' style="fill: \1"', svg[start.end() :])
    body = _USE.sub(_by_name, body)
    return f"{svg[: start.end()]}{style}{body}"


def _by_name(found: re.Match[str]) -> str:
    name = _NAMES.get(found[2].lower())
    # A colour that is not known, such as one of a heat map, stays as it is.
    return found[0] if name is None else f"{found[1]}: var({name})"
