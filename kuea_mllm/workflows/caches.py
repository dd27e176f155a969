"""Everything that is kept because it took long to make, and can be made again.

FOLDER/
    embeddings-<digest>/            targets of `align` (`alignment.target_store`)
    probing/features-<digest>/      embeddings that `probe` and `look` read (`probing.features`)
    probing/classes-<digest>.npy    class vectors of zero-shot (`probing.zero_shot`)
    probing/captions-<digest>.npy   embeddings of captions (`probing.retrieval`)
    tar_index/<digest>.npz          where images lie in tar shards (`data.tar`)
    mixtures/<digest>-<format>/     conversations as Arrow (`tuning.mixture`)
    retrieval/<digest>.npy          embeddings of few-shot demonstrations (`evaluation.fewshot`)

The first two and mixtures are listed one by one; of the others all files are one entry each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.alignment import target_store
from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json
from kuea_mllm.probing import feature_files
from kuea_mllm.probing.kept_features import StoredFeatures, remove_features

TARGETS, FEATURES, MIXTURE = "targets", "features", "mixture"
_DIGITS = 16


@dataclass(frozen=True)
class Kept:
    """One thing that is kept, or all small files of one kind.

    Attributes:
        name: What `cache rm` calls it.
        kind: "targets", "features", "mixture", "class vectors", "captions", "tar index" or
            "demonstrations".
        model: What it was made by or from, in words.
        count: What it holds when it is complete.
        unit: Of `count`: "images", "records" or "files".
        done: How much of that is there.
        bytes: What it takes on disk.
        used: When it was last read or written, in seconds since 1970.
        problem: Why it cannot be used; None if it can.
        details: More about it, as plain data.
        remove: Deletes it; refuses what another process is making.
    """

    name: str
    kind: str
    model: str
    count: int
    unit: str
    done: int
    bytes: int
    used: float
    problem: str | None
    details: dict[str, Any]
    remove: Callable[[], None]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing and nothing is damaged."""
        return self.problem is None and self.done == self.count


def list_kept(root: Path) -> list[Kept]:
    """Return all that is kept below a folder of caches; nothing is changed or loaded."""
    return [
        *_targets(root),
        *_features(root / "probing"),
        *_mixtures(root / "mixtures"),
        *_files(root / "probing", "classes-*.npy", "class vectors", "zero-shot classes"),
        *_files(root / "probing", "captions-*.npy", "captions", "captions of retrieval"),
        *_files(root / "tar_index", "*.npz", "tar index", "headers of tar shards"),
        *_files(root / "retrieval", "*.npy", "demonstrations", "images of few-shot examples"),
    ]


def _targets(root: Path) -> Iterator[Kept]:
    for path, store, problem in target_store.list_stores(root):
        name = path.name.removeprefix(target_store.PREFIX)

        def remove(path: Path = path) -> None:
            target_store.remove_store(path)

        if store is None:
            yield _damaged(name, TARGETS, path, problem, remove)
            continue
        yield Kept(
            name,
            TARGETS,
            store.description,
            store.key.population,
            "images",
            int(store.done.sum()),
            store.disk_bytes(),
            store.used,
            None,
            {
                "width": store.key.width,
                "precision": store.key.precision,
                "created": store.created,
            },
            remove,
        )


def _features(folder: Path) -> Iterator[Kept]:
    for path in sorted(folder.glob(f"{feature_files.PREFIX}*")):
        name = path.name.removeprefix(feature_files.PREFIX)

        def remove(path: Path = path) -> None:
            remove_features(path)

        try:
            found = StoredFeatures.read(path)
        except UserError as error:
            yield _damaged(name, FEATURES, path, error.problem, remove)
            continue
        yield Kept(
            name,
            FEATURES,
            found.description,
            found.key.count,
            "images",
            found.rows,
            _disk_bytes(path),
            found.used,
            None,
            {
                "width": found.key.width,
                "precision": found.key.dtype,
                "created": found.created,
                "first_image": found.first_image or None,
            },
            remove,
        )


def _mixtures(folder: Path) -> Iterator[Kept]:
    for path in sorted(folder.glob("*/mixture.json")):
        home, name = path.parent, path.parent.name[:_DIGITS]

        def remove(home: Path = home) -> None:
            shutil.rmtree(home)

        try:
            content = read_json(path)
            source, records = str(content["source"]), int(content["records"])
        except UserError as error:
            yield _damaged(name, MIXTURE, home, error.problem, remove)
            continue
        except (KeyError, TypeError, ValueError):
            yield _damaged(name, MIXTURE, home, f"file {path} lacks source or records", remove)
            continue
        used = _used(list(home.iterdir()))
        size = _disk_bytes(home)
        yield Kept(name, MIXTURE, source, records, "records", records, size, used, None, {}, remove)


def _files(folder: Path, pattern: str, kind: str, model: str) -> Iterator[Kept]:
    """Yield one entry for all files of a kind, with what a killed process left of some."""
    files = sorted(folder.glob(pattern))
    if not files:
        return
    everything = [*files, *folder.glob(f".{pattern}")]

    def remove() -> None:
        for path in everything:
            path.unlink(missing_ok=True)

    count, size = len(files), sum(_blocks(path) for path in everything)
    name = kind.replace(" ", "-")
    yield Kept(name, kind, model, count, "files", count, size, _used(files), None, {}, remove)


def _damaged(name: str, kind: str, path: Path, problem: str, remove: Callable[[], None]) -> Kept:
    used = path.stat().st_mtime
    return Kept(name, kind, "", 0, "", 0, _disk_bytes(path), used, problem, {}, remove)


def _used(paths: list[Path]) -> float:
    # None of these is read by listing, so that the time of the last reading is one of use.
    states = [path.stat() for path in paths]
    return max(max(state.st_mtime, state.st_atime) for state in states)


def _disk_bytes(folder: Path) -> int:
    """Return what the files of a folder take on disk; holes take nothing."""
    return sum(_blocks(path) for path in folder.iterdir() if path.is_file())


def _blocks(path: Path) -> int:
    return path.stat().st_blocks * 512
