"""Which settings are named where a tuning runs out of memory."""

from __future__ import annotations

from typing import Any

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.tuning.identity import is_free_key
from kuea_mllm.tuning.shortage import memory_remedy


def advice(*, processes: int = 1, is_resumable: bool = False, **content: Any) -> str:
    recipe = LoraRecipe.parse({"kind": "lora", **content}, origin="test")
    resolved = recipe.resolved(processes=processes)
    return memory_remedy(resolved, processes=processes, is_resumable=is_resumable)


def test_every_saving_that_is_not_made_yet_is_named() -> None:
    told = advice(
        processes=2,
        runtime={"device": "cuda", "gradient_checkpointing": False},
        optim={"micro_batch_size": 4},
    )
    for setting in (
        "runtime.gradient_checkpointing=true",
        "runtime.sharding=fsdp",
        "optim.micro_batch_size=2",
        "model.quantization=nf4",
        "optim.optimizer=paged_adamw",
        "data.max_length below 2048",
    ):
        assert setting in told


def test_what_is_chosen_already_or_needs_cuda_is_not_named() -> None:
    assert advice(runtime={"device": "cpu"}) == (
        "Try with a data.max_length below 2048; `kuea-mllm plan` says what fits."
    )
    told = advice(
        runtime={"device": "cuda"},
        model={"quantization": "nf4"},
        optim={"optimizer": "paged_adamw"},
    )
    assert told.startswith("Try with a data.max_length")


def test_unfinished_run_is_told_what_it_may_go_on_with() -> None:
    told = advice(
        processes=2,
        is_resumable=True,
        runtime={"device": "cuda", "gradient_checkpointing": False},
    )
    going_on, anew = told.split(". Or begin anew (--restart) with ")
    named = [word.partition("=")[0] for word in going_on.split() if "=" in word]
    assert named == ["runtime.gradient_checkpointing", "runtime.sharding"]
    assert all(map(is_free_key, named))
    assert "model.quantization=nf4" in anew


def test_unfinished_run_that_can_only_begin_anew_is_told_so() -> None:
    told = advice(is_resumable=True, runtime={"device": "cuda"})
    assert told.startswith("Begin anew (--restart) with model.quantization=nf4")
    assert "--resume" not in told
