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
        default=None, description="Train the parameters; null follows `compat`. Student only."
    )
    parametrisation: Literal["log", "direct"] = Field(
        default="log",
        description="What is trained. log: the logarithm of rho = gamma / coef0, positive by "
        "construction and all that the kernel depends on. direct: gamma and coef0 themselves.",
    )


class GaussianKernelConfig(StrictModel):
    """Gaussian kernel exp(-d^2 / (2 sigma^2))."""

    type: Literal["gaussian"] = "gaussian"
    sigma: PositiveFloat = Field(description="Bandwidth, in units of the embedding.")
    trainable: bool | None = Field(
        default=None, description="Train sigma; null follows `compat`. Student only."
    )
    parametrisation: Literal["log", "direct"] = Field(
        default="log", description="What is trained: the logarithm of sigma, or sigma itself."
    )


class CosineKernelConfig(StrictModel):
    """Cosine similarity; no parameters."""

    type: Literal["cosine"] = "cosine"


SimpleKernelConfig = Annotated[
    PolynomialKernelConfig | GaussianKernelConfig | CosineKernelConfig,
    Field(discriminator="type"),
]


class WeightedKernelConfig(StrictModel):
    """One summand of a sum of kernels."""

    weight: PositiveFloat = 1.0
    kernel: SimpleKernelConfig


class SumKernelConfig(StrictModel):
    """Weighted mean of kernels; one on the diagonal, whatever the weights."""

    type: Literal["sum"] = "sum"
    kernels: Annotated[list[WeightedKernelConfig], Field(min_length=1)]


KernelConfig = Annotated[
    PolynomialKernelConfig | GaussianKernelConfig | CosineKernelConfig | SumKernelConfig,
    Field(discriminator="type"),
]


def _trains(kernel: KernelConfig) -> bool:
    if isinstance(kernel, SumKernelConfig):
        return any(_trains(part.kernel) for part in kernel.kernels)
    return bool(getattr(kernel, "trainable", None))


def _settled(kernel: KernelConfig, trainable: bool) -> KernelConfig:
    """Write out whether a kernel trains, where it is left open."""
    if isinstance(kernel, SumKernelConfig):
        parts = [
            part.model_copy(update={"kernel": _settled(part.kernel, trainable)})
            for part in kernel.kernels
        ]
        return kernel.model_copy(update={"kernels": parts})
    if isinstance(kernel, CosineKernelConfig) or kernel.trainable is not None:
        return kernel
    return kernel.model_copy(update={"trainable": trainable})


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

    model: str | None = Field(
        default=None, description="HF directory or hub id; timm:NAME for a timm model."
    )
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

    images: str | None = Field(
        default=None,
        description="Folder, list of files (.txt), tar shards (a/{000..127}.tar, also URLs), "
        "parquet files, Hugging Face data set, or pack.",
    )
    format: Literal["auto", "folder", "list", "tar", "parquet", "dataset", "pack"] = Field(
        default="auto", description="What `images` is; auto tells by its name and content."
    )
    split: str = Field(default="train", description="Split of a Hugging Face data set.")
    column: str | None = Field(
        default=None, description="Image column of a parquet file or data set; null finds it."
    )
    stream: bool = Field(
        default=False,
        description="Read tar shards or a data set front to back through a shuffle buffer, "
        "instead of by position; needed for remote ones.",
    )
    shuffle_buffer: PositiveInt = Field(
        default=10_000, description="Images in the shuffle buffer of a stream."
    )
    fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Part of the training images to use, drawn by runtime.seed."
    )
    count: PositiveInt | None = Field(
        default=None, description="Number of training images to use; alternative to fraction."
    )
    skip_unreadable: NonNegativeInt = Field(
        default=0,
        description="Unreadable images to leave out (named in the log) before the run ends.",
    )
    augment: Literal["none", "flip", "random_resized_crop"] = Field(
        default="none", description="Random transform; the paper uses none."
    )
    heldout: str | None = Field(
        default=None,
        description="Images to measure on, like `images`; null takes some out of `images`.",
    )
    heldout_split: str = Field(
        default="validation", description="Split, where `heldout` is a Hugging Face data set."
    )
    heldout_count: PositiveInt = Field(
        default=256, description="How many held-out images the gap is measured on."
    )
    workers: NonNegativeInt = Field(
        default=8, description="Decoding processes for each training process."
    )

    @model_validator(mode="after")
    def _one_part(self) -> Self:
        if self.fraction is not None and self.count is not None:
            raise ValueError("give data.fraction or data.count, not both")
        return self


