"""Training of the mini LLaVA: a projector and a decoder on frozen vision features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kuea_mllm.miniworld.models import CLIP_MEAN, CLIP_STD, DECODER_WIDTH, make_llava
from kuea_mllm.miniworld.packing import PackedBatch, QuestionPacker
from kuea_mllm.miniworld.questions import sample_questions
from kuea_mllm.miniworld.rendering import Images, render_scenes
from kuea_mllm.miniworld.scenes import COLOURS, DIGITS, GRID, Scene, sample_scenes
from kuea_mllm.miniworld.training import (
    Schedule,
    in_eval_mode,
    normalise_pixels,
    optimise,
    seeded,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, LlamaTokenizer, LlavaForConditionalGeneration

PICTURES = 16_000
BATCH = 32
QUESTIONS = 8
SCHEDULE = Schedule(steps=3000, lr=2e-3, weight_decay=0.02)
_CELLS = GRID * GRID
# Half of the training: afterwards the answers alone decide what the projector keeps.
_NAMING_WEIGHT = 1.0
_HINT_WEIGHT = 0.5
_ALIGNMENT = Schedule(steps=600, lr=3e-3, weight_decay=0.0)


def train_llava(
    clip: CLIPModel,
    tokenizer: LlamaTokenizer,
    *,
    seed: int,
    pictures: int = PICTURES,
    schedule: Schedule = SCHEDULE,
    progress: bool = True,
) -> LlavaForConditionalGeneration:
    """Train a LLaVA on `pictures` pictures with several questions each.

    Only answers are learned. A second loss, for the projector alone, asks that every image token
    lie near the embeddings of the words for its patch (the digit, the colour); it stands for the
    caption pre-training of the real projector and saves most of its time.

    Args:
        clip: The CLIP whose vision tower is used; it stays as it is.
        tokenizer: From `build_llava_tokenizer`.
        seed: Decides the pictures, the questions, the initial weights and the batches.
        pictures: Number of training pictures.
        schedule: Steps and learning rate.
        progress: Whether to show a bar.
    """
    scenes = sample_scenes(pictures, "train", seed=seed + 500)
    rng = np.random.default_rng([seed, 3])
    images = render_scenes(scenes, rng)
    packer = QuestionPacker(tokenizer)
    questions = [
        [packer.encode(question) for question in sample_questions(scene, rng, QUESTIONS)]
        for scene in scenes
    ]
    named = torch.from_numpy(_patch_words(scenes, tokenizer))
    with seeded(seed) as generator:
        llava = make_llava(clip, tokenizer)
        llava.model.vision_tower.requires_grad_(False)
        features = compute_features(llava, images)
        hint_head = nn.Linear(DECODER_WIDTH, len(tokenizer))
        llava.train()
        _align_projector(llava, features, named, generator, progress=progress)
        _prepare_decoder(llava)

        def compute_loss(step: int) -> Tensor:
            rows = torch.randint(pictures, (BATCH,), generator=generator)
            batch = packer.pack([questions[row] for row in rows.tolist()])
            tokens = llava.model.multi_modal_projector(features[rows])
            hidden = decode_packed(llava, tokens, batch)
            return (
                answer_loss(llava, hidden, batch)
                + _HINT_WEIGHT * _hint_loss(hint_head, hidden, batch)
                + _NAMING_WEIGHT * _naming_loss(llava, tokens, named[rows])
            )

        modules: list[nn.Module] = [
            llava.model.multi_modal_projector,
            llava.model.language_model,
            llava.lm_head,
            hint_head,
        ]
        optimise(modules, compute_loss, schedule, label="llava", progress=progress)
    return in_eval_mode(llava)


def compute_features(
    llava: LlavaForConditionalGeneration, images: Images, *, batch: int = 1000
) -> Tensor:
    """Compute what the projector reads, (n, patches, width): the model's own tap, once."""
    parts = []
    tower = llava.model.vision_tower.eval()
    with torch.no_grad():
        for start in range(0, len(images), batch):
            pixels = normalise_pixels(images[start : start + batch], CLIP_MEAN, CLIP_STD)
            states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
            parts.append(states[llava.config.vision_feature_layer][:, 1:])
    return torch.cat(parts)


def answer_loss(llava: LlavaForConditionalGeneration, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Compute the mean cross entropy of the answer tokens.

    Args:
        llava: The model.
        hidden: Result of `decode_packed`, (pictures, length, decoder width).
        batch: The packed questions of the same pictures.
    """
    logits = llava.lm_head(hidden[batch.is_answer])
    return F.cross_entropy(logits, batch.targets[batch.is_answer])


def decode_packed(
    llava: LlavaForConditionalGeneration, tokens: Tensor, batch: PackedBatch
) -> Tensor:
    """Run the decoder over packed questions; returns its last states, (pictures, length, width)."""
    embedded = llava.get_input_embeddings()(batch.input_ids)
    start = batch.image_start
    embedded = torch.cat([embedded[:, :start], tokens, embedded[:, start + tokens.shape[1] :]], 1)
    output = llava.model.language_model(
        inputs_embeds=embedded,
        attention_mask=batch.mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _align_projector(
    llava: LlavaForConditionalGeneration,
    features: Tensor,
    named: Tensor,
    generator: torch.Generator,
    *,
    progress: bool,
) -> None:
    """Train the projector and the word embeddings on the naming loss alone."""
    projector, table = llava.model.multi_modal_projector, llava.get_input_embeddings()

    def compute_loss(step: int) -> Tensor:
        rows = torch.randint(len(features), (256,), generator=generator)
        return _naming_loss(llava, projector(features[rows]), named[rows])

    optimise([projector, table], compute_loss, _ALIGNMENT, label="projector", progress=progress)


def _prepare_decoder(llava: LlavaForConditionalGeneration) -> None:
    """Let attention begin by looking for likeness and copying what it finds.

    A question has to find the image token that is like one of its words, and repeat the other word
    that this token is like. From random weights that circuit takes longer to appear than everything
    else together; see mimetic initialisation (Trockman and Kolter, 2023).
    """
    with torch.no_grad():
        for layer in llava.model.language_model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        llava.lm_head.weight.copy_(llava.get_input_embeddings().weight)


def _hint_loss(hint_head: nn.Linear, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Ask every word of a question for the answer's first token, as far as it can know."""
    return F.cross_entropy(hint_head(hidden[batch.is_prompt]), batch.hints[batch.is_prompt])


def _naming_loss(llava: LlavaForConditionalGeneration, tokens: Tensor, named: Tensor) -> Tensor:
    """Ask image tokens on digits for the words of their digit and colour."""
    on_digit = named[..., 0] >= 0
    table: Tensor = llava.get_input_embeddings().weight  # type: ignore[assignment]
    scores = tokens[on_digit] @ table.T
    words = named[on_digit]  # (tokens on digits, 2)
    return F.cross_entropy(scores, words[:, 0]) + F.cross_entropy(scores, words[:, 1])


def _patch_words(scenes: Sequence[Scene], tokenizer: LlamaTokenizer) -> np.ndarray:
    """Token ids of (digit, colour) for every cell, -1 where a cell is empty."""
    digits, colours = (
        [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
        for words in (DIGITS, COLOURS)
    )
    labels = np.full((len(scenes), _CELLS, 2), -1)
    for index, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.row * GRID + item.column
            labels[index, cell] = (digits[item.digit], colours[item.colour])
    return labels
