"""Batches of samples of different length, with and without an image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from kuea_mllm.errors import DataError
from kuea_mllm.log import LOGGER
from kuea_mllm.training.distributed import gather_objects
from kuea_mllm.tuning.examples import IGNORED, Example

# What the model does not take; `DataCounter.take` removes it from a batch.
_COUNTED = ("positions", "left_out", "unlabelled")
_NAMED = 5

# Ids, labels, and the number of tokens that were cut off.
Row = tuple[list[int], list[int], int]


class Collator:
    """Makes a batch: right padding, and the image token once for each patch.

    The original cuts twice: a sample in which the image counts as one token, and again after the
    image's patches have taken its place. The code released with the paper lacks the second cut, so
    its longest sample has 2048 + 575 positions.

    A batch without an image may carry a zero image all the same (`idle_pixel_values`). The original
    sends one through tower and projector, whose gradient is then zero instead of none, so that the
    optimiser goes on moving the projector. The model must not be given it as `pixel_values`: no
    token stands for it. Add 0 * the sum of its features to the loss.

    Args:
        placeholder: What stands for an image in `Example.input_ids`.
        image_token_id: What the model wants there.
        tokens_per_image: How often.
        pad_token_id: Fills rows; the mask does not depend on it.
        max_length: Longest row in tokens.
        cut_after_splicing: Whether the second cut is made.
        idle_image_size: Height and width of the zero image for batches without one; None gives
            none.
    """

    def __init__(
        self,
        *,
        placeholder: int,
        image_token_id: int,
        tokens_per_image: int,
        pad_token_id: int,
        max_length: int,
        cut_after_splicing: bool = True,
        idle_image_size: int | None = None,
    ) -> None:
        self.placeholder = placeholder
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.cut_after_splicing = cut_after_splicing
        self.idle_image_size = idle_image_size

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask` and `labels`, (batch, longest row), int64; `pixel_values`,
            (rows with an image, 3, size, size), absent without any; and for `DataCounter`, one of
            each row: `positions` in the mixture, `left_out` tokens, `unlabelled`.
        """
        rows = [self._row(example) for example in examples]
        width = max(len(ids) for ids, _, _ in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for number, (ids, targets, _) in enumerate(rows):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            labels[number, : len(ids)] = torch.tensor(targets)
            attention_mask[number, : len(ids)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return batch | self._of_samples(examples, rows)

    def count_tokens(self, example: Example) -> int:
        """Return how many tokens a sample takes in a batch; its pixels are not looked at."""
        return len(self._row(example)[0])

    def _of_samples(self, examples: Sequence[Example], rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return what a batch holds of each sample, whichever row it is in."""
        pixels = [
            _pixels_of(example)
            for example, (ids, _, _) in zip(examples, rows, strict=True)
            if self.image_token_id in ids
        ]
        found = {"pixel_values": torch.stack(pixels)} if pixels else self._idle_pixels()
        cuts = [e.left_out + cut for e, (_, _, cut) in zip(examples, rows, strict=True)]
        unlabelled = [all(target == IGNORED for target in targets) for _, targets, _ in rows]
        return found | {
            "positions": torch.tensor([example.position for example in examples]),
            "left_out": torch.tensor(cuts),
            "unlabelled": torch.tensor(unlabelled),
        }

    def _idle_pixels(self) -> dict[str, Tensor]:
        if self.idle_image_size is None:
            return {}
        return {"idle_pixel_values": torch.zeros(1, 3, self.idle_image_size, self.idle_image_size)}

    def _row(self, example: Example) -> Row:
        ids, labels = example.input_ids[: self.max_length], example.labels[: self.max_length]
        cut = len(example.input_ids) - len(ids)
        if self.placeholder not in ids:
            return ids, labels, cut
        if ids.count(self.placeholder) > 1:
            raise ValueError(f"sample {example.position} has more than one image tag")
        at = ids.index(self.placeholder)
        patches = self.tokens_per_image
        ids = [*ids[:at], *[self.image_token_id] * patches, *ids[at + 1 :]]
        labels = [*labels[:at], *[IGNORED] * patches, *labels[at + 1 :]]
        end = len(ids)
        if self.cut_after_splicing and end > self.max_length:
            # A part of an image can only be the very end of a row, where nothing is predicted any
            # more: without it, loss and gradient are the same.
            end = at if at < self.max_length < at + patches else self.max_length
        return ids[:end], labels[:end], cut + len(ids) - end


class DataCounter:
    """Counts, in the main process, what the limits of length and format cost.

    Args:
        name: From a position in the mixture to what to call it (`Mixture.name`).
        skipped: Positions that are not read, and not counted.
    """

    def __init__(self, name: Callable[[int], str], *, skipped: Collection[int] = ()) -> None:
        self._name = name
        self._skipped = frozenset(skipped)
        self.samples = 0
        self.truncated = 0
        self.left_out = 0
        self.unlabelled = 0

    def take(self, batch: dict[str, Tensor]) -> None:
        """Remove from a batch what is only for counting, and count it.

        The first few samples that nothing is learned from are named in the log.
        """
        positions, left_out, unlabelled = (batch.pop(key).tolist() for key in _COUNTED)
        self.samples += sum(position not in self._skipped for position in positions)
        self.truncated += sum(cut > 0 for cut in left_out)
        self.left_out += sum(left_out)
        for position, is_unlabelled in zip(positions, unlabelled, strict=True):
            if not is_unlabelled or position in self._skipped:
                continue
            self.unlabelled += 1
            if self.unlabelled <= _NAMED:
                LOGGER.warning(
                    "%s: nothing is learned from it; its answers were cut off, or cannot be told "
                    "from its questions",
                    self._name(position),
                )

    def require_something_learned(self) -> None:
        """Refuse to go on where no sample so far had an answer to learn.

        Raises:
            DataError: If so.
        """
        if self.samples and self.unlabelled == self.samples:
            raise DataError(
                f"nothing can be learned from any of the first {self.samples} samples: their "
                "answers were cut off, or cannot be told from their questions.",
                "Set a larger data.max_length, or check the data with `kuea-mllm doctor --data`.",
            )

    def report(self) -> dict[str, int]:
        """Return the counts, for the run record."""
        return {
            "samples": self.samples,
            "truncated_samples": self.truncated,
            "tokens_left_out": self.left_out,
            "unlabelled_samples": self.unlabelled,
        }

    def exchange(self) -> dict[str, int]:
        """Return the counts of all processes together; all of them have to ask."""
        reports = gather_objects(self.report())
        return {key: sum(report[key] for report in reports) for key in reports[0]}

    def load_report(self, report: Mapping[str, int]) -> None:
        """Go on from `report`."""
        self.samples = report["samples"]
        self.truncated = report["truncated_samples"]
        self.left_out = report["tokens_left_out"]
        self.unlabelled = report["unlabelled_samples"]


def _pixels_of(example: Example) -> Tensor:
    if example.pixels is None:
        raise ValueError(f"sample {example.position} has an image tag and no pixels")
    return example.pixels
