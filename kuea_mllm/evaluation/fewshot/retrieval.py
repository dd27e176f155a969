"""RICES: demonstrations whose images look most like the question's, the most similar one last.

Images are compared by the embeddings of a CLIP tower that is named for it. The published code uses
OpenAI's ViT-L/14 beside the model, whatever tower the model itself has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kuea_mllm.config.evaluate import Retrieval
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.devices import choose_device
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.fewshot.images import StoredImage
from kuea_mllm.log import LOGGER
from kuea_mllm.towers.encode import TowerEncoder
from kuea_mllm.towers.load import load_tower

_QUERIES_AT_ONCE = 256


class Retriever:
    """Finds similar images.

    Args:
        settings: The tower, and where embeddings are kept.
        device: Where the tower runs, as for `choose_device`.

    Raises:
        TowerError: If the tower cannot be loaded or has no projection.
    """

    def __init__(self, settings: Retrieval, *, device: str = "auto") -> None:
        self.settings = settings
        tower = load_tower(settings.tower)
        self.name = tower.fingerprint
        self.device = choose_device(device)
        self.encoder: Any = TowerEncoder(tower).to(self.device).eval()
        self.transform = ImageTransform.from_spec(tower.spec)
        self._last: dict[str, Tensor] = {}

    def most_similar(
        self, pool: Sequence[str], asked: Sequence[str], count: int
    ) -> list[list[int]]:
        """Return, for each image asked about, the places of its neighbours in the pool.

        Args:
            pool: Images of the training examples; an image may stand there several times.
            asked: Images of the questions.
            count: Neighbours per question.

        Returns:
            (questions, count), the most similar one last; among equals the one that stands first in
            the pool counts as the more similar.

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
        known, queries = self.embed(pool), self.embed(asked)
        found: list[list[int]] = []
        for part in torch.split(queries, _QUERIES_AT_ONCE):
            order = (-(part @ known.T)).argsort(dim=1, stable=True)[:, :count]
            found += order.flip(1).tolist()
        return found

    def embed(self, paths: Sequence[str]) -> Tensor:
        """Return embeddings of length one, (images, width), float32 on the CPU.

        They are kept in the cache folder under a name of their own for every tower, transform and
        list of images (by path, size and time of change).
        """
        unique = list(dict.fromkeys(paths))
        place = {path: number for number, path in enumerate(unique)}
        key = self._key(unique)
        if key not in self._last:
            self._last[key] = self._stored(key, unique)
        return self._last[key][[place[path] for path in paths]]

    def _stored(self, key: str, paths: Sequence[str]) -> Tensor:
        folder = self.settings.cache
        file = None if folder is None else Path(folder) / f"{key}.npy"
        if file is not None and file.is_file():
            return torch.from_numpy(np.load(file))
        LOGGER.info("Embedding %d images for the retrieval of demonstrations.", len(paths))
        embedded = self._computed(paths)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial.npy")
            np.save(partial, embedded.numpy())
            partial.replace(file)
        return embedded

    @torch.no_grad()
    def _computed(self, paths: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(paths), self.settings.batch_size):
            images = [StoredImage(path) for path in paths[start : start + self.settings.batch_size]]
            pixels = torch.stack([self.transform(image.open()) for image in images])
            embedded = self.encoder(pixels.to(self.device)).float().cpu()
            parts.append(torch.nn.functional.normalize(embedded, dim=-1))
        return torch.cat(parts)

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
