"""Which documents are asked, and which demonstrations each of them is shown.

Both ways draw uniformly, first a query set of 2,048 training examples, then the demonstrations of
each document from it. The published order of random numbers makes a document's demonstrations
depend on how many documents come before it and on the number of processes; the default draws for
every document from a stream of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kuea_mllm.errors import EvaluationError

QUERY_SET = 2048
_SUBSET, _QUERIES, _DOCUMENT = range(3)


@dataclass(frozen=True)
class Draw:
    """What one trial asks and shows.

    Attributes:
        documents: Indices into the test part, in the order they are visited.
        demonstrations: For each of them, indices into the training part.
        query_set: The training examples that were drawn from.
    """

    documents: list[int]
    demonstrations: list[list[int]]
    query_set: list[int]


Sampler = Callable[..., Draw]


def draw_uniform(
    test_size: int,
    train_size: int,
    shots: int,
    seed: int,
    *,
    num_samples: int | None = None,
    query_set: int = QUERY_SET,
) -> Draw:
    """Draw so that a document's demonstrations depend on the seed and the document alone.

    Fewer shots are the first of more: 4 shots are the first 4 of 16.

    Args:
        test_size: Documents of the test part.
        train_size: Examples of the training part.
        shots: Demonstrations per document.
        seed: Seed of the trial.
        num_samples: Documents to ask, None for all.
        query_set: Training examples to draw from.

    Raises:
        EvaluationError: If there are fewer examples than demonstrations.
    """
    pool = np.random.default_rng([seed, _QUERIES]).permutation(train_size)[:query_set]
    _require_enough(len(pool), shots, train_size)
    documents = list(range(test_size))
    if num_samples is not None and num_samples < test_size:
        chosen = np.random.default_rng([seed, _SUBSET]).permutation(test_size)[:num_samples]
        documents = sorted(chosen.tolist())
    demonstrations = [
        pool[np.random.default_rng([seed, _DOCUMENT, document]).permutation(len(pool))[:shots]]
        for document in documents
    ]
    return Draw(documents, [row.tolist() for row in demonstrations], pool.tolist())


def draw_released(
    test_size: int,
    train_size: int,
    shots: int,
    seed: int,
    *,
    num_samples: int | None = None,
    query_set: int = QUERY_SET,
) -> Draw:
    """Draw with the random numbers of the published code, as one process uses them.

    Args: as of `draw_uniform`.

    Raises:
        EvaluationError: If there are fewer examples than demonstrations.
    """
    import torch

    # The legacy generators are the point here: the same numbers in the same order.
    numbers = np.random.RandomState(seed)
    count = test_size if num_samples is None else min(num_samples, test_size)
    subset = numbers.choice(test_size, count, replace=False)
    pool = numbers.choice(train_size, min(query_set, train_size), replace=False).tolist()
    _require_enough(len(pool), shots, train_size)
    # torch's distributed sampler shuffles with its seed 0 even on one process.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    draws = random.Random(seed)
    documents = [int(subset[place]) for place in order]
    return Draw(documents, [draws.sample(pool, shots) for _ in documents], pool)


def in_document_order(draw: Draw) -> Draw:
    """Sort a draw by document; each keeps its demonstrations."""
    pairs = sorted(zip(draw.documents, draw.demonstrations, strict=True))
    return Draw([d for d, _ in pairs], [shown for _, shown in pairs], draw.query_set)


def _require_enough(pool: int, shots: int, train_size: int) -> None:
    if pool < shots:
        raise EvaluationError(
            f"{shots} demonstrations were asked for, but there are only {pool} to draw from "
            f"(training part: {train_size}).",
            "Ask for fewer with --shots, or give the whole training part.",
        )


def require_pool(shots: Sequence[int], train_size: int) -> None:
    """Refuse more demonstrations than the training part has.

    Raises:
        EvaluationError: As above.
    """
    _require_enough(train_size, max(shots, default=0), train_size)
