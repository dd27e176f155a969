"""Columns that are about some of the same pictures: what that does to their average.

POPE asks about 500 of the pictures that VQAv2 asks about, RefCOCOg about some of RefCOCO's. A model
that reads such a picture better does so in both columns, so that their differences depend on each
other as far as the pictures are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from kuea_mllm.evaluation.comparing.paired_rows import Pair
from kuea_mllm.evaluation.comparing.resampling import Stratum
from kuea_mllm.evaluation.measures import Array
from kuea_mllm.evaluation.results import SampleRow

# COCO numbers its pictures once for all years and splits, and data sets name them in many ways.
_COCO = re.compile(
    r"(?:^|[/\\])(?:COCO_(?:train|val|test)20\d\d_(\d{12})(?:\.jpe?g)?|(\d{12})\.jpe?g)$"
)

Pulls = Mapping[str, float]
"""How much each picture pulls the difference of a column, by a name that other columns know."""


def picture_name(row: SampleRow) -> str | None:
    """Return what a picture is recognised by in other columns; None if nothing tells.

    That is its number in COCO, or else its file. Other names may mean another picture elsewhere.
    """
    for name in (row.image, row.cluster):
        found = None if name is None else _COCO.search(name)
        if found is not None:
            return f"coco {int(found[1] or found[2])}"
    return row.image


def picture_pulls(
    used: Sequence[Sequence[Pair]], strata: Sequence[Stratum], top: float
) -> dict[str, float]:
    """Return the first-order effect of every picture on a column's difference.

    Clusters of several pictures have no name, and are left out.

    Args:
        used: The rows of each run, side by side.
        strata: The same runs as scores.
        top: Highest score; effects are shares of it.
    """
    names: dict[str, set[str | None]] = {}
    for pairs in used:
        for row, _ in pairs:
            names.setdefault(row.cluster, set()).add(picture_name(row))
    runs = sum(len(stratum.baseline) for stratum in strata)
    pulls: dict[str, float] = {}
    for stratum in strata:
        share = len(stratum.baseline) / runs / top
        for cluster, pull in zip(stratum.names, stratum.influences.tolist(), strict=True):
            (name, *others) = names[cluster]
            if name is not None and not others and pull:
                pulls[name] = pulls.get(name, 0.0) + share * pull
    return pulls


def widening(draws: Sequence[Array], pulls: Sequence[Sequence[Pulls]]) -> float:
    """Return how many times wider the sum of columns spreads than if they were independent.

    The covariance of two scores that come from some of the same clusters is, to the first order,
    the sum over those clusters of the product of both effects. Below 1 where they go against each
    other.

    Args:
        draws: Resampled differences of each group of columns, apart from one another.
        pulls: Effects of the pictures on the columns of each group.

    Returns:
        Exactly 1 where no picture is in two groups.
    """
    sums = [_summed(group) for group in pulls]
    covariance = sum(
        sum(pull * second[name] for name, pull in first.items() if name in second)
        for first, second in combinations(sums, 2)
    )
    apart = sum(float(np.var(column)) for column in draws)
    if covariance == 0.0 or apart == 0.0:
        return 1.0
    return float(np.sqrt(max(0.0, 1.0 + 2.0 * covariance / apart)))


def _summed(group: Sequence[Pulls]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pulls in group:
        for name, pull in pulls.items():
            found[name] = found.get(name, 0.0) + pull
    return found
