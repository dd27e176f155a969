"""RICES: demonstrations whose images look most like the question's, the most similar one last.

Images are compared by the embeddings of a CLIP tower that is named for it. The published code uses
OpenAI's ViT-L/14 beside the model, whatever tower the model itself has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kuea_mllm.config.evaluate import Retrieval
from kuea_mllm.data.cache import cache_folder
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import EvaluationError, TowerError
from kuea_mllm.evaluation.answering.preparing import strict_image_files
from kuea_mllm.evaluation.fewshot.images import StoredImage
from kuea_mllm.io import create_directory
from kuea_mllm.log import LOGGER
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower

_QUERIES_AT_ONCE = 256
_FOLDER = "retrieval"


class Retriever:
    """Finds similar images.

    Args:
        settings: The tower, and where embeddings are kept.
        device: Where the tower runs and embeddings are compared, as for `choose_device`.

    Raises:
        TowerError: If the tower cannot be loaded or has no projection.
    """

    def __init__(self, settings: Retrieval, *, device: str = "auto") -> None:
        self.settings = settings
        tower = _load(settings.tower)
        self.name = tower.fingerprint
        self.device = choose_device(device)
        self.encoder: Any = TowerEncoder(tower).to(self.device).eval()
        self.transform = ImageTransform.from_spec(tower.spec)

    def most_similar(
        self, pool: Sequence[str], asked: Sequence[str], count: int
    ) -> npt.NDArray[np.int32]:
        """Return, for each image asked about, the places of its neighbours in the pool.

        Args:
            pool: Images of the training examples; an image may stand there several times.
            asked: Images of the questions.
            count: Neighbours per question.

        Returns:
            (questions, count), the most similar one last; among equals the one that stands first in
            the pool counts as the more similar. The last columns of many are those of few.

        Raises:
            EvaluationError: If the pool is smaller than `count`.
            DataError: If an image cannot be decoded.
        """
        if len(pool) < count:
            raise EvaluationError(
                f"{count} demonstrations were asked for, but there are only {len(pool)} to "
                "choose from.",
                "Ask for fewer with --shots, or give the whole training part.",
            )
        # Several examples are about one image, and several questions: every image counts once.
        images, examples = _group(pool)
        queries, positions = _group(asked)
        known = self.embed(images).to(self.device)
        found = np.empty((len(asked), count), dtype=np.int32)
        for start, part in self._parts(self.embed(queries)):
            scores, nearest = top_columns(part @ known.T, min(count, len(images)))
            for row, (values, columns) in enumerate(zip(scores, nearest, strict=True)):
                shown = _first_examples(values.tolist(), columns.tolist(), examples, count)
                found[positions[start + row]] = shown[::-1]
        return found

    def _parts(self, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            yield start, queries[start : start + _QUERIES_AT_ONCE].to(self.device)

    def embed(self, paths: Sequence[str]) -> Tensor:
        """Return embeddings of length one, (images, width), float32 on the CPU.

        They are kept under a name of their own for every tower, transform and list of images (by
        path, size and time of change).

        Raises:
            EvaluationError: If an image or the file of kept embeddings cannot be read.
            DataError: If an image cannot be decoded.
        """
        folder = self.settings.cache
        kept = Path(folder) if folder is not None else cache_folder() / _FOLDER
        file = kept / f"{self._key(paths)}.npy"
        if file.is_file():
            return _load_kept(file, len(paths))
        LOGGER.info("Embedding %d images for the retrieval of demonstrations.", len(paths))
        embedded = self._computed(paths)
        create_directory(kept)
        partial = file.with_suffix(f".partial-{os.getpid()}.npy")
        np.save(partial, embedded.numpy())
        partial.replace(file)
        return embedded

    @torch.no_grad()
    def _computed(self, paths: Sequence[str]) -> Tensor:
        size = self.settings.batch_size
        parts = []
        # Decoding and resizing release the interpreter lock, so that threads do for workers.
        with strict_image_files(), ThreadPoolExecutor(self.settings.workers) as threads:
            ahead = [threads.submit(self._read, path) for path in paths[:size]]
            for start in range(0, len(paths), size):
                batch = ahead
                following = paths[start + size : start + 2 * size]
                # The next batch is decoded while this one goes through the tower.
                ahead = [threads.submit(self._read, path) for path in following]
                pixels = torch.stack([pending.result() for pending in batch])
                embedded = self.encoder(pixels.to(self.device)).float().cpu()
                parts.append(torch.nn.functional.normalize(embedded, dim=-1))
        return torch.cat(parts)

    def _read(self, path: str) -> Tensor:
        return self.transform(StoredImage(path).open())

    def _key(self, paths: Sequence[str]) -> str:
        digest = hashlib.sha256(f"{self.name}\n{self.transform.fingerprint}\n".encode())
        for path in paths:
            try:
                state = Path(path).stat()
            except OSError as error:
                raise EvaluationError(
                    f"image {path} cannot be read for the retrieval of demonstrations: "
                    f"{error.strerror}.",
                    "See docs/fewshot.md for where images are expected.",
                ) from error
            digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:32]


def top_columns(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each row and their columns, the highest first.

    Equal ones stand in the order of their columns, and where not all of them are among the highest,
    the first columns are: `topk` by itself promises neither.

    Args:
        scores: (rows, columns).
        count: How many, at most the columns.

    Returns:
        Values and columns, (rows, count) each, on the CPU.
    """
    values, columns = scores.topk(count, dim=1)
    last = values[:, -1:]
    crowded = torch.nonzero((scores >= last).sum(dim=1) > count).flatten().tolist()
    values, columns, last = values.cpu(), columns.cpu(), last.cpu()
    for row in crowded:
        above = columns[row][values[row] > last[row]]
        equal = torch.nonzero(scores[row].cpu() == last[row]).flatten()
        columns[row] = torch.cat([above, equal[: count - len(above)]])
        values[row, len(above) :] = last[row]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _group(paths: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Return the different paths in order of first appearance, and where each stands."""
    places: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        places.setdefault(path, []).append(place)
    return list(places), list(places.values())


def _first_examples(
    scores: Sequence[float], images: Sequence[int], examples: Sequence[Sequence[int]], count: int
) -> list[int]:
    """Turn the nearest images into the nearest examples, the nearest first."""
    ranked = sorted(
        (-score, example)
        for score, image in zip(scores, images, strict=True)
        for example in examples[image][:count]
    )
    return [example for _, example in ranked[:count]]


def _load(source: str) -> Tower:
    try:
        return load_tower(source)
    except TowerError as error:
        remedy = error.remedy
        if remedy.startswith("Pass --"):
            # Options that an evaluation does not have.
            remedy = (
                "Give a directory that states it: `kuea-mllm convert FILE DIR` makes one, and "
                "takes --activation and --heads."
            )
        raise TowerError(f"key fewshot.retrieval.tower: {error.problem}", remedy) from error


def _load_kept(file: Path, images: int) -> Tensor:
    try:
        stored = np.load(file)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"file {file} of kept embeddings cannot be read: {' '.join(str(error).split())}.",
            "Remove it; the embeddings are then computed again.",
        ) from error
    if len(stored) != images:
        raise EvaluationError(
            f"file {file} holds {len(stored)} embeddings, {images} were expected.",
            "Remove it; the embeddings are then computed again.",
        )
    return torch.from_numpy(stored)
