"""Answers questions with a LLaVA-1.5 directory: batched, left padded, greedy unless asked.

Questions about one image share what comes before the question (see `prefix_sharing`), wherever
requests say by `image_keys` that their images are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from kuea_mllm.adapters.answering import (
    AnsweringRuntime,
    describe_model,
    forget_stored_settings,
    unwritable_tokens,
)
from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.choosing import candidate_tokens, likeliest
from kuea_mllm.adapters.llava.adapter import model_class
from kuea_mllm.adapters.llava.images import PaddedImages, padded_images
from kuea_mllm.adapters.llava.loading import load_model_and_tokenizer
from kuea_mllm.adapters.llava.prompt import build_prompt, check_tokenizer, tokenize_prompt
from kuea_mllm.adapters.prefix_sharing import (
    Prompt,
    SharedPrefixes,
    next_inputs,
    padded_left,
)
from kuea_mllm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

LOGGER = logging.getLogger("kuea_mllm")


class LlavaRuntime(AnsweringRuntime):
    """A loaded LLaVA-1.5.

    Args:
        model: `LlavaForConditionalGeneration` in evaluation mode, on its device.
        tokenizer: Its tokenizer.
        images: Its image preprocessing.
        where: The directory it came from, for messages.

    Raises:
        UserError: If the tokenizer follows another conversation format or has no padding token.
    """

    # Class and configuration of a directory; another one for variants.
    _model_class = staticmethod(model_class)

    def __init__(self, model: Any, tokenizer: Any, images: PaddedImages, where: str) -> None:
        check_tokenizer(tokenizer, where)
        self.model = model
        self.tokenizer = tokenizer
        self._images = images
        self._tokens_per_image = tokens_per_image(model.config)
        self._pad_token_id = _padding_token(tokenizer, model.config, where)
        self._ends = [tokenizer.eos_token_id]
        self._suppressed = self._tokens_never_to_generate()
        self.prefixes = SharedPrefixes()
        forget_stored_settings(model)

    @classmethod
    def load(cls, model_dir: Path, *, dtype: str, device: str) -> Self:
        """Load a directory exactly as asked, with no other dtype or device as a fallback.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        loader, config = cls._model_class(model_dir)
        images = padded_images(model_dir, config.vision_config.image_size)
        model, tokenizer = load_model_and_tokenizer(loader, model_dir, dtype=dtype, device=device)
        return cls(model, tokenizer, images, str(model_dir))

    def _answer(
        self, requests: Sequence[ChatRequest], options: Mapping[str, Any]
    ) -> list[list[int]]:
        prompts = self._prompts(requests)
        longest = max(len(prompt.ids) for prompt in prompts)
        self._warn_of_length(longest + options["max_new_tokens"])
        tokens = {
            "pad_token_id": self._pad_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
        }
        with self._memory_named(len(requests)), torch.inference_mode():
            return self._go_on(self._inputs(prompts, requests), {**options, **tokens})

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

    def describe(self) -> dict[str, Any]:
        """Say how the model runs."""
        return {
            **describe_model(self.model),
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
        config = self.model.config
        never = unwritable_tokens(
            self.tokenizer, config.text_config.vocab_size, config.image_token_id
        )
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
