"""Small pictures of the first documents, so that a report can show what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kuea_mllm.evaluation.results import file_name
from kuea_mllm.evaluation.session import ImageObserver

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 336


def thumbnail_writer(folder: Path, count: int) -> ImageObserver:
    """Return an observer that keeps the first image of the first `count` documents of each task."""

    def keep(task: str, doc_id: int, images: Sequence[Image]) -> None:
        if doc_id >= count or not images:
            return
        path = folder / file_name(task) / f"{doc_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = images[0].copy()
        small.thumbnail((MAX_SIDE, MAX_SIDE))
        small.save(path)

    return keep
