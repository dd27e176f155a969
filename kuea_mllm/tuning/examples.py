"""Samples as the trainer draws them: tokens and pixels of one record."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kuea_mllm.adapters.base import ConversationEncoder
from kuea_mllm.data.source import read_image
from kuea_mllm.errors import DataError, UnreadableImage
from kuea_mllm.tuning.mixture import Mixture
from kuea_mllm.tuning.records import leaves_folder

IGNORED = -100

Preprocess = Callable[[Sequence[Image.Image]], Tensor]


class Example(NamedTuple):
    """One sample.

    Attributes:
        position: In the mixture.
        input_ids: See `EncodedSample.input_ids`.
        labels: See `EncodedSample.labels`.
        pixels: (3, size, size), None for text alone.
        left_out: Tokens that were cut off.
    """

    position: int
    input_ids: list[int]
    labels: list[int]
    pixels: Tensor | None
    left_out: int


class TuningExamples(Dataset[Example]):
    """A mixture with its images, ready for `collate.Collator`.

    Args:
        mixture: The records.
        encoder: Of the model to tune.
        images: Folder that the records' paths are relative to; may be missing for text alone.
        preprocess: From PIL images to pixel values, (images, 3, size, size).
        skipped: Positions that are not read; an empty sample takes the place of each, so that
            all others stay in their micro-batches.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: ConversationEncoder,
        *,
        images: Path | None,
        preprocess: Preprocess,
        skipped: Collection[int] = (),
    ) -> None:
        self.mixture = mixture
        self.encoder = encoder
        self.images = images
        self.preprocess = preprocess
        self.skipped = frozenset(skipped)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> Example:
        if index in self.skipped:
            return Example(index, [self.encoder.pad_token_id], [IGNORED], None, 0)
        record = self.mixture.record(index)
        pixels = None
        if record["image"] is not None:
            pixels = self._pixels(record["image"], index)
        encoded = self.encoder.encode(record)
        return Example(index, encoded.input_ids, encoded.labels, pixels, encoded.left_out)

    def _pixels(self, image: str, index: int) -> Tensor:
        if self.images is None:
            raise DataError(
                f"{self.mixture.name(index)} has an image, and no image folder is given.",
                "Pass --images DIR, the folder that the paths in the file are relative to.",
            )
        path = image_path(self.images, image)
        try:
            return self.preprocess([read_image(path)])[0]
        except UnreadableImage as error:
            raise UnreadableImage(
                f"{self.mixture.name(index)}: {error.problem}",
                "Repair it, or leave this record out: --set "
                f"'data.skip_records=[{index}]'. All such images: "
                f"`kuea-mllm doctor --data {self.mixture.source} --images {self.images}`.",
            ) from error


def image_path(folder: Path, name: str) -> Path:
    """Return where an image lies.

    Raises:
        DataError: If that is outside of the folder. Links within it may lead elsewhere.
    """
    if leaves_folder(name):
        raise DataError(f"image {name} does not lie below the image folder {folder}.")
    return folder / name
