"""The original's numbers in half precision, within the bounds that docs/openflamingo.md states."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from openflamingo_golden import case, cases_with, golden_model, pixels

DOCUMENT = Path(__file__).parents[2] / "docs" / "openflamingo.md"
ROWS = re.findall(r"^\| (b?float16) \|.*\| ([\d.]+) \| ([\d.]+) \|$", DOCUMENT.read_text(), re.M)


def test_bounds_are_stated_for_both_dtypes() -> None:
    assert [name for name, *_ in ROWS] == ["bfloat16", "float16"]


@torch.no_grad()
@pytest.mark.parametrize(("name", "error", "cosine"), ROWS)
def test_half_precision_keeps_the_stated_bounds(name: str, error: str, cosine: str) -> None:
    dtype = getattr(torch, name)
    model = copy.deepcopy(golden_model()).to(dtype)
    for number in cases_with("logits"):
        given = case(number)
        real = given["attention_mask"].bool()
        found = model(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            pixel_values=pixels(given["pixel_values"]).to(dtype),
        ).logits
        assert found.dtype == dtype
        logits, expected = found[real].float(), given["logits"][real].float()
        ratio = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert 0 < float(ratio) <= float(error), number
        nearest = torch.nn.functional.cosine_similarity(logits, expected, dim=-1).min()
        assert float(nearest) >= float(cosine), number
