"""Schema of a probe recipe (`kuea-mllm probe`): data sets of one suite, and what is expected."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from kuea_mllm.config.base import Device, Recipe, StrictModel

SuiteName = Literal["zero-shot", "retrieval", "linear", "patch", "mmvp-vlm"]
SUITES: tuple[SuiteName, ...] = ("zero-shot", "retrieval", "linear", "patch", "mmvp-vlm")
Layout = Literal["wds", "folder", "table", "karpathy", "coco-stuff", "mmvp-vlm"]
Metric = Literal["acc1", "recall@k", "lp_acc1", "macro_recall", "pair_accuracy"]
Fault = Literal["tensor_resize", "raw_pixels", "cut_captions"]


class ExpectedScores(StrictModel):
    """Published scores of one column, in percent."""

    column: str = Field(description="Name of the column in the results.")
    table: PositiveInt | None = Field(
        default=None, description="Table of the paper; null is `by`'s own measurement."
    )
    by: str = Field(default="paper", description="Who published them.")
    scores: dict[str, float] = Field(description="Model to score.")


class ProbeData(StrictModel):
    """One data set of a suite."""

    name: str = Field(description="Heading of its columns, such as CIFAR10.")
    key: str = Field(description="Folder of the data set below --data.")
    source: str = Field(
        description="Where it comes from: a data set on the hub, or files to fetch."
    )
    layout: Layout = Field(description="Layout of the source; local copies may have another.")
    split: str = Field(default="test", description="What is scored.")
    train_split: str | None = Field(default=None, description="What a probe is trained on.")
    classnames: str | None = Field(
        default=None,
        description="List of clip-benchmark's package for copies without one; null takes the names "
        "of folders or labels.",
    )
    templates: str | None = Field(
        default=None,
        description="Prompts of clip-benchmark's package, for copies without any.",
    )
    metric: Metric
    documents: PositiveInt = Field(description="Images (or pairs) of the split.")
    train_documents: PositiveInt | None = Field(
        default=None, description="Images of the training split."
    )
    captions_per_image: PositiveInt | None = Field(
        default=None, description="Only the first captions of an image; null takes all."
    )
    image_column: str | None = Field(default=None, description="Of a table; null finds the only.")
    label_column: str | None = Field(default=None, description="Of a table; null finds the only.")
    caption_column: str | None = Field(default=None, description="Of a table with captions.")
    may_miss_classes: bool = Field(
        default=False, description="Allow classes without an image in the split."
    )
    faults: list[Fault] = Field(
        default=[], description="What the released code does here, with compat: released."
    )
    remark: str = Field(default="", description="What to know when comparing with `expected`.")
    expected: list[ExpectedScores] = Field(default=[], description="Published scores.")


class LinearProbe(StrictModel):
    """How a linear probe is trained; the defaults are CLIP_benchmark's."""

    lr: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="First learning rate; half a cosine down to 0, no warm-up."
    )
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 64
    validation: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Share of the training images that the weight decay is searched on; null "
        "trains without weight decay, as the paper.",
    )


class PatchProbe(StrictModel):
    """How heads for patches are trained; the defaults are those of Covert et al."""

    head: Literal["transformer", "linear", "mlp"] = "transformer"
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 32
    lr: Annotated[float, Field(gt=0)] = 1e-3
    last_lr: Annotated[float, Field(ge=0)] = Field(
        default=1e-4, description="Where the cosine ends."
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: NonNegativeInt = 500
    selection: Literal["last", "best"] = Field(
        default="last",
        description="Which epoch is scored; best is chosen on the images that are scored, as "
        "published.",
    )


class ProbeRecipe(Recipe):
    """Everything that one suite of `kuea-mllm probe` needs to know."""

    kind: Literal["probe"]
    suite: SuiteName
    datasets: Annotated[list[ProbeData], Field(min_length=1)]
    averages: dict[str, list[str]] = Field(
        default={}, description="Name of an average to the data sets that it covers."
    )
    recall_at: list[PositiveInt] = Field(default=[1, 5, 10], description="Of retrieval.")
    linear: LinearProbe | None = Field(default=None, description="Of the suite linear alone.")
    patch: PatchProbe | None = Field(default=None, description="Of the suite patch alone.")
    batch_size: PositiveInt = Field(default=64, description="Images that the tower sees at once.")
    limit: PositiveInt | None = Field(
        default=None, description="Only so many images of each data set, spread evenly."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="float32 as the paper; others by autocast."
    )
    device: Device = "auto"
    seed: NonNegativeInt = 0
    compat: Literal["correct", "released"] = Field(
        default="correct",
        description="released = the authors' evaluation code with its faults (docs/probing.md).",
    )

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [data.name for data in self.datasets]
        for field, values in (("name", names), ("key", [data.key for data in self.datasets])):
            if twice := {value for value in values if values.count(value) > 1}:
                raise ValueError(f"two data sets have the {field} {min(twice)!r}")
        for average, covered in self.averages.items():
            if unknown := set(covered) - set(names):
                raise ValueError(
                    f"average {average!r} covers {min(unknown)!r}, which is no data set"
                )
        for section, given in (("linear", self.linear), ("patch", self.patch)):
            if (given is not None) != (self.suite == section):
                what = "needs" if given is None else "takes no"
                raise ValueError(f"suite {self.suite} {what} section {section!r}")
        for data in self.datasets:
            if self.suite == "linear" and data.train_split is None:
                raise ValueError(f"data set {data.name!r} needs a train_split for a linear probe")
        return self

    def faults_of(self, data: ProbeData) -> list[Fault]:
        """Return the faults of the released code that a data set is scored with."""
        return list(data.faults) if self.compat == "released" else []
