"""A mixture of conversations as a memory-mapped Arrow file: made once, shared by all processes.

LLaVA-1.5's mixture has 665,298 records. Held as a Python list it costs several gigabytes in every
process, and in every worker too, because counting references writes to the pages that a fork
shares. The Arrow file stays in the page cache, once per machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm.auto import tqdm

from kuea_mllm.data.cache import cache_folder
from kuea_mllm.errors import DataError, OutputError
from kuea_mllm.io import atomic_directory, create_directory, read_json, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.tuning.records import (
    ANSWER,
    HUMAN,
    MalformedRecord,
    Record,
    normalise,
    signed_length,
)
from kuea_mllm.tuning.scanning import scan_records

# Raised whenever other columns, or other checks of the records, are wanted.
_FORMAT = 1
_BATCH = 4096
_ARROW_FILE = "records.arrow"
_STATEMENT_FILE = "mixture.json"
_SHOWN = 3
_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("image", pa.large_string()),
        ("is_answer", pa.large_list(pa.bool_())),
        ("values", pa.large_list(pa.large_string())),
        ("length", pa.int32()),
    ]
)


class Mixture:
    """Records that are read by position.

    Holds no record in memory and no open file across processes: pickled, it is two paths and a
    number.

    Args:
        folder: Directory that `open_mixture` made.
        source: The file it was made from, for messages.
        count: Number of records.
    """

    def __init__(self, folder: Path, *, source: Path, count: int) -> None:
        self.folder = folder
        self.source = source
        self._count = count
        self._reader: pa.RecordBatchFileReader | None = None
        self._batches: dict[int, pa.RecordBatch] = {}

    def __len__(self) -> int:
        return self._count

    def record(self, index: int) -> Record:
        """Return one record."""
        if not 0 <= index < self._count:
            raise IndexError(f"position {index} of {self._count} records")
        number, row = divmod(index, _BATCH)
        columns = [column[row].as_py() for column in self._batch(number).columns[:4]]
        name, image, is_answer, values = columns
        turns = zip(is_answer, values, strict=True)
        return {
            "id": name,
            "image": image,
            "conversations": [
                {"from": ANSWER if answers else HUMAN, "value": value} for answers, value in turns
            ],
        }

    def name(self, index: int) -> str:
        """Return how messages call one record."""
        return f"{self.source}, record {index} (id {self.record(index)['id']!r})"

    def lengths(self) -> NDArray[np.int64]:
        """Return the words of every record, (records,), negative where there is no image."""
        batches = range(-(-self._count // _BATCH))
        columns = [self._batch(number).column("length").to_numpy() for number in batches]
        return np.concatenate(columns).astype(np.int64)

    def _batch(self, number: int) -> pa.RecordBatch:
        batch = self._batches.get(number)
        if batch is None:
            if self._reader is None:
                self._reader = pa.ipc.open_file(pa.memory_map(str(self.folder / _ARROW_FILE)))
            # Only the addresses of the columns are kept; their content stays in the file.
            batch = self._batches[number] = self._reader.get_batch(number)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "source": self.source, "count": self._count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def open_mixture(path: str | Path, *, cache: Path | None = None, progress: bool = True) -> Mixture:
    """Open a mixture; the first time, turn its file into Arrow.

    What is made is kept under the checksum of the file's content, so that a changed file is read
    anew and a copied one is not. Of several processes that come at once, one does the work.

    Args:
        path: JSON list or JSONL, in LLaVA's schema or of chat messages (see `records.normalise`).
        cache: Where to keep it, by default `mixtures` in the folder of all caches.
        progress: Whether to show a bar.

    Raises:
        DataError: If the file or a record in it is malformed (names file, position and id), or what
            was kept is damaged.
    """
    path = Path(path)
    checksum = _checksum(path)
    home = cache or cache_folder() / "mixtures"
    folder = home / f"{checksum[:32]}-{_FORMAT}"
    if not folder.is_dir():
        create_directory(home)
        with one_at_a_time(home / f".{folder.name}.lock"):
            if not folder.is_dir():
                _build(path, folder, checksum, progress=progress)
    return Mixture(folder, source=path, count=_verify(folder, checksum))


def _build(path: Path, folder: Path, checksum: str, *, progress: bool) -> None:
    LOGGER.info("reading %s, once; it is kept in %s", path, folder)
    size = path.stat().st_size
    with atomic_directory(folder) as partial:
        arrow = partial / _ARROW_FILE
        with (
            tqdm(total=size, desc="read", unit="B", unit_scale=True, disable=not progress) as bar,
            pa.OSFile(str(arrow), "wb") as file,
            pa.ipc.new_file(file, _SCHEMA) as writer,
        ):
            records = text_only = 0
            for batch in _batches(path, bar):
                writer.write_batch(batch)
                records += batch.num_rows
                text_only += batch.column("image").null_count
        if not records:
            raise DataError(f"data file {path} holds no record.")
        if _checksum(path) != checksum:
            raise DataError(f"data file {path} was changed while it was being read.")
        write_json(
            partial / _STATEMENT_FILE,
            {
                "format": _FORMAT,
                "source": path.name,
                "source_sha256": checksum,
                "records": records,
                "text_only": text_only,
                "bytes": arrow.stat().st_size,
                "sha256": _checksum(arrow),
            },
        )
    LOGGER.info("%s holds %d records, %d of them without an image", path, records, text_only)


def _batches(path: Path, bar: Any) -> Iterator[pa.RecordBatch]:
    columns: list[list[Any]] = [[] for _ in _SCHEMA]
    problems: list[str] = []
    found = 0
    for index, raw in enumerate(scan_records(path, progress=bar.update)):
        try:
            record = normalise(raw)
        except MalformedRecord as error:
            found += 1
            if len(problems) < _SHOWN:
                name = raw.get("id") if isinstance(raw, dict) else None
                problems.append(f"record {index} (id {name!r}): {error}")
            continue
        turns = record["conversations"]
        for column, value in zip(
            columns,
            (
                record["id"],
                record["image"],
                [turn["from"] == ANSWER for turn in turns],
                [turn["value"] for turn in turns],
                signed_length(record),
            ),
            strict=True,
        ):
            column.append(value)
        if len(columns[0]) == _BATCH:
            yield _as_batch(columns, path)
            columns = [[] for _ in _SCHEMA]
    if found:
        # All of the file is read first: whoever repairs it wants to know how much there is to do.
        raise DataError(
            f"data file {path}, {problems[0]}"
            + "".join(f"; {each}" for each in problems[1:])
            + (f"; {found} malformed records in all." if found > 1 else "."),
            "Repair them, or leave them out: `kuea-mllm doctor --data FILE --write-clean CLEAN`.",
        )
    if columns[0]:
        yield _as_batch(columns, path)


def _as_batch(columns: list[list[Any]], path: Path) -> pa.RecordBatch:
    try:
        arrays = [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
    except UnicodeEncodeError as error:
        # JSON may hold half of a surrogate pair, which is no text in any file format.
        raise DataError(
            f"data file {path} has a record with half a character ({error.object[:40]!r})."
        ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _verify(folder: Path, checksum: str) -> int:
    """Check a kept mixture against its statement; return the number of its records."""
    statement = read_json(folder / _STATEMENT_FILE)
    arrow = folder / _ARROW_FILE
    if statement.get("source_sha256") != checksum or statement.get("format") != _FORMAT:
        reason = "is of another file"
    elif not arrow.is_file():
        reason = f"lacks {_ARROW_FILE}"
    elif arrow.stat().st_size != statement["bytes"] or _checksum(arrow) != statement["sha256"]:
        reason = f"is damaged: {_ARROW_FILE} is not as it was written"
    else:
        return int(statement["records"])
    raise DataError(
        f"the kept mixture {folder} {reason}.", "Remove that folder; it is made again by itself."
    )


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}.") from error


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Let one process of this machine at a time into a block.

    Raises:
        OutputError: If the lock file cannot be written.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            f"cache folder {lock.parent} cannot be written: {error.strerror}.",
            "Set KUEA_MLLM_CACHE to a folder of your own.",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
