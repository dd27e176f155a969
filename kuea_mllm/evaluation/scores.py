"""Scores per document, out of whatever a task's `process_results` returns.

A per-document score is only trusted when the column's statistic of all of them (see `statistics`)
is the score that lmms-eval reports for the task; otherwise (F1, totals) the column is not paired.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.results import SampleRow, finite
from kuea_mllm.evaluation.statistics import (
    MEAN,
    MEAN_OF_GROUP_RATIOS,
    MEAN_OF_GROUPS,
    RATIO_OF_SUMS,
    ROC_AUC,
    STATISTICS,
    Outcomes,
    measure_value,
)

CLUSTER_KEYS = (
    "image_id",
    "imageId",
    "img_id",
    "image_source",
    "image_file",
    "image_path",
    "image_name",
    "file_name",
    "filename",
    "pair_index",
    "image",
)
"""Where tasks without a `cluster_key` usually name the image; the first that varies is taken."""

# RefCOCO's name of a picture ends with a number for each region in it.
_REGION = re.compile(r"(COCO_(?:train|val)2014_\d{12})_\d+(\.jpg)")
_SCORE_KEYS = ("score", "is_correct")
_RATIOS = (RATIO_OF_SUMS, MEAN_OF_GROUP_RATIOS)
# Tasks round what they report, to four digits or to two of a percentage.
_TOLERANCE = 1e-4
_SLOW = 0.02
_PROBE = 3


@dataclass(frozen=True)
class SampleScores:
    """Scores per document.

    Attributes:
        values: One per document, on the scale of the column's score; None where unusable.
        scale: 1 or 100, the highest score of one document.
        reason: Why the column cannot be paired; None where it can.
    """

    values: list[float | None]
    scale: int
    reason: str | None

    @property
    def is_paired(self) -> bool:
        """Whether two runs can be compared document by document."""
        return self.reason is None


def extract_scores(
    items: Sequence[Any],
    reported: float | None,
    *,
    score_key: str = "score",
    aggregate: Callable[[list[Any]], Any] | None = None,
    statistic: str = MEAN,
    clusters: Sequence[str] | None = None,
) -> SampleScores:
    """Find the score of every document.

    Args:
        items: The main metric's value of each document.
        reported: The task's score.
        score_key: Where a dictionary holds the score.
        aggregate: The task's aggregation; used on single documents where items hold no score.
        statistic: How the task's score comes out of the documents.
        clusters: Cluster of each document; by default each is its own.

    Returns:
        The scores, or Nones with the reason.
    """
    nothing: list[float | None] = [None] * len(items)
    if reported is None:
        return SampleScores(nothing, 1, "the task reports no number as its score")
    values = [_plain_score(item, score_key) for item in items]
    if None in values and aggregate is not None:
        values = _scores_by_aggregation(items, aggregate)
    known = [value for value in values if value is not None]
    if len(known) < len(items) or not known:
        return SampleScores(nothing, 1, "the task gives no score per document")
    names = clusters or [str(number) for number in range(len(items))]
    details = [
        {**_as_dict(item), "score": value, "image_id": name}
        for item, value, name in zip(items, known, names, strict=True)
    ]
    try:
        outcomes = Outcomes.of_items(statistic, details)
        own = measure_value(outcomes.measure(statistic), outcomes.cluster_count)
    except EvaluationError as error:
        return SampleScores(nothing, 1, error.problem.rstrip("."))
    # Ratios are of 100 in any case.
    for scale, factor in ((100, 1),) if statistic in _RATIOS else ((1, 1), (100, 100)):
        if abs(own * factor - reported) <= _TOLERANCE * scale:
            is_mean = statistic not in (*_RATIOS, ROC_AUC)
            return SampleScores([v * scale if is_mean else v for v in known], scale, None)
    reason = f"the score ({reported:g}) is not the {STATISTICS[statistic]} ({own:g})"
    return SampleScores(nothing, 1, reason)


def find_clusters(
    documents: Sequence[Mapping[str, Any]],
    items: Sequence[Any],
    doc_ids: Sequence[int],
    cluster_key: str | None,
) -> list[str]:
    """Name the cluster of every document: the task's key, else the image, else the document.

    A document without the key is a cluster of its own (lmms-eval puts all of those into one).
    """
    sources = [
        {**_as_dict(document), **_as_dict(item)}
        for document, item in zip(documents, items, strict=True)
    ]
    for key in (cluster_key,) if cluster_key else CLUSTER_KEYS:
        names = [_cluster_name(source.get(key)) for source in sources]
        # A guessed key that is the same for all is a property of the data set, not of an image.
        is_usable = any(name is not None for name in names)
        if is_usable and (cluster_key or len(Counter(names)) > 1):
            return [
                name if name is not None else f"doc {doc_id}"
                for name, doc_id in zip(names, doc_ids, strict=True)
            ]
    return [str(doc_id) for doc_id in doc_ids]


def lost_groups(
    statistic: str, rows: Iterable[SampleRow], used: Iterable[SampleRow]
) -> tuple[str, ...]:
    """Return the groups that a mean over groups would silently leave out.

    Args:
        statistic: One of `STATISTICS`.
        rows: All rows.
        used: Those that have a score.
    """
    if statistic not in (MEAN_OF_GROUPS, MEAN_OF_GROUP_RATIOS):
        return ()
    there = {row.group for row in used}
    return tuple(dict.fromkeys(row.group for row in rows if row.group and row.group not in there))


def is_missing_judgement(item: Any) -> bool:
    """Recognise lmms-eval's placeholder of a failed GPT judge, which would score 100 %."""
    return isinstance(item, dict) and list(item.get("scores") or ()) == [-1, -1]


def _plain_score(item: Any, score_key: str) -> float | None:
    if isinstance(item, dict):
        for key in (score_key, *_SCORE_KEYS):
            if key in item:
                return finite(item[key])
        return None
    return None if isinstance(item, list | tuple) else finite(item)


def _scores_by_aggregation(
    items: Sequence[Any], aggregate: Callable[[list[Any]], Any]
) -> list[float | None]:
    values: list[float | None] = []
    # Some aggregations print what they computed.
    with contextlib.redirect_stdout(io.StringIO()):
        for item in items:
            start = time.perf_counter()
            try:
                values.append(finite(aggregate([item])))
            # Foreign code on an input it was not made for; the column is then not paired.
            except Exception:
                return [None] * len(items)
            # Captioning metrics start a Java process each time.
            if len(values) <= _PROBE and time.perf_counter() - start > _SLOW:
                return [None] * len(items)
    return values


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _cluster_name(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    region = _REGION.fullmatch(str(value))
    return str(value) if region is None else region[1] + region[2]
