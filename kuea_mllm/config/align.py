"""Schema of an alignment recipe (`kuea-mllm align`)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kuea_mllm.config.base import Device, Recipe, StrictModel

Beta = Annotated[float, Field(ge=0, lt=1)]


class PolynomialKernelConfig(StrictModel):
    """Normalised polynomial kernel, the paper's choice (degree 3)."""

    type: Literal["polynomial"] = "polynomial"
    gamma: PositiveFloat | None = Field(
        default=None, description="Scale of the inner product; null means 1 / embedding width."
    )
    coef0: PositiveFloat = Field(default=1.0, description="Offset added to the inner product.")
    degree: PositiveInt = Field(default=3, description="Power.")
    trainable: bool | None = Field(
        default=None, description="Train gamma and coef0; null follows `compat`. Student only."
    )


class GaussianKernelConfig(StrictModel):
    """Gaussian kernel exp(-d^2 / (2 sigma^2))."""

    type: Literal["gaussian"] = "gaussian"
    sigma: PositiveFloat = Field(description="Bandwidth, in units of the embedding.")
    trainable: bool | None = Field(
        default=None, description="Train sigma; null follows `compat`. Student only."
    )


class CosineKernelConfig(StrictModel):
    """Cosine similarity; no parameters."""

    type: Literal["cosine"] = "cosine"


KernelConfig = Annotated[
    PolynomialKernelConfig | GaussianKernelConfig | CosineKernelConfig,
    Field(discriminator="type"),
]


class StudentConfig(StrictModel):
    """The CLIP-family tower to be aligned."""

    model: str | None = Field(
        default=None, description="HF directory, hub id or checkpoint file of the tower."
    )
    activation: Literal["quick_gelu", "gelu"] | None = Field(
        default=None, description="Needed for checkpoint files, which do not state it."
    )
    heads: PositiveInt | None = Field(
        default=None, description="Attention heads, where a checkpoint file leaves them open."
    )
    revision: str | None = Field(default=None, description="Hub revision.")


class TeacherConfig(StrictModel):
    """The frozen vision model whose kernel matrix is the target."""

    model: str | None = Field(default=None, description="HF directory or hub id.")
    readout: Literal["cls", "pooled", "mean_patch"] = Field(
        default="cls", description="Which output is the embedding."
    )
    normalisation: Literal["own", "student"] | None = Field(
        default=None,
        description="Whose pixel statistics the teacher is fed with; null follows `compat`.",
    )
    image_size: PositiveInt | None = Field(
        default=None, description="Input size in pixels; null takes the teacher's own."
    )
    revision: str | None = Field(default=None, description="Hub revision.")


class DataConfig(StrictModel):
    """Images to align on; no captions and no labels are used."""

    images: str | None = Field(default=None, description="Folder searched recursively for images.")
    heldout: str | None = Field(
        default=None,
        description="Folder of images to measure on; null takes some out of `images`.",
    )
    heldout_count: PositiveInt = Field(
        default=256, description="How many held-out images the gap is measured on."
    )
    workers: NonNegativeInt = Field(default=8, description="Processes that decode images.")


class ObjectiveConfig(StrictModel):
    """What is minimised: kernel_weight * kernel gap + preserve_weight * preservation."""

    kernel_weight: NonNegativeFloat = Field(default=0.5, description="Paper, Table 7 coefficient.")
    preserve_weight: NonNegativeFloat = Field(
        default=1.0, description="Weight of the squared distance to the original embedding."
    )
    student_kernel: KernelConfig = PolynomialKernelConfig(gamma=0.0032, coef0=0.191623)
    teacher_kernel: KernelConfig = PolynomialKernelConfig()

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.kernel_weight == 0:
            raise ValueError(
                "objective.kernel_weight is 0: student and original start equal, so nothing "
                "would be learned"
            )
        if getattr(self.teacher_kernel, "trainable", None):
            raise ValueError("objective.teacher_kernel.trainable must stay false: it is the target")
        return self


class OptimConfig(StrictModel):
    """AdamW with linear warm-up and cosine decay (paper, section 4 and Table 7)."""

    lr: PositiveFloat = 1e-5
    weight_decay: NonNegativeFloat = Field(
        default=1e-4, description="Applied to every tower parameter, norms and biases included."
    )
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    batch_size: Annotated[int, Field(ge=2)] = Field(
        default=64, description="Images in one kernel matrix; the loss is over pairs."
    )
    steps: PositiveInt | None = Field(default=None, description="Optimiser updates.")
    epochs: PositiveFloat | None = Field(
        default=None, description="Alternative to steps: passes over the images."
    )
    warmup_steps: NonNegativeInt = 0
    first_update_at_full_lr: bool | None = Field(
        default=None,
        description="Quirk of the released loop: update 1 runs at the full rate; "
        "null follows `compat`.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of optim.steps and optim.epochs")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.warmup_steps}) must be smaller than "
                f"optim.steps ({self.steps})"
            )
        return self


class RuntimeConfig(StrictModel):
    """Where and how the run is carried out."""

    seed: NonNegativeInt = 0
    device: Device = "auto"
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16 = autocast; weights, kernels and losses stay fp32."
    )
    log_every: PositiveInt = Field(default=10, description="Steps between rows of metrics.jsonl.")
    measure_every: PositiveInt = Field(
        default=500, description="Steps between measurements on held-out images."
    )


class AlignRecipe(Recipe):
    """Everything that `kuea-mllm align` needs to know."""

    kind: Literal["align"]
    compat: Literal["paper", "released"] = Field(
        default="paper",
        description="paper: trainable kernel, teacher's own pixel statistics, warm-up from the "
        "first update. released: as the authors' code in effect behaves.",
    )
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig
    runtime: RuntimeConfig = RuntimeConfig()

    def resolved(self) -> AlignRecipe:
        """Return the recipe with every value that follows `compat` written out."""
        released = self.compat == "released"
        objective = self.objective
        if getattr(objective.student_kernel, "trainable", False) is None:
            kernel = objective.student_kernel.model_copy(update={"trainable": not released})
            objective = objective.model_copy(update={"student_kernel": kernel})
        if getattr(objective.teacher_kernel, "trainable", False) is None:
            kernel = objective.teacher_kernel.model_copy(update={"trainable": False})
            objective = objective.model_copy(update={"teacher_kernel": kernel})
        teacher, optim = self.teacher, self.optim
        if teacher.normalisation is None:
            choice = "student" if released else "own"
            teacher = teacher.model_copy(update={"normalisation": choice})
        if optim.first_update_at_full_lr is None:
            optim = optim.model_copy(update={"first_update_at_full_lr": released})
        return self.model_copy(update={"objective": objective, "teacher": teacher, "optim": optim})
