"""Schema of an evaluation recipe (`kuea-mllm eval`)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

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

LLAVA_COLUMNS = (
    "AI2D",
    "text-ocr",
    "text-pure",
    "pope",
    "tallyQA",
    "vsr",
    "RefCOCOg",
    "RefCOCO+",
    "RefCOCO",
    "vqa-v2",
    "llava-wild",
    "llava-coco",
    "MMVP",
)
QUICK_COLUMNS = ("text-pure", "pope", "vsr", "MMVP")
FLAMINGO_COLUMNS: dict[str, FewShotName] = {
    "COCO": "coco",
    "Flickr-30K": "flickr30k",
    "VQAv2": "vqav2",
    "OK-VQA": "okvqa",
    "TextVQA": "textvqa",
    "VizWiz": "vizwiz",
    "HatefulMemes": "hatefulmemes",
}
"""Columns of the few-shot suite, as they are printed, and their data sets."""

FLAMINGO_SUITE = "flamingo-paper"
SUITE_COLUMNS: dict[str, tuple[str, ...]] = {
    "llava-paper": LLAVA_COLUMNS,
    FLAMINGO_SUITE: tuple(FLAMINGO_COLUMNS),
    "quick": QUICK_COLUMNS,
}
LLAVA_PROTOCOLS = ("paper", "padded", "lmms-eval")
FLAMINGO_PROTOCOLS = {"open-flamingo": "correct", "open-flamingo-released": "released"}
"""Protocols of the few-shot suite and the `fewshot.compat` that each of them is."""

DATA_NAMES: tuple[str, ...] = (
    "ai2d",
    "textvqa",
    "pope",
    "tallyqa",
    "vsr",
    "refcoco",
    "refcoco_plus",
    "refcocog",
    "vqav2",
    "llava_bench_wild",
    "llava_bench_coco",
    "mmvp",
    "coco",
    "flickr30k",
    "okvqa",
    "vizwiz",
    "hatefulmemes",
)


def protocols_of(suite: str) -> tuple[str, ...]:
    """Return the protocols of a suite, its default first."""
    return tuple(FLAMINGO_PROTOCOLS) if suite == FLAMINGO_SUITE else LLAVA_PROTOCOLS


def nearest(name: str, known: Sequence[str]) -> str:
    """Say which of the known names look most like `name`, whatever their case."""
    by_case = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), list(by_case), n=2, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(by_case[other] for other in close)}"
    return f"known: {', '.join(known)}"


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


class SuiteSettings(StrictModel):
    """Columns of a table of the KUEA paper."""

    name: str = Field(description="llava-paper, flamingo-paper or quick.")
    protocol: str | None = Field(
        default=None,
        description="paper, padded or lmms-eval (docs/evaluation.md); of flamingo-paper "
        "open-flamingo or open-flamingo-released. null is the first of them.",
    )
    columns: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="Names as in the paper; null is all of the suite."
    )

    @field_validator("name")
    @classmethod
    def _known_suite(cls, name: str) -> str:
        if name not in SUITE_COLUMNS:
            raise ValueError(f"no suite is called that ({nearest(name, tuple(SUITE_COLUMNS))})")
        return name

    @model_validator(mode="before")
    @classmethod
    def _default_protocol(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("protocol") is None:
            name = content.get("name")
            if isinstance(name, str) and name in SUITE_COLUMNS:
                return {**content, "protocol": protocols_of(name)[0]}
        return content

    @model_validator(mode="after")
    def _names_of_this_suite(self) -> Self:
        known = protocols_of(self.name)
        if self.protocol not in known:
            raise ValueError(
                f"suite {self.name} has no protocol {self.protocol!r} "
                f"({nearest(str(self.protocol), known)})"
            )
        columns = self.columns or []
        for column in columns:
            if column not in SUITE_COLUMNS[self.name]:
                raise ValueError(
                    f"suite {self.name} has no column {column!r} "
                    f"({nearest(column, SUITE_COLUMNS[self.name])})"
                )
        if len(set(columns)) < len(columns):
            raise ValueError(f"suite.columns holds an entry twice: {columns}")
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The columns that are run, in the order of the suite."""
        every = SUITE_COLUMNS[self.name]
        return every if self.columns is None else tuple(c for c in every if c in self.columns)


class JudgeSettings(StrictModel):
    """A language model that grades answers, behind an OpenAI-compatible endpoint."""

    url: str = Field(description="Base URL, such as http://localhost:8000/v1.")
    model: str
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable that holds the key."
    )
    temperature: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 1024
    concurrency: PositiveInt = Field(default=4, description="Requests at a time.")
    timeout_s: PositiveFloat = 60.0
    retries: NonNegativeInt = 3

    # Of the section, not of the field: a message about a field repeats what was given.
    @model_validator(mode="after")
    def _names_a_variable(self) -> Self:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) is None:
            raise ValueError(
                "api_key_env is the name of an environment variable, such as OPENAI_API_KEY, and "
                "never the key itself: recipes are written into files"
            )
        return self


