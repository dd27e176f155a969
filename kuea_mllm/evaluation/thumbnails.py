"""Small pictures of what was asked about, so that a report can show it.

Questions share images (18 in POPE, 5 in VQAv2), so a picture is kept once, under the hash of its
pixels, and a list says which question has which:

    thumbnails/<task>.jsonl       {"doc_id": 7, "picture": "<hash>.jpg"}, one line per question
    thumbnails/pictures/<hash>.*  JPEG; PNG where the image is so small that every pixel counts

A photograph takes 7 to 10 kB (measured on two of 640 x 427) and 0.8 ms to see whether it is known;
the first 500 questions of a benchmark thus take at most 5 MB, those of POPE 0.3 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kuea_mllm.evaluation.answering.session import ImageObserver
from kuea_mllm.evaluation.results import file_name

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 288
TINY_SIDE = 128
QUALITY = 70
PICTURES = "pictures"


def thumbnail_writer(folder: Path, count: int) -> ImageObserver:
    """Return an observer that keeps the first image of the first `count` documents of each task."""
    kept: dict[str, dict[str, str]] = {}

    def keep(task: str, doc_id: int, images: Sequence[Image]) -> None:
        if doc_id >= count or not images:
            return
        image = images[0]
        pictures = kept.setdefault(task, {})
        key = _hash_pixels(image)
        if key not in pictures:
            pictures[key] = _save(image, folder / PICTURES, key)
        line = json.dumps({"doc_id": doc_id, "picture": pictures[key]})
        # One short write per line, so that several processes may add to one list.
        with (folder / f"{file_name(task)}.jsonl").open("a", encoding="utf-8") as index:
            index.write(line + "\n")

    return keep


def _hash_pixels(image: Image) -> str:
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=12)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _save(image: Image, folder: Path, key: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if max(image.size) <= TINY_SIDE:
        name = f"{key}.png"
        image.convert("RGB").save(folder / name)
        return name
    name = f"{key}.jpg"
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    small.save(folder / name, quality=QUALITY, optimize=True)
    return name
