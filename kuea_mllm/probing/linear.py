"""Linear probe by the protocol of CLIP_benchmark: one linear layer on frozen embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuea_mllm.errors import DataError
from kuea_mllm.probing.column import ProbeColumn, ProbeRow, percent
from kuea_mllm.probing.datasets.dataset import ProbeDataset
from kuea_mllm.probing.linear_training import (
    BLOCK,
    Labelled,
    LinearSettings,
    search_weight_decay,
    train_classifiers,
)
from kuea_mllm.probing.zero_shot import describe_dataset

SUITE = "linear"


def probe_linear(
    train_features: NDArray[np.float32],
    train: ProbeDataset,
    test_features: NDArray[np.float32],
    test: ProbeDataset,
    *,
    validation: tuple[NDArray[np.float32], ProbeDataset] | None = None,
    how: LinearSettings | None = None,
    name: str | None = None,
    details: dict[str, Any] | None = None,
) -> ProbeColumn:
    """Train a linear probe on one split and score it on another.

    Args:
        train_features: Embeddings of the training images, not normalised.
        train: Their labels.
        test_features: Embeddings of the test images.
        test: Their labels.
        validation: A third split; then the weight decay is searched on it, and the probe that is
            scored is trained on both. Without one, the weight decay is 0.
        how: See `LinearSettings`.
        name: Heading of the column; "<data set> linear" if left out.
        details: More to note about how it was made.

    Returns:
        A column of metric "lp_acc1"; `details["metrics"]` holds acc5 (None below six classes,
        as in CLIP_benchmark) and the mean per-class recall as well.

    Raises:
        DataError: If labels are missing, splits have different classes, or a class has no training
            image.
        TowerError: If an embedding is not finite.
    """
    how = how or LinearSettings()
    known = Labelled.of(train_features, train, how.device)
    asked = Labelled.of(test_features, test, how.device)
    others = [test] if validation is None else [test, validation[1]]
    for other in others:
        _require_same_classes(train, other)
    classes = int(known.labels.max()) + 1
    search = None
    if validation is not None:
        held = Labelled.of(validation[0], validation[1], how.device)
        search = search_weight_decay(known, held, classes, how)
        known = known + held
    weight_decay = 0.0 if search is None else search.weight_decay
    classifier = train_classifiers(known, classes, [weight_decay], how)
    if not classifier.is_finite.all():
        raise DataError(
            f"the linear probe on {train.name} diverged (weight decay {weight_decay:g}).",
            "Lower its learning rate.",
        )
    logits = torch.cat(
        [classifier.logits(part)[0].cpu() for part in torch.split(asked.features, BLOCK)]
    )  # (images, classes)
    labels = asked.labels.cpu()
    top = logits.topk(min(5, classes), dim=1).indices
    right = top == labels[:, None]
    guesses, scores = top[:, 0].tolist(), right[:, 0].double().tolist()
    score = percent(scores)
    metrics = {
        "acc1": score,
        "acc5": 100 * right.any(1).double().mean().item() if int(labels.max()) >= 5 else None,
        "mean_per_class_recall": _mean_per_class_recall(labels, right[:, 0]),
    }
    return ProbeColumn(
        name=name or f"{test.name} linear",
        metric="lp_acc1",
        score=score,
        statistic="mean",
        rows=_rows(test, guesses, scores),
        suite=SUITE,
        details={
            "metrics": metrics,
            "dataset": describe_dataset(test),
            "train": describe_dataset(train),
            "validation": None if validation is None else describe_dataset(validation[1]),
            "classes": classes,
            "weight_decay": weight_decay,
            "search": None if search is None else search.accuracies,
            "settings": asdict(how),
            **(details or {}),
        },
    )


def _require_same_classes(train: ProbeDataset, other: ProbeDataset) -> None:
    if train.class_names != other.class_names:
        raise DataError(
            f"data set {train.name}: split {train.split} has {len(train.class_names)} classes, "
            f"split {other.split} has {len(other.class_names)}, or they differ in name or order.",
            "Both splits need the same classnames.txt.",
        )
    unknown = sorted(set(other.require_labels().tolist()) - set(train.require_labels().tolist()))
    if unknown:
        names = ", ".join(train.class_names[label] for label in unknown[:5])
        raise DataError(
            f"data set {train.name}: {len(unknown)} classes of split {other.split} have no image "
            f"in split {train.split}: {names}.",
            "Complete the training split, or raise --limit.",
        )


def _rows(test: ProbeDataset, guesses: Sequence[int], scores: Sequence[float]) -> list[ProbeRow]:
    names, labels = test.class_names, test.require_labels().tolist()
    return [
        ProbeRow(
            doc_id=index,
            cluster=test.images.name(index),
            question="Which class is it?",
            target=names[label],
            answer=names[guess],
            score=score,
            group=names[label],
            image=test.images.name(index),
        )
        for index, (label, guess, score) in enumerate(zip(labels, guesses, scores, strict=True))
    ]


def _mean_per_class_recall(labels: Tensor, is_right: Tensor) -> float:
    recalls = [is_right[labels == label].double().mean() for label in torch.unique(labels)]
    return 100 * torch.stack(recalls).mean().item()
