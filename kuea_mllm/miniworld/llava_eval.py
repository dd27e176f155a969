"""A quick look at what a mini LLaVA answers, without lmms-eval.

A question counts as right if greedy decoding would give exactly the right answer. That needs one
pass over the right answers: decoding reproduces one if each of its tokens is the likeliest.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from kuea_mllm.miniworld.packing import QuestionPacker
from kuea_mllm.miniworld.rendering import render_scenes
from kuea_mllm.miniworld.scenes import sample_scenes
from kuea_mllm.miniworld.tasks import TASKS
from kuea_mllm.miniworld.train_llava import compute_features, decode_packed

if TYPE_CHECKING:
    from transformers import LlamaTokenizer, LlavaForConditionalGeneration

_SEED = 88
_BATCH = 50


def score_llava(
    llava: LlavaForConditionalGeneration,
    tokenizer: LlamaTokenizer,
    *,
    split: str = "test",
    pictures: int = 400,
) -> dict[str, float]:
    """Score the kinds of questions of the four tasks.

    Args:
        llava: The model.
        tokenizer: Its tokenizer.
        split: Split of the scans in the pictures.
        pictures: Pictures for each task.

    Returns:
        Percent of right answers by `<task>` and `<task>/<kind of question>`.
    """
    packer = QuestionPacker(tokenizer)
    scores: dict[str, float] = {}
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([_SEED, number])
        scenes = sample_scenes(pictures, split, seed=_SEED + number, objects=task.objects)
        images = render_scenes(scenes, rng)
        questions = [task.ask(scene, rng) for scene in scenes]
        found: dict[str, list[bool]] = defaultdict(list)
        features = compute_features(llava, images)
        for start in range(0, pictures, _BATCH):
            rows = slice(start, start + _BATCH)
            encoded = [[packer.encode(question) for question in row] for row in questions[rows]]
            batch = packer.pack(encoded)
            with torch.inference_mode():
                tokens = llava.model.multi_modal_projector(features[rows])
                guesses = llava.lm_head(decode_packed(llava, tokens, batch)).argmax(-1)
            is_right = (guesses == batch.targets) | ~batch.is_answer
            for row, asked, items in zip(is_right, questions[rows], encoded, strict=True):
                end = batch.image_start + features.shape[1]
                for question, item in zip(asked, items, strict=True):
                    begin, end = end, end + len(item.prompt) + len(item.answer)
                    found[question.kind].append(bool(row[begin:end].all()))
        everything = [right for answers in found.values() for right in answers]
        scores[task.name] = 100 * float(np.mean(everything))
        scores |= {f"{task.name}/{k}": 100 * float(np.mean(found[k])) for k in sorted(found)}
    return scores
