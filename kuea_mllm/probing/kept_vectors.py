"""Embeddings of texts on disk: the same for every tower that shares a text tower."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kuea_mllm.data.cache import cache_folder
from kuea_mllm.errors import DataError
from kuea_mllm.io import create_directory, disk_errors_named


def kept_vectors(
    kind: str, about: Any, count: int, make: Callable[[], Tensor], *, cache: Path | None = None
) -> Tensor:
    """Return vectors from the cache, or make and keep them.

    Args:
        kind: First part of the file's name; also what errors call them.
        about: All that they depend on, as JSON: the fingerprint of the text tower, the texts.
        count: How many there are.
        make: Computes them, (count, width), float32; what it raises is not kept.
        cache: Folder of everything that is kept; None takes `data.cache.cache_folder`.

    Raises:
        DataError: If what was kept is damaged; names the file.
        EnvironmentFailure: If the disk is full.
    """
    folder = (cache_folder() if cache is None else cache) / "probing"
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = folder / f"{kind}-{digest}.npy"
    if path.is_file():
        return _read(path, kind, count)
    vectors = make()
    create_directory(folder)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}.npy")
    try:
        with disk_errors_named(path):
            np.save(partial, vectors.numpy())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return vectors


def _read(path: Path, kind: str, count: int) -> Tensor:
    try:
        vectors = torch.from_numpy(np.load(path))
        is_whole = vectors.ndim == 2 and len(vectors) == count
    except (ValueError, EOFError, OSError):
        is_whole = False
    if not is_whole:
        raise DataError(
            f"cached vectors of {kind} {path} are damaged.",
            "Remove the file; it is made again when it is needed.",
        )
    return vectors
