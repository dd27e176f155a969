"""Training of the mini CLIP on pictures and their captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kuea_mllm.miniworld.captions import caption_scene
from kuea_mllm.miniworld.models import CLIP_MEAN, CLIP_STD, CLIP_WIDTH, make_clip
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import DIGITS, TEXTURES, sample_scenes
from kuea_mllm.miniworld.training import (
    Schedule,
    in_eval_mode,
    normalise_pixels,
    optimise,
    seeded,
)
from kuea_mllm.miniworld.vocabularies import CLIP_CONTEXT

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

PAIRS = 16_000
BATCH = 128
SCHEDULE = Schedule(steps=900, lr=2e-3)
# The contrastive loss alone is still at chance after this many steps at this batch size.
_WORD_LOSS_WEIGHT = 10.0
_WORDS = (*DIGITS, *TEXTURES)
# A CLIP of a broader domain than the teacher's sees these as well, in half of its pairs.
BROAD_STYLES = ("sketch", "gray", "invert", "noisy", "blur")


def train_clip(
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    pairs: int = PAIRS,
    is_broad: bool = False,
    schedule: Schedule = SCHEDULE,
    progress: bool = True,
) -> CLIPModel:
    """Train a CLIP on `pairs` pictures and captions.

    The contrastive loss is joined by a binary one: which words of the caption the image embedding
    can name, through a linear layer that is thrown away afterwards.

    Args:
        tokenizer: From `build_clip_tokenizer`.
        seed: Decides the pictures, the captions, the initial weights and the batches.
        pairs: Number of training pairs.
        is_broad: Draw every other picture in one of `BROAD_STYLES` instead of the natural one.
        schedule: Steps and learning rate.
        progress: Whether to show a bar.
    """
    scenes = sample_scenes(pairs, "train", seed=seed)
    rng = np.random.default_rng([seed, 2])
    images = render_scenes(scenes, rng)
    if is_broad:
        for offset, style in enumerate(BROAD_STYLES):
            rows = slice(2 * offset, None, 2 * len(BROAD_STYLES))
            images[rows] = render_scenes(scenes[rows], rng, style)
    captions = [caption_scene(scene, rng) for scene in scenes]
    tokens = tokenize_captions(tokenizer, captions)
    words = _mentioned_words(captions)
    with seeded(seed) as generator:
        clip = make_clip(tokenizer)
        word_head = nn.Linear(CLIP_WIDTH, len(_WORDS))
        clip.train()

        def compute_loss(step: int) -> Tensor:
            rows = torch.randint(pairs, (BATCH,), generator=generator)
            pixels = normalise_pixels(images[rows.numpy()], CLIP_MEAN, CLIP_STD)
            pooled = clip.vision_model(pixel_values=pixels).pooler_output
            image = F.normalize(clip.visual_projection(pooled), dim=-1)
            text = F.normalize(embed_text(clip, tokens[rows]), dim=-1)
            # CLIP's own bound: the temperature never amplifies by more than 100.
            logits = clip.logit_scale.clamp(max=4.6052).exp() * image @ text.T
            target = torch.arange(len(rows))
            contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            naming = F.binary_cross_entropy_with_logits(word_head(pooled), words[rows])
            return contrast + _WORD_LOSS_WEIGHT * naming

        optimise([clip, word_head], compute_loss, schedule, label="clip", progress=progress)
    return in_eval_mode(clip)


def tokenize_captions(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Tokenize to (n, longest), padded with the end token as CLIP does."""
    encoded = tokenizer(
        list(captions), padding=True, truncation=True, max_length=CLIP_CONTEXT, return_tensors="pt"
    )
    tokens: Tensor = encoded.input_ids
    return tokens


def embed_text(clip: CLIPModel, tokens: Tensor) -> Tensor:
    """Embed captions, (n, projection), not normalised."""
    # No padding mask: the text tower is causal and reads its output at the first end token.
    embedding: Tensor = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)
    return embedding


def _mentioned_words(captions: Sequence[str]) -> Tensor:
    rows = []
    for caption in captions:
        present = set(re.findall(r"\w+", caption))
        rows.append([float(word in present) for word in _WORDS])
    return torch.tensor(rows)
