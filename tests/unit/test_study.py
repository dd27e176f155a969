"""How a study sums up its seeds."""

import pytest

from kuea_mllm.workflows.studies.study import VARIANTS, study_markdown, summarise


def result(seed, **scores):
    groups = ("alignment", "encoder", "llava")
    return {"seed": seed} | {
        name: {group: {"score": value} for group in groups} for name, value in scores.items()
    }


RESULTS = [
    result(0, original=10.0, kernel=12.0, no_preservation=5.0),
    result(1, original=20.0, kernel=21.0, no_preservation=25.0),
]


def test_changes_are_paired_within_a_seed():
    row = summarise(RESULTS)[0]
    assert row["original"]["mean"] == 15
    assert row["original"]["sd"] == pytest.approx(7.0711, abs=1e-4)
    kernel = row["variants"]["kernel"]
    assert kernel["mean"] == 1.5
    # Paired: 0.71, although the scores themselves spread by 6 and 7.
    assert kernel["sd"] == pytest.approx(0.7071, abs=1e-4)
    assert (kernel["seeds_up"], row["variants"]["no_preservation"]["seeds_up"]) == (2, 1)


def test_one_seed_has_no_spread():
    row = summarise(RESULTS[:1])[0]
    assert row["original"]["sd"] is None
    assert all(row["variants"][name]["sd"] is None for name in VARIANTS)


def test_markdown_shows_every_variant_and_how_many_seeds_went_up():
    text = study_markdown({"seeds": 2, "rows": summarise(RESULTS)})
    assert "+1.5 ± 0.7 (2/2 up)" in text
    assert text.count("\n") == 2 + 3
