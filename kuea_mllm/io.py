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
    created = _first_missing(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
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
        if created is not None:
            _remove_empty_parents(parent, created)
        raise


@contextmanager
def disk_errors_named(destination: Path) -> Iterator[None]:
    """Turn "no space left" of any library into one line that names the place.

    Raises:
        EnvironmentFailure: If the block fails because the disk is full.
    """
    try:
        yield
    except Exception as error:
        if _is_disk_full(error):
            raise EnvironmentFailure(
                f"no space left on device while writing {destination}.",
                "Free some space (or choose another --out) and run the command again; "
                "nothing was left behind.",
            ) from error
        raise


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


def _first_missing(parent: Path) -> Path | None:
    missing = None
    while not parent.exists():
        missing, parent = parent, parent.parent
    return missing


def _remove_empty_parents(parent: Path, highest: Path) -> None:
    while True:
        try:
            parent.rmdir()
        except OSError:
            return
        if parent == highest:
            return
        parent = parent.parent
