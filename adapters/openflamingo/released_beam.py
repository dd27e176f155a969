"""Beam search with the length rule of transformers <= 4.35, which the published numbers used.

Those releases divide a beam's score by (prompt + generated)**length_penalty; later ones by the
generated length alone, the end token included. With the penalty 0 of the published evaluation both
give the same (fact sheet, trap 4), so transformers' own search is the default and this one is for
`compat: released` with another penalty. Use it as

    model.generate(..., num_beams=3, length_penalty=-2.0, custom_generate=released_beam_search)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput


@dataclass
class _Finished:
    """The best finished texts of one example, at most `size`, best first."""

    size: int
    penalty: float
    found: list[tuple[float, Tensor]] = field(default_factory=list)
    is_done: bool = False

    def add(self, ids: Tensor, log_probability: float) -> None:
        self.found.append((log_probability / len(ids) ** self.penalty, ids))
        # A tie keeps the one that was there first.
        self.found.sort(key=lambda scored: -scored[0])
        del self.found[self.size :]

    def close(self, best: float, length: int) -> None:
        """Stop if the best candidate cannot beat the worst that is kept."""
        full = len(self.found) == self.size
        self.is_done |= full and self.found[-1][0] >= best / length**self.penalty


@torch.no_grad()
def released_beam_search(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    generation_config: Any,
    stopping_criteria: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Search as transformers 4.31 does; made for `generate(custom_generate=...)`.

    Args:
        model: The model that generates.
        input_ids: (examples * beams, prompt length), each example's rows together.
        logits_processor: Changes log-probabilities.
        generation_config: Gives beams, penalty, lengths and special ids.
        stopping_criteria: Not used beyond the longest length, which `generation_config` gives.
        **model_kwargs: Inputs of the model.

    Returns:
        The best text of each example with its prompt, (examples, length), filled up with the
        padding id; with `return_dict_in_generate` an output that holds the scores as well.

    Raises:
        ValueError: Without an end token.
    """
    if generation_config._eos_token_tensor is None:
        raise ValueError("beam search needs an eos_token_id.")
    beams, longest = generation_config.num_beams, generation_config.max_length
    ends = {int(token) for token in generation_config._eos_token_tensor.tolist()}
    padding = int(generation_config._pad_token_tensor)
    examples = len(input_ids) // beams
    finished = [_Finished(beams, generation_config.length_penalty) for _ in range(examples)]
    scores = torch.zeros(examples, beams, device=input_ids.device)
    scores[:, 1:] = -1e9  # All beams begin alike: only the first one counts.
    scores = scores.flatten()
    is_first = True
    while input_ids.shape[1] < longest and not all(row.is_done for row in finished):
        log_probabilities, model_kwargs = _step(
            model, input_ids, logits_processor, model_kwargs, is_first=is_first
        )
        is_first = False
        vocabulary = log_probabilities.shape[-1]
        candidates = (log_probabilities + scores[:, None]).view(examples, -1)
        values, places = candidates.topk(2 * beams, dim=1)
        chosen: list[tuple[float, int, int]] = []
        for example, row in enumerate(finished):
            first = example * beams
            if row.is_done:
                chosen += [(0.0, padding, first)] * beams
                continue
            ranked = [
                (float(value), int(place) % vocabulary, first + int(place) // vocabulary)
                for value, place in zip(values[example], places[example], strict=True)
            ]
            chosen += _advance(row, ranked, input_ids, ends)
            row.close(ranked[0][0], input_ids.shape[1] + 1)
        device = input_ids.device
        scores = torch.tensor([value for value, _, _ in chosen], device=device)
        source = torch.tensor([beam for _, _, beam in chosen], device=device)
        new = torch.tensor([token for _, token, _ in chosen], device=device)
        input_ids = torch.cat([input_ids[source], new[:, None]], dim=1)
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"].reorder_cache(source)
    for example, row in enumerate(finished):
        if not row.is_done:
            for beam in range(example * beams, (example + 1) * beams):
                row.add(input_ids[beam], float(scores[beam]))
    sequences = _filled([row.found[0][1] for row in finished], longest, min(ends), padding)
    if not generation_config.return_dict_in_generate:
        return sequences
    best = torch.tensor([row.found[0][0] for row in finished], device=sequences.device)
    output: Any = GenerateBeamDecoderOnlyOutput
    return output(sequences=sequences, sequences_scores=best)


def _step(
    model: Any, input_ids: Tensor, logits_processor: Any, kwargs: dict[str, Any], *, is_first: bool
) -> tuple[Tensor, dict[str, Any]]:
    cached = kwargs.get("past_key_values") is not None and not is_first
    inputs = model.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=1 if cached else None,
        is_first_iteration=is_first,
        **kwargs,
    )
    outputs = model(**inputs, return_dict=True)
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
    log_probabilities = outputs.logits[:, -1].float().log_softmax(dim=-1)
    return logits_processor(input_ids, log_probabilities), kwargs


def _advance(
    row: _Finished, ranked: list[tuple[float, int, int]], input_ids: Tensor, ends: set[int]
) -> list[tuple[float, int, int]]:
    """Take the best candidates of one example: texts that end are kept apart, others go on."""
    following: list[tuple[float, int, int]] = []
    for rank, (value, token, beam) in enumerate(ranked):
        if token not in ends:
            following.append((value, token, beam))
        elif rank < row.size:
            # The end token is not part of the length.
            row.add(input_ids[beam], value)
        if len(following) == row.size:
            break
    return following


def _filled(texts: list[Tensor], longest: int, end: int, padding: int) -> Tensor:
    width = min(max(len(text) for text in texts) + 1, longest)
    filled = torch.full((len(texts), width), padding, device=texts[0].device)
    for number, text in enumerate(texts):
        filled[number, : len(text)] = text
        if len(text) < longest:
            filled[number, len(text)] = end
    return filled
