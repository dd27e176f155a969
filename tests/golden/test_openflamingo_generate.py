"""Greedy and beam decoding of OpenFlamingo against the original (see openflamingo/index.json)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from openflamingo_golden import case, golden_model, index, pixels, tensors
from torch import Tensor

from kuea_mllm.adapters.openflamingo.released_beam import released_beam_search

STORED = tensors("generation.safetensors")
END = index()["config"]["ids"]["<|endofchunk|>"]
GREEDY = [name.removesuffix(".greedy") for name in STORED if name.endswith(".greedy")]
# Runs are named prompt.beam3_lp0, with _max5 for another length and _genlen for the newer rule.
BEAM = {
    name: match
    for name in STORED
    if (match := re.fullmatch(r"(\w+)\.beam(\d+)_lp(-?\d+)(?:_max(\d+))?(_genlen)?", name))
}
caches = pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])


def generate(prompt: str, width: int, **options: Any) -> Any:
    found = case(prompt) or {
        key.removeprefix(f"{prompt}."): t
        for key, t in STORED.items()
        if key.startswith(f"{prompt}.")
    }
    return golden_model().generate(
        input_ids=found["input_ids"],
        attention_mask=found["attention_mask"],
        pixel_values=pixels(found["pixel_values"]),
        max_new_tokens=width - found["input_ids"].shape[1],
        do_sample=False,
        eos_token_id=END,
        pad_token_id=END,
        **options,
    )


def widened(sequences: Tensor, width: int) -> Tensor:
    """Fill up with the end id, as the stored rows are."""
    return torch.nn.functional.pad(sequences, (0, width - sequences.shape[1]), value=END)


@caches
@pytest.mark.parametrize("prompt", GREEDY)
def test_greedy_ids_equal_the_original(prompt: str, use_cache: bool) -> None:
    expected = STORED[f"{prompt}.greedy"]
    found = generate(prompt, expected.shape[1], use_cache=use_cache)
    assert torch.equal(widened(found, expected.shape[1]), expected)


@caches
@pytest.mark.parametrize("name", BEAM)
def test_beam_search_equals_the_original(name: str, use_cache: bool) -> None:
    prompt, beams, penalty, length, newer = BEAM[name].groups()
    expected = STORED[name]
    # Without a penalty the two rules are one.
    searches = [None, released_beam_search] if penalty == "0" else [released_beam_search]
    for search in [None] if newer else searches:
        found = generate(
            prompt,
            expected.shape[1],
            use_cache=use_cache,
            num_beams=int(beams),
            length_penalty=float(penalty),
            custom_generate=search,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert torch.equal(widened(found.sequences, expected.shape[1]), expected)
        key = f"{prompt}.beam{beams}_lp{penalty}_score{newer or ''}"
        if key in STORED and length is None:
            scores = STORED[key]
            worst = ((found.sequences_scores - scores).abs() / scores.abs().clamp_min(1.0)).max()
            assert float(worst) <= 1e-4
