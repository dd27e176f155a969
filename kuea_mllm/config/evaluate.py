"""Schema of an evaluation recipe (`kuea-mllm eval`)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from kuea_mllm.config.base import Device, Recipe, StrictModel

FewShotName = Literal["coco", "flickr30k", "vqav2", "okvqa", "textvqa", "vizwiz", "hatefulmemes"]
FEWSHOT_NAMES: tuple[FewShotName, ...] = (
    "coco",
    "flickr30k",
    "vqav2",
    "okvqa",
    "textvqa",
    "vizwiz",
    "hatefulmemes",
)


class Retrieval(StrictModel):
    """Demonstrations that look like the question's image (RICES) instead of random ones."""

    tower: str = Field(
        description="CLIP tower whose embeddings are compared; not the one in the model."
    )
    cache: str | None = Field(
        default=None,
        description="Folder where embeddings are kept; null is $KUEA_MLLM_CACHE, else kuea_mllm "
        "below $HF_HOME.",
    )
    batch_size: PositiveInt = 64
    workers: PositiveInt = Field(default=4, description="Threads that decode images.")


class FewShotSettings(StrictModel):
    """Few-shot evaluation as published for OpenFlamingo."""

    datasets: Annotated[list[FewShotName], Field(min_length=1)] = Field(
        default=list(FEWSHOT_NAMES), description="Each needs a folder under `data`."
    )
    shots: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        default=[0, 4, 16],
        description="Demonstrations; 0 shows two of them without their images.",
    )
    trials: PositiveInt = Field(default=1, description="Seeds: `seed`, `seed` + 1, ...")
    seed: NonNegativeInt = 42
    num_samples: PositiveInt | None = Field(
        default=None, description="Ask so many documents, drawn at random; null asks all."
    )
    query_set: PositiveInt = Field(
        default=2048, description="Training examples that a trial draws demonstrations from."
    )
    length_penalty: float = Field(
        default=0.0,
        description="Of the beam search. 0 in the published code (2.0.1); its tag 2.0.0 had -2 for "
        "captions.",
    )
    retrieval: Retrieval | None = None
    cache_images: PositiveInt = Field(
        default=8192, description="Images whose features are remembered on the device."
    )
    compat: Literal["correct", "released"] = Field(
        default="correct",
        description="released = the published code with its faults (docs/fewshot.md).",
    )

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for name, values in (("datasets", self.datasets), ("shots", self.shots)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds an entry twice: {values}")
        if self.retrieval is not None and self.trials > 1 and self.num_samples is None:
            raise ValueError(
                "trials differ in nothing where demonstrations are retrieved and all documents "
                "are asked; set trials to 1"
            )
        return self


class EvalRecipe(Recipe):
    """Which tasks are run, and how."""

    kind: Literal["eval"]
    tasks: list[str] = Field(
        default=[], description="Names known to lmms-eval, task YAML files, or folders of them."
    )
    fewshot: FewShotSettings | None = Field(
        default=None, description="Few-shot tasks, run beside `tasks`."
    )
    data: dict[FewShotName, str] = Field(
        default={}, description="Folder of each data set of `fewshot`, in its original layout."
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

    @model_validator(mode="after")
    def _something_to_run(self) -> Self:
        if not self.tasks and self.fewshot is None:
            raise ValueError("there is neither `tasks` nor `fewshot`: nothing to evaluate on")
        if self.data and self.fewshot is None:
            raise ValueError("`data` belongs to few-shot evaluation, and there is no `fewshot`")
        return self
