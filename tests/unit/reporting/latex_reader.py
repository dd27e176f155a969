"""A strict reader of LaTeX tables: what pdflatex would stop at or set wrongly is an error here."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

# Commands that stand for text, without and with an argument.
TEXT = {
    "textbackslash": "\\",
    "textasciitilde": "~",
    "textasciicircum": "^",
    "textless": "<",
    "textgreater": ">",
    "textbar": "|",
    "textasciigrave": "`",
    "textquoteleft": "\u2018",
    "textquoteright": "\u2019",
    "textquotedblleft": "\u201c",
    "textquotedblright": "\u201d",
    "ldots": "\u2026",
    **{"ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "o": "ø", "O": "Ø"},
    **{"l": "ł", "L": "Ł", "i": "\u0131"},
}
MATH = {
    "-": "-",
    r"\pm": "±",
    r"\times": "\u00d7",
    r"\cdot": "·",
    r"\to": "→",
    r"\leq": "≤",
    r"\geq": "≥",
    r"\neq": "≠",
    r"\approx": "≈",
    r"\infty": "∞",
    r"^{\circ}": "°",
    **{
        f"\\{name}": letter
        for name, letter in zip(
            ("alpha", "beta", "gamma", "delta", "epsilon", "lambda", "mu", "rho", "sigma", "tau"),
            "\u03b1\u03b2\u03b3\u03b4\u03b5\u03bb\u03bc\u03c1\u03c3\u03c4",
            strict=True,
        )
    },
}
ACCENTS = {"`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304"}
ACCENTS |= {"u": "\u0306", ".": "\u0307", '"': "\u0308", "r": "\u030a", "H": "\u030b"}
ACCENTS |= {"v": "\u030c", "c": "\u0327"}
# What TeX joins, longest first; an empty group keeps it apart.
LIGATURES = {"---": "\u2014", "--": "\u2013", "''": '"', "``": "?", ",,": "?", "!`": "?", "?`": "?"}
RULES = ("toprule", "midrule", "bottomrule")
_TOKEN = re.compile(
    r"\\(?P<word>[A-Za-z]+) *|\\(?P<sign>[^A-Za-z])|\$(?P<math>[^$]*)\$|(?P<other>.)", re.DOTALL
)


@dataclass
class Tabular:
    """One tabular: its columns, and its lines as rules or as the cells that a reader sees."""

    columns: str
    lines: list[str | list[str]] = field(default_factory=list)

    @property
    def cells(self) -> list[list[str]]:
        return [line for line in self.lines if isinstance(line, list)]

    @property
    def rules(self) -> list[str]:
        return [line if isinstance(line, str) else "row" for line in self.lines]


def read_tables(text: str) -> tuple[list[str], list[Tabular]]:
    """Return the captions and the tabulars of some tables.

    Raises:
        AssertionError: At the first thing that would not compile or would look like another.
    """
    body = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("%"))
    assert body.isascii(), [c for c in body if not c.isascii()]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", body), "control characters"
    captions: list[str] = []
    tabulars: list[Tabular] = []
    stack: list[str] = []
    for line in map(str.strip, body.split("\n")):
        if begins := re.fullmatch(r"\\begin\{(\w+)\}(\{.*\})?", line):
            _open(begins[1], begins[2], stack, tabulars)
        elif ends := re.fullmatch(r"\\end\{(\w+)\}", line):
            assert stack.pop() == ends[1]
        elif stack and stack[-1] == "tabular":
            _read_line(line, tabulars[-1])
        elif found := re.fullmatch(r"\\caption\{(.*)\}", line):
            assert stack == ["table"]
            captions.append(read_text(found[1]))
        else:
            assert line in ("", r"\centering", r"\medskip"), line
    assert not stack
    return captions, tabulars


def read_text(text: str) -> str:
    """Return what a reader sees of a piece of LaTeX."""
    seen, depth, argument = "", 0, ""
    for token in _TOKEN.finditer(text):
        if token["math"] is not None:
            shown = MATH[token["math"]]
        elif token["sign"] is not None and token["sign"] in ACCENTS:
            shown, argument = "", token["sign"]
        elif token["sign"] is not None:
            assert token["sign"] in "{}$&#%_", f"\\{token['sign']} is no character"
            shown = token["sign"]
        elif (word := token["word"]) is not None:
            follows = text[token.end() :]
            assert follows.startswith("{"), f"\\{word} would swallow the space behind it"
            if word in ACCENTS and not follows.startswith("{}"):
                shown, argument = "", word
            elif word == "textbf":
                shown = ""
            else:
                assert follows.startswith("{}"), f"\\{word} takes no argument"
                shown = f"\0{TEXT[word]}\0"
        else:
            character = token["other"]
            assert character not in '&#%_~^<>|"`$\\', f"{character} is not escaped"
            depth += {"{": 1, "}": -1}.get(character, 0)
            assert depth >= 0, "a brace closes nothing"
            # An empty character keeps apart what would be joined.
            shown = "\0" if character in "{}" else character
            if argument and shown != "\0":
                shown, argument = character + ACCENTS[argument], ""
        seen += shown
    assert depth == 0, "a brace is open"
    for joined, one in LIGATURES.items():
        assert one != "?" or joined not in seen, f"{joined} becomes one character"
        seen = seen.replace(joined, one)
    return unicodedata.normalize("NFC", seen.replace("\0", ""))


def _open(name: str, arguments: str | None, stack: list[str], tabulars: list[Tabular]) -> None:
    inside = {"table": None, "adjustbox": "table", "tabular": "adjustbox"}
    assert inside[name] == (stack[-1] if stack else None), f"{name} in {stack}"
    stack.append(name)
    if name == "adjustbox":
        assert arguments == r"{max width=\linewidth}"
    elif name == "tabular":
        assert arguments is not None and re.fullmatch(r"\{[lr]+\}", arguments)
        tabulars.append(Tabular(arguments.strip("{}")))


def _read_line(line: str, tabular: Tabular) -> None:
    if line.removeprefix("\\") in RULES:
        tabular.lines.append(line.removeprefix("\\"))
        return
    # Behind `\\` and behind a rule these would be taken as an argument.
    assert not line.startswith(("[", "*", "(")) or (line.startswith("(") and tabular.lines)
    assert line.endswith(r" \\"), line
    cells = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
    assert len(cells) == len(tabular.columns), line
    tabular.lines.append([read_text(cell.strip()) for cell in cells])
