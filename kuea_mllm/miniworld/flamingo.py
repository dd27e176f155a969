"""The mini Flamingo: the classes of OpenFlamingo-3B, small, around the CLIP of a mini world."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kuea_mllm.adapters.fewshot_text import cut_answer, cut_caption
from kuea_mllm.miniworld.captions import PREFIXES, describe
from kuea_mllm.miniworld.models import CLIP_MEAN, CLIP_STD
from kuea_mllm.miniworld.scenes import CANVAS, DIGITS, MAX_OBJECTS, TEXTURES, Scene
from kuea_mllm.miniworld.vocabularies import learn_merges

if TYPE_CHECKING:
    from transformers import CLIPModel, GPTNeoXTokenizer

    from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration
    from kuea_mllm.adapters.openflamingo.processing import OpenFlamingoProcessor

TASKS = ("caption", "count", "texture", "naming")
# Words of no meaning.
NAMES = ("dax", "wug", "blick", "toma", "fep", "zorp")
# Prompts of the published evaluation (fact sheet, section 6.1).
CAPTION_PROMPT = "Output:"
_CONTEXT = 512
_WIDTH = 96
# As byte-level vocabularies write a space.
_SPACE = "\u0120"


@dataclass(frozen=True)
class Wording:
    """What only the demonstrations of a prompt tell.

    Attributes:
        style: Form of its captions: index into `PREFIXES`.
        names: What pictures with so many digits are called in it; two kinds have names.
    """

    style: int
    names: Mapping[int, str]


def draw_wording(rng: np.random.Generator, *, digits: int | None = None) -> Wording:
    """Draw the wording of a prompt.

    Args:
        rng: Source of every choice.
        digits: Number of digits that has to have a name.
    """
    counts = rng.permutation(range(1, MAX_OBJECTS + 1)).tolist()
    if digits is not None:
        counts = [digits, *(count for count in counts if count != digits)]
    names = rng.choice(NAMES, 2, replace=False).tolist()
    return Wording(int(rng.integers(len(PREFIXES))), dict(zip(counts[:2], names, strict=True)))


def draw_pictures(
    task: str,
    wording: Wording,
    scenes: ScenesByCount,
    rng: np.random.Generator,
    count: int,
    *,
    is_balanced: bool = False,
) -> list[int]:
    """Draw the scenes of a prompt.

    Args:
        task: One of `TASKS`; for "naming" only scenes that have a name are drawn.
        wording: Of the prompt.
        scenes: What to draw from.
        rng: Source of every choice.
        count: How many.
        is_balanced: Whether both names come as often, as far as `count` allows.
    """
    if task != "naming":
        rows: list[int] = rng.integers(len(scenes.all), size=count).tolist()
        return rows
    names = list(wording.names)
    kinds = [names[number % 2] for number in rng.permutation(count).tolist()]
    if not is_balanced:
        kinds = [names[choice] for choice in rng.integers(2, size=count).tolist()]
    pools = [scenes.rows[kind] for kind in kinds]
    return [pool[int(rng.integers(len(pool)))] for pool in pools]


class ScenesByCount:
    """Scenes, and which of them have how many digits."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.all = scenes
        self.rows = {
            count: [row for row, scene in enumerate(scenes) if len(scene.objects) == count]
            for count in range(1, MAX_OBJECTS + 1)
        }


def write_example(task: str, scene: Scene, wording: Wording) -> tuple[str, str]:
    """Write what follows the image: the prompt, and what the model is to say.

    Args:
        task: One of `TASKS`. "naming" asks for a name that means nothing by itself: a model has to
            see which demonstrated picture is like this one.
        scene: What the image shows.
        wording: Of the whole prompt.
    """
    if task == "caption":
        digits = [DIGITS[digit] for digit in sorted(scene.digits)]
        return CAPTION_PROMPT, describe(digits, None, PREFIXES[wording.style])
    if task == "count":
        question, answer = "How many digits are in the image?", str(len(scene.objects))
    elif task == "texture":
        question, answer = "What is the background?", scene.texture_name
    else:
        question, answer = "What is it called?", wording.names[len(scene.objects)]
    return f"Question:{question} Short answer:", answer


def build_flamingo_tokenizer() -> GPTNeoXTokenizer:
    """Build a GPT-NeoX tokenizer in which every word of the mini Flamingo is one token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPTNeoXTokenizer

    texts = [
        *PREFIXES,
        *DIGITS,
        *TEXTURES,
        *NAMES,
        "Output Question Short answer and",
        "How many digits are in the image What is the background it called",
    ]
    words = sorted(set(" ".join(texts).split()))
    merges = learn_merges([*words, *(_SPACE + word for word in words)])
    pieces = ["<|endoftext|>", "<|padding|>", *sorted(ByteLevel.alphabet())]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    # Pairs are right; the annotation of transformers knows lines of a merges file only.
    return GPTNeoXTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=_CONTEXT,
    )


def make_flamingo_processor() -> OpenFlamingoProcessor:
    """Make the processor that is saved beside the model."""
    from kuea_mllm.adapters.openflamingo.processing import (
        OpenFlamingoImageProcessor,
        OpenFlamingoProcessor,
    )

    images = OpenFlamingoImageProcessor(CANVAS, CLIP_MEAN, CLIP_STD)
    return OpenFlamingoProcessor(images, build_flamingo_tokenizer())


def make_flamingo(
    clip: CLIPModel, processor: OpenFlamingoProcessor
) -> OpenFlamingoForConditionalGeneration:
    """Make a Flamingo around the vision weights of `clip`; everything else is untrained."""
    from kuea_mllm.adapters.openflamingo.configuration import (
        OpenFlamingoConfig,
        OpenFlamingoTextConfig,
    )
    from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration

    end, padding = processor.endofchunk_token_id, int(processor.tokenizer.pad_token_id)
    text = OpenFlamingoTextConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=_CONTEXT,
        # The usual 0.02 is meant for widths in the thousands.
        initializer_range=_WIDTH**-0.5,
    )
    config = OpenFlamingoConfig(
        vision_config=clip.vision_model.config.to_dict() | {"model_type": "clip_vision_model"},
        text_config=text,
        perceiver_depth=1,
        num_latents=8,
        resampler_heads=4,
        resampler_head_dim=16,
        resampler_ff_mult=2,
        cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_ff_mult=2,
        image_token_id=processor.image_token_id,
        endofchunk_token_id=end,
        eos_token_id=end,
        pad_token_id=padding,
        initializer_range=_WIDTH**-0.5,
    )
    flamingo = OpenFlamingoForConditionalGeneration(config)
    flamingo.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    generation: Any = flamingo.generation_config
    generation.eos_token_id, generation.pad_token_id = end, padding
    return flamingo


def save_flamingo(
    flamingo: OpenFlamingoForConditionalGeneration, processor: OpenFlamingoProcessor, folder: Path
) -> None:
    """Write a Flamingo with its processor and tokenizer."""
    model: Any = flamingo
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # safetensors makes files for their owner alone.
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def score_answer(task: str, answer: str, expected: str) -> float:
    """Score what a Flamingo said, from 0 to 1.

    Captions: F1 of the words, cut off as in the published evaluation. Others: right or wrong.
    """
    if task != "caption":
        return float(cut_answer(answer).strip().lower() == expected)
    said = set(re.findall(r"[a-z]+", cut_caption(answer).lower()))
    right = set(re.findall(r"[a-z]+", expected))
    return 2 * len(said & right) / (len(said) + len(right))
