"""Properties of the order, whatever the lengths: nothing lost, resumable, equal on all ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kuea_mllm.errors import DataError
from kuea_mllm.tuning.sampler import GroupedBatchSampler, grouped_order

LENGTHS = st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=80)
FEW = st.integers(1, 4)


def mixed(count: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 500, count) * rng.choice([1, 1, 1, -1], count)


@given(lengths=LENGTHS, batch_size=FEW, world_size=FEW, accumulation=FEW)
def test_every_sample_comes_once(
    lengths: list[int], batch_size: int, world_size: int, accumulation: int
) -> None:
    sampler = GroupedBatchSampler(
        lengths, batch_size=batch_size, world_size=world_size, accumulation=accumulation
    )
    assert sorted(sampler.order()) == list(range(len(lengths)))


@given(lengths=LENGTHS, batch_size=FEW, world_size=FEW, start=st.integers(0, 30))
def test_processes_share_an_epoch_and_resume_in_it(
    lengths: list[int], batch_size: int, world_size: int, start: int
) -> None:
    def batches(rank: int, start_batch: int = 0) -> list[list[int]]:
        sampler = GroupedBatchSampler(
            lengths,
            batch_size=batch_size,
            world_size=world_size,
            accumulation=2,
            rank=rank,
            start_batch=start_batch,
        )
        found = list(sampler)
        assert len(sampler) == len(found) + min(start_batch, len(sampler))
        return found

    of_ranks = [batches(rank) for rank in range(world_size)]
    drawn = [position for of_rank in of_ranks for batch in of_rank for position in batch]
    assert set(drawn) == set(range(len(lengths)))
    if world_size == 1:
        assert sorted(drawn) == list(range(len(lengths)))
    else:
        # The tail is filled, so that no process waits for another.
        assert len(drawn) - len(lengths) < batch_size * world_size
        assert {len(batch) for of_rank in of_ranks for batch in of_rank} == {batch_size}
    for rank, whole in enumerate(of_ranks):
        assert batches(rank, start) == whole[start:]


def test_one_process_draws_what_four_draw_together() -> None:
    lengths = mixed(300)

    def sampler(rank: int, world_size: int, accumulation: int) -> GroupedBatchSampler:
        return GroupedBatchSampler(
            lengths, batch_size=1, world_size=world_size, accumulation=accumulation, rank=rank
        )

    one = [position for (position,) in sampler(0, 1, 8)]
    four = [list(sampler(rank, 4, 2)) for rank in range(4)]
    together = [position for batch in zip(*four, strict=True) for (position,) in batch]
    assert one == together[: len(one)]


def test_steps_are_of_one_modality_but_for_the_last() -> None:
    lengths = mixed(1000)
    order = grouped_order(lengths, batch_size=1, chunks=16, generator=torch.Generator())
    kinds = [
        {bool(lengths[position] > 0) for position in order[start : start + 16]}
        for start in range(0, len(order), 16)
    ]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert {True} in kinds
    assert {False} in kinds


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = mixed(200)

    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(np.random.default_rng().integers(1000))
        return GroupedBatchSampler(
            lengths, batch_size=1, world_size=2, accumulation=2, seed=seed, epoch=epoch
        ).order()

    assert order(0, 0) == order(0, 0)
    different = [order(0, 0), order(0, 1), order(1, 0), order(1, 1), order(2, 0)]
    assert len({tuple(each) for each in different}) == len(different)


def test_sample_without_words_is_refused() -> None:
    with pytest.raises(DataError, match="sample 2 has no words"):
        GroupedBatchSampler([3, -4, 0], batch_size=1, world_size=1, accumulation=1)
    with pytest.raises(DataError, match="no sample"):
        GroupedBatchSampler([], batch_size=1, world_size=1, accumulation=1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        GroupedBatchSampler([1], batch_size=1, world_size=2, accumulation=1, rank=2)


def test_alike_in_length_keeps_the_updates_and_saves_padding() -> None:
    numbers = np.random.default_rng(0)
    lengths = (numbers.lognormal(4, 1, 500).astype(int) + 1) * numbers.choice([1, 1, -1], 500)
    drawn = {}
    for alike in (False, True):
        sampler = GroupedBatchSampler(
            lengths, batch_size=4, world_size=1, accumulation=8, seed=1, alike_in_length=alike
        )
        order = sampler.order()
        batches = [np.abs(lengths[order[start : start + 4]]) for start in range(0, 500, 4)]
        padding = sum(int((batch.max() - batch).sum()) for batch in batches)
        updates = [frozenset(order[start : start + 32]) for start in range(0, 500, 32)]
        drawn[alike] = (padding, updates)
    assert drawn[False][1] == drawn[True][1]
    assert drawn[True][0] < drawn[False][0] / 2
