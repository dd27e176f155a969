"""Colours of pages and figures, in light and dark, against the contrast rules of WCAG 2."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from kuea_mllm.reporting.dark import COLOURS, adapt_to_dark
from kuea_mllm.reporting.drawing import figure_svg
from kuea_mllm.reporting.html import make_picture
from kuea_mllm.reporting.score_figures import Series, score_bars

STYLE = (files("kuea_mllm.reporting") / "templates" / "style.html").read_text(encoding="utf-8")
_ROOTS = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
LIGHT, DARK = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in _ROOTS)
TEXTS = [
    *[(text, back) for text in ("text", "soft", "link") for back in ("back", "panel")],
    ("better", "better-back"),
    ("worse", "worse-back"),
    ("text", "warn-back"),
    ("better", "back"),
    ("worse", "back"),
]


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_formula_gives_known_values() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("text", "back"), TEXTS)
def test_text_can_be_read(palette: dict[str, str], text: str, back: str) -> None:
    colours = {**LIGHT, **palette}
    assert contrast(colours[text], colours[back]) >= 4.5


def test_dark_palette_names_every_colour() -> None:
    assert DARK.keys() == LIGHT.keys()
    assert DARK["back"] != LIGHT["back"]


@pytest.mark.parametrize(
    "colour", ["#000000", "#0072b2", "#d55e00", "#009e73", "#aa4499", "#595959"]
)
def test_lines_of_figures_can_be_seen_in_both(colour: str) -> None:
    assert contrast(colour, LIGHT["back"]) >= 3
    assert contrast(COLOURS[colour], DARK["back"]) >= 3


def test_paper_of_figures_is_the_page() -> None:
    assert (COLOURS["#ffffff"], LIGHT["back"]) == (DARK["back"], "#ffffff")


def test_figure_follows_the_choice_of_the_reader() -> None:
    svg = '<svg><path style="fill: #FFFFFF; stroke: #0072b2"/><path style="fill: #123456"/></svg>'
    adapted = adapt_to_dark(svg)
    assert "prefers-color-scheme:dark" in adapted
    assert "fill: var(--c0); stroke: var(--c2)" in adapted
    assert "fill: #123456" in adapted
    assert adapt_to_dark("no figure") == "no figure"


def test_figures_of_pages_are_adapted() -> None:
    plain = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    assert len(make_picture(plain).uri) > len(plain) * 2


def test_hatched_bars_follow_the_page_too() -> None:
    figure = score_bars(["a"], [Series(str(number), [50.0]) for number in range(5)])
    svg = figure_svg(figure, "bars")
    assert 'fill="#d55e00"' in svg
    adapted = adapt_to_dark(svg)
    assert 'fill="#' not in adapted
    for colour in ("#d55e00", "#009e73", "#aa4499"):
        assert f'style="fill: var(--c{list(COLOURS).index(colour)})"' in adapted
