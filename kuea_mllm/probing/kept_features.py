"""Stores of embeddings as wholes: one process at a time computes one, and they can be removed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kuea_mllm.errors import EnvironmentFailure, OutputError, UserError
from kuea_mllm.io import read_json
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.feature_files import (
    CHECKSUMS_FILE,
    PREFIX,
    RECORD_FILE,
    ROWS_FILE,
    FeatureKey,
    damaged_store,
)


@dataclass(frozen=True)
class StoredFeatures:
    """What a store says about itself; its rows are not read.

    Attributes:
        directory: The store.
        key: What its rows depend on.
        rows: How many are whole.
        description: The model, in words.
        first_image: Name of the first image; empty in stores of earlier versions.
        created: When, in UTC.
    """

    directory: Path
    key: FeatureKey
    rows: int
    description: str
    first_image: str
    created: str

    @classmethod
    def read(cls, directory: Path) -> StoredFeatures:
        """Read a store's statement, and see that its files are there.

        Raises:
            UserError: If something is missing or damaged.
        """
        content = read_json(directory / RECORD_FILE)
        try:
            found = cls(
                directory,
                FeatureKey(**content["key"]),
                sum(int(rows) for rows, _ in content["shards"]),
                str(content["embedder"]),
                str(content.get("first_image", "")),
                str(content["created"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise damaged_store(
                directory, f"{RECORD_FILE} lacks or holds an unknown key ({error})"
            ) from error
        if directory.name != f"{PREFIX}{found.key.digest}":
            raise damaged_store(
                directory, f"the key in {RECORD_FILE} is not the one it is named by"
            )
        for name in (ROWS_FILE, CHECKSUMS_FILE):
            if not (directory / name).is_file():
                raise damaged_store(directory, f"{name} is missing")
        return found

    @property
    def used(self) -> float:
        """When it was last written or read, in seconds since 1970."""
        return (self.directory / RECORD_FILE).stat().st_mtime


def remove_features(directory: Path) -> None:
    """Delete a store, whole or damaged.

    Raises:
        UserError: If another process is computing it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if not _try_lock(descriptor, directory):
            raise UserError(
                f"cache {directory} is being computed by another process.",
                "Wait for it, or stop it first.",
            )
        # The statement goes first: what is left after a kill is then no store any more.
        (directory / RECORD_FILE).unlink(missing_ok=True)
        for path in sorted(directory.iterdir()):
            path.unlink()
        directory.rmdir()
    finally:
        os.close(descriptor)


@contextmanager
def locked_store(directory: Path) -> Iterator[None]:
    """Make the directory of a store and hold its lock; wait for another process that does.

    Raises:
        OutputError: If it cannot be created.
        EnvironmentFailure: If its file system has no locks.
    """
    descriptor = None
    while descriptor is None:
        descriptor = _locked_descriptor(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked_descriptor(directory: Path) -> int | None:
    """Return the descriptor of a locked directory, or None if it was removed meanwhile."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cache {directory} cannot be created: {error.strerror}.",
            "Choose another place with $KUEA_MLLM_CACHE.",
        ) from error
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if not _try_lock(descriptor, directory):
            LOGGER.info("features: waiting for another process that computes %s", directory)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        held = os.fstat(descriptor)
        if directory.exists() and os.path.samestat(held, directory.stat()):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _try_lock(descriptor: int, directory: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EnvironmentFailure(
            f"cache {directory} cannot be locked: {error.strerror}.",
            "Choose a place on another disk with $KUEA_MLLM_CACHE.",
        ) from error
    return True
