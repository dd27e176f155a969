"""Image-text retrieval: is one of the right items among the first k?

An image may have several right captions, and finding any one of them counts (CLIP_benchmark's
rule). The table of all similarities is never made: ranks are counted over blocks of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.probing.column import ProbeColumn, ProbeRow, percent
from kuea_mllm.probing.datasets.dataset import ProbeDataset
from kuea_mllm.probing.embedder import CUT_CAPTIONS
from kuea_mllm.probing.kept_vectors import kept_vectors
from kuea_mllm.probing.partner import TextPartner
from kuea_mllm.probing.zero_shot import describe_dataset

SUITE = "retrieval"
RECALL_AT = (1, 5, 10)
CUT_AT = 77  # characters, where the released code means tokens
_BLOCK = 2048


@dataclass(frozen=True)
class Ranks:
    """Where the right items stand.

    Attributes:
        rank: Items before the first right one, (queries,): 0 means it is the best.
        best: The item with the highest similarity, (queries,).
    """

    rank: Tensor
    best: Tensor


def probe_retrieval(
    features: NDArray[np.float32],
    dataset: ProbeDataset,
    partner: TextPartner,
    *,
    name: str | None = None,
    recall_at: Sequence[int] = RECALL_AT,
    faults: Sequence[str] = (),
    cache: Path | None = None,
    details: dict[str, Any] | None = None,
) -> list[ProbeColumn]:
    """Find captions of images (I2T) and images of captions (T2I).

    Args:
        features: Embeddings of the images, (images, width), not normalised.
        dataset: With captions.
        partner: The text tower.
        name: Heading of the columns; the data set's if left out.
        recall_at: Values of k; one column for each and for each direction.
        faults: Of the released code; `cut_captions` cuts captions to 77 characters. (`raw_pixels`
            is about the features.)
        cache: Folder of caption embeddings; None takes `data.cache.cache_folder`.
        details: More to note about how it was made.

    Returns:
        Columns "NAME I2T R@k", then "NAME T2I R@k". I2T has a row per image, T2I a row per caption,
        whose cluster is its image.

    Raises:
        DataError: If there are no captions, or not of these features.
        TowerError: If an embedding of a caption is not finite.
    """
    captions = dataset.require_captions()
    if len(features) != len(captions):
        raise DataError(
            f"data set {dataset.name} has {len(captions)} images, but {len(features)} embeddings."
        )
    texts = [text for each in captions for text in each]
    owner = torch.tensor([image for image, each in enumerate(captions) for _ in each])
    cut = [text[:CUT_AT] for text in texts] if CUT_CAPTIONS in faults else texts
    # Copied: the rows are mapped read-only, which torch warns about.
    image_vectors = normalize(torch.from_numpy(np.array(features)), dim=-1)
    text_vectors = kept_vectors(
        "captions",
        [1, partner.fingerprint, cut],
        len(cut),
        lambda: _embed_texts(partner, cut),
        cache=cache,
    )
    both = {
        "I2T": rank_right_items(image_vectors, text_vectors, torch.arange(len(captions)), owner),
        "T2I": rank_right_items(text_vectors, image_vectors, owner, torch.arange(len(captions))),
    }
    shared = {
        "dataset": describe_dataset(dataset),
        "captions": len(texts),
        "text_tower": partner.describe(),
        "faults": list(faults),
        **(details or {}),
    }
    return [
        _column(dataset, texts, owner, direction, k, ranks, shared, name or dataset.name)
        for direction, ranks in both.items()
        for k in recall_at
    ]


def rank_right_items(
    queries: Tensor,
    items: Tensor,
    query_owner: Tensor,
    item_owner: Tensor,
    *,
    block: int = _BLOCK,
) -> Ranks:
    """Count, for each query, the wrong items that come before its best right one.

    Of equal similarities the item that stands first in the list comes first, so that a tower which
    embeds everything alike scores as a guess would.

    Args:
        queries: Unit vectors, (queries, width).
        items: Unit vectors, (items, width).
        query_owner: What each query belongs to, (queries,).
        item_owner: What each item belongs to; an item is right if that is the same, (items,).
        block: Queries and items at once: `block * block` numbers are held.
    """
    ranks, bests = [], []
    for start in range(0, len(queries), block):
        chosen, owners = queries[start : start + block], query_owner[start : start + block]
        rank, best = _rank_block(chosen, items, owners, item_owner, block)
        ranks.append(rank)
        bests.append(best)
    return Ranks(torch.cat(ranks), torch.cat(bests))


def _rank_block(
    queries: Tensor, items: Tensor, owners: Tensor, item_owner: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    none = torch.full((len(queries),), -torch.inf)
    top, top_at = none.clone(), torch.zeros(len(queries), dtype=torch.int64)
    right, right_at = none.clone(), torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(items), block):
        scores = queries @ items[start : start + block].T
        is_right = owners[:, None] == item_owner[None, start : start + block]
        _keep_best(scores, start, top, top_at)
        _keep_best(scores.masked_fill(~is_right, -torch.inf), start, right, right_at)
    rank = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(items), block):
        # The same product again, not kept: its numbers are the same bit by bit.
        scores = queries @ items[start : start + block].T
        places = torch.arange(start, start + scores.shape[1])
        before = scores > right[:, None]
        before |= (scores == right[:, None]) & (places[None] < right_at[:, None])
        rank += before.sum(1)
    return rank, top_at


def _keep_best(scores: Tensor, start: int, best: Tensor, best_at: Tensor) -> None:
    """Update the best score of every query and its place, in place; the first of equals stays."""
    values, places = scores.max(1)
    better = values > best
    best[better] = values[better]
    best_at[better] = places[better] + start


def _embed_texts(partner: TextPartner, texts: Sequence[str]) -> Tensor:
    embedded = partner.encode(texts)
    is_finite = torch.isfinite(embedded).all(1)
    if not is_finite.all():
        bad = int((~is_finite).nonzero()[0])
        raise TowerError(
            f"the text tower of {partner.source} gives NaN or infinity for the caption "
            f"{texts[bad]!r}.",
            "Its weights are damaged; fetch them again.",
        )
    return normalize(embedded, dim=-1)


def _column(
    dataset: ProbeDataset,
    texts: Sequence[str],
    owner: Tensor,
    direction: str,
    k: int,
    ranks: Ranks,
    details: dict[str, Any],
    name: str,
) -> ProbeColumn:
    captions = dataset.require_captions()
    images = [dataset.image_name(index) for index in range(len(dataset))]
    best, found = ranks.best.tolist(), (ranks.rank < k).float().tolist()
    owners = owner.tolist()
    rows = []
    for index, (choice, score) in enumerate(zip(best, found, strict=True)):
        position = index if direction == "I2T" else owners[index]
        if direction == "I2T":
            question = "Which caption fits the image?"
            target, answer = " | ".join(captions[index]), texts[choice]
        else:
            question = f"Which image shows: {texts[index]}"
            target, answer = images[position], images[choice]
        rows.append(
            ProbeRow(
                doc_id=index,
                cluster=images[position],
                question=question,
                target=target,
                answer=answer,
                score=score,
                image=dataset.images.name(position),
            )
        )
    return ProbeColumn(
        name=f"{name} {direction} R@{k}",
        metric=f"recall@{k}",
        score=percent(found),
        statistic="mean",
        rows=rows,
        suite=SUITE,
        details={"median_rank": ranks.rank.double().median().item() + 1, **details},
    )