class EvalRecipe(Recipe):
    """Which tasks are run, and how."""

    kind: Literal["eval"]
    tasks: list[str] = Field(
        default=[], description="Names known to lmms-eval, task YAML files, or folders of them."
    )
    suite: SuiteSettings | None = Field(
        default=None, description="Columns of the paper, run beside `tasks`."
    )
    fewshot: FewShotSettings | None = Field(
        default=None, description="Few-shot tasks, run beside `tasks`."
    )
    data_root: str | None = Field(
        default=None, description="Folder with one sub-folder for each data set, named as `data`."
    )
    data: dict[str, str] = Field(
        default={}, description="Folder of each data set, in its original layout; wins."
    )
    batch_size: PositiveInt = 8
    limit: PositiveInt | None = Field(default=None, description="Only N documents of each task.")
    limit_seed: NonNegativeInt | None = Field(
        default=None,
        description="Draw those N at random with this seed; null takes the first N. Left out, it "
        "is 0 where there is a suite.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto = bfloat16 on CUDA, float32 elsewhere."
    )
    device: Device = "auto"
    num_processes: PositiveInt = Field(
        default=1, description="Processes on this machine, one for each GPU."
    )
    shared_prefix: bool = Field(
        default=True, description="Compute what questions about one image share only once."
    )
    seed: NonNegativeInt = 0
    max_failures: NonNegativeInt = Field(
        default=0, description="Questions that may stay unanswered before the command fails."
    )
    judge: JudgeSettings | None = Field(
        default=None, description="Grades LLaVA-Bench; null leaves those columns without a score."
    )
    backend: str = Field(
        default="kuea_mllm",
        description="Model class of lmms-eval that answers: ours, or vllm, sglang, openai, ...",
    )
    backend_args: dict[str, str] = Field(
        default={}, description="Arguments of that class, passed through."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_suite(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("suite"), dict):
            return content
        # Here and not where it is run, so that a written recipe says what was done.
        return {"limit_seed": 0, **_with_fewshot(content)}

    @field_validator("data")
    @classmethod
    def _known_data(cls, data: dict[str, str]) -> dict[str, str]:
        for name in data:
            if name not in DATA_NAMES:
                raise ValueError(f"no data set is called data.{name} ({nearest(name, DATA_NAMES)})")
        return data

    @model_validator(mode="after")
    def _something_to_run(self) -> Self:
        if not self.tasks and self.fewshot is None and self.suite is None:
            raise ValueError(
                "there is neither `suite` nor `tasks` nor `fewshot`: nothing to evaluate on"
            )
        if (self.data or self.data_root) and self.fewshot is None and self.suite is None:
            raise ValueError(
                "`data` belongs to suites and few-shot evaluation, and there is neither"
            )
        if self.suite is not None and self.suite.name != FLAMINGO_SUITE and self.fewshot:
            raise ValueError(
                f"suite {self.suite.name} and `fewshot` are two evaluations of different "
                "protocols; run them into two directories"
            )
        if self.backend_args and self.backend == "kuea_mllm":
            raise ValueError("`backend_args` belongs to another backend than kuea_mllm")
        return self


def _with_fewshot(content: dict[str, Any]) -> dict[str, Any]:
    """Let the few-shot suite and `fewshot` say the same, each where the other is silent."""
    suite, fewshot = content["suite"], content.get("fewshot") or {}
    if suite.get("name") != FLAMINGO_SUITE or not isinstance(fewshot, dict):
        return content
    by_compat = {compat: protocol for protocol, compat in FLAMINGO_PROTOCOLS.items()}
    protocol = suite.get("protocol") or by_compat.get(fewshot.get("compat", "correct"))
    columns = suite.get("columns") or list(FLAMINGO_COLUMNS)
    compat = FLAMINGO_PROTOCOLS.get(str(protocol), "correct")
    datasets = [FLAMINGO_COLUMNS.get(str(column), str(column)) for column in columns]
    if not suite.get("columns"):
        datasets = fewshot.get("datasets", datasets)
        names = {name: column for column, name in FLAMINGO_COLUMNS.items()}
        columns = [names.get(name, name) for name in datasets]
    return {
        **content,
        "suite": {**suite, "protocol": protocol, "columns": columns},
        "fewshot": {**fewshot, "compat": compat, "datasets": datasets},
    }
