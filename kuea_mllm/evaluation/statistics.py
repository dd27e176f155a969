"""Scores of a column as functions of its documents.

Every score of a benchmark is one of the `STATISTICS`; what a bootstrap needs of it is a `Measure`
(see `measures`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.measures import (
    Array,
    AucMeasure,
    Codes,
    Measure,
    RatioMeasure,
)
from kuea_mllm.evaluation.results import SampleRow

MEAN = "mean"
MEAN_OF_GROUPS = "mean_of_groups"
ALL_RIGHT_IN_CLUSTER = "all_right_in_cluster"
RATIO_OF_SUMS = "ratio_of_sums"
MEAN_OF_GROUP_RATIOS = "mean_of_group_ratios"
ROC_AUC = "roc_auc"
MACRO_RECALL = "macro_recall"

STATISTICS = {
    MEAN: "mean over documents",
    MEAN_OF_GROUPS: "mean over groups of the mean of each group",
    ALL_RIGHT_IN_CLUSTER: "share of the clusters in which every document is right",
    RATIO_OF_SUMS: "100 x sum of the scores / sum of the reference scores",
    MEAN_OF_GROUP_RATIOS: "mean over groups of 100 x sum of scores / sum of reference scores",
    ROC_AUC: "area under the ROC curve",
    MACRO_RECALL: "mean over classes of the share of each that was found",
}
"""How a column's score comes out of its documents."""

_NEEDS = {
    MEAN_OF_GROUPS: ("group",),
    RATIO_OF_SUMS: ("reference",),
    MEAN_OF_GROUP_RATIOS: ("group", "reference"),
    ROC_AUC: ("label",),
    MACRO_RECALL: ("counts",),
}


@dataclass(frozen=True)
class Outcomes:
    """What the documents of one column and one run came to.

    Attributes:
        scores: Score of each document, (n,).
        clusters: Number of its cluster, (n,).
        cluster_count: Number of clusters.
        groups: Number of its group, (n,); -1 without one.
        group_names: Names of the groups; empty without groups.
        references: What the score is divided by, (n,); ones without references.
        labels: Class of the document, (n,); zeros without labels.
        counts: Of each document, class -> found, there; empty without such.
    """

    scores: Array
    clusters: Codes
    cluster_count: int
    groups: Codes
    group_names: tuple[str, ...]
    references: Array
    labels: Codes
    counts: tuple[Mapping[str, Sequence[int]], ...] = ()

    @classmethod
    def of_rows(
        cls, statistic: str, rows: Sequence[SampleRow], names: Sequence[str] | None = None
    ) -> Outcomes:
        """Read sample rows, all of which have a score.

        Args:
            statistic: One of `STATISTICS`.
            rows: The rows.
            names: All clusters, sorted, where other runs have more than these rows.

        Raises:
            EvaluationError: If a row lacks what the statistic needs.
        """
        return _read(statistic, [(row.doc_id, row.cluster, vars(row)) for row in rows], names)

    @classmethod
    def of_items(cls, statistic: str, items: Sequence[Mapping[str, Any]]) -> Outcomes:
        """Read what `process_results` of our tasks returned; the cluster is `image_id`.

        Raises:
            EvaluationError: If an item lacks what the statistic needs.
        """
        return _read(
            statistic,
            [(number, str(item["image_id"]), item) for number, item in enumerate(items)],
        )

    def measure(self, statistic: str, scale: float = 1.0) -> Measure:
        """Return the score as a function of the clusters.

        Args:
            statistic: One of `STATISTICS`.
            scale: Highest score, 1 or 100. Documents of a mean, of groups or in clusters are on
                this scale; ratios are of 100 whatever it is; an area is multiplied by it.

        Raises:
            EvaluationError: If there is nothing to divide by, or a class is missing.
        """
        if statistic == ROC_AUC:
            return self._area(scale)
        if statistic == MACRO_RECALL:
            return self._recalls(scale)
        if statistic == ALL_RIGHT_IN_CLUSTER:
            is_wrong = (self.scores < scale).astype(np.float64)
            wrong = np.bincount(self.clusters, weights=is_wrong, minlength=self.cluster_count)
            asked = np.bincount(self.clusters, minlength=self.cluster_count) > 0
            right = scale * (asked & (wrong == 0.0)).astype(np.float64)
            return RatioMeasure(right[:, None], asked.astype(np.float64)[:, None])
        is_ratio = statistic in (RATIO_OF_SUMS, MEAN_OF_GROUP_RATIOS)
        is_grouped = statistic in (MEAN_OF_GROUPS, MEAN_OF_GROUP_RATIOS)
        groups = self.groups if is_grouped else np.zeros_like(self.groups)
        count = max(len(self.group_names), 1) if is_grouped else 1
        references = self.references if is_ratio else np.ones(len(self.scores))
        if is_ratio and not self.references.sum() > 0.0:
            raise EvaluationError("the judge's scores of the reference answers sum to 0.")
        return RatioMeasure(
            self._sums(self.scores, groups, count),
            self._sums(references, groups, count),
            factor=100.0 if is_ratio else 1.0,
        )

    def breakdown(self, statistic: str, scale: float = 1.0) -> dict[str, float]:
        """Return the score of each group; empty without groups."""
        whole = {MEAN_OF_GROUPS: MEAN, MEAN_OF_GROUP_RATIOS: RATIO_OF_SUMS}.get(
            statistic, statistic
        )
        found = {}
        for number, name in enumerate(self.group_names):
            value = self._part(self.groups == number)._value(whole, scale)
            if value is not None:
                found[name] = value
        return found

    def _value(self, statistic: str, scale: float) -> float | None:
        try:
            return measure_value(self.measure(statistic, scale), self.cluster_count)
        # A group may hold one class only, or references of 0: it has no score of its own.
        except EvaluationError:
            return None

    def _part(self, chosen: npt.NDArray[np.bool_]) -> Outcomes:
        names, clusters = np.unique(self.clusters[chosen], return_inverse=True)
        return Outcomes(
            self.scores[chosen],
            clusters.astype(np.int64),
            len(names),
            self.groups[chosen],
            self.group_names,
            self.references[chosen],
            self.labels[chosen],
            tuple(self.counts[index] for index in np.flatnonzero(chosen)) if self.counts else (),
        )

    def _sums(self, values: Array, groups: Codes, count: int) -> Array:
        cells = self.clusters * count + groups
        sums = np.bincount(cells, weights=values, minlength=self.cluster_count * count)
        return sums.astype(np.float64).reshape(self.cluster_count, count)

    def _recalls(self, scale: float) -> RatioMeasure:
        names = sorted({name for counts in self.counts for name in counts})
        number_of = {name: number for number, name in enumerate(names)}
        found = np.zeros((self.cluster_count, len(names)))
        there = np.zeros_like(found)
        for cluster, counts in zip(self.clusters.tolist(), self.counts, strict=True):
            for name, (hits, positives) in counts.items():
                found[cluster, number_of[name]] += hits
                there[cluster, number_of[name]] += positives
        return RatioMeasure(found, there, factor=scale)

    def _area(self, scale: float) -> AucMeasure:
        classes = set(self.labels.tolist())
        if classes != {0, 1}:
            raise EvaluationError(
                f"ROC-AUC needs documents of both classes, 0 and 1; all {len(self.labels)} have "
                f"label {', '.join(map(str, sorted(classes)))}.",
                "Use more documents (--limit).",
            )
        order = np.argsort(self.scores, kind="stable")
        ranked = self.scores[order]
        return AucMeasure(
            starts=np.searchsorted(ranked, ranked, side="left"),
            ends=np.searchsorted(ranked, ranked, side="right"),
            members=self.clusters[order],
            is_positive=self.labels[order].astype(np.float64),
            clusters=self.cluster_count,
            factor=scale,
        )


