"""Batches: padding, both cuts, which rows bring an image, what was counted."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from kuea_mllm.log import LOGGER
from kuea_mllm.tuning.collate import IGNORED, Collator, DataCounter
from kuea_mllm.tuning.examples import Example

TAG, IMAGE, PAD = -200, 90, 91
PATCHES = 4


def collator(**changes: Any) -> Collator:
    settings: dict[str, Any] = {
        "placeholder": TAG,
        "image_token_id": IMAGE,
        "tokens_per_image": PATCHES,
        "pad_token_id": PAD,
        "max_length": 12,
    }
    return Collator(**{**settings, **changes})


def example(ids: list[int], *, position: int = 0, left_out: int = 0) -> Example:
    labels = [token if token > 10 else IGNORED for token in ids]
    pixels = torch.full((3, 2, 2), float(position)) if TAG in ids else None
    return Example(position, ids, labels, pixels, left_out)


def test_image_token_is_repeated_and_rows_are_padded_on_the_right() -> None:
    batch = collator()([example([1, TAG, 20], position=3), example([1, 30], position=5)])
    assert batch["input_ids"].tolist() == [
        [1, IMAGE, IMAGE, IMAGE, IMAGE, 20],
        [1, 30, PAD, PAD, PAD, PAD],
    ]
    assert batch["labels"].tolist() == [[IGNORED] * 5 + [20], [IGNORED, 30] + [IGNORED] * 4]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch["pixel_values"].tolist() == torch.full((1, 3, 2, 2), 3.0).tolist()
    assert batch["positions"].tolist() == [3, 5]


def test_padding_token_within_a_sample_is_not_masked() -> None:
    batch = collator()([example([1, PAD, 20]), example([1, 2, 3, 4])])
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 4]


def test_images_are_in_the_order_of_rows() -> None:
    rows = [example([TAG, 11], position=2), example([12]), example([TAG], position=7)]
    assert collator()(rows)["pixel_values"][:, 0, 0, 0].tolist() == [2.0, 7.0]


@pytest.mark.parametrize("size", [None, 6])
def test_batch_without_an_image_brings_a_zero_image_only_if_asked(size: int | None) -> None:
    batch = collator(idle_image_size=size)([example([1, 30])])
    assert "pixel_values" not in batch
    if size is None:
        assert "idle_pixel_values" not in batch
    else:
        assert torch.equal(batch["idle_pixel_values"], torch.zeros(1, 3, size, size))
    mixed = collator(idle_image_size=size)([example([1, 30]), example([TAG, 20])])
    assert "idle_pixel_values" not in mixed


def test_first_cut_counts_the_image_as_one_token_and_the_second_its_patches() -> None:
    ids = [1, TAG, *range(20, 34)]  # 16 tokens, 19 with the patches
    released = collator(cut_after_splicing=False)([example(ids)])
    assert released["input_ids"].tolist() == [[1, *[IMAGE] * 4, *range(20, 30)]]
    assert released["left_out"].tolist() == [4]
    cut = collator()([example(ids)])
    assert cut["input_ids"].tolist() == [[1, *[IMAGE] * 4, *range(20, 27)]]
    assert cut["labels"].tolist() == [[*[IGNORED] * 5, *range(20, 27)]]
    assert cut["left_out"].tolist() == [7]


@pytest.mark.parametrize(
    ("before", "kept"),
    [(8, 12), (9, 9), (11, 11), (12, 12)],
    ids=["whole", "one patch missing", "one patch", "none"],
)
def test_part_of_an_image_at_the_end_is_left_out_with_its_pixels(before: int, kept: int) -> None:
    ids = [*range(20, 20 + before), TAG, 50]
    batch = collator(idle_image_size=2)([example(ids, left_out=1)])
    assert batch["input_ids"].shape == (1, kept)
    has_image = before + PATCHES <= 12
    assert ("pixel_values" in batch) is has_image
    assert ("idle_pixel_values" in batch) is not has_image
    assert int((batch["input_ids"] == IMAGE).sum()) == (PATCHES if has_image else 0)
    # The second cut counts in patches, the first (which ends before the tag) in tokens.
    expected = 2 + 1 if before == 12 else before + PATCHES + 1 - kept + 1
    assert batch["left_out"].tolist() == [expected]


def test_samples_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="sample 4 has more than one image tag"):
        collator()([example([TAG, TAG, 20], position=4)])
    with pytest.raises(ValueError, match="sample 4 has an image tag and no pixels"):
        collator()([example([TAG, 20], position=4)._replace(pixels=None)])


def test_counter_takes_its_part_and_names_what_teaches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    # Not caplog: once lmms-eval was imported, what reaches the root logger is seen twice.
    monkeypatch.setattr(LOGGER, "warning", lambda text, *values: said.append(text % values))
    counter = DataCounter(lambda position: f"record {position}")
    collate = pickle.loads(pickle.dumps(collator()))
    for start in range(4):
        rows = [
            example([1, *range(20, 20 + 12)], position=start, left_out=2),
            example([1, 2], position=10 + start),
            example([1, 30]),
        ]
        batch = collate(rows)
        assert batch["unlabelled"].tolist() == [False, True, False]
        counter.take(batch)
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
    counter.take(collate([example([1, 2], position=n) for n in range(20, 24)]))
    assert counter.report() == {
        "samples": 16,
        "truncated_samples": 4,
        "tokens_left_out": 12,
        "unlabelled_samples": 8,
    }
    named = [line.split(":")[0] for line in said]
    assert named == [f"record {number}" for number in (10, 11, 12, 13, 20)]
