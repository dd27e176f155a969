"""Image prefixes shared between questions, for the models of transformers where that is exact.

Whether it is, is decided twice: by structure, and by the first batch that could share, which is
computed both ways and has to give the same logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.base import ChatRequest
from kuea_mllm.adapters.prefix_sharing import (
    Prompt,
    SharedPrefixes,
    holds_everything,
    next_inputs,
    padded_left,
)

LOGGER = logging.getLogger("kuea_mllm")

TOLERANCE = 1e-3
"""In the proof: largest difference of two logits in float32, over their standard deviation."""

HALF_TOLERANCE = 0.1
"""Likewise in bfloat16 and float16, whose rounding depends on the shape of a batch."""

_OWN = {"input_ids", "attention_mask"}
_STEPS = 2  # the rest of the prompt, and one token behind it

Inputs = dict[str, Any]
Prepare = Callable[[Sequence[ChatRequest]], dict[str, Tensor]]


class _OtherCache(Exception):
    """The model keeps its past in a form that has no rows to be taken apart into."""


class ImageSharing:
    """Lays out the batches of one model.

    Args:
        model: A generating model of transformers.
        pad_token_id: What to fill rows up with.
    """

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model = model
        self.prefixes = SharedPrefixes()
        self._pad_token_id = pad_token_id
        self._is_proven = False
        self._is_refused = False

    def inputs(self, requests: Sequence[ChatRequest], prepare: Prepare) -> Inputs:
        """Return the inputs of `generate` for questions with the same number of images each.

        Args:
            requests: The batch.
            prepare: Makes the plain inputs of some requests.
        """
        plain: Inputs = dict(prepare(requests))
        if self._is_refused or not all(request.image_keys for request in requests):
            return plain
        reason = _reason_against(self.model, plain)
        if reason is None:
            prompts = self._prompts(requests, plain)
            if not self.prefixes.pay(prompts):
                return plain
            shared = self._lay_out(prompts, requests, prepare)
            if shared is None:
                reason = "its cache is not of the plain kind"
            elif self._is_proven:
                return shared
            elif self._gives_the_same(plain, shared):
                self._is_proven = True
                # The proof has used up the first one; the prefixes are kept.
                return self._lay_out(prompts, requests, prepare) or plain
            else:
                reason = "its logits would change"
        self._is_refused = True
        self.prefixes.forget()
        LOGGER.info(
            "Questions about one image do not share its computation with this model: %s.", reason
        )
        return plain

    def _prompts(self, requests: Sequence[ChatRequest], plain: Inputs) -> list[Prompt]:
        token = self.model.config.image_token_id
        prompts = []
        for request, ids, mask in zip(
            requests, plain["input_ids"], plain["attention_mask"], strict=True
        ):
            real = ids[mask.bool()].tolist()
            prompts.append(Prompt(real, len(real) - real[::-1].index(token), request.image_keys))
        return prompts

    def _lay_out(
        self, prompts: Sequence[Prompt], requests: Sequence[ChatRequest], prepare: Prepare
    ) -> Inputs | None:
        def prefill(places: Sequence[int]) -> Any:
            inputs: Inputs = dict(prepare([requests[place] for place in places]))
            heads = [prompts[place].ids[: prompts[place].prefix] for place in places]
            ids, mask = padded_left(heads, self._pad_token_id)
            device = self.model.device
            inputs |= {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            cache = self.model(**next_inputs(inputs), use_cache=True).past_key_values
            if not holds_everything(cache):
                raise _OtherCache
            return cache

        try:
            with torch.inference_mode():
                return self.prefixes.lay_out(
                    prompts, prefill, pad_token_id=self._pad_token_id, device=self.model.device
                )
        except _OtherCache:
            return None

    def _gives_the_same(self, plain: Inputs, shared: Inputs) -> bool:
        first, second = self._logits(plain), self._logits(shared)
        exact = self.model.dtype == torch.float32
        tolerance = TOLERANCE if exact else HALF_TOLERANCE
        is_same = torch.ones(len(first[0][1]), dtype=torch.bool, device=first[0][1].device)
        for (step, token), (other, other_token) in zip(first, second, strict=True):
            worst = (step - other).abs().amax(dim=1) / step.std(dim=1)
            # Behind another token, other logits are right.
            if bool((worst[is_same] > tolerance).any()):
                return False
            is_same &= token == other_token
        return True

    def _logits(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=_STEPS,
                min_new_tokens=_STEPS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = output.sequences[:, -_STEPS:]
        return [(step.float(), tokens[:, n]) for n, step in enumerate(output.logits)]


def _reason_against(model: Any, plain: Mapping[str, Any]) -> str | None:
    """Say what in its structure forbids it, None if nothing does."""
    config = model.config
    token = getattr(config, "image_token_id", None)
    if token is None or not bool((plain["input_ids"] == token).any(dim=1).all()):
        return "it is not known where images stand in its prompts"
    text, body = config.get_text_config(decoder=True), getattr(model, "model", model)
    kinds = set(getattr(text, "layer_types", None) or ())
    shape = plain["input_ids"].shape
    told = [name for name, value in plain.items() if value.shape[:2] == shape and name not in _OWN]
    reasons = {
        "it has an encoder": getattr(config, "is_encoder_decoder", False),
        "not all of its layers see the whole past": (
            kinds - {"full_attention"} or getattr(text, "sliding_window", None)
        ),
        "its positions have several dimensions": (
            hasattr(body, "get_rope_index") or hasattr(body, "rope_deltas")
        ),
        f"its attention depends on {' and '.join(told)}": told,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
