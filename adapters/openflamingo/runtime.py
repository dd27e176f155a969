"""Answers questions and completes prompts with an OpenFlamingo directory, in batches."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kuea_mllm.adapters.answering import describe_model, forget_stored_settings, memory_named
from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.choosing import candidate_tokens
from kuea_mllm.adapters.generation import generation_options
from kuea_mllm.adapters.loading import failures_named, load_model, resolve_device, resolve_dtype
from kuea_mllm.adapters.openflamingo.processing import IMAGE_TAG, OpenFlamingoProcessor
from kuea_mllm.adapters.openflamingo.ranking import rank_names, rank_names_as_released
from kuea_mllm.adapters.openflamingo.released_beam import released_beam_search
from kuea_mllm.errors import UserError

LOGGER = logging.getLogger("kuea_mllm")

_COUNTED_AT_ONCE = 1024
# Of `build_prompt`. With the colon: an answer may hold the words.
_NEXT_TURN = re.compile("Question:|Short answer:")
# Images whose latents are remembered for the next questions about them: 64 MiB of the 3B model.
_REMEMBERED = 256


class OpenFlamingoRuntime:
    """A loaded OpenFlamingo.

    Args:
        model: `OpenFlamingoForConditionalGeneration` in evaluation mode, on its device.
        processor: Its processor.
    """

    def __init__(self, model: Any, processor: OpenFlamingoProcessor) -> None:
        self.model = model
        self.processor = processor
        forget_stored_settings(model)
        self._latents: OrderedDict[str, Tensor] = OrderedDict()
        self._shortened: set[int] = set()

    @classmethod
    def load(cls, model_dir: Path, *, dtype: str, device: str) -> OpenFlamingoRuntime:
        """Load a directory exactly as asked, with no other dtype or device as a fallback.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
            EnvironmentFailure: If the device is too small.
        """
        from kuea_mllm.adapters.openflamingo.modeling import OpenFlamingoForConditionalGeneration

        torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
        with failures_named(model_dir, torch_device):
            processor = OpenFlamingoProcessor.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
            loader = OpenFlamingoForConditionalGeneration
            model = load_model(loader, model_dir, dtype=torch_dtype, device=torch_device)
        if len(processor.tokenizer) != model.config.text_config.vocab_size:
            raise UserError(
                f"the tokenizer of {model_dir} has {len(processor.tokenizer)} tokens, the model "
                f"{model.config.text_config.vocab_size}.",
                "Restore tokenizer.json and tokenizer_config.json from the source of the model.",
            )
        return cls(model, processor)

    def generate(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[str]:
        """Answer a batch of questions in the format of visual question answering, zero-shot.

        See `MLLMRuntime.generate`; demonstrations go through `complete`. An answer ends where the
        model goes on with a question or an answer of its own making: without demonstrations it may
        not know that `<|endofchunk|>` belongs behind the first. It takes at most half of the
        context, whatever is allowed.
        """
        answers = self.complete(
            [build_prompt(request.prompt, image_count=len(request.images)) for request in requests],
            self._encoded(requests),
            max_new_tokens=self._longest_answer(max_new_tokens),
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
        )
        return [_NEXT_TURN.split(answer, maxsplit=1)[0].strip() for answer in answers]

    def choose(self, requests: Sequence[ChatRequest], candidates: Sequence[str]) -> list[str]:
        """Pick the likeliest candidate for each question; see `ChoosingRuntime.choose`.

        A candidate is scored with the blank that stands between "Short answer:" and an answer.

        Raises:
            UserError: Naming a candidate that is not one token of its own.
            EnvironmentFailure: If the device runs out of memory.
        """
        candidate_tokens(self.processor.tokenizer, candidates, before=" ")
        if not requests:
            return []
        prompts = [build_prompt(r.prompt, image_count=len(r.images)) for r in requests]
        names = [f" {candidate}" for candidate in candidates]
        scores = self.rank(prompts, self._encoded(requests), names)
        return [candidates[row.index(max(row))] for row in scores]

    def complete(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        length_penalty: float = 0.0,
        temperature: float = 0.0,
        top_p: float | None = None,
        released: bool = False,
    ) -> list[str]:
        """Go on with prompts up to `<|endofchunk|>`.

        Args:
            prompts: Texts with `<image>` where an image belongs, demonstrations and all.
            images: The images of each prompt in order, or what `encode_images` gave for them.
            max_new_tokens: Most tokens per answer.
            num_beams: Beam search width.
            length_penalty: Of the beam search; the published evaluation has 0.
            temperature: 0 decodes greedily; above 0 samples.
            top_p: Nucleus of the sampling.
            released: Weigh the length of beams as the published evaluation did, which differs
                unless `length_penalty` is 0, and let the model write `<image>` and `<PAD>`.

        Returns:
            The new text of each prompt as it comes, blanks at its ends included.

        Raises:
            UserError: If a prompt does not fit its images or the context, or an option is out of
                range.
            EnvironmentFailure: If the device runs out of memory.
        """
        options = generation_options(max_new_tokens, num_beams, temperature, top_p)
        if not prompts:
            return []
        config = self.model.config
        inputs = self.prepare(prompts, images, max_new_tokens)
        if num_beams > 1:
            options["length_penalty"] = length_penalty
            if released and length_penalty:
                options["custom_generate"] = released_beam_search
        if not released:
            # Neither is something to say, and what an <image> without a picture sees would depend
            # on the rest of the batch.
            padding = self.processor.tokenizer.pad_token_id
            options["suppress_tokens"] = [config.image_token_id, padding]
        with self._memory_named(len(prompts)):
            output: Tensor = self.model.generate(
                **inputs,
                eos_token_id=config.endofchunk_token_id,
                pad_token_id=config.endofchunk_token_id,
                **options,
            )
        return self.processor.decode_new(output, inputs["input_ids"].shape[1])

    def rank(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | Sequence[Sequence[Tensor]],
        class_names: Sequence[str],
        *,
        released: bool = False,
    ) -> list[list[float]]:
        """Score class names as continuations of prompts; see `FewShotRuntime.rank`.

        Raises:
            UserError: If a prompt does not fit its images or the context, or a name is empty.
            EnvironmentFailure: If the device runs out of memory.
        """
        tokenizer = self.processor.tokenizer
        names = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in class_names]
        if not all(names):
            raise UserError(f"class names {list(class_names)} must not be empty.")
        if not prompts:
            return []
        lengths = [len(ids) for ids in names]
        # The published way feeds all names one after another, last tokens included.
        added = sum(lengths) + 1 if released else max(lengths)
        inputs = self.prepare(prompts, images, added, released_counts=released)
        rank_all = rank_names_as_released if released else rank_names
        with self._memory_named(len(prompts)):
            return rank_all(self.model, inputs, names).tolist()

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return the latents of each image, (latents, width), on the model's device.

        Raises:
            DataError: If an image cannot be decoded.
            EnvironmentFailure: If the device runs out of memory.
        """
        if not images:
            return []
        pixels = self.processor.image_processor(list(images))["pixel_values"]
        with self._memory_named(len(images)):
            latents = self.model.encode_images(pixels.to(self.model.device, self.model.dtype))
        # Copies: a view that is kept would keep the latents of the whole batch.
        return [each.clone() for each in latents]

    def _encoded(
        self, requests: Sequence[ChatRequest]
    ) -> Sequence[Sequence[Image.Image]] | Sequence[Sequence[Tensor]]:
        """Return the latents of all images, those with a key computed once; else the images."""
        if not all(len(r.image_keys) == len(r.images) for r in requests):
            return [request.images for request in requests]
        wanted = {k: i for r in requests for k, i in zip(r.image_keys, r.images, strict=True)}
        missing = [key for key in wanted if key not in self._latents]
        encoded = self.encode_images([wanted[key] for key in missing])
        found = {key: self._latents[key] for key in wanted if key in self._latents}
        found.update(zip(missing, encoded, strict=True))
        for key, latents in found.items():
            self._latents[key] = latents
            self._latents.move_to_end(key)
        while len(self._latents) > _REMEMBERED:
            self._latents.popitem(last=False)
        return [[found[key] for key in request.image_keys] for request in requests]

    def _longest_answer(self, asked: int) -> int:
        # By the model alone: what a prompt leaves free would depend on the others of its batch.
        most = self._context // 2
        if asked > most and asked not in self._shortened:
            self._shortened.add(asked)
            LOGGER.warning(
                "Answers of up to %d tokens are allowed: they end after %d, half of the context.",
                asked,
                most,
            )
        return min(asked, most)

    @property
    def _context(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return the length of each prompt in tokens."""
        counts: list[int] = []
        # In parts: the encodings of millions of few-shot prompts would not fit in memory.
        for start in range(0, len(prompts), _COUNTED_AT_ONCE):
            part = list(prompts[start : start + _COUNTED_AT_ONCE])
            counts += [len(ids) for ids in self.processor.tokenizer(part)["input_ids"]]
        return counts

    def prompt_room(self, max_new_tokens: int) -> int:
        """Return the most tokens that a prompt may have with an answer of this length."""
        # The last new token is never fed back.
        return self._context - max(max_new_tokens - 1, 0)

    def prepare(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | Sequence[Sequence[Tensor]],
        max_new_tokens: int = 0,
        *,
        released_counts: bool = False,
    ) -> dict[str, Tensor]:
        """Turn prompts into the inputs of the model, on its device.

        Args:
            prompts: Texts with `<image>` where an image belongs.
            images: Images of each prompt, or their features.
            max_new_tokens: Length of the answer that has to fit behind the prompt.
            released_counts: As for the processor.

        Raises:
            UserError: If images and prompts do not match, or prompt and answer exceed the context.
        """
        room = self.prompt_room(max_new_tokens)
        if room < 1:
            raise UserError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the {self._context} "
                "tokens of the context.",
                "Ask for shorter answers.",
            )
        rows: Sequence[Sequence[Any]] = images
        encoded = any(isinstance(image, Tensor) for row in rows for image in row)
        if encoded and not released_counts:
            _require_places(prompts, rows)
        batch = self.processor(
            text=list(prompts),
            images=None if encoded else list(rows),
            max_length=room,
            released_counts=released_counts or encoded,
        )
        inputs: dict[str, Tensor] = {k: t.to(self.model.device) for k, t in batch.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        if encoded:
            inputs["image_features"] = _stacked(rows)
        return inputs

    def _memory_named(self, count: int) -> AbstractContextManager[None]:
        return memory_named(self.model.device, f"with a batch of {count}")

    def describe(self) -> dict[str, Any]:
        """Say how the model runs."""
        return {
            **describe_model(self.model),
            "conversation": "Question:... Short answer:",
            "images": "resized with PIL and cropped to a square, then made RGB",
            "pads_to_square": False,
            "tokens_per_image": self.model.config.num_latents,
            "suppressed_tokens": 2,
            "longest_answer": self._context // 2,
        }

    def vision_state(self) -> Mapping[str, Tensor]:
        """Return the tensors of the tower in use."""
        state: Mapping[str, Tensor] = self.model.model.vision_tower.state_dict()
        return state


def build_prompt(question: str, *, image_count: int = 0) -> str:
    """Return the zero-shot prompt of a question as the model was evaluated with it.

    Args:
        question: The user's words; image tags in it are removed, images always come first.
        image_count: Number of images.
    """
    return f"{IMAGE_TAG * image_count}Question:{question.replace(IMAGE_TAG, '')} Short answer:"


def _require_places(prompts: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> None:
    """Refuse features in other numbers than the places for images, as the processor does."""
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if prompt.count(IMAGE_TAG) != len(row):
            raise UserError(
                f"prompt {number} holds {prompt.count(IMAGE_TAG)} {IMAGE_TAG} tokens and comes "
                f"with {len(row)} images.",
                f"Put one {IMAGE_TAG} where each image belongs.",
            )


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Put features into one tensor, zeros where a row has fewer images; no text sees those."""
    like = next(features for row in rows for features in row)
    stacked = like.new_zeros(len(rows), max(map(len, rows)), *like.shape)
    for number, row in enumerate(rows):
        for place, features in enumerate(row):
            stacked[number, place] = features
    return stacked