class TargetsConfig(StrictModel):
    """Where teacher and original embeddings come from."""

    cache: bool = Field(
        default=False,
        description="Compute them once, keep them on disk, and do not run the frozen towers.",
    )
    directory: str | None = Field(
        default=None,
        description="Folder of caches; null is $KUEA_MLLM_CACHE, else kuea_mllm below $HF_HOME.",
    )


class ObjectiveConfig(StrictModel):
    """What is minimised: the weighted sum of all terms whose weight is not zero.

    Pooled terms compare whole batches of pooled embeddings, patch terms the patch tokens of one
    image at a time.
    """

    kernel_weight: NonNegativeFloat = Field(
        default=0.5, description="Gap of the kernel matrices; paper, Table 7 coefficient."
    )
    preserve_weight: NonNegativeFloat = Field(
        default=1.0, description="Squared distance to the original embedding."
    )
    student_kernel: KernelConfig = PolynomialKernelConfig(gamma=0.0032, coef0=0.191623)
    teacher_kernel: KernelConfig = PolynomialKernelConfig()
    feature_weight: NonNegativeFloat = Field(
        default=0.0,
        description="Squared distance to a trained linear map of the teacher embedding "
        "(the paper's baseline, eq. 18).",
    )
    cka_weight: NonNegativeFloat = Field(
        default=0.0, description="One minus the linear CKA with the teacher (beyond the paper)."
    )
    distill_weight: NonNegativeFloat = Field(
        default=0.0,
        description="Multi-teacher distillation in the manner of AM-RADIO: one head per teacher, "
        "the original tower among them; cosine loss on pooled embeddings.",
    )
    patch_preserve_weight: NonNegativeFloat = Field(
        default=0.0,
        description="Mean squared distance of patch tokens to the original's, summed over the "
        "width (beyond the paper): keeps what an MLLM reads.",
    )
    patch_kernel_weight: NonNegativeFloat = Field(
        default=0.0,
        description="Gap of the kernel matrices over the patch tokens of each image (beyond the "
        "paper).",
    )
    patch_distill_weight: NonNegativeFloat = Field(
        default=0.0, description="The patch-token part of multi-teacher distillation."
    )
    patch_layer: int = Field(
        default=-2, description="Hidden state whose patch tokens patch terms read; LLaVA-1.5: -2."
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        driving = {
            name: getattr(self, name)
            for name in (
                "kernel_weight",
                "feature_weight",
                "cka_weight",
                "distill_weight",
                "patch_kernel_weight",
                "patch_distill_weight",
            )
        }
        if not any(driving.values()):
            raise ValueError(
                "objective: every weight that pulls towards the teacher is 0 "
                f"({', '.join(driving)}): student and original start equal, so nothing would be "
                "learned"
            )
        if _trains(self.teacher_kernel):
            raise ValueError("objective.teacher_kernel.trainable must stay false: it is the target")
        return self

    @property
    def has_patch_terms(self) -> bool:
        """Whether any term reads patch tokens."""
        return bool(
            self.patch_preserve_weight or self.patch_kernel_weight or self.patch_distill_weight
        )


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
    kernel_lr: PositiveFloat | None = Field(
        default=None, description="Rate of kernel parameters, maps and heads; null is optim.lr."
    )
    max_grad_norm: NonNegativeFloat = Field(
        default=0.0, description="Clip the gradient norm; 0 does not (released code)."
    )
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
    micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="Images that one device embeds at once; the gradients stay those of the "
        "whole batch (gradient cache: one more forward pass). null: all of its share.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: about a third slower, far less memory."
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile of the towers; auto: on CUDA only."
    )
    check_memory: bool = Field(
        default=True, description="Refuse a run that a CUDA device clearly has no memory for."
    )
    log_every: PositiveInt = Field(default=10, description="Steps between rows of metrics.jsonl.")
    measure_every: PositiveInt = Field(
        default=500, description="Steps between measurements on held-out images."
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="Beside metrics.jsonl."
    )


