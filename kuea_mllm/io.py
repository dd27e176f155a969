"""Files and directories that are either complete or absent."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EnvironmentFailure, OutputError, UserError

LOGGER = logging.getLogger("kuea_mllm")

# Between the creation of a partial directory and its lock there are microseconds.
_FRESH_SECONDS = 10.0
_NOTHING_LEFT = (
    "Free some space (or choose another --out) and run the command again; nothing was left behind."
)
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def require_free_output(destination: Path) -> None:
    """Refuse an output path that exists, before any work is done.

    Raises:
        OutputError: If `destination` exists or lies in a place that cannot be written.
    """
    if destination.exists() or destination.is_symlink():
        raise OutputError(
            f"output {destination} exists already.",
            "Choose another place, or remove it first; nothing is ever overwritten.",
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
    directory which exists is complete. What a killed process left behind is removed by the next one
    that writes to the same place. Of two processes that write there at once, one wins.

    Args:
        destination: Directory to create; must not exist.

    Raises:
        OutputError: If `destination` exists, is made by another process meanwhile, or cannot be
            created.
        EnvironmentFailure: If the disk is full.
    """
    destination = Path(destination)
    require_free_output(destination)
    parent = destination.absolute().parent
    created = create_directory(parent, wanted_for=destination)
    # A hidden name, so that a listing never shows it as something finished.
    prefix = f".{destination.name}.partial-"
    _remove_abandoned(parent, prefix)
    try:
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        follow_umask(partial)
    except OSError as error:
        raise OutputError(f"output {destination} cannot be created: {error.strerror}.") from error
    try:
        with disk_errors_named(destination), _held(partial):
            yield partial
            _rename(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        remove_empty_parents(parent, created)
        raise


def _rename(partial: Path, destination: Path) -> None:
    try:
        if destination.is_dir():
            # rename(2) would silently replace an empty directory.
            raise OSError(errno.EEXIST, "File exists")
        partial.rename(destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise OutputError(
                f"output {destination} was created by another process meanwhile.",
                "What is there is left alone; choose another --out.",
            ) from error
        raise


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory that ends with this process, whatever ends it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the partial directories of processes that were killed."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            # A fresh one may not be locked yet.
            if time.time() - path.stat().st_mtime < _FRESH_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY)
        # Removed by its owner meanwhile, or of another user.
        except OSError:
            continue
        try:
            if _try_lock(descriptor):
                LOGGER.warning("Removing %s, which an interrupted command left behind.", path)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Held by someone else; or a file system without locks, where nothing can be told.
    except OSError:
        return False
    return True


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
    # Whoever gave a remedy of its own knows which disk it is: a cache may lie on another one.
    if isinstance(error, EnvironmentFailure) and error.remedy not in ("", _NOTHING_LEFT):
        return error
    return EnvironmentFailure(
        f"no space left on device while writing {destination}.", remedy or _NOTHING_LEFT
    )


def follow_umask(path: Path) -> None:
    """Give a file or directory the permissions that a plain `open` or `mkdir` gives.

    tempfile, and safetensors since 0.8, create for their owner alone, so that nobody else could
    read what was written.
    """
    # Asked of the system, because a process reads its umask only by changing it for all threads.
    if path.is_dir():
        # Inside, so that whoever removes the directory removes what a killed process left.
        plain = path / f".mode-{os.getpid()}"
        plain.mkdir()
        mode = plain.stat().st_mode
        plain.rmdir()
    else:
        plain = path.with_name(f".{path.name}.mode-{os.getpid()}")
        plain.touch()
        mode = plain.stat().st_mode
        plain.unlink()
    path.chmod(stat.S_IMODE(mode))


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
