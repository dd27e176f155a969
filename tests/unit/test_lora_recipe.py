"""What a tuning recipe settles, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.errors import RecipeError


def recipe(**content: Any) -> LoraRecipe:
    return LoraRecipe.parse({"kind": "lora", **content}, origin="test")


def settled(made: LoraRecipe) -> tuple[Any, ...]:
    optim = made.optim
    return (
        made.lora.projector,
        optim.batch_size,
        optim.max_grad_norm,
        optim.loss_weighting,
        optim.last_update,
        made.data.cut_after_splicing,
    )


def test_defaults_are_the_papers() -> None:
    made = recipe()
    assert (made.lora.rank, made.lora.alpha, made.lora.dropout) == (128, 256, 0.05)
    assert (made.optim.lr, made.optim.projector_lr, made.optim.weight_decay) == (2e-4, 2e-5, 0)
    assert (made.optim.epochs, made.optim.warmup_ratio, made.data.max_length) == (1, 0.03, 2048)
    assert settled(made.resolved(processes=4)) == ("train", 128, 1.0, "token", "run", True)


def test_released_follows_the_released_script() -> None:
    made = recipe(compat="released").resolved(processes=4)
    assert settled(made) == ("freeze", 4, 0.0, "micro_batch", "drop", False)


def test_what_is_written_beats_compat() -> None:
    made = recipe(
        compat="released",
        lora={"projector": "train"},
        optim={"max_grad_norm": 0.5, "accumulation": 7, "last_update": "run"},
    ).resolved(processes=2)
    assert settled(made) == ("train", 14, 0.5, "micro_batch", "run", False)


def test_settled_recipe_stays_as_it_is_under_other_processes() -> None:
    made = recipe().resolved(processes=4)
    assert made.resolved(processes=2) == made
    assert [made.accumulation(count) for count in (1, 2, 4)] == [128, 64, 32]


def test_batch_size_has_to_divide() -> None:
    with pytest.raises(RecipeError, match=r"batch_size 6 does not divide among 4 processes"):
        recipe(optim={"batch_size": 6}).resolved(processes=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optim": {"steps": 5}}, "exactly one of optim.steps and optim.epochs"),
        (
            {"optim": {"batch_size": 8, "accumulation": 2}},
            "at most one of optim.batch_size and optim.accumulation",
        ),
        ({"lora": {"dropout": 1.0}}, r"lora\.dropout"),
        ({"lora": {"ranks": 4}}, "did you mean 'rank'"),
        ({"model": {"quantization": "fp4"}}, r"model\.quantization"),
    ],
)
def test_impossible_recipes_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**content)
