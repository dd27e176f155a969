"""Files and directories that are either complete or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EnvironmentFailure, OutputError, UserError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def require_free_output(destination: Path) -> None:
    """Refuse an output path that exists, before any work is done.

    Raises:
        OutputError: If `destination` exists or lies in a place that cannot be written.
    """
    if destination.exists() or destination.is_symlink():
        raise OutputError(
            f"output {destination} exists already.",
            "Choose another --out, or remove it first; nothing is ever overwritten.",
        )
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"output {destination} cannot be created: {parent} is not writable.")


@contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `destination` that becomes it when the block succeeds.

    Whatever ends the block early (an error, a full disk, Ctrl-C) removes the sibling, so that a
    directory which exists is complete.

    Args:
        destination: Directory to create; must not exist.

    Raises:
        OutputError: If `destination` exists or cannot be created.
        EnvironmentFailure: If the disk is full.
    """
    destination = Path(destination)
    require_free_output(destination)
    parent = destination.absolute().parent
    created = create_directory(parent, wanted_for=destination)
    try:
        # A hidden name, so that a listing never shows it as something finished.
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=parent))
    except OSError as error:
        raise OutputError(f"output {destination} cannot be created: {error.strerror}.") from error
    partial.chmod(0o755)
    try:
        with disk_errors_named(destination):
            yield partial
            partial.replace(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        remove_empty_parents(parent, created)
        raise


def create_directory(directory: Path, *, wanted_for: Path | None = None) -> Path | None:
    """Create a directory and its parents; return the highest that was missing, if any was.

    Args:
        directory: May exist.
        wanted_for: What to call the output in an error.

    Raises:
        OutputError: If it cannot be created.
    """
    created = _first_missing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"output {wanted_for or directory} cannot be created: {error.strerror}."
        ) from error
    return created


def remove_empty_parents(parent: Path, highest: Path | None) -> None:
    """Remove the directories that `create_directory` made, as far as they are empty."""
    while highest is not None:
        try:
            parent.rmdir()
        except OSError:
            return
        if parent == highest:
            return
        parent = parent.parent


@contextmanager
def disk_errors_named(destination: Path, *, remedy: str | None = None) -> Iterator[None]:
    """Turn "no space left" of any library into one line that names the place.

    Args:
        destination: What is written.
        remedy: What to do about it; by default the output is said to be removed.

    Raises:
        EnvironmentFailure: If the block fails because the disk is full.
    """
    try:
        yield
    except Exception as error:
        named = name_disk_error(error, destination, remedy=remedy)
        if named is not error:
            raise named from error
        raise


def name_disk_error(
    error: BaseException, destination: Path, *, remedy: str | None = None
) -> BaseException:
    """Return `EnvironmentFailure` for an error of any library that means a full disk.

    Args:
        error: Returned as it is if it means something else.
        destination: What was written.
        remedy: What to do about it; by default the output is said to be removed.
    """
    if not _is_disk_full(error):
        return error
    return EnvironmentFailure(
        f"no space left on device while writing {destination}.",
        remedy
        or "Free some space (or choose another --out) and run the command again; "
        "nothing was left behind.",
    )


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file that is either complete or, after a failure, as it was before.

    Raises:
        EnvironmentFailure: If the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with disk_errors_named(path):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"file {path} is missing.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"file {path} is not valid JSON: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON with a final newline (strict: no NaN)."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def _is_disk_full(error: BaseException | None) -> bool:
    # safetensors and pyarrow raise errors of their own, so the text has to do where errno is lost.
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        text = str(error)
        if "No space left on device" in text or "File too large" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def sync_to_disk(path: Path) -> None:
    """Wait until a file or the entries of a directory are on the disk, safe from a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_missing(parent: Path) -> Path | None:
    missing = None
    while not parent.exists():
        missing, parent = parent, parent.parent
    return missing
