"""One number of an encoder-level table together with the items it is made of.

Every probe returns columns of this shape, whatever it measures, so that results, paired
comparisons and reports need to know nothing of the probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """What a tower did with one item of a data set.

    Attributes:
        doc_id: Position of the item in its data set: the same for every tower.
        cluster: The image (or pair) that the item hangs on, named as inside of its data set; items
            of one cluster are resampled together.
        question: What was asked of the item, in words.
        target: The right answer in words; several are joined with " | ".
        answer: What the tower chose, in words.
        score: 1 or 0 for right or wrong, any number for soft scores; None where only the corpus
            has a score (macro recall: see `counts`).
        group: Pattern, class or category that the score is also reported by.
        image: Path of the picture (or `shard.tar!member`), for reports that show it; relative if
            the folder of the data was given so.
        counts: For statistics over a corpus: class name -> [true positives, positives].
    """

    doc_id: int
    cluster: str
    question: str
    target: str
    answer: str
    score: float | None
    group: str | None = None
    image: str | None = None
    counts: dict[str, list[int]] | None = None


@dataclass(frozen=True, slots=True)
class ProbeColumn:
    """One column of a table: its score, how it was made, and its rows.

    Attributes:
        name: Heading, such as "CIFAR10" or "Flickr30K I2T R@1".
        metric: What is measured, such as "acc1" or "recall@5".
        score: The score in percent.
        statistic: How the score follows from the rows: "mean", "mean_of_groups", "macro_recall".
        rows: The items, in the order of `doc_id`.
        suite: The suite it belongs to, such as "zero-shot".
        details: Everything else worth keeping as plain data: further metrics, data set, split,
            templates, fingerprints, and every departure from the protocol.
    """

    name: str
    metric: str
    score: float
    statistic: str
    rows: list[ProbeRow]
    suite: str
    details: dict[str, Any] = field(default_factory=dict)


def percent(scores: Sequence[float]) -> float:
    """The mean of the scores of rows, in percent."""
    return 100.0 * sum(scores) / len(scores)