class CheckpointConfig(StrictModel):
    """When an unfinished run is saved, so that `--resume` can go on."""

    every_steps: PositiveInt | None = Field(default=None, description="Steps between checkpoints.")
    every_minutes: PositiveFloat | None = Field(
        default=15.0, description="Minutes between checkpoints; null: by steps only."
    )
    keep: PositiveInt = Field(
        default=2, description="Checkpoints kept; the best one is kept beside them."
    )


Measurement = Literal[
    "heldout_kernel_gap",
    "heldout_cka_teacher",
    "heldout_drift_distance_mean",
    "heldout_drift_cosine_mean",
    "heldout_drift_bound_mean",
    "heldout_patch_drift",
    "heldout_zero_shot",
]


class EarlyStopConfig(StrictModel):
    """End the run when a held-out measurement stops improving or drifts too far."""

    metric: Measurement = Field(
        default="heldout_kernel_gap",
        description="A measurement; of CKA, zero-shot accuracy and cosine higher is better.",
    )
    patience: PositiveInt = Field(default=5, description="Measurements without improvement.")
    min_delta: NonNegativeFloat = Field(default=0.0, description="What counts as improvement.")
    max_drift_bound: PositiveFloat | None = Field(
        default=None,
        description="Stop when heldout_drift_bound_mean (Proposition 3.2) exceeds this.",
    )


class MonitorConfig(StrictModel):
    """What is measured on held-out images during training."""

    patch_drift: bool = Field(
        default=True, description="Relative drift of the patch tokens of objective.patch_layer."
    )
    zero_shot: str | None = Field(
        default=None,
        description="Folder with one sub-folder of images per class name: zero-shot accuracy with "
        "the student's own text tower.",
    )
    zero_shot_count: PositiveInt = Field(default=1000, description="Images of that folder to use.")
    early_stop: EarlyStopConfig | None = None


class AlignRecipe(Recipe):
    """Everything that `kuea-mllm align` needs to know."""

    kind: Literal["align"]
    compat: Literal["paper", "released"] = Field(
        default="paper",
        description="paper: trainable kernel, teacher's own pixel statistics, warm-up from the "
        "first update. released: as the authors' code in effect behaves.",
    )
    method: Literal["align", "projection"] = Field(
        default="align",
        description="align trains the tower. projection: the paper's baseline, which leaves it "
        "alone and maps the teacher into CLIP space by least squares.",
    )
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    extra_teachers: list[TeacherConfig] = Field(
        default=[], description="More teachers, for objective.distill_weight only."
    )
    data: DataConfig = DataConfig()
    targets: TargetsConfig = TargetsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig
    runtime: RuntimeConfig = RuntimeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        objective = self.objective
        if self.extra_teachers and not (objective.distill_weight or objective.patch_distill_weight):
            raise ValueError(
                "extra_teachers are read by objective.distill_weight and patch_distill_weight "
                "only, and both are 0"
            )
        if self.targets.cache and self.data.augment != "none":
            raise ValueError(
                f"targets.cache cannot be used with data.augment={self.data.augment}: a random "
                "transform gives other embeddings every time"
            )
        if self.targets.cache and self.data.stream:
            raise ValueError(
                "targets.cache needs images that can be read by position: set data.stream=false, "
                "or make a pack of the stream first (kuea-mllm pack)"
            )
        return self

    def resolved(self) -> AlignRecipe:
        """Return the recipe with every value that follows `compat` written out."""
        released = self.compat == "released"
        objective = self.objective.model_copy(
            update={
                "student_kernel": _settled(self.objective.student_kernel, not released),
                "teacher_kernel": _settled(self.objective.teacher_kernel, False),
            }
        )
        teachers = [
            teacher
            if teacher.normalisation is not None
            else teacher.model_copy(update={"normalisation": "student" if released else "own"})
            for teacher in (self.teacher, *self.extra_teachers)
        ]
        optim = self.optim
        if optim.first_update_at_full_lr is None:
            optim = optim.model_copy(update={"first_update_at_full_lr": released})
        return self.model_copy(
            update={
                "objective": objective,
                "teacher": teachers[0],
                "extra_teachers": teachers[1:],
                "optim": optim,
            }
        )
