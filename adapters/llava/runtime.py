"""Answers questions with a LLaVA-1.5 directory: batched, left padded, greedy unless asked.

Questions about one image share what comes before the question (see `prefix_sharing`), wherever
requests say by `image_keys` that their images are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.choosing import candidate_tokens, likeliest
from kuea_mllm.adapters.generation import check_generation_options
from kuea_mllm.adapters.llava.adapter import resolve_config
from kuea_mllm.adapters.llava.images import PaddedImages, padded_images
from kuea_mllm.adapters.llava.loading import load_model_and_tokenizer
from kuea_mllm.adapters.llava.prompt import build_prompt, check_tokenizer, tokenize_prompt
from kuea_mllm.adapters.prefix_sharing import (
    Prompt,
    SharedPrefixes,
    next_inputs,
    padded_left,
)
from kuea_mllm.errors import EnvironmentFailure, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

LOGGER = logging.getLogger("kuea_mllm")


class LlavaRuntime:
    """A loaded LLaVA-1.5.

    Args:
        model: `LlavaForConditionalGeneration` in evaluation mode, on its device.
        tokenizer: Its tokenizer.
        images: Its image preprocessing.
        where: The directory it came from, for messages.

    Raises:
        UserError: If the tokenizer follows another conversation format or has no padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, images: PaddedImages, where: str) -> None:
        check_tokenizer(tokenizer, where)
        self.model = model
        self.tokenizer = tokenizer
        self._images = images
        self._tokens_per_image = tokens_per_image(model.config)
        self._pad_token_id = _padding_token(tokenizer, model.config, where)
        self._suppressed = self._tokens_never_to_generate()
        self.prefixes = SharedPrefixes()
        self._forget_stored_sampling()

    @classmethod
    def load(cls, model_dir: Path, *, dtype: str, device: str) -> LlavaRuntime:
        """Load a directory exactly as asked, with no other dtype or device as a fallback.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        config = resolve_config(model_dir)
        images = padded_images(model_dir, config.vision_config.image_size)
        model, tokenizer = load_model_and_tokenizer(model_dir, dtype=dtype, device=device)
        return cls(model, tokenizer, images, str(model_dir))

    def generate(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[str]:
        """Answer a batch of questions; see `MLLMRuntime.generate`."""
        ids = self.generate_ids(
            requests,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    def generate_ids(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[list[int]]:
        """Answer a batch of questions with token ids, the end token and padding left out.

        Raises:
            UserError: If an option is out of range.
            EnvironmentFailure: If the device runs out of memory.
        """
        check_generation_options(max_new_tokens, num_beams, temperature, top_p)
        if not requests:
            return []
        prompts = self._prompts(requests)
        self._warn_of_length(max(len(prompt.ids) for prompt in prompts) + max_new_tokens)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            # top_k would otherwise default to 50, which the original never used.
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
            if top_p is not None:
                sampling["top_p"] = top_p
        with self._memory_named(len(requests)), torch.inference_mode():
            inputs = self._inputs(prompts, requests)
            if num_beams > 1 and "past_key_values" in inputs:
                # transformers repeats all the other inputs for its beams.
                inputs["past_key_values"].batch_repeat_interleave(num_beams)
            output: Tensor = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                suppress_tokens=self._suppressed or None,
                pad_token_id=self._pad_token_id,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **sampling,
            )
        new_ids = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_until(row, self.tokenizer.eos_token_id) for row in new_ids]

    def choose(self, requests: Sequence[ChatRequest], candidates: Sequence[str]) -> list[str]:
        """Pick the likeliest candidate for each question; see `ChoosingRuntime.choose`.

        Raises:
            UserError: Naming a candidate that is not one token of its own.
            EnvironmentFailure: If the device runs out of memory.
        """
        tokens = candidate_tokens(self.tokenizer, candidates)
        if not requests:
            return []
        prompts = self._prompts(requests)
        self._warn_of_length(max(len(prompt.ids) for prompt in prompts) + 1)
        with self._memory_named(len(requests)), torch.inference_mode():
            inputs = next_inputs(self._inputs(prompts, requests))
            last = self.model.model(**inputs, use_cache=True).last_hidden_state[:, -1].float()
            # In float32 whatever the model's dtype: bfloat16 logits lie up to 0.1 apart and tie.
            logits = last @ self.model.lm_head.weight[tokens].float().T
        return likeliest(logits, candidates)

    def preprocess(self, image: Image) -> Tensor:
        """Return the pixel values of one image, (3, size, size), float32, on the CPU.

        Raises:
            DataError: If the image cannot be decoded.
        """
        return self._images([image])[0]

    def prepare(self, requests: Sequence[ChatRequest]) -> dict[str, Tensor]:
        """Turn requests into the inputs of the model, each complete in itself.

        Returns:
            `input_ids` and `attention_mask`, (batch, longest prompt), padded on the left;
            `pixel_values`, (images, 3, size, size), in the model's dtype, absent without images.
        """
        return self._read([prompt.ids for prompt in self._prompts(requests)], requests)

    def _prompts(self, requests: Sequence[ChatRequest]) -> list[Prompt]:
        image_token = self.model.config.image_token_id
        prompts = []
        for request in requests:
            ids = tokenize_prompt(
                build_prompt(request.prompt, image_count=len(request.images)),
                self.tokenizer,
                image_token_id=image_token,
                tokens_per_image=self._tokens_per_image,
            )
            prefix = len(ids) - ids[::-1].index(image_token) if request.images else 0
            prompts.append(Prompt(ids, prefix, request.image_keys))
        return prompts

    def _inputs(self, prompts: Sequence[Prompt], requests: Sequence[ChatRequest]) -> dict[str, Any]:
        if not self.prefixes.pay(prompts):
            return self._read([prompt.ids for prompt in prompts], requests)

        def prefill(places: Sequence[int]) -> Any:
            rows = [prompts[place].ids[: prompts[place].prefix] for place in places]
            inputs = next_inputs(dict(self._read(rows, [requests[place] for place in places])))
            return self.model.model(**inputs, use_cache=True).past_key_values

        return self.prefixes.lay_out(
            prompts, prefill, pad_token_id=self._pad_token_id, device=self.model.device
        )

    def _read(
        self, rows: Sequence[Sequence[int]], requests: Sequence[ChatRequest]
    ) -> dict[str, Tensor]:
        input_ids, attention_mask = padded_left(rows, self._pad_token_id)
        device = self.model.device
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        pixels = self._pixels(requests)
        if pixels is not None:
            inputs["pixel_values"] = pixels.to(device, self.model.dtype)
        return inputs

    def _pixels(self, requests: Sequence[ChatRequest]) -> Tensor | None:
        pictures = [image for request in requests for image in request.images]
        if not pictures:
            return None
        ready: list[Tensor] = [pixels for request in requests for pixels in request.pixels]
        return torch.stack(ready) if len(ready) == len(pictures) else self._images(pictures)

    @contextmanager
    def _memory_named(self, count: int) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.prefixes.forget()
            raise EnvironmentFailure(
                f"out of memory on {self.model.device} while answering {count} questions at once.",
                "Choose a smaller --batch-size, a smaller dtype or a larger device.",
            ) from error

    def describe(self) -> dict[str, Any]:
        """Say how the model runs."""
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "attention": self.model.config._attn_implementation,
            "conversation": "v1",
            "images": "padded to a square, resized with PIL",
            "pads_to_square": True,
            "tokens_per_image": self._tokens_per_image,
            "suppressed_tokens": len(self._suppressed),
        }

    def vision_state(self) -> Mapping[str, Tensor]:
        """Return the tensors of the tower in use."""
        state: Mapping[str, Tensor] = self.model.model.vision_tower.state_dict()
        return state

    def _tokens_never_to_generate(self) -> list[int]:
        # The embedding is padded beyond the tokenizer; those rows can win an argmax (trap 7), and
        # neither placeholder is something to say.
        vocabulary = self.model.config.text_config.vocab_size
        known = set(self.tokenizer.get_vocab().values())
        never = {token for token in range(vocabulary) if token not in known}
        if self.model.config.image_token_id < vocabulary:
            never.add(self.model.config.image_token_id)
        in_use = {self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}
        if self._pad_token_id not in in_use | {self.tokenizer.unk_token_id}:
            never.add(self._pad_token_id)
        return sorted(never)

    def _warn_of_length(self, length: int) -> None:
        longest = self.model.config.text_config.max_position_embeddings
        if length > longest:
            LOGGER.warning(
                "a prompt and its answer may take %d tokens, the model was made for %d; "
                "answers beyond that are unreliable",
                length,
                longest,
            )

    def _forget_stored_sampling(self) -> None:
        # A stored temperature or length would otherwise fill in what a call leaves open.
        from transformers import GenerationConfig

        empty: Any = GenerationConfig
        self.model.generation_config = empty()


def tokens_per_image(config: Any) -> int:
    """Return how many tokens one image takes, from a `LlavaConfig`."""
    vision = config.vision_config
    tokens = (int(vision.image_size) // int(vision.patch_size)) ** 2
    has_cls = vision.model_type == "clip_vision_model"
    drops_first = config.vision_feature_select_strategy == "default"
    return tokens + int(has_cls) - int(drops_first)


def _padding_token(tokenizer: Any, config: Any, where: str) -> int:
    candidates = (
        tokenizer.pad_token_id,
        getattr(config, "pad_token_id", None),
        getattr(config.text_config, "pad_token_id", None),
    )
    for candidate in candidates:
        if candidate is not None and candidate >= 0 and candidate != config.image_token_id:
            return int(candidate)
    raise UserError(
        f"neither the tokenizer nor the configuration in {where} names a padding token.",
        'Set "pad_token" in tokenizer_config.json; LLaVA-1.5 uses "<unk>" or "<pad>".',
    )


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
