"""Zero-shot classification by the protocol of CLIP_benchmark.

A class is the normalised mean of the normalised embeddings of its prompts; an image is given the
class with the largest `100 * image . class`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.probing.column import ProbeColumn, ProbeRow, percent
from kuea_mllm.probing.datasets.classes import fill_templates
from kuea_mllm.probing.datasets.dataset import ProbeDataset
from kuea_mllm.probing.kept_vectors import kept_vectors
from kuea_mllm.probing.partner import TextPartner

SUITE = "zero-shot"
LOGIT_SCALE = 100.0
_BLOCK = 4096
_CLASSES_AT_ONCE = 64


def probe_zero_shot(
    features: NDArray[np.float32],
    dataset: ProbeDataset,
    partner: TextPartner,
    *,
    name: str | None = None,
    cache: Path | None = None,
    details: dict[str, Any] | None = None,
) -> ProbeColumn:
    """Classify images by the nearest class vector.

    Args:
        features: Embeddings of the images, (images, width), not normalised.
        dataset: With labels, class names and prompts.
        partner: The text tower.
        name: Heading of the column; the data set's if left out.
        cache: Folder of class vectors; None takes `data.cache.cache_folder`.
        details: More to note about how it was made.

    Returns:
        A column of metric "acc1"; `details["metrics"]` holds acc5 (None below five classes) and
        the mean per-class recall as well.

    Raises:
        DataError: If labels, prompts or class names are missing, or not of these features.
        TowerError: If an embedding of a text is not finite.
    """
    labels = torch.from_numpy(dataset.require_labels())
    if len(features) != len(labels):
        raise DataError(
            f"data set {dataset.name} has {len(labels)} images, but {len(features)} embeddings."
        )
    vectors = class_vectors(partner, dataset, cache=cache)
    top = torch.cat([_top(block, vectors) for block in _blocks(features)])  # (images, 1 or 5)
    right = top == labels[:, None]
    predicted, scores = top[:, 0].tolist(), right[:, 0].float().tolist()
    names = dataset.class_names
    rows = [
        ProbeRow(
            doc_id=index,
            cluster=dataset.image_name(index),
            question="Which class is it?",
            target=names[label],
            answer=names[guess],
            score=score,
            group=names[label],
            image=dataset.images.name(index),
        )
        for index, (label, guess, score) in enumerate(
            zip(labels.tolist(), predicted, scores, strict=True)
        )
    ]
    score = percent(scores)
    metrics = {
        "acc1": score,
        "acc5": 100 * right.any(1).double().mean().item() if top.shape[1] == 5 else None,
        "mean_per_class_recall": _mean_per_class_recall(labels, right[:, 0]),
    }
    return ProbeColumn(
        name=name or dataset.name,
        metric="acc1",
        score=score,
        statistic="mean",
        rows=rows,
        suite=SUITE,
        details={
            "metrics": metrics,
            "dataset": describe_dataset(dataset),
            "classes": len(names),
            "templates": list(dataset.templates),
            "text_tower": partner.describe(),
            **(details or {}),
        },
    )


def class_vectors(
    partner: TextPartner, dataset: ProbeDataset, *, cache: Path | None = None
) -> Tensor:
    """Embed the classes of a data set, from the cache if they are there.

    Args:
        partner: The text tower.
        dataset: With class names and prompts.
        cache: Folder of class vectors; None takes `data.cache.cache_folder`.

    Returns:
        Unit vectors, (classes, width), float32.

    Raises:
        DataError: If class names or prompts are missing.
        TowerError: If an embedding is not finite.
    """
    if not dataset.class_names or not dataset.templates:
        lacking = "prompts" if dataset.class_names else "class names"
        raise DataError(
            f"data set {dataset.name} ({dataset.source}) has no {lacking} for zero-shot.",
            "Write zeroshot_classification_templates.txt and classnames.txt beside its splits, or "
            "name those of clip-benchmark in the recipe (templates, classnames).",
        )
    names, templates = dataset.class_names, dataset.templates
    return kept_vectors(
        "classes",
        [1, partner.fingerprint, names, templates],
        len(names),
        lambda: embed_classes(partner, names, templates),
        cache=cache,
    )


def embed_classes(
    partner: TextPartner, class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Return the normalised mean of the normalised prompt embeddings of every class.

    Args:
        partner: The text tower.
        class_names: The classes.
        templates: Prompts with `{c}` for the name.

    Raises:
        TowerError: If an embedding is not finite.
    """
    parts = []
    # Some classes at a time: ImageNet's 80,000 prompts need not be in memory at once.
    for start in range(0, len(class_names), _CLASSES_AT_ONCE):
        names = class_names[start : start + _CLASSES_AT_ONCE]
        prompts = [prompt for name in names for prompt in fill_templates(templates, name)]
        embedded = normalize(partner.encode(prompts), dim=-1)
        mean = embedded.view(len(names), len(templates), -1).mean(1)
        parts.append(mean / mean.norm(dim=-1, keepdim=True))
    vectors = torch.cat(parts)
    if not torch.isfinite(vectors).all():
        bad = int((~torch.isfinite(vectors).all(1)).nonzero()[0])
        raise TowerError(
            f"the text tower of {partner.source} gives NaN or infinity for class "
            f"{class_names[bad]!r}.",
            "Its weights are damaged; fetch them again.",
        )
    return vectors


def describe_dataset(dataset: ProbeDataset) -> dict[str, Any]:
    """Return what a results file says about a data set."""
    return {
        "name": dataset.name,
        "split": dataset.split,
        "source": dataset.source,
        "images": len(dataset),
        "fingerprint": dataset.fingerprint,
    }


def _blocks(features: NDArray[np.float32]) -> Iterator[Tensor]:
    for start in range(0, len(features), _BLOCK):
        # Copied: the rows are mapped read-only, which torch warns about.
        yield torch.from_numpy(np.array(features[start : start + _BLOCK]))


def _top(features: Tensor, vectors: Tensor) -> Tensor:
    """Return the best classes, (n, 5), or (n, 1) where there are fewer than five."""
    logits = LOGIT_SCALE * normalize(features, dim=-1) @ vectors.T
    return logits.topk(5 if len(vectors) >= 5 else 1, dim=1).indices


def _mean_per_class_recall(labels: Tensor, is_right: Tensor) -> float:
    present = sorted(set(labels.tolist()))
    recalls = [is_right[labels == label].double().mean().item() for label in present]
    return percent(recalls)
