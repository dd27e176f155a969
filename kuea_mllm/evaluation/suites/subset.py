"""Which documents of a task are asked when not all are: the rule behind `--limit`.

A draw depends on the seed and the number of units alone, so that every model is asked the same
documents; a smaller limit asks a part of what a larger one does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

FIRST = "first N documents of each task"
DRAWN = "N documents of each task, drawn at random with limit_seed; what is scored together whole"


def limit_rule(seed: int | None) -> str:
    """Say in words which documents a limit keeps."""
    return FIRST if seed is None else DRAWN


def draw_positions(units: Iterable[Hashable], limit: int | None, seed: int | None) -> list[int]:
    """Choose documents, whole units of them.

    Args:
        units: The unit of each document; documents of one unit (the two questions of an MMVP
            pair) are asked together or not at all.
        limit: At most so many documents, but one unit at least; None takes all.
        seed: Seed of the draw; None takes units as they come.

    Returns:
        Positions of the chosen documents, ascending.
    """
    members: dict[Hashable, list[int]] = {}
    total = 0
    for position, unit in enumerate(units):
        members.setdefault(unit, []).append(position)
        total += 1
    if limit is None or limit >= total:
        return list(range(total))
    groups = list(members.values())
    order = range(len(groups)) if seed is None else _shuffled(len(groups), seed)
    chosen: list[int] = []
    for group in order:
        if chosen and len(chosen) + len(groups[group]) > limit:
            break
        chosen += groups[group]
    return sorted(chosen)


def keep_documents(task: Any, positions: Sequence[int]) -> None:
    """Cut the documents of a loaded lmms-eval task down to some of them."""
    split = task.config.test_split or task.config.validation_split
    is_shared = task.dataset_no_image is task.dataset
    task.dataset[split] = task.dataset[split].select(positions)
    if not is_shared:
        task.dataset_no_image[split] = task.dataset_no_image[split].select(positions)
    task.task_docs = task.eval_docs


def limit_task(task: Any, limit: int | None, seed: int | None, *, per_unit: int = 1) -> None:
    """Apply a limit to a loaded lmms-eval task.

    Args:
        task: lmms-eval's task object.
        limit: Documents to keep; None keeps all.
        seed: Seed of the draw; None keeps the first.
        per_unit: So many documents that follow each other are a unit.
    """
    count = len(task.eval_docs_no_media)
    if limit is None or limit >= count:
        return
    keep_documents(task, draw_positions((n // per_unit for n in range(count)), limit, seed))


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order
