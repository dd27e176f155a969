"""Training of the mini teacher: an expert of the world's pictures.

It plays DINOv2's part: an image-only model that sees digits, colours and places well. It gets there
with labels, because self-supervision did not at this size; the labels reach the weights that are
saved, the heads that read them do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kuea_mllm.miniworld.models import IMAGENET_MEAN, IMAGENET_STD, TEACHER_WIDTH, make_teacher
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import (
    COLOURS,
    DIGITS,
    GRID,
    MAX_OBJECTS,
    TEXTURES,
    Scene,
    sample_scenes,
)
from kuea_mllm.miniworld.training import (
    Schedule,
    in_eval_mode,
    normalise_pixels,
    optimise,
    seeded,
)

if TYPE_CHECKING:
    from transformers import Dinov2WithRegistersModel

# One teacher for every CLIP: as in reality, nothing ties their random choices together.
TEACHER_SEED = 1009
PICTURES = 30_000
BATCH = 128
SCHEDULE = Schedule(steps=2000, lr=2e-3)
_PRESENCE_WEIGHT = 5.0
# Without the patch losses the teacher sees digits worse than the CLIP does.
_PATCH_WEIGHT = 3.0
_CELLS = GRID * GRID
# What the image token has to tell as yes or no: digits, colours, cells, and their combinations.
_PRESENCE = {
    "digit": len(DIGITS),
    "colour": len(COLOURS),
    "cell": _CELLS,
    "digit_colour": len(DIGITS) * len(COLOURS),
    "digit_cell": len(DIGITS) * _CELLS,
}


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.presence = nn.ModuleDict(
            {name: nn.Linear(TEACHER_WIDTH, size) for name, size in _PRESENCE.items()}
        )
        self.count = nn.Linear(TEACHER_WIDTH, MAX_OBJECTS)
        self.texture = nn.Linear(TEACHER_WIDTH, len(TEXTURES))
        # One more class each: an empty cell.
        self.patch_digit = nn.Linear(TEACHER_WIDTH, len(DIGITS) + 1)
        self.patch_colour = nn.Linear(TEACHER_WIDTH, len(COLOURS) + 1)


def train_teacher(
    *,
    seed: int = TEACHER_SEED,
    pictures: int = PICTURES,
    schedule: Schedule = SCHEDULE,
    progress: bool = True,
) -> Dinov2WithRegistersModel:
    """Train a teacher on labelled pictures; only its backbone is returned.

    Args:
        seed: Decides the pictures, the initial weights and the batches.
        pictures: Number of training pictures.
        schedule: Steps and learning rate.
        progress: Whether to show a bar.
    """
    scenes = sample_scenes(pictures, "train", seed=seed)
    images = render_scenes(scenes, np.random.default_rng([seed, 2]))
    presence = {name: torch.from_numpy(labels) for name, labels in _presence(scenes).items()}
    counts = torch.tensor([len(scene.objects) - 1 for scene in scenes])
    textures = torch.tensor([scene.texture for scene in scenes])
    patch_digits, patch_colours = (torch.from_numpy(labels) for labels in _patch_labels(scenes))
    with seeded(seed) as generator:
        teacher = make_teacher()
        heads = _Heads()
        teacher.train()

        def compute_loss(step: int) -> Tensor:
            rows = torch.randint(pictures, (BATCH,), generator=generator)
            pixels = normalise_pixels(images[rows.numpy()], IMAGENET_MEAN, IMAGENET_STD)
            tokens = teacher(pixel_values=pixels).last_hidden_state
            image, patches = tokens[:, 0], tokens[:, -_CELLS:]
            patch_loss = F.cross_entropy(
                heads.patch_digit(patches).flatten(0, 1), patch_digits[rows].flatten()
            ) + F.cross_entropy(
                heads.patch_colour(patches).flatten(0, 1), patch_colours[rows].flatten()
            )
            image_loss = F.cross_entropy(heads.count(image), counts[rows]) + F.cross_entropy(
                heads.texture(image), textures[rows]
            )
            for name, head in heads.presence.items():
                image_loss = image_loss + _PRESENCE_WEIGHT * F.binary_cross_entropy_with_logits(
                    head(image), presence[name][rows]
                )
            loss: Tensor = image_loss + _PATCH_WEIGHT * patch_loss
            return loss

        optimise([teacher, heads], compute_loss, schedule, label="teacher", progress=progress)
    return in_eval_mode(teacher)


def _presence(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    labels = {name: np.zeros((len(scenes), size), np.float32) for name, size in _PRESENCE.items()}
    for index, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.row * GRID + item.column
            labels["digit"][index, item.digit] = 1
            labels["colour"][index, item.colour] = 1
            labels["cell"][index, cell] = 1
            labels["digit_colour"][index, item.digit * len(COLOURS) + item.colour] = 1
            labels["digit_cell"][index, item.digit * _CELLS + cell] = 1
    return labels


def _patch_labels(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    digits = np.full((len(scenes), _CELLS), len(DIGITS))
    colours = np.full((len(scenes), _CELLS), len(COLOURS))
    for index, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.row * GRID + item.column
            digits[index, cell] = item.digit
            colours[index, cell] = item.colour
    return digits, colours
