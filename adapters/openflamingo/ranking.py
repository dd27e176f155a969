"""Log-likelihoods of class names after prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kuea_mllm.adapters.openflamingo.media import media_index

_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def rank_names(model: Any, inputs: Mapping[str, Tensor], names: Sequence[Sequence[int]]) -> Tensor:
    """Score names with one pass over the prompts; padding stays hidden.

    The output layer is applied in float32 whatever the dtype of the model: bfloat16 logits between
    4 and 8 lie 0.03 apart, so that questions would tie whose order is what ROC-AUC measures.

    Args:
        model: The model.
        inputs: `input_ids`, `attention_mask`, and images in any form that the model takes.
        names: Ids of each name, at least one.

    Returns:
        Mean log-probability of each name's ids, (prompts, names), float32.
    """
    context = model.read(**inputs, use_cache=True)
    seen = _last_image(model, inputs)
    cache = context.past_key_values
    states = []
    for ids in names:
        state = context.last[:, -1:]
        if len(ids) > 1:
            given = _rows(ids[:-1], seen)
            output = model.read(
                input_ids=given,
                attention_mask=torch.cat(
                    [inputs["attention_mask"], torch.ones_like(given, dtype=torch.bool)], dim=1
                ),
                past_key_values=cache,
                use_cache=True,
                **_images(context.image_features, seen.expand_as(given)),
            )
            state = torch.cat([state, output.last], dim=1)
            # The next name must not see this one.
            cache.crop(1 - len(ids))
        states.append(state)
    weight = model.get_output_embeddings().weight
    joined = torch.cat(states, dim=1).float()  # (prompts, ids of all names, width)
    rows = weight[[token for ids in names for token in ids]].float()
    chosen = (joined * rows).sum(dim=-1) - _log_sum_exp(joined, weight)
    ends = itertools.accumulate(len(ids) for ids in names)
    parts = [chosen[:, end - len(ids) : end] for ids, end in zip(names, ends, strict=True)]
    return torch.stack([part.mean(dim=1) for part in parts], dim=1)


@torch.no_grad()
def rank_names_as_released(
    model: Any, inputs: Mapping[str, Tensor], names: Sequence[Sequence[int]]
) -> Tensor:
    """Score names the published fast way.

    It has no mask on the names, so that they see padding, and one cache that grows from name to
    name, so that a name sees those before it. Names of one token are scored all the same before
    either matters (fact sheet, trap 9). Logits are those of the model, rounded to its dtype.

    Args and returns as of `rank_names`.
    """
    context = model(**inputs, use_cache=True, logits_to_keep=1)
    seen = _last_image(model, inputs)
    scores = []
    for ids in names:
        steps = [context.logits[:, -1:]]
        for token in ids:
            output = model(
                input_ids=_rows([token], seen),
                past_key_values=context.past_key_values,
                use_cache=True,
                **_images(context.image_hidden_states, seen),
            )
            steps.append(output.logits)
        scores.append(_mean_log_probability(torch.cat(steps, dim=1), ids))
    return torch.stack(scores, dim=1)


def _last_image(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the image that whatever follows each prompt sees, (prompts, 1)."""
    return media_index(inputs["input_ids"], model.config.image_token_id)[:, -1:]


def _images(features: Tensor | None, index: Tensor) -> dict[str, Any]:
    return {} if features is None else {"image_features": features, "media_index": index}


def _rows(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, device=like.device).expand(len(like), -1)


def _log_sum_exp(states: Tensor, weight: Tensor) -> Tensor:
    """Return the normaliser of the logits of float32 states; no more than a part is float32."""
    parts = [
        (states @ weight[start : start + _TOKENS_AT_ONCE].float().T).logsumexp(dim=-1)
        for start in range(0, len(weight), _TOKENS_AT_ONCE)
    ]
    return torch.stack(parts).logsumexp(dim=0)


def _mean_log_probability(logits: Tensor, ids: Sequence[int]) -> Tensor:
    log_probabilities = logits[:, : len(ids)].float().log_softmax(dim=-1)
    index = torch.tensor(ids, device=logits.device).expand(len(logits), -1)[:, :, None]
    return log_probabilities.gather(2, index)[:, :, 0].mean(dim=1)
