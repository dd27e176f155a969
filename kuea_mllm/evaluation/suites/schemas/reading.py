"""Reading annotation files so that whatever is wrong with them is named: file, entry and key."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.fewshot.json_stream import DAMAGED, stream_entries
from kuea_mllm.evaluation.suites.documents import REMEDY

T = TypeVar("T")
_LAYOUT_ERRORS = (KeyError, TypeError, AttributeError, ValueError, IndexError)


def read_json(path: Path) -> Any:
    """Read a JSON file whole.

    Raises:
        DataError: If it is missing or is not JSON.
    """
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, error.msg) from error


def read_list(path: Path) -> list[Any]:
    """Read a JSON file that holds a list.

    Raises:
        DataError: If it is missing, is not JSON or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise bad_layout(path, "a list was expected")
    return content


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the lines of a file with one JSON value in each.

    Raises:
        DataError: If it is missing, or a line is not JSON.
    """
    # Not `splitlines`: texts may hold other line separators.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise _damaged(path, f"line {number}: {error.msg}") from error


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Read a CSV file with a header.

    Raises:
        DataError: If it is missing, damaged or lacks one of the columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows, names = list(reader), reader.fieldnames or ()
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    for column in columns:
        if column not in names:
            raise bad_layout(path, f"column '{column}' is missing")
    # A row that is cut short has None for what is missing.
    return converted(path, rows, _whole_row)


def stream(path: Path, key: str) -> Iterator[Any]:
    """Yield the entries of the list under a key of a large JSON file.

    Raises:
        DataError: If it is missing, is not JSON or has no such list.
    """
    try:
        yield from stream_entries(path, key)
    except DataError as error:
        raise DataError(error.problem, REMEDY) from error
    except (KeyError, TypeError) as error:
        raise bad_layout(path, _reason(error)) from error


def converted(path: Path, entries: Iterable[Any], convert: Callable[[Any], T]) -> list[T]:
    """Convert every entry of a file.

    Raises:
        DataError: Naming the entry that is not laid out as expected and its key; if there are
            no entries.
    """
    results: list[T] = []
    for number, entry in enumerate(entries, start=1):
        try:
            results.append(convert(entry))
        except _LAYOUT_ERRORS as error:
            raise bad_layout(path, f"entry {number}: {_reason(error)}") from error
    if not results:
        raise bad_layout(path, "it holds no entries")
    return results


def indexed(path: Path, entries: Iterable[Any], key: str) -> dict[Any, Mapping[str, Any]]:
    """Return the entries of a file by one of their keys.

    Raises:
        DataError: If an entry lacks the key.
    """
    return dict(converted(path, entries, lambda entry: (entry[key], entry)))


def image_folder(folder: Path, name: str) -> Path:
    """Return where the images of a collection lie: in the data set's folder, or beside it.

    Several data sets share COCO's images, which then lie once, next to their folders.
    """
    inside, beside = folder / name, folder.parent / name
    return beside if beside.is_dir() and not inside.is_dir() else inside


def image_file(folder: Path, name: object) -> Path:
    """Return the path of an image that an annotation names.

    Raises:
        ValueError: If that would lie outside of the folder.
    """
    path = PurePosixPath(str(name))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"image {str(name)!r} does not lie in {folder}")
    return folder / path


def bad_layout(path: Path, problem: str) -> DataError:
    """Make the error of a file that is not what the authors of the data set publish."""
    return DataError(f"file {path} is not laid out as expected: {problem}.", REMEDY)


def first_file(folder: Path, *names: str) -> Path:
    """Return the first of several files that exists, else the first."""
    paths = [folder / name for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _missing(path) from None
    except UnicodeDecodeError as error:
        raise _damaged(path, error.reason) from error
    except OSError as error:
        raise DataError(f"file {path} cannot be read: {error.strerror}.", REMEDY) from error


def _missing(path: Path) -> DataError:
    return DataError(f"file {path} does not exist.", REMEDY)


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"file {path} cannot be read: {reason} ({DAMAGED}).", REMEDY)


def _reason(error: Exception) -> str:
    return f"key {error} is missing" if isinstance(error, KeyError) else str(error)


def _whole_row(row: Mapping[str | None, Any]) -> dict[str, str]:
    if None in row or None in row.values():
        raise ValueError("it has not as many fields as the header")
    return {str(name): value for name, value in row.items()}
