"""A sensible beginning for the map of the feature baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from kuea_mllm.alignment.inputs import TrainingImages, spread
from kuea_mllm.alignment.projection import fit_projection
from kuea_mllm.alignment.targets import TargetSource
from kuea_mllm.data.transforms import unit_pixels
from kuea_mllm.log import LOGGER
from kuea_mllm.objectives import FeatureTerm, Objective

IMAGES = 4096
# Fewer images than twice the teacher's width leave the map undetermined; the penalty decides then.
_RIDGE = 1e-3
_BATCH = 64


def start_feature_map(
    objective: Objective,
    images: TrainingImages,
    dataset: Dataset[Any],
    targets: TargetSource,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """Fit the map of a feature term to the untouched tower by least squares; nothing without one.

    A random map, trained at the tower's rate, is far from any sensible target for thousands of
    steps and pulls the tower there. The paper does not say how its map began; this is the beginning
    that favours the baseline.

    Args:
        objective: With or without a `FeatureTerm`.
        images: What is trained on; of a stream, held-out images are taken.
        dataset: The same images, with cached rows if there are any.
        targets: Gives teacher and original embeddings of its batches.
        device: Where towers run.
        autocast: Context in which they run.
    """
    terms = [term for term in objective.pooled_terms if isinstance(term, FeatureTerm)]
    if not terms:
        return
    if images.positions is None:
        chosen: Dataset[Any] = Subset(images.heldout, images.heldout_positions.tolist())
    else:
        rows = images.positions[spread(len(images.positions), IMAGES)]
        chosen = Subset(dataset, rows.tolist())

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in DataLoader(chosen, batch_size=_BATCH):
            on_device = {
                name: values.to(device) for name, values in batch.items() if torch.is_tensor(values)
            }
            with torch.no_grad(), autocast():
                found = targets({**on_device, "pixels": unit_pixels(on_device["pixels"])})
            yield found.teachers[0].pooled, found.original.pooled

    fitted = fit_projection(pairs(), ridge=_RIDGE)
    LOGGER.info(
        "feature map: least squares on %d images, %.3f of the squared norm is left",
        fitted.images,
        fitted.residual,
    )
    for term in terms:
        with torch.no_grad():
            term.feature_map.copy_(fitted.weight)
