"""Which documents are asked, and which demonstrations each of them is shown.

Both ways draw uniformly, first a query set of 2,048 training examples, then the demonstrations of
each document from it. The published order of random numbers makes a document's demonstrations
depend on how many documents come before it and on the number of processes; the default draws for
every document from a stream of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kuea_mllm.errors import EvaluationError

QUERY_SET = 2048
_SUBSET, _QUERIES, _DOCUMENT = range(3)


@dataclass(frozen=True)
class Draw:
    """What one trial asks and shows.

    Attributes:
        documents: Indices into the test part, in the order they are visited.
        demonstrations: For each of them, indices into the training part, (documents, shots).
        query_set: The training examples that were drawn from.
    """

    # Not lists: three seeds and shots of VQAv2 are 14 million numbers.
    documents: npt.NDArray[np.int32]
    demonstrations: npt.NDArray[np.int32]
    query_set: npt.NDArray[np.int32]


def draw_uniform(
    test_size: int,
    train_size: int,
    shots: int,
    seed: int,
    *,
    num_samples: int | None = None,
    query_set: int = QUERY_SET,
    limit: int | None = None,
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
        limit: Return the first so many documents.

    Raises:
        EvaluationError: If there are fewer examples than demonstrations.
    """
    pool = np.random.default_rng([seed, _QUERIES]).permutation(train_size)[:query_set]
    _require_enough(len(pool), shots, train_size)
    documents = np.arange(test_size, dtype=np.int32)
    if num_samples is not None and num_samples < test_size:
        chosen = np.random.default_rng([seed, _SUBSET]).permutation(test_size)[:num_samples]
        documents = np.sort(chosen).astype(np.int32)
    documents = documents[:limit]
    shown = np.empty((len(documents), shots), dtype=np.int32)
    for row, document in zip(shown, documents.tolist(), strict=True):
        stream = np.random.default_rng([seed, _DOCUMENT, document])
        row[:] = pool[stream.permutation(len(pool))[:shots]]
    return Draw(documents, shown, pool.astype(np.int32))


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

    It draws anew for every number of shots, all of them with the same seed: fewer shots are not the
    first of more, and a document's demonstrations depend on those drawn before.

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
    documents = subset[order].astype(np.int32)
    shown = np.empty((count, shots), dtype=np.int32)
    for row in shown:
        row[:] = draws.sample(pool, shots)
    return Draw(documents, shown, np.asarray(pool, dtype=np.int32))


def in_document_order(draw: Draw) -> Draw:
    """Sort a draw by document; each keeps its demonstrations."""
    order = np.argsort(draw.documents)
    return Draw(draw.documents[order], draw.demonstrations[order], draw.query_set)


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
