"""Log-likelihoods of class names after prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.openflamingo.media import media_index


@torch.no_grad()
def rank_names(model: Any, inputs: Mapping[str, Tensor], names: Sequence[Sequence[int]]) -> Tensor:
    """Score names with one pass over the prompts; padding stays hidden.

    Args:
        model: The model.
        inputs: `input_ids`, `attention_mask`, and images in any form that the model takes.
        names: Ids of each name, at least one.

    Returns:
        Mean log-probability of each name's ids, (prompts, names), float32.
    """
    context, seen = _context(model, inputs)
    cache = context.past_key_values
    last = context.logits[:, -1:]
    scores = []
    for ids in names:
        logits = last
        if len(ids) > 1:
            given = _rows(ids[:-1], seen)
            output = model(
                input_ids=given,
                attention_mask=torch.cat(
                    [inputs["attention_mask"], torch.ones_like(given, dtype=torch.bool)], dim=1
                ),
                past_key_values=cache,
                use_cache=True,
                **_images(context, seen.expand_as(given)),
            )
            logits = torch.cat([last, output.logits], dim=1)
            # The next name must not see this one.
            cache.crop(1 - len(ids))
        scores.append(_mean_log_probability(logits, ids))
    return torch.stack(scores, dim=1)


@torch.no_grad()
def rank_names_as_released(
    model: Any, inputs: Mapping[str, Tensor], names: Sequence[Sequence[int]]
) -> Tensor:
    """Score names the published fast way.

    It has no mask on the names, so that they see padding, and one cache that grows from name to
    name, so that a name sees those before it. Names of one token are scored all the same before
    either matters (fact sheet, trap 9).

    Args and returns as of `rank_names`.
    """
    context, seen = _context(model, inputs)
    scores = []
    for ids in names:
        steps = [context.logits[:, -1:]]
        for token in ids:
            output = model(
                input_ids=_rows([token], seen),
                past_key_values=context.past_key_values,
                use_cache=True,
                **_images(context, seen),
            )
            steps.append(output.logits)
        scores.append(_mean_log_probability(torch.cat(steps, dim=1), ids))
    return torch.stack(scores, dim=1)


def _context(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    context = model(**inputs, use_cache=True, logits_to_keep=1)
    seen = media_index(inputs["input_ids"], model.config.image_token_id)[:, -1:]  # (prompts, 1)
    return context, seen


def _images(context: Any, index: Tensor) -> dict[str, Any]:
    if context.image_hidden_states is None:
        return {}
    return {"image_features": context.image_hidden_states, "media_index": index}


def _rows(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, device=like.device).expand(len(like), -1)


def _mean_log_probability(logits: Tensor, ids: Sequence[int]) -> Tensor:
    log_probabilities = logits[:, : len(ids)].float().log_softmax(dim=-1)
    index = torch.tensor(ids, device=logits.device).expand(len(logits), -1)[:, :, None]
    return log_probabilities.gather(2, index)[:, :, 0].mean(dim=1)
