"""Words and numbers the way every report shows them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable

ANSWER_LIMIT = 400
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def clean(text: object) -> str:
    """Make foreign text harmless for terminals and files; what it says stays readable.

    Control characters (terminal escapes, null bytes) and lone surrogates, which cannot be encoded,
    become the replacement character. Line breaks and tabs stay.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cs"}
        else _REPLACEMENT
        for character in str(text).replace("\r\n", "\n").replace("\r", "\n")
    )


def one_line(text: object) -> str:
    """Return `clean(text)` with every run of white space as one space."""
    return " ".join(clean(text).split())


def short_name(text: object, limit: int = 32) -> str:
    """Return one line that is short enough to name a row of a figure."""
    line = one_line(text)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def shorten(text: str, limit: int = ANSWER_LIMIT) -> tuple[str, int | None]:
    """Cut text that is too long to show.

    Returns:
        What to show, and the full length if something was cut off, else None.
    """
    if len(text) <= limit:
        return text, None
    return text[:limit], len(text)


def percent(fraction: float | None) -> str:
    """Format a score between 0 and 1 as a percentage, without the sign: `0.4231` is `42.3`."""
    return _number(fraction, 100.0, "")


def points(fraction: float | None) -> str:
    """Format a difference of scores in percentage points, signed: `0.034` is `+3.4`."""
    return _number(fraction, 100.0, "+")


def interval(low: float | None, high: float | None) -> str:
    """Format an interval in percentage points: `[1.2, 5.6]`."""
    return f"[{_number(low, 100.0, '')}, {_number(high, 100.0, '')}]"


def plain(value: float | None, sign: str = "") -> str:
    """Format a number that is no share of anything, with one decimal: `1,481.2`."""
    return "n/a" if value is None else f"{value:{sign},.1f}"


def p_value(value: float | None) -> str:
    """Format a p-value with three decimals, the smallest as `<0.001`."""
    if value is None or math.isnan(value):
        return "n/a"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(number: int | None) -> str:
    """Format a count with thousands separators."""
    return "n/a" if number is None else f"{number:,}"


def plural(number: int, singular: str, many: str | None = None) -> str:
    """Return `1 column`, `2 columns`."""
    return f"{number} {singular if number == 1 else many or singular + 's'}"


def grouped(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """Say every remark once, as `name: remark` or, of several, as `Remark (name, name).`, in order.

    Args:
        remarks: Pairs of what a remark is about, and the remark.
    """
    names: dict[str, list[str]] = {}
    for name, remark in remarks:
        names.setdefault(remark, []).append(name)
    return [
        f"{remark[:1].upper()}{remark[1:].rstrip('.')} ({', '.join(about)})."
        if len(about) > 1
        else f"{about[0]}: {remark}"
        for remark, about in names.items()
    ]


def value_text(value: object) -> str:
    """Format a value of unknown type for a key-value list."""
    if value is None or isinstance(value, bool):
        return {None: "n/a", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{clean(key)}: {value_text(item)}" for key, item in value.items())
    if isinstance(value, int) and abs(value) >= 10_000:
        # Seeds and years look wrong with separators, so only what is long gets them.
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else clean(value)


def _number(value: float | None, scale: float, sign: str) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    # Adding zero turns the "-0.0" that rounding leaves behind into "0.0".
    rounded = round(value * scale, 1) + 0.0
    return f"{rounded:{sign}.1f}"
