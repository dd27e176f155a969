"""Which images lie near each other under one model and not under another.

All pairs of images are visited once, a block of rows at a time, so that thousands of images need no
matrix of all their similarities in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from kuea_mllm.errors import DataError

ORIGINAL, ALIGNED, TEACHER = "original", "aligned", "teacher"

_BLOCK = 512
# Candidates of each list, of which pairs that show an image again are left out.
_CANDIDATES = 400


@dataclass(frozen=True)
class Pair:
    """Two images and how alike they are to each model.

    Attributes:
        first: Position of the first image.
        second: Position of the second image, a larger one.
        cosine: Cosine of their embeddings, by name of the model.
    """

    first: int
    second: int
    cosine: dict[str, float]


@dataclass(frozen=True)
class PairSurvey:
    """What all pairs of images say.

    Attributes:
        images: Number of images.
        overlap: Share of the k nearest neighbours that two models agree on, mean over images:
            "original|aligned" -> k -> share.
        chance: k -> the share that two unrelated models would agree on.
        mean_cosine: Mean cosine of two different images, by model.
        gap: Mean absolute difference of cosines between two models, over all pairs.
        moved: "apart", "together" and, with a teacher, "blind" (alike to the original, not to the
            teacher) -> pairs, the strongest first, no image twice.
    """

    images: int
    overlap: dict[str, dict[int, float]]
    chance: dict[int, float]
    mean_cosine: dict[str, float]
    gap: dict[str, float]
    moved: dict[str, list[Pair]] = field(default_factory=dict)


def survey_pairs(
    embeddings: Mapping[str, NDArray[np.float32]],
    *,
    ks: Sequence[int] = (1, 5, 10, 50),
    shown: int = 12,
    device: str = "cpu",
    progress: Callable[[Iterator[int], int], Iterator[int]] | None = None,
) -> PairSurvey:
    """Compare how several models place the same images.

    Args:
        embeddings: "original", "aligned" and, if there is one, "teacher" -> (images, width); the
            widths may differ.
        ks: Numbers of neighbours; those that are no less than the number of images are left out.
        shown: Pairs to return of each kind.
        device: Where to compute.
        progress: Given the starts of the blocks and their number, yields them.

    Raises:
        DataError: If there are fewer than three images.
        ValueError: If the numbers of images differ, or "original" or "aligned" is missing.
    """
    counts = {len(rows) for rows in embeddings.values()}
    if len(counts) != 1 or not {ORIGINAL, ALIGNED} <= embeddings.keys():
        raise ValueError(f"original and aligned of one length are needed, not {counts}")
    count = counts.pop()
    if count < 3:
        raise DataError(
            f"neighbours need at least three images, found {count}.", "Give a larger --images."
        )
    units = {
        name: normalize(torch.tensor(rows, dtype=torch.float32)).to(device)
        for name, rows in embeddings.items()
    }
    wanted = [k for k in ks if k < count]
    sums = _Sums(list(units), wanted)
    lists = {name: _Strongest(_CANDIDATES) for name in _differences(units.keys())}
    starts: Iterator[int] = iter(range(0, count, _BLOCK))
    for start in progress(starts, -(-count // _BLOCK)) if progress else starts:
        block = {name: rows[start : start + _BLOCK] @ rows.T for name, rows in units.items()}
        sums.add(block, start)
        for name, (more, less) in _differences(units.keys()).items():
            lists[name].add(block[more] - block[less], start)
    pairs = count * (count - 1)
    return PairSurvey(
        images=count,
        overlap={
            names: {k: total / count / k for k, total in by_k.items()}
            for names, by_k in sums.agreed.items()
        },
        chance={k: k / (count - 1) for k in wanted},
        mean_cosine={name: total / pairs for name, total in sums.cosine.items()},
        gap={names: total / pairs for names, total in sums.gap.items()},
        moved={name: _pairs(found, units, shown) for name, found in lists.items()},
    )


def _differences(names: object) -> dict[str, tuple[str, str]]:
    """Name of a list -> the model that finds its pairs more alike, and the one that does less."""
    found = {"apart": (ORIGINAL, ALIGNED), "together": (ALIGNED, ORIGINAL)}
    if TEACHER in names:  # type: ignore[operator]
        found["blind"] = (ORIGINAL, TEACHER)
    return found


class _Sums:
    def __init__(self, names: list[str], ks: Sequence[int]) -> None:
        self._couples = list(combinations(names, 2))
        keys = ["|".join(couple) for couple in self._couples]
        self._ks = ks
        self.agreed = {key: dict.fromkeys(ks, 0.0) for key in keys}
        self.gap = dict.fromkeys(keys, 0.0)
        self.cosine = dict.fromkeys(names, 0.0)

    def add(self, block: Mapping[str, Tensor], start: int) -> None:
        nearest = {}
        for name, cosines in block.items():
            rows = torch.arange(len(cosines), device=cosines.device)
            # An image is not its own neighbour; its cosine with itself counts nowhere.
            self.cosine[name] += float(cosines.sum(dtype=_sum_dtype(cosines))) - float(
                cosines[rows, start + rows].sum()
            )
            alone = cosines.clone()
            alone[rows, start + rows] = -torch.inf
            nearest[name] = alone.topk(max(self._ks), dim=1).indices if self._ks else None
        for first, second in self._couples:
            key = f"{first}|{second}"
            gap = (block[first] - block[second]).abs()
            rows = torch.arange(len(gap), device=gap.device)
            gap[rows, start + rows] = 0.0
            self.gap[key] += float(gap.sum(dtype=_sum_dtype(gap)))
            for k in self._ks:
                a, b = nearest[first], nearest[second]
                if a is not None and b is not None:
                    self.agreed[key][k] += float(_common(a[:, :k], b[:, :k]))


def _common(a: Tensor, b: Tensor) -> int:
    return int((a[:, :, None] == b[:, None, :]).any(2).sum())


def _sum_dtype(values: Tensor) -> torch.dtype:
    # Apple's GPU has no float64.
    return torch.float32 if values.device.type == "mps" else torch.float64


class _Strongest:
    """The pairs with the largest values so far, each once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.values = torch.empty(0)
        self.pairs = torch.empty(0, 2, dtype=torch.long)

    def add(self, values: Tensor, start: int) -> None:
        rows, columns = values.shape
        later = torch.arange(columns, device=values.device)[None, :] > torch.arange(
            start, start + rows, device=values.device
        ).unsqueeze(1)
        flat = values.masked_fill(~later, -torch.inf).flatten()
        best = flat.topk(min(self._count, len(flat)))
        pairs = torch.stack([start + best.indices // columns, best.indices % columns], 1)
        kept = best.values > -torch.inf
        merged = torch.cat([self.values, best.values[kept].cpu()])
        order = merged.argsort(descending=True, stable=True)[: self._count]
        self.values = merged[order]
        self.pairs = torch.cat([self.pairs, pairs[kept].cpu()])[order]


def _pairs(found: _Strongest, units: Mapping[str, Tensor], shown: int) -> list[Pair]:
    seen: set[int] = set()
    pairs: list[Pair] = []
    for value, (first, second) in zip(found.values.tolist(), found.pairs.tolist(), strict=True):
        # A pair that no model moved is no finding, and one picture shall not fill the page.
        if value <= 0 or len(pairs) == shown:
            break
        if seen & {first, second}:
            continue
        seen |= {first, second}
        cosine = {name: float(rows[first] @ rows[second]) for name, rows in units.items()}
        pairs.append(Pair(first, second, cosine))
    return pairs
