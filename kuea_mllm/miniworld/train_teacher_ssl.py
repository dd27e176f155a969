"""Training of a mini teacher without labels: DINOv2's part played as DINOv2 learnt it.

Two renderings of one scene, with other hues, jitter, noise and size of the digits, have to be found
among those of other scenes (InfoNCE). What stays the same between the two is what is learnt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kuea_mllm.miniworld.models import IMAGENET_MEAN, IMAGENET_STD, TEACHER_WIDTH, make_teacher
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import SIDES, Scene, sample_scenes
from kuea_mllm.miniworld.training import (
    Schedule,
    in_eval_mode,
    normalise_pixels,
    optimise,
    seeded,
)

if TYPE_CHECKING:
    from transformers import Dinov2WithRegistersModel

SSL_TEACHER_SEED = 2003
PICTURES = 12_000
BATCH = 128
SCHEDULE = Schedule(steps=800, lr=1e-3)
_TEMPERATURE = 0.1


def train_ssl_teacher(
    *,
    seed: int = SSL_TEACHER_SEED,
    pictures: int = PICTURES,
    schedule: Schedule = SCHEDULE,
    progress: bool = True,
) -> Dinov2WithRegistersModel:
    """Train a teacher on pairs of renderings; only its backbone is returned.

    Args:
        seed: Decides the pictures, the initial weights and the batches.
        pictures: Number of scenes, each drawn twice.
        schedule: Steps and learning rate.
        progress: Whether to show a bar.
    """
    scenes = sample_scenes(pictures, "train", seed=seed)
    views = [
        render_scenes(_resized(scenes, np.random.default_rng([seed, 10 + view])), rng)
        for view in range(2)
        for rng in [np.random.default_rng([seed, 20 + view])]
    ]
    with seeded(seed) as generator:
        teacher = make_teacher()
        head = nn.Sequential(
            nn.Linear(TEACHER_WIDTH, 2 * TEACHER_WIDTH),
            nn.GELU(),
            nn.Linear(2 * TEACHER_WIDTH, TEACHER_WIDTH),
        )
        teacher.train()

        def compute_loss(step: int) -> Tensor:
            rows = torch.randint(pictures, (BATCH,), generator=generator).numpy()
            pixels = torch.cat(
                [normalise_pixels(view[rows], IMAGENET_MEAN, IMAGENET_STD) for view in views]
            )
            image = teacher(pixel_values=pixels).last_hidden_state[:, 0]
            first, second = F.normalize(head(image), dim=1).chunk(2)
            logits = first @ second.T / _TEMPERATURE
            target = torch.arange(len(rows))
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        optimise([teacher, head], compute_loss, schedule, label="teacher", progress=progress)
    return in_eval_mode(teacher)


def _resized(scenes: list[Scene], rng: np.random.Generator) -> list[Scene]:
    """Return the scenes with other sizes of digits, as one more thing that does not count."""
    low, high = SIDES
    return [
        replace(
            scene,
            objects=tuple(
                replace(item, side=low + float(rng.random()) * (high - low))
                for item in scene.objects
            ),
        )
        for scene in scenes
    ]
