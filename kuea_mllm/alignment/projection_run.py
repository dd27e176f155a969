"""`align` with `method: projection`: the baseline that maps the teacher into CLIP space."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from kuea_mllm.alignment.inputs import AlignmentInputs, open_inputs
from kuea_mllm.alignment.projection import Projection, fit_projection
from kuea_mllm.alignment.record import describe_run
from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import recipe_to_yaml
from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.transforms import unit_pixels
from kuea_mllm.data.unreadable import UnreadableCounter
from kuea_mllm.errors import RecipeError
from kuea_mllm.io import atomic_directory, follow_umask, require_free_output, write_json
from kuea_mllm.log import LOGGER, log_file
from kuea_mllm.towers.model.encode import TowerEncoder

_BATCH = 64


def run_projection(
    recipe: AlignRecipe, out: Path, *, progress: bool = True
) -> tuple[Projection, dict[str, float]]:
    """Fit the map from teacher to CLIP embeddings on all training images, once.

    Writes `OUT/projection/projection.safetensors` (`weight`, (CLIP width, teacher width)) and
    `kuea.json`, which names the teacher that it belongs to. There is no tower: the image encoder of
    this baseline is the teacher followed by the map.

    Args:
        recipe: `method` is "projection"; objective and optimiser are not used.
        out: Directory to create.
        progress: Show a progress bar.

    Returns:
        The map, and what is left of the embeddings on held-out images:
        `heldout_residual` (share of the squared norm) and `heldout_cosine_mean`.

    Raises:
        UserError: If an input is wrong.
    """
    require_free_output(out)
    inputs = open_inputs(recipe)
    positions = inputs.images.positions
    if positions is None:
        raise RecipeError(
            "method 'projection' reads every image once and needs to know them: data.stream is on.",
            "Set data.stream=false.",
        )
    with atomic_directory(out) as partial, log_file(partial / "run.log"):
        (partial / "run.yaml").write_text(recipe_to_yaml(inputs.recipe), encoding="utf-8")
        started = time.perf_counter()
        embed = _Embedder(inputs)
        images = inputs.images
        found = fit_projection(embed(images.training, positions, progress=progress))
        measured = _measure(found, embed(images.heldout, images.heldout_positions, progress=False))
        LOGGER.info(
            "projection of %d images: residual %.4f, held out %.4f, %.0f s",
            found.images,
            found.residual,
            measured["heldout_residual"],
            time.perf_counter() - started,
        )
        folder = partial / "projection"
        folder.mkdir()
        save_file({"weight": found.weight}, folder / "projection.safetensors")
        follow_umask(folder / "projection.safetensors")
        manifest = describe_run(
            inputs, kernel={}, measured={"after": measured}, images_left_out=embed.left_out()
        )
        write_json(folder / "kuea.json", {**manifest, "kind": "projection"})
    return found, measured


class _Embedder:
    def __init__(self, inputs: AlignmentInputs) -> None:
        self._recipe = inputs.recipe
        self._device = torch.device(inputs.recipe.runtime.device)
        original = TowerEncoder(inputs.student)
        self._live = LiveTargets(inputs.teachers[:1], original, self._device)
        training = inputs.images.training
        name = training.source.name if isinstance(training, ImageDataset) else None
        self._left_out = UnreadableCounter(inputs.recipe.data.skip_unreadable, name)

    def left_out(self) -> dict[str, Any]:
        """Return the images that could not be read."""
        return self._left_out.report()

    def __call__(
        self, dataset: Dataset[Any], positions: NDArray[np.int64], *, progress: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield teacher and original embeddings of the images, a batch at a time."""
        # Positions stay an array: a million Python numbers would be copied into every worker.
        order: Any = positions
        loader: DataLoader[Any] = DataLoader(
            Subset(dataset, order),
            batch_size=_BATCH,
            num_workers=self._recipe.data.workers,
        )
        is_half = self._recipe.runtime.precision == "bf16"
        for batch in tqdm(loader, desc="projection", unit="batch", disable=not progress):
            self._left_out.update(batch)
            pixels = unit_pixels(batch["pixels"].to(self._device))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):
                targets = self._live({"pixels": pixels})
            yield targets.teachers[0].pooled, targets.original.pooled


def _measure(found: Projection, pairs: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    left = total = cosine = 0.0
    count = 0
    for teacher, original in pairs:
        guess, wanted = teacher.double().cpu() @ found.weight.double().T, original.double().cpu()
        left += float((guess - wanted).square().sum())
        total += float(wanted.square().sum())
        cosine += float(torch.nn.functional.cosine_similarity(guess, wanted).sum())
        count += len(wanted)
    return {"heldout_residual": left / total, "heldout_cosine_mean": cosine / count}
