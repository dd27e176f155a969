"""Training of the mini Flamingo: resampler, gated blocks and language model on a frozen tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kuea_mllm.adapters.fewshot_text import TEXT_ONLY_SHOTS
from kuea_mllm.miniworld.flamingo import (
    TASKS,
    ScenesByCount,
    draw_pictures,
    draw_wording,
    make_flamingo,
    write_example,
)
from kuea_mllm.miniworld.models import CLIP_MEAN, CLIP_STD
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import DIGITS, TEXTURES, Scene, sample_scenes
from kuea_mllm.miniworld.training import (
    Schedule,
    in_eval_mode,
    normalise_pixels,
    optimise,
    seeded,
)

if TYPE_CHECKING:
    from transformers import CLIPModel

    from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
    from kuea_mllm.adapters.openflamingo.processing import OpenFlamingoProcessor

PICTURES = 12_000
BATCH = 16
# Every text teaches zero to four demonstrations at once: each chunk sees those before it.
CHUNKS = 5
SCHEDULE = Schedule(steps=1800, lr=2e-3, weight_decay=0.02)
# Closed gates, as the original begins with on a trained language model, would only cost time.
_GATE = 0.5
# Of the texts: those that begin like the zero-shot prompt of the published evaluation.
_TEXT_ONLY_SHARE = 0.3
_HINT_WEIGHT = 0.5
_IGNORED = -100


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor
    labels: Tensor
    images: Tensor  # rows of pictures, (texts, chunks); -1 where a text has fewer


def train_flamingo(
    clip: CLIPModel,
    processor: OpenFlamingoProcessor,
    *,
    seed: int,
    pictures: int = PICTURES,
    schedule: Schedule = SCHEDULE,
    progress: bool = True,
) -> OpenFlamingoForConditionalGeneration:
    """Train a Flamingo on texts of several pictures, all with the same kind of task.

    The language model is trained along, as there is none that knows these few words. A second
    loss, for the resampler alone, asks the mean latent what a picture shows; it saves most of the
    time until captions name what is there.

    Args:
        clip: The CLIP whose vision tower is used; it stays as it is.
        processor: From `make_flamingo_processor`.
        seed: Decides pictures, texts, initial weights and batches.
        pictures: Number of training pictures.
        schedule: Steps and learning rate.
        progress: Whether to show a bar.
    """
    scenes = sample_scenes(pictures, "train", seed=seed + 900)
    rng = np.random.default_rng([seed, 9])
    images = render_scenes(scenes, rng)
    shown = _contents(scenes)
    with seeded(seed):
        flamingo = make_flamingo(clip, processor)
        flamingo.model.vision_tower.requires_grad_(False)
        features = _patch_tokens(flamingo, images)
        hint_head = nn.Linear(features.shape[-1], shown.shape[1])
        with torch.no_grad():
            for name, parameter in flamingo.named_parameters():
                if name.endswith("_gate"):
                    parameter.fill_(_GATE)
        flamingo.train()
        tokenize, sorted_scenes = _tokenizer(processor), ScenesByCount(scenes)

        def compute_loss(step: int) -> Tensor:
            batch = _draw(sorted_scenes, rng, tokenize, processor)
            is_there = batch.images >= 0
            latents = flamingo.model.resampler(features[batch.images[is_there]])
            padded = latents.new_zeros(*is_there.shape, *latents.shape[1:])
            padded[is_there] = latents
            output: Any = flamingo(
                input_ids=batch.input_ids,
                attention_mask=torch.ones_like(batch.input_ids, dtype=torch.bool),
                image_features=padded,
                labels=batch.labels,
            )
            hints = hint_head(latents.mean(dim=1))
            wanted = shown[batch.images[is_there]]
            hint: Tensor = F.binary_cross_entropy_with_logits(hints, wanted)
            loss: Tensor = output.loss + _HINT_WEIGHT * hint
            return loss

        modules: list[nn.Module] = [
            flamingo.model.resampler,
            flamingo.model.language_model,
            hint_head,
        ]
        optimise(modules, compute_loss, schedule, label="flamingo", progress=progress)
    return in_eval_mode(flamingo)


def _draw(
    scenes: ScenesByCount,
    rng: np.random.Generator,
    tokenize: Callable[[str], tuple[int, ...]],
    processor: OpenFlamingoProcessor,
) -> _Batch:
    image, end = processor.image_token_id, processor.endofchunk_token_id
    newline = tokenize("\n")
    texts: list[list[int]] = []
    labels: list[list[int]] = []
    pictures = np.full((BATCH, CHUNKS), -1)
    for row in range(BATCH):
        task = TASKS[int(rng.integers(len(TASKS)))]
        wording = draw_wording(rng)
        blind = TEXT_ONLY_SHOTS if rng.random() < _TEXT_ONLY_SHARE else 0
        drawn = draw_pictures(task, wording, scenes, rng, CHUNKS)
        pictures[row, : CHUNKS - blind] = drawn[blind:]
        ids: list[int] = []
        wanted: list[int] = []
        named: set[str] = set()
        for number, picture in enumerate(drawn):
            prompt, answer = write_example(task, scenes.all[picture], wording)
            is_shown = number >= blind
            before = [*((image,) if is_shown else ()), *tokenize(prompt)]
            after = [*tokenize(answer), end]
            ids += [*before, *after, *newline]
            # Nothing can be known of a picture that is not shown, nor its name before it was said.
            is_known = is_shown and (task != "naming" or answer in named)
            learned = after if is_known else [_IGNORED] * len(after)
            wanted += [_IGNORED] * len(before) + learned + [_IGNORED] * len(newline)
            if is_shown:
                named.add(answer)
        texts.append(ids)
        labels.append(wanted)
    width = max(len(ids) for ids in texts)
    padding = int(processor.tokenizer.pad_token_id)
    # On the right, where no label is and nothing before it looks.
    return _Batch(
        torch.tensor([ids + [padding] * (width - len(ids)) for ids in texts]),
        torch.tensor([wanted + [_IGNORED] * (width - len(wanted)) for wanted in labels]),
        torch.from_numpy(pictures),
    )


def _tokenizer(processor: OpenFlamingoProcessor) -> Callable[[str], tuple[int, ...]]:
    return cache(lambda text: tuple(processor.tokenizer(text)["input_ids"]))


@torch.no_grad()
def _patch_tokens(
    flamingo: OpenFlamingoForConditionalGeneration, images: Any, *, batch: int = 1000
) -> Tensor:
    """Compute what the resampler reads, (n, patches, width)."""
    parts = []
    for start in range(0, len(images), batch):
        pixels = normalise_pixels(images[start : start + batch], CLIP_MEAN, CLIP_STD)
        parts.append(flamingo.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:])
    return torch.cat(parts)


def _contents(scenes: Sequence[Scene]) -> Tensor:
    """What each picture shows as zeros and ones: digits, how many, texture."""
    width = len(DIGITS) + 4 + len(TEXTURES)
    shown = torch.zeros(len(scenes), width)
    for row, scene in zip(shown, scenes, strict=True):
        row[list(scene.digits)] = 1
        row[len(DIGITS) + len(scene.objects) - 1] = 1
        row[len(DIGITS) + 4 + scene.texture] = 1
    return shown
