"""What a report is made of: a tree of plain values that `html` renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Tone: TypeAlias = Literal[
    "plain", "lead", "note", "warning", "better", "worse", "unclear", "differs"
]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text.

    Args:
        text: Plain text; never interpreted as HTML.
        tone: `lead` for the finding of a report, `note` for small print, `warning` for caveats.
    """

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Bullets:
    """A list of short texts.

    Args:
        items: Plain texts.
        numbered: Whether the order matters, as in steps.
    """

    items: Sequence[str]
    numbered: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture with a caption.

    Args:
        image: SVG text, or the bytes of a PNG or JPEG file.
        alt: What the picture shows, for those who cannot see it.
        caption: Text below the picture.
    """

    image: str | bytes
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell whose text carries a judgement.

    Args:
        text: Plain text; the tone only repeats what it says.
        tone: Colour of the cell.
    """

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names the row.

    Args:
        caption: What the table shows.
        header: Names of the columns.
        rows: Cells, as many per row as there are names.
        numeric: Positions of the columns that hold numbers, which are aligned to the right.
        footer: How many rows at the end are totals.
        breaks: Whether long values (paths, fingerprints) are broken to fit, anywhere.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numeric: frozenset[int] = frozenset()
    footer: int = 0
    breaks: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells, the table {len(self.header)} names.")


@dataclass(frozen=True)
class KeyValues:
    """Names and their values.

    Args:
        items: Pairs of name and value.
    """

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Text shown as it is, in a fixed-width font: a command or a file.

    Args:
        text: The text.
    """

    text: str


@dataclass(frozen=True)
class Tiles:
    """A few large numbers with a word below each.

    Args:
        items: Number, what it is, and its tone.
    """

    items: Sequence[tuple[str, str, Tone]]


@dataclass(frozen=True)
class Box:
    """A rectangle on the picture of an example.

    Args:
        label: What it is: `expected`, or the name of a model.
        role: Decides colour and line.
        corners: Left, top, right, bottom in fractions of the picture.
    """

    label: str
    role: Literal["expected", "baseline", "candidate"]
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Example:
    """One question and what two models answered.

    Args:
        task: Name of the task.
        doc_id: Name of the question within the task.
        question: What was asked.
        expected: The answer that counts as right.
        baseline_answer: What the baseline answered; None if it failed to answer.
        candidate_answer: What the candidate answered; None likewise.
        baseline_score: 1 for right, 0 for wrong, None if there is nothing to score.
        candidate_score: Likewise.
        baseline_note: What the score is where it says nothing about right or wrong.
        candidate_note: Likewise.
        image: Bytes of a PNG or JPEG, if there is a picture.
        no_image: Why there is none.
        boxes: What to draw over it.
        group: Part of the task that the question belongs to.
    """

    task: str
    doc_id: str
    question: str
    expected: str
    baseline_answer: str | None
    candidate_answer: str | None
    baseline_score: float | None
    candidate_score: float | None
    baseline_note: str = ""
    candidate_note: str = ""
    image: bytes | None = None
    no_image: str = "no picture stored"
    boxes: Sequence[Box] = ()
    group: str = ""


@dataclass(frozen=True)
class Gallery:
    """Example questions side by side.

    Args:
        items: The examples.
        baseline: Name of the first model.
        candidate: Name of the second model; empty if only one model is shown.
    """

    items: Sequence[Example]
    baseline: str
    candidate: str = ""


@dataclass(frozen=True)
class FlipGroup:
    """Questions of one column whose score moved in one direction.

    Args:
        total: How many there are.
        shown: Those shown as cards.
        listed: Further ones, shown as lines.
    """

    total: int
    shown: Sequence[Example] = ()
    listed: Sequence[Example] = ()


@dataclass(frozen=True)
class FlipColumn:
    """What moved in one column.

    Args:
        name: The column.
        gained: Questions that the candidate answers better.
        lost: Questions that the baseline answers better.
        file: Where all of them are.
    """

    name: str
    gained: FlipGroup
    lost: FlipGroup
    file: str


@dataclass(frozen=True)
class Flips:
    """A gallery of questions whose score moved, to be filtered by column and direction.

    Args:
        columns: The columns.
        baseline: Name of the first model.
        candidate: Name of the second model.
    """

    columns: Sequence[FlipColumn]
    baseline: str
    candidate: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away behind a line.

    Args:
        summary: The line.
        blocks: What it hides.
    """

    summary: str
    blocks: Sequence[Block]


Block: TypeAlias = (
    Paragraph | Bullets | Tiles | Figure | Table | KeyValues | Code | Gallery | Flips | Details
)


@dataclass(frozen=True)
class Section:
    """A heading with blocks below it, and sections within.

    Args:
        heading: Plain text.
        blocks: Content.
        sections: Parts, one heading level further down.
    """

    heading: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = field(default=())


@dataclass(frozen=True)
class Report:
    """A page.

    Args:
        title: Heading and title of the page.
        subtitle: One line below it.
        summary: Blocks before the first section: what was found.
        sections: The sections.
    """

    title: str
    subtitle: str = ""
    summary: Sequence[Block] = ()
    sections: Sequence[Section] = ()