def measure_value(measure: Measure, clusters: int) -> float:
    """Return the score itself: every cluster counted once."""
    return float(measure.values(np.ones((1, clusters)))[0])


def score_items(statistic: str, items: Sequence[Mapping[str, Any]], scale: float = 1.0) -> float:
    """Return the score of a column from what `process_results` returned for each document.

    Raises:
        EvaluationError: If there are no items, or one lacks what the statistic needs.
    """
    outcomes = Outcomes.of_items(statistic, items)
    return measure_value(outcomes.measure(statistic, scale), outcomes.cluster_count)


def standard_error(measure: Measure) -> float | None:
    """Return the cluster-robust standard error of a score; None below two clusters."""
    return influence_error(measure.influences())


def influence_error(influences: Array) -> float | None:
    """Return the standard error of a sum of independent effects; None below two of them."""
    count = len(influences)
    if count < 2:
        return None
    return float(np.sqrt(np.square(influences).sum() * count / (count - 1)))


def require_statistic(name: str, task: str) -> None:
    """Refuse a statistic that does not exist.

    Raises:
        EvaluationError: Naming the task.
    """
    if name not in STATISTICS:
        raise EvaluationError(
            f"task {task}: metadata.kuea.statistic is {name!r}.",
            f"Known statistics: {', '.join(STATISTICS)}.",
        )


def _read(
    statistic: str,
    documents: Sequence[tuple[int, str, Mapping[str, Any]]],
    names: Sequence[str] | None = None,
) -> Outcomes:
    if not documents:
        raise EvaluationError("a score needs at least one document.")
    for key in ("score", *_NEEDS.get(statistic, ())):
        for doc_id, _, values in documents:
            if values.get(key) is None:
                raise EvaluationError(
                    f"document {doc_id} has no {key}, which the statistic {statistic!r} needs."
                )
    own = [cluster for _, cluster, _ in documents]
    known = sorted(set(own)) if names is None else names
    numbers = {name: number for number, name in enumerate(known)}
    groups = [document[2].get("group") for document in documents]
    group_names = tuple(dict.fromkeys(str(group) for group in groups if group is not None))
    # A document without a group belongs to none of the parts; the whole counts it all the same.
    codes = {name: number for number, name in enumerate(group_names)}
    return Outcomes(
        scores=_column(documents, "score", 0.0),
        clusters=np.array([numbers[cluster] for cluster in own], dtype=np.int64),
        cluster_count=len(known),
        groups=np.array(
            [-1 if group is None else codes[str(group)] for group in groups], dtype=np.int64
        ),
        group_names=group_names,
        references=_column(documents, "reference", 1.0),
        labels=_column(documents, "label", 0.0).astype(np.int64),
        counts=tuple(document[2]["counts"] for document in documents)
        if statistic == MACRO_RECALL
        else (),
    )


def _column(
    documents: Sequence[tuple[int, str, Mapping[str, Any]]], key: str, default: float
) -> Array:
    values = (document[2].get(key) for document in documents)
    return np.array([default if value is None else value for value in values], dtype=np.float64)
