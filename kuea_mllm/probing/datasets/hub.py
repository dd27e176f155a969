"""Data sets of Hugging Face's `datasets`: saved folders, folders it understands, hub ids."""

from __future__ import annotations

import numpy as np

from kuea_mllm.data.huggingface import DatasetImages, class_labels, read_column
from kuea_mllm.errors import DataError
from kuea_mllm.probing.datasets.dataset import ProbeDataset


def open_table(
    reference: str,
    split: str,
    *,
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
) -> ProbeDataset:
    """Open a split of a data set with labels or captions in a column.

    Args:
        reference: A folder or an id on the hub.
        split: Which split.
        name: Heading of its columns.
        image_column: The image column; None takes the only one.
        label_column: The label column; None takes the only one of the type ClassLabel.
        caption_column: Column of captions, a text or a list of texts each; with it, labels are not
            looked for.

    Raises:
        DataError: If there is no such data set, split or column.
    """
    images = DatasetImages(reference, split=split, column=image_column)
    if caption_column is not None:
        cells = read_column(reference, split, caption_column)
        captions = tuple((c,) if isinstance(c, str) else tuple(map(str, c)) for c in cells)
        return ProbeDataset(name, split, images, reference, captions=captions)
    column, class_names = class_labels(reference, split, label_column)
    labels = read_column(reference, split, column)
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"column {column} of data set {reference} holds no whole numbers.")
    return ProbeDataset(
        name,
        split,
        images,
        reference,
        labels=np.array(labels, dtype=np.int64),
        class_names=class_names,
    )
