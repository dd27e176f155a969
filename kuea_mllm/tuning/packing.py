"""Several samples in one row: which go together, and the batches made of them.

A row holds as many samples as its length allows. None sees another: positions begin anew in each,
there is no attention mask, and the adapters' `hidden_states` keeps them apart by that. What differs
from training sample by sample is what an update holds; the loss of a sample does not.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kuea_mllm.errors import DataError
from kuea_mllm.tuning.collate import Collator, Row
from kuea_mllm.tuning.examples import IGNORED, Example, TuningExamples
from kuea_mllm.tuning.sampler import GroupedBatchSampler

# Samples that are fitted together at a time: all of them at once would put the longest of the
# whole mixture into the same rows, whatever the seed.
WINDOW = 4096
# Keeps the order in which rows are filled apart from the order in which they are visited.
_FILLING = 0x9AC4


def fill_rows(
    positions: Sequence[int], tokens: NDArray[np.integer], *, room: int, window: int = WINDOW
) -> list[list[int]]:
    """Put samples into rows: the longest of a window first, each where it leaves the least room.

    Args:
        positions: Of the samples, in the order of their windows.
        tokens: Of every sample, by position.
        room: Tokens of a row; a longer sample has a row for itself.
        window: Samples that are fitted together.

    Returns:
        Positions of each row's samples.
    """
    rows: list[list[int]] = []
    for start in range(0, len(positions), window):
        here = np.asarray(positions[start : start + window])
        ordered = here[np.argsort(-np.asarray(tokens[here], dtype=np.int64), kind="stable")]
        spaces: list[tuple[int, int]] = []  # tokens left and number, of rows that are not full
        for position, size in zip(ordered.tolist(), tokens[ordered].tolist(), strict=True):
            at = bisect_left(spaces, (size, -1))
            if at < len(spaces):
                left, row = spaces.pop(at)
                rows[row].append(position)
            else:
                left, row = room, len(rows)
                rows.append([position])
            if left > size:
                insort(spaces, (left - size, row))
    return rows


class PackedBatchSampler(Sampler[list[list[int]]]):
    """Batches of one process for one epoch, each a list of rows.

    Rows depend on the seed alone, so that every epoch has as many and a run may be resumed with
    another number of processes. Their order depends on seed and epoch, and is made like that of
    single samples: rows of text alone apart, and the rows of an update of like length.

    Args:
        lengths: Of every sample in words, negative without an image (`Mixture.lengths()`).
        tokens: Of every sample.
        max_length: Tokens of a row.
        batch_size: Rows in one micro-batch of one process.
        world_size: Number of processes.
        accumulation: Micro-batches in one optimiser step.
        seed: Of rows and order.
        rank: Which process this is.
        start_batch: Micro-batches of this process that are done already.
        by_modality: Off joins samples with and without an image, too.

    Raises:
        DataError: If there is no sample.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        tokens: NDArray[np.integer],
        *,
        max_length: int,
        batch_size: int,
        world_size: int,
        accumulation: int,
        seed: int = 0,
        rank: int = 0,
        start_batch: int = 0,
        by_modality: bool = True,
    ) -> None:
        if len(lengths) != len(tokens):
            raise ValueError(f"{len(lengths)} lengths and {len(tokens)} token counts")
        has_image = np.asarray(lengths) > 0
        groups = [has_image, ~has_image] if by_modality else [np.ones_like(has_image)]
        shuffled = np.array(_shuffled(len(tokens), seed), dtype=np.int64)
        self.rows = [
            row
            for group in groups
            for row in fill_rows(shuffled[group[shuffled]].tolist(), tokens, room=max_length)
        ]
        sizes = [int(tokens[row].sum()) * (1 if has_image[row].any() else -1) for row in self.rows]
        self._batches = GroupedBatchSampler(
            sizes,
            batch_size=batch_size,
            world_size=world_size,
            accumulation=accumulation,
            seed=seed,
            rank=rank,
            start_batch=start_batch,
            by_modality=by_modality,
        )

    @property
    def epoch(self) -> int:
        """Counts from 0; each has another order of the rows."""
        return self._batches.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._batches.epoch = epoch

    def __len__(self) -> int:
        """Return the micro-batches of one process in an epoch, those done included."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[list[int]]]:
        for batch in self._batches:
            yield [self.rows[number] for number in batch]


class PackedExamples(Dataset[list[Example]]):
    """Samples by the positions of a row.

    Args:
        examples: Single samples.
    """

    def __init__(self, examples: TuningExamples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: Sequence[int]) -> list[Example]:
        return [self.examples[position] for position in row]


class PackedCollator(Collator):
    """Makes a batch of rows that hold several samples each; arguments as of `Collator`."""

    def __call__(self, examples: Sequence[Sequence[Example]]) -> dict[str, Tensor]:  # type: ignore[override]
        """Collate.

        Returns:
            `input_ids`, `position_ids` and `labels`, (rows, longest row), int64, and whatever else
            `Collator` gives, one entry of each sample. What fills a row up is like one more sample
            of which nothing is learned. The first token of a sample is never predicted: what comes
            before it in the row is another sample.

        Raises:
            DataError: If a row has more than `max_length` tokens.
        """
        rows = [[self._row(example) for example in row] for row in examples]
        lengths = [sum(len(ids) for ids, _, _ in row) for row in rows]
        width = max(lengths)
        if width > self.max_length:
            raise DataError(
                f"a packed row has {width} tokens, more than data.max_length {self.max_length}: "
                "its samples have more tokens than were counted.",
                "Remove the kept counts, mixtures/*/tokens-*.npy in the folder of caches.",
            )
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        position_ids = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for number, row in enumerate(rows):
            at = 0
            for ids, targets, _ in row:
                end = at + len(ids)
                input_ids[number, at:end] = torch.tensor(ids)
                labels[number, at + 1 : end] = torch.tensor(targets[1:], dtype=torch.long)
                position_ids[number, at:end] = torch.arange(len(ids))
                at = end
            position_ids[number, at:] = torch.arange(width - at)
        samples = [example for row in examples for example in row]
        flat: list[Row] = [each for row in rows for each in row]
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return batch | self._of_samples(samples, flat)


@dataclass(frozen=True)
class PackingReport:
    """What packing does to padding.

    Attributes:
        samples: In the mixture.
        rows: They are packed in.
        filled: Share of the rows' length that samples take.
        padding: Share of the tokens of micro-batches that is padding.
        padding_unpacked: The same without packing, for micro-batches of as many samples.
        samples_unpacked: How many these are.
    """

    samples: int
    rows: int
    filled: float
    padding: float
    padding_unpacked: float
    samples_unpacked: int

    def __str__(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.samples} samples packed in {self.rows} rows, filled to {self.filled:.1%}; "
            f"{self.padding:.1%} of the micro-batches is padding, without packing it would be "
            f"{self.padding_unpacked:.1%} of micro-batches of {self.samples_unpacked}"
        )


def report_packing(
    sampler: PackedBatchSampler,
    lengths: NDArray[np.int64],
    tokens: NDArray[np.integer],
    *,
    max_length: int,
    batch_size: int,
    chunks: int,
    by_modality: bool = True,
) -> PackingReport:
    """Compare packed rows with the same samples one by one in the order of their lengths.

    Args:
        sampler: Of one process.
        lengths: As for the sampler.
        tokens: Likewise.
        max_length: Tokens of a row.
        batch_size: Rows in a micro-batch.
        chunks: Micro-batches in an update: processes times accumulation.
        by_modality: As for the sampler.
    """
    sizes = np.array([int(tokens[row].sum()) for row in sampler.rows])
    alike = max(1, round(batch_size * len(tokens) / len(sampler.rows)))
    unpacked = GroupedBatchSampler(
        lengths, batch_size=alike, world_size=1, accumulation=chunks, by_modality=by_modality
    )
    return PackingReport(
        samples=len(tokens),
        rows=len(sizes),
        filled=float(sizes.sum() / (len(sizes) * max_length)),
        padding=padding_share(
            [[int(tokens[row].sum()) for row in batch] for batch in sampler],
        ),
        padding_unpacked=padding_share([tokens[batch].tolist() for batch in unpacked]),
        samples_unpacked=alike,
    )


def padding_share(batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding in batches that are as wide as their longest row.

    Args:
        batches: Tokens of each row of each batch.
    """
    taken = sum(sum(batch) for batch in batches)
    wide = sum(len(batch) * max(batch) for batch in batches)
    return 1 - taken / wide


def _shuffled(count: int, seed: int) -> list[int]:
    words = np.random.SeedSequence([seed, _FILLING]).generate_state(2)
    generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
    return torch.randperm(count, generator=generator).tolist()
