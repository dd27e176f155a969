"""Schema of an evaluation recipe (`kuea-mllm eval`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from kuea_mllm.config.base import Device, Recipe


class EvalRecipe(Recipe):
    """Which tasks are run, and how."""

    kind: Literal["eval"]
    tasks: Annotated[list[str], Field(min_length=1)] = Field(
        description="Names known to lmms-eval, task YAML files, or folders of them."
    )
    batch_size: PositiveInt = 8
    limit: PositiveInt | None = Field(
        default=None, description="Only the first N documents of each task."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto = bfloat16 on CUDA, float32 elsewhere."
    )
    device: Device = "auto"
    seed: NonNegativeInt = 0
    max_failures: NonNegativeInt = Field(
        default=0, description="Questions that may stay unanswered before the command fails."
    )
