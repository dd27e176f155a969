"""Images in parquet files, read by position one row group at a time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from kuea_mllm.data.source import decode_cell
from kuea_mllm.errors import DataError
from kuea_mllm.log import LOGGER

# Row groups kept per process. Reading in order needs one; threads that read ahead a few more.
_GROUPS_KEPT = 4
_LARGE_GROUP = 64 << 20
_OPEN_THREADS = 16
_BAR_FROM = 16


class ParquetImages:
    """All rows of some parquet files.

    The image column is binary, or a struct of `bytes` and `path` as Hugging Face writes it. One
    image costs the reading of its row group, which is kept for the next few: reading in random
    order is slow where row groups are large (a pack, tar shards or a stream are not).

    Args:
        files: Paths.
        column: Name of the image column; None takes the only one that can be.

    Raises:
        DataError: If a file is missing or damaged, or the column cannot be told.
    """

    def __init__(self, files: Sequence[str], *, column: str | None = None) -> None:
        self.files = list(files)
        schema = _schema(self.files[0])
        self.column = column or _find_column(schema, self.files[0])
        _require_column(schema, self.column, self.files[0])
        with ThreadPool(_OPEN_THREADS) as pool:
            found = pool.imap(lambda path: _row_groups(path, self.column, schema), self.files)
            few = len(self.files) < _BAR_FROM
            bar = tqdm(found, "open", len(self.files), unit="file", disable=few, leave=False)
            groups = list(bar)
        rows = np.concatenate([each[:, 0] for each in groups])
        self._bytes = np.concatenate([each[:, 1] for each in groups])
        self._starts = np.concatenate([[0], np.cumsum(rows)])  # (row groups + 1,)
        self._first_group = np.concatenate([[0], np.cumsum([len(each) for each in groups])])
        if not len(self):
            raise DataError(f"{len(files)} parquet files, first {self.files[0]}, hold no row.")
        if self._bytes.mean() > _LARGE_GROUP:
            LOGGER.warning(
                "row groups of %s have %.0f MiB on average: reading images in random order will "
                "be slow; make a pack of them (kuea-mllm pack)",
                Path(self.files[0]).parent,
                self._bytes.mean() / 2**20,
            )
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> Image.Image:
        """Decode one image completely."""
        file, group, row = self._locate(index)
        return decode_cell(self._group(file, group)[row].as_py(), self.name(index))

    def name(self, index: int) -> str:
        """Return `file.parquet!row`."""
        file, group, row = self._locate(index)
        first = int(self._starts[int(self._first_group[file])])
        start = int(self._starts[int(self._first_group[file]) + group])
        return f"{self.files[file]}!{start - first + row}"

    def fingerprint(self) -> str:
        """Hash the names of files (without their folder), and rows and bytes of row groups."""
        digest = hashlib.sha256(self.column.encode() + b"\0")
        for path in self.files:
            digest.update(os.fsencode(Path(path).name) + b"\0")
        for array in (self._first_group, self._starts, self._bytes):
            digest.update(array.astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def groups(self) -> int:
        """Return the number of row groups in all files."""
        return len(self._starts) - 1

    def group_rows(self, number: int) -> Iterator[tuple[str, Any]]:
        """Yield name and undecoded cell of each row of one row group, read just once."""
        first = int(self._starts[number])
        file = int(np.searchsorted(self._first_group, number, side="right")) - 1
        cells = self._read_group(file, number - int(self._first_group[file]))
        for row, cell in enumerate(cells):
            yield self.name(first + row), cell.as_py()

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Return the file, the row group in it and the row in that."""
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)} images")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = int(np.searchsorted(self._first_group, group, side="right")) - 1
        return file, group - int(self._first_group[file]), index - int(self._starts[group])

    def _group(self, file: int, group: int) -> pa.ChunkedArray:
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            found = self._groups.get((file, group))
            if found is None:
                found = self._groups[file, group] = self._read_group(file, group)
                if len(self._groups) > _GROUPS_KEPT:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end((file, group))
            return found

    def _read_group(self, file: int, group: int) -> pa.ChunkedArray:
        path = self.files[file]
        try:
            # Opened anew each time: its footer is small beside a row group of images, and no
            # descriptor or thread of Arrow's outlives a fork.
            with pq.ParquetFile(path, pre_buffer=False) as opened:
                return opened.read_row_group(
                    group, columns=[self.column], use_threads=False
                ).column(self.column)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"parquet file {path}, row group {group}, cannot be read: {reason}.",
                "Copy or download this file again.",
            ) from error

    def _reset(self) -> None:
        self._groups: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        left = {"_groups", "_lock", "_process"}
        return {key: value for key, value in self.__dict__.items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _schema(path: str) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from error


def _row_groups(path: str, column: str, expected: pa.Schema) -> np.ndarray:
    """Return rows and bytes of each row group, (row groups, 2)."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from error
    _require_column(schema, column, path)
    if schema.field(column).type != expected.field(column).type:
        raise DataError(
            f"parquet file {path}: column {column} is {schema.field(column).type}, but "
            f"{expected.field(column).type} in the first file."
        )
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _not_parquet(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(
        f"parquet file {path} cannot be opened: {reason.rstrip('.')}.",
        "Copy or download it again; a download that was cut short lacks its footer.",
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema)


def _find_column(schema: pa.Schema, path: str) -> str:
    fitting = [field.name for field in schema if _holds_images(field.type)]
    if len(fitting) == 1:
        return str(fitting[0])
    what = "several columns that could be" if fitting else "no column of"
    raise DataError(
        f"parquet file {path} has {what} images: {_columns(schema)}.",
        "Name the image column with data.column; it is binary, or a struct with `bytes`.",
    )


def _require_column(schema: pa.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise DataError(f"parquet file {path} has no column {column}: {_columns(schema)}.")
    kind = schema.field(column).type
    if not _holds_images(kind):
        raise DataError(
            f"parquet file {path}: column {column} is {kind}, not binary or a struct with `bytes`."
        )
