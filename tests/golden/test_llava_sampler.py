"""The order of training samples against the original code's (see llava/index.json)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kuea_mllm.tuning.records import normalise, signed_length
from kuea_mllm.tuning.sampler import (
    GroupedBatchSampler,
    grouped_order,
    rank_batches,
    released_state,
)

GOLDEN = Path(os.environ.get("KUEA_GOLDEN_DIR", Path(__file__).parent)) / "llava"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "lora" / "sampler.json").read_text())["cases"]
WITH_RANKS = [case for case in CASES if "per_rank_batches" in case]


def names(cases: list[dict[str, Any]]) -> list[str]:
    return [case["name"] for case in cases]


def generator_of(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_order_equals_the_original(case: dict[str, Any]) -> None:
    order = grouped_order(
        case["lengths"],
        batch_size=case["per_device_batch_size"],
        chunks=case["sampler_world_size"],
        generator=torch.Generator().manual_seed(case["torch_manual_seed"]),
        last_generator=generator_of(case["generator_seed"]),
        by_modality=case["group_by_modality"],
    )
    assert order == case["order"]


@pytest.mark.parametrize("case", WITH_RANKS, ids=names(WITH_RANKS))
def test_batches_of_every_process_equal_the_original(case: dict[str, Any]) -> None:
    for rank, expected in enumerate(case["per_rank_batches"]):
        found = rank_batches(
            case["order"], case["per_device_batch_size"], world_size=case["num_gpus"], rank=rank
        )
        assert found == expected, rank


@pytest.mark.parametrize("case", WITH_RANKS, ids=names(WITH_RANKS))
def test_sampler_draws_from_the_state_of_the_global_generator(case: dict[str, Any]) -> None:
    torch.manual_seed(case["torch_manual_seed"])
    state = torch.get_rng_state()
    for rank, expected in enumerate(case["per_rank_batches"]):
        sampler = GroupedBatchSampler(
            case["lengths"],
            batch_size=case["per_device_batch_size"],
            world_size=case["num_gpus"],
            accumulation=case["gradient_accumulation_steps"],
            rank=rank,
            rng_state=state,
            by_modality=case["group_by_modality"],
        )
        assert list(sampler) == expected, rank
        assert len(sampler) == len(expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_order_of_the_training_trace_follows_from_its_seed() -> None:
    trace = json.loads((GOLDEN / "lora" / "trace.json").read_text())
    records = json.loads((GOLDEN / "lora" / "trace_data.json").read_text())
    settings = trace["hyperparameters"]
    sampler = GroupedBatchSampler(
        [signed_length(normalise(record)) for record in records],
        batch_size=settings["per_device_train_batch_size"],
        world_size=1,
        accumulation=settings["gradient_accumulation_steps"],
        rng_state=released_state(settings["seed"]),
    )
    expected = trace["sample_index_per_micro_batch"]
    assert [position for (position,) in sampler][: len(expected)] == expected
    assert len(sampler) == len(expected) + trace["trailing_samples_dropped"]


def test_set_covers_what_differs() -> None:
    kinds = {(min(c["lengths"]) < 0, max(c["lengths"]) > 0) for c in CASES}
    assert (True, True) in kinds
    assert WITH_RANKS
