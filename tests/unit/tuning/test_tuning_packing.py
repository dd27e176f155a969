"""Packed rows: every sample once, never too long, the same for any number of processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_samples import record, write_list

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.errors import DataError, RecipeError
from kuea_mllm.tuning.collate import IGNORED, DataCounter
from kuea_mllm.tuning.examples import Example
from kuea_mllm.tuning.mixture import open_mixture
from kuea_mllm.tuning.packing import (
    PackedBatchSampler,
    PackedCollator,
    fill_rows,
    padding_share,
    report_packing,
)
from kuea_mllm.tuning.token_counts import encoder_identity, open_token_counts

TAG, IMAGE, PAD = -200, 90, 91
ROOM = 12


def collator(**changes: Any) -> PackedCollator:
    values: dict[str, Any] = {
        "placeholder": TAG,
        "image_token_id": IMAGE,
        "tokens_per_image": 4,
        "pad_token_id": PAD,
        "max_length": ROOM,
    }
    return PackedCollator(**{**values, **changes})


def example(ids: list[int], *, position: int = 0) -> Example:
    labels = [token if token > 10 else IGNORED for token in ids]
    pixels = torch.full((3, 2, 2), float(position)) if TAG in ids else None
    return Example(position, ids, labels, pixels, 0)


def sampler(lengths: Any, tokens: Any, **changes: Any) -> PackedBatchSampler:
    values: dict[str, Any] = {
        "max_length": 64,
        "batch_size": 1,
        "world_size": 1,
        "accumulation": 8,
        "seed": 5,
    }
    return PackedBatchSampler(np.asarray(lengths), np.asarray(tokens), **{**values, **changes})


def mixture_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(1, 65, count)
    return tokens * numbers.choice([1, 1, 1, -1], count), tokens


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 40), max_size=60), window=st.integers(1, 70))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(sizes: list[int], window: int) -> None:
    tokens = np.array(sizes, dtype=np.int64)
    rows = fill_rows(range(len(sizes)), tokens, room=30, window=window)
    assert sorted(position for row in rows for position in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[position] for position in row) <= 30 or len(row) == 1
    if window > len(sizes):
        # No two rows could be one.
        totals = sorted(sum(sizes[position] for position in row) for row in rows)
        assert len(totals) < 2 or totals[0] + totals[1] > 30


def test_sample_goes_where_it_leaves_the_least_room() -> None:
    tokens = np.array([6, 4, 7, 5, 3])
    assert fill_rows(range(5), tokens, room=10) == [[2, 4], [0, 1], [3]]


@pytest.mark.parametrize("by_modality", [True, False])
def test_every_sample_comes_once_in_an_epoch(by_modality: bool) -> None:
    lengths, tokens = mixture_of(400)
    drawn = sampler(lengths, tokens, batch_size=3, by_modality=by_modality)
    kinds = set()
    for epoch in (0, 1):
        drawn.epoch = epoch
        batches = list(drawn)
        assert len(batches) == len(drawn)
        assert sorted(p for batch in batches for row in batch for p in row) == list(range(400))
        for row in (row for batch in batches for row in batch):
            assert tokens[row].sum() <= 64
            kinds.add(len({bool(lengths[position] > 0) for position in row}))
    # Text alone has rows of its own, unless that is switched off.
    assert kinds == ({1} if by_modality else {1, 2})


def test_updates_are_of_one_modality_but_for_the_last() -> None:
    lengths, tokens = mixture_of(600)
    rows = [row for batch in sampler(lengths, tokens) for row in batch]
    kinds = [
        {bool(lengths[p] > 0) for row in rows[start : start + 8] for p in row}
        for start in range(0, len(rows), 8)
    ]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert {True} in kinds and {False} in kinds


def test_order_depends_on_seed_and_epoch_and_rows_on_the_seed() -> None:
    lengths, tokens = mixture_of(200)

    def order(seed: int, epoch: int) -> list[list[list[int]]]:
        torch.manual_seed(np.random.default_rng().integers(1000))
        drawn = sampler(lengths, tokens, seed=seed)
        drawn.epoch = epoch
        return list(drawn)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert sorted(order(0, 0)) == sorted(order(0, 1))
    assert sorted(order(0, 0)) != sorted(order(1, 0))


def test_processes_together_draw_what_one_draws_and_go_on_where_they_stopped() -> None:
    lengths, tokens = mixture_of(300)
    one = [row for batch in sampler(lengths, tokens, accumulation=8) for row in batch]
    four = [
        list(sampler(lengths, tokens, world_size=4, accumulation=2, rank=rank)) for rank in range(4)
    ]
    together = [row for batch in zip(*four, strict=True) for (row,) in batch]
    assert together[: len(one)] == one
    assert len(together) - len(one) < 4
    late = sampler(lengths, tokens, world_size=4, accumulation=2, rank=1, start_batch=7)
    assert list(late) == four[1][7:]


def test_row_holds_samples_with_positions_of_their_own() -> None:
    rows = [
        [example([1, TAG, 20], position=4), example([1, 30, 31], position=2)],
        [example([40, 41], position=7)],
    ]
    batch = pickle.loads(pickle.dumps(collator()))(rows)
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [
        [1, IMAGE, IMAGE, IMAGE, IMAGE, 20, 1, 30, 31],
        [40, 41, *[PAD] * 7],
    ]
    assert batch["position_ids"].tolist() == [[*range(6), *range(3)], [0, 1, *range(7)]]
    # The first token of a sample has another sample before it, so that 40 is not learned.
    assert batch["labels"].tolist() == [
        [*[IGNORED] * 5, 20, IGNORED, 30, 31],
        [IGNORED, 41, *[IGNORED] * 7],
    ]
    assert batch["positions"].tolist() == [4, 2, 7]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [4.0]


def test_images_are_in_the_order_of_samples_and_text_rows_bring_a_zero_image() -> None:
    rows = [
        [example([TAG, 11], position=2), example([12]), example([TAG], position=7)],
        [example([TAG, 13], position=1)],
    ]
    assert collator()(rows)["pixel_values"][:, 0, 0, 0].tolist() == [2.0, 7.0, 1.0]
    text = collator(idle_image_size=6)([[example([1, 30]), example([1])]])
    assert torch.equal(text["idle_pixel_values"], torch.zeros(1, 3, 6, 6))


def test_long_sample_is_cut_as_without_packing_and_counted() -> None:
    long = example([1, TAG, *range(20, 34)], position=3)
    single, packed = super(PackedCollator, collator()).__call__([long]), collator()([[long]])
    for key in ("input_ids", "labels", "pixel_values", "left_out", "unlabelled", "positions"):
        assert torch.equal(single[key], packed[key]), key
    assert packed["input_ids"].shape == (1, ROOM)
    counter = DataCounter(str)
    batch = collator()([[example([1, 30]), example([1, 2], position=9)], [long]])
    assert batch["unlabelled"].tolist() == [False, True, False]
    counter.take(batch)
    assert counter.report() == {
        "samples": 3,
        "truncated_samples": 1,
        "tokens_left_out": 7,
        "unlabelled_samples": 1,
    }
    assert set(batch) == {"input_ids", "position_ids", "labels", "pixel_values"}


def test_rows_longer_than_counted_are_refused() -> None:
    with pytest.raises(DataError, match=r"13 tokens, more than data\.max_length 12"):
        collator()([[example([1] * 7), example([1] * 6)]])


def test_padding_is_reported_with_and_without_packing() -> None:
    assert padding_share([[4, 2], [3]]) == pytest.approx(2 / 11)
    lengths, tokens = mixture_of(500)
    drawn = sampler(lengths, tokens, batch_size=2)
    report = report_packing(drawn, lengths, tokens, max_length=64, batch_size=2, chunks=8)
    assert (report.samples, report.rows) == (500, len(drawn.rows))
    assert report.filled == pytest.approx(tokens.sum() / (64 * len(drawn.rows)))
    assert report.filled > 0.9
    assert report.samples_unpacked == round(2 * 500 / report.rows)
    assert report.padding < 0.1 < report.padding_unpacked
    assert f"500 samples packed in {report.rows} rows" in str(report)


class Words:
    """Every letter is a token."""

    placeholder = TAG
    pad_token_id = 0
    max_length = 64
    calls = 0

    def encode(self, record: Any) -> Any:
        type(self).calls += 1
        ids = [1, *([TAG] if record["image"] else [])]
        ids += [65 for turn in record["conversations"] for _ in turn["value"]]
        return SimpleNamespace(input_ids=ids, labels=ids, left_out=0)


def test_tokens_are_counted_once_and_kept_beside_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kuea_mllm.tuning.token_counts._BATCH", 3)
    records = [record(f"{n}", image=f"{n}.png" if n % 2 else None) for n in range(8)]
    path = write_list(tmp_path / "data.json", records)
    mixture = open_mixture(path, cache=tmp_path / "cache", progress=False)

    def counts(identity: str = "a", **changes: Any) -> np.ndarray:
        given = collator(**{"max_length": 40, **changes})
        return open_token_counts(mixture, Words(), given, identity=identity, progress=False)

    first = counts()
    expected = [len(Words().encode(mixture.record(n)).input_ids) for n in range(8)]
    has_image = [n % 2 for n in range(8)]
    assert first.tolist() == [
        min(count + 3 * image, 40) for count, image in zip(expected, has_image, strict=True)
    ]
    assert isinstance(first, np.memmap)
    Words.calls = 0
    assert counts().tolist() == first.tolist()
    assert Words.calls == 0
    # Another encoder, length or image size is counted anew.
    for changes in ({"identity": "b"}, {"max_length": 9}, {"tokens_per_image": 5}):
        Words.calls = 0
        assert (counts(**changes) <= 40).all()
        assert Words.calls == 8
    kept = sorted(mixture.folder.glob("tokens-*.npy"))
    assert len(kept) == 4
    for file in kept:
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"token counts .* are damaged"):
        counts()


def test_counts_depend_on_the_tokenizer_and_on_nothing_else_in_the_directory(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    first = encoder_identity(tmp_path, "llava")
    (tmp_path / "model.safetensors").write_text("weights")
    assert encoder_identity(tmp_path, "llava") == first
    assert encoder_identity(tmp_path, "other") != first
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert encoder_identity(tmp_path, "llava") != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"loss_weighting": "micro_batch"}}, "optim.loss_weighting is micro_batch"),
        ({"compat": "released"}, "optim.loss_weighting is micro_batch"),
        ({"data": {"packing": True, "cut_after_splicing": False}}, "data.cut_after_splicing"),
        ({"data": {"packing": True, "order": "released"}}, "data.order is released"),
    ],
)
def test_what_packing_cannot_be_together_with_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    content = {"kind": "lora", "data": {"packing": True}}
    LoraRecipe.parse(content, origin="test")
    with pytest.raises(RecipeError, match=message):
        LoraRecipe.parse({**content, **changes}, origin="test")
