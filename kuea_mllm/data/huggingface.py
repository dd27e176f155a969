"""Hugging Face data sets: the only module of the data path that imports `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from kuea_mllm.data.source import decode_cell
from kuea_mllm.errors import DataError

_ROWS_AT_ONCE = 16
_SHARDS_OF_SAVED = 128


class DatasetImages:
    """One split of a Hugging Face data set, memory-mapped by `datasets`.

    Args:
        reference: A folder that `save_to_disk` wrote, a folder that `load_dataset` understands, or
            an id on the hub.
        split: Which split.
        column: The image column; None takes the only one.

    Raises:
        DataError: If there is no such data set, split or column.
    """

    def __init__(self, reference: str, *, split: str = "train", column: str | None = None) -> None:
        self.reference = reference
        data = _open(reference, split, streaming=False)
        if not len(data):
            raise DataError(f"split {split} of data set {reference} is empty.")
        self.column = _image_column(data.features, reference, column)
        self.split = split
        # The name that `datasets` itself gives to this content and its history.
        text = f"{data._fingerprint}\0{len(data)}\0{self.column}"
        self._fingerprint = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        self._data = _undecoded(data, self.column)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Image.Image:
        """Decode one image completely."""
        return decode_cell(self._data[int(index)][self.column], self.name(index))

    def name(self, index: int) -> str:
        """Return `data set/split!row`."""
        return f"{self.reference}/{self.split}!{index}"

    def fingerprint(self) -> str:
        """Hash the fingerprint that `datasets` keeps, the number of rows and the column."""
        return self._fingerprint


class DatasetStream:
    """One split of a data set, read front to back without downloading it first.

    Args:
        reference: As for `DatasetImages`.
        split: Which split.
        column: The image column; None takes the only one.

    Raises:
        DataError: If there is no such data set, split or column.
    """

    def __init__(self, reference: str, *, split: str = "train", column: str | None = None) -> None:
        self.reference, self.split = reference, split
        data = _open(reference, split, streaming=True)
        if data.features is None:
            raise DataError(
                f"data set {reference} does not state its columns.", "Set data.stream=false."
            )
        self.column = _image_column(data.features, reference, column)
        self._data = _undecoded(data, self.column)

    def __len__(self) -> int:
        """Return the number of shards that the data set comes in."""
        return int(self._data.num_shards)

    def rows(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield name and undecoded cell of each row of one shard."""
        part = self._data.shard(num_shards=len(self), index=shard)
        number = 0
        # Not `for row in part`: that would divide the shard once more among DataLoader workers.
        for batch in part.iter(batch_size=_ROWS_AT_ONCE):
            for cell in batch[self.column]:
                yield f"{self.reference}/{self.split}!shard {shard}, row {number}", cell
                number += 1


def _open(reference: str, split: str, *, streaming: bool) -> Any:
    import datasets

    try:
        if _is_saved(reference):
            data = datasets.load_from_disk(reference)
            if isinstance(data, dict):
                if split not in data:
                    raise ValueError(f"it has no split {split}, only {', '.join(data)}")
                data = data[split]
            return data.to_iterable_dataset(_shards_of(len(data))) if streaming else data
        return datasets.load_dataset(reference, split=split, streaming=streaming)
    # `datasets` raises anything from ValueError to pickling and connection errors here.
    except Exception as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise DataError(
            f"data set {reference} cannot be opened (split {split}): {reason}.",
            "Give a folder, or an id on the hub that can be reached from here, and data.split.",
        ) from error


def _shards_of(rows: int) -> int:
    # A saved data set is memory-mapped, so it can come in as many parts as readers may want.
    return max(1, min(rows, _SHARDS_OF_SAVED))


def _is_saved(reference: str) -> bool:
    folder = Path(reference)
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _image_column(features: Any, reference: str, column: str | None) -> str:
    import datasets

    listed = ", ".join(f"{name} ({type(each).__name__})" for name, each in features.items())
    if column is not None:
        if column not in features:
            raise DataError(f"data set {reference} has no column {column}: {listed}.")
        return column
    found = [name for name, each in features.items() if isinstance(each, datasets.Image)]
    if len(found) == 1:
        return str(found[0])
    what = "several image columns" if found else "no column of the type Image"
    raise DataError(
        f"data set {reference} has {what}: {listed}.", "Name the image column with data.column."
    )


def _undecoded(data: Any, column: str) -> Any:
    import datasets

    # Pictures are decoded here and not by `datasets`, so that every source decodes alike and names
    # what it cannot read.
    data = data.select_columns([column])
    return data.cast_column(column, datasets.Image(decode=False))


def read_column(reference: str, split: str, column: str) -> list[Any]:
    """Return one column of a split, such as its labels or captions.

    Args:
        reference: As for `DatasetImages`.
        split: Which split.
        column: Which column.

    Raises:
        DataError: If there is no such data set, split or column.
    """
    data = _open(reference, split, streaming=False)
    if column not in data.features:
        raise DataError(f"data set {reference} has no column {column}: {', '.join(data.features)}.")
    return list(data[column])


def class_labels(
    reference: str, split: str, column: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return the label column of a split and the names of its classes, () where it has none.

    Args:
        reference: As for `DatasetImages`.
        split: Which split.
        column: The label column; None takes the only one of the type ClassLabel.

    Raises:
        DataError: If there is no such data set, split or column.
    """
    import datasets

    features = _open(reference, split, streaming=False).features
    if column is None:
        found = [name for name, each in features.items() if isinstance(each, datasets.ClassLabel)]
        if len(found) != 1:
            what = "several columns" if found else "no column"
            raise DataError(
                f"data set {reference} has {what} of the type ClassLabel: {', '.join(features)}.",
                "Name the label column with label_column in the recipe.",
            )
        column = str(found[0])
    if column not in features:
        raise DataError(f"data set {reference} has no column {column}: {', '.join(features)}.")
    return column, tuple(getattr(features[column], "names", ()))
