"""Answers questions with any Hugging Face VLM through its own processor and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.answering import (
    AnsweringRuntime,
    describe_model,
    forget_stored_settings,
    unwritable_tokens,
)
from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.choosing import likeliest
from kuea_mllm.adapters.hf_vlm.answering import answer_tokens
from kuea_mllm.adapters.hf_vlm.sharing import ImageSharing
from kuea_mllm.adapters.hf_vlm.structure import conversing_class, find_tower
from kuea_mllm.adapters.images import as_plain_rgb
from kuea_mllm.adapters.loading import failures_named, load_model, resolve_device, resolve_dtype
from kuea_mllm.errors import UserError

# Those that put a single image whole into the middle of a square; others tile, stretch or crop.
_PADDING = {"DeepseekVLHybridImageProcessor", "DeepseekVLImageProcessor", "LlavaImageProcessor"}

_RESTORE = "Restore chat_template.jinja and processor_config.json from the base model."


class HFVLMRuntime(AnsweringRuntime):
    """A loaded VLM.

    Args:
        model: A generating model of transformers in evaluation mode, on its device.
        processor: Its processor, which has a chat template.
        where: The directory it came from, for messages.

    Raises:
        UserError: If there is no chat template, or no padding token.
    """

    def __init__(self, model: Any, processor: Any, where: str) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._where = where
        # A batch is padded on the left, so that every answer begins right behind its question.
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            raise UserError(
                f"the tokenizer in {where} names no padding token.",
                'Set "pad_token" in its tokenizer_config.json.',
            )
        self._tower = find_tower(model, where)
        self._ends = _end_tokens(model, self.tokenizer)
        self._suppressed = self._tokens_never_to_generate()
        forget_stored_settings(
            model,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self._ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.sharing = ImageSharing(model, self.tokenizer.pad_token_id)
        self.prefixes = self.sharing.prefixes
        self._choices: dict[tuple[str, ...], list[int]] = {}

    @classmethod
    def load(cls, model_dir: Path, *, dtype: str, device: str) -> HFVLMRuntime:
        """Load a directory exactly as asked, with no other dtype or device as a fallback.

        Raises:
            UserError: If the directory, the dtype or the device is not usable, or if the model
                cannot be asked by chat template.
        """
        from transformers import AutoProcessor

        loader, _ = conversing_class(model_dir)
        torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
        with failures_named(model_dir, torch_device):
            # The quick part first: what is wrong with it is then found in a second.
            processors: Any = AutoProcessor
            processor = processors.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
            require_chat(processor, str(model_dir))
            model = load_model(loader, model_dir, dtype=torch_dtype, device=torch_device)
        return cls(model, processor, str(model_dir))

    def _answer(
        self, requests: Sequence[ChatRequest], options: Mapping[str, Any]
    ) -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        for positions in _same_image_counts(requests):
            group = [requests[position] for position in positions]
            with self._memory_named(len(group)), torch.inference_mode():
                found = self._go_on(self.sharing.inputs(group, self.prepare), options)
            answers |= dict(zip(positions, found, strict=True))
        return [answers[position] for position in range(len(requests))]

    def choose(self, requests: Sequence[ChatRequest], candidates: Sequence[str]) -> list[str]:
        """Pick the likeliest candidate for each question; see `ChoosingRuntime.choose`.

        Raises:
            UserError: Naming a candidate that is not one token of its own, or if the model cannot
                take a question or begins its answers with something else.
            EnvironmentFailure: If the device runs out of memory.
        """
        tokens = self._tokens_of(tuple(candidates))
        chosen: dict[int, str] = {}
        for positions in _same_image_counts(requests):
            group = [requests[position] for position in positions]
            with self._memory_named(len(group)), torch.inference_mode():
                # By `generate`, which gives each class of models the inputs that it wants.
                inputs = self.sharing.inputs(group, self.prepare)
                output = self.model.generate(
                    **inputs,
                    max_new_tokens=1,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            found = likeliest(output.logits[0][:, tokens], candidates)
            chosen |= dict(zip(positions, found, strict=True))
        return [chosen[position] for position in range(len(requests))]

    def prepare(self, requests: Sequence[ChatRequest]) -> dict[str, Tensor]:
        """Turn requests with the same number of images into the inputs of the model.

        Raises:
            UserError: If chat template and processor cannot take them.
        """
        conversations = [self._conversation(request) for request in requests]
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        # The template is a program of the model's, and processors raise many kinds of exceptions.
        except Exception as error:
            raise UserError(
                f"chat template and processor of {self._where} cannot take a question with "
                f"{len(requests[0].images)} images ({type(error).__name__}: {error}).",
                _RESTORE,
            ) from error
        if requests[0].images:
            self._require_placeholders(inputs["input_ids"])
        prepared: dict[str, Tensor] = dict(inputs.to(self.model.device, self.model.dtype))
        return prepared

    def describe(self) -> dict[str, Any]:
        """Say how the model runs."""
        return {
            **describe_model(self.model),
            "conversation": "chat template of the model",
            "images": type(self.processor.image_processor).__name__,
            "pads_to_square": _pads_to_square(self.processor.image_processor),
            "tower": self._tower.path,
            "suppressed_tokens": len(self._suppressed),
        }

    def vision_state(self) -> Mapping[str, Tensor]:
        """Return the tensors of the tower in use."""
        state: Mapping[str, Tensor] = self._tower.module.state_dict()
        return state

    def _tokens_of(self, candidates: tuple[str, ...]) -> list[int]:
        if candidates not in self._choices:
            self._choices[candidates] = answer_tokens(self.processor, candidates, self._where)
        return self._choices[candidates]

    def _conversation(self, request: ChatRequest) -> list[dict[str, Any]]:
        question = request.prompt
        # An image tag in the question would be taken for an image.
        for owner in (self.processor, self.tokenizer):
            for name in ("image_token", "boi_token", "eoi_token"):
                if tag := getattr(owner, name, None):
                    question = question.replace(str(tag), "")
        images = [{"type": "image", "image": as_plain_rgb(image)} for image in request.images]
        return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]

    def _require_placeholders(self, input_ids: Tensor) -> None:
        token = getattr(self.model.config, "image_token_id", None)
        if token is not None and not bool((input_ids == token).any(dim=1).all()):
            raise UserError(
                f"the chat template of {self._where} leaves images out of the prompt.",
                _RESTORE,
            )

    def _tokens_never_to_generate(self) -> list[int]:
        config = self.model.config
        never = unwritable_tokens(
            self.tokenizer,
            config.get_text_config(decoder=True).vocab_size,
            getattr(config, "image_token_id", None),
        )
        return sorted(never - set(self._ends))


def require_chat(processor: Any, where: str) -> None:
    """Make sure that a processor takes images, and that there is a chat template.

    Raises:
        UserError: Naming what is missing.
    """
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"{where} has no processor that takes images and text.",
            "Restore preprocessor_config.json and processor_config.json from the base model.",
        )
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"{where} has no chat template, so it is not known how to ask this model.",
            "Swapping and verifying work without one. To ask questions, add the "
            "chat_template.jinja that the model was trained with, or use an adapter of its own.",
        )


def _pads_to_square(image_processor: Any) -> bool:
    name = type(image_processor).__name__.removesuffix("Fast").removesuffix("Pil")
    return name in _PADDING and bool(image_processor.do_pad)


def _same_image_counts(requests: Sequence[ChatRequest]) -> list[list[int]]:
    """Return the places of requests, those with as many images together.

    Processors disagree about batches in which only some rows have images.
    """
    groups: dict[int, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(len(request.images), []).append(position)
    return list(groups.values())


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    # Some models end a turn with another token than the tokenizer's; their generation settings
    # list all of them.
    stored = model.generation_config.eos_token_id
    ends = stored if isinstance(stored, list) else [stored]
    found = dict.fromkeys(token for token in [*ends, tokenizer.eos_token_id] if token is not None)
    return list(found)
