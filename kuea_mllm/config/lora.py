"""Schema of a tuning recipe (`kuea-mllm lora`)."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kuea_mllm.config.align import Beta, CheckpointConfig
from kuea_mllm.config.base import Device, Recipe, StrictModel
from kuea_mllm.errors import RecipeError

T = TypeVar("T")

Share = Annotated[float, Field(ge=0, lt=1)]


class TunedModelConfig(StrictModel):
    """The MLLM to be tuned."""

    path: str | None = Field(default=None, description="HF model directory, as swap writes it.")
    adapter: str | None = Field(
        default=None, description="Which adapter knows it; null recognises it by its config.json."
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        default="none",
        description="Of the frozen language model while it is tuned (bitsandbytes). none keeps "
        "it in runtime.dtype. Merging always goes into the weights as they lie on disk.",
    )


class MixtureConfig(StrictModel):
    """What is learned from."""

    file: str | None = Field(
        default=None, description="JSON list or JSONL of conversations (LLaVA's or chat schema)."
    )
    images: str | None = Field(
        default=None, description="Folder that the images' paths are relative to."
    )
    max_length: PositiveInt = Field(
        default=2048, description="Longest sample in tokens, the image's tokens included."
    )
    cut_after_splicing: bool | None = Field(
        default=None,
        description="Cut again when the image's tokens have taken their places (original LLaVA); "
        "the code released with the paper does not. null follows `compat`.",
    )
    packing: bool = Field(
        default=False,
        description="Join samples up to max_length in one row; none sees another. Changes what a "
        "step holds: micro_batch_size and batch_size count rows.",
    )
    group_by_modality: bool = Field(
        default=True, description="Keep samples with and without an image apart, then by length."
    )
    order: Literal["seed", "length", "released"] = Field(
        default="seed",
        description="seed: the original's order, drawn from runtime.seed and the epoch. length: "
        "the same updates, with samples of like length in one micro-batch (less padding; no "
        "difference at micro-batches of one). released: the "
        "order in which the original's trainer finds PyTorch's generator.",
    )
    skip_records: list[NonNegativeInt] = Field(
        default=[],
        description="Records, by the number that messages call them by, that nothing is learned "
        "from; the others keep their places. May be changed with --resume.",
    )
    workers: NonNegativeInt = Field(default=4, description="Decoders for each process.")


class LoraConfig(StrictModel):
    """What is trained."""

    rank: PositiveInt = 128
    alpha: PositiveFloat = 256.0
    dropout: Share = 0.05
    targets: list[str] | None = Field(
        default=None,
        description="Last names of the linear layers of the language model that take LoRA; null: "
        "all of them. Nothing outside of the language model is ever matched.",
    )
    projector: Literal["train", "freeze"] | None = Field(
        default=None,
        description="The projector between tower and language model. The original LLaVA trains "
        "it; the code released with the paper freezes it in effect. null follows `compat`.",
    )
    train_lm_head: bool = Field(
        default=False, description="Also train the output layer (whole, not by LoRA)."
    )


class TuningOptimConfig(StrictModel):
    """Optimiser and schedule."""

    lr: PositiveFloat = 2.0e-4
    projector_lr: PositiveFloat = 2.0e-5
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1.0e-8
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw", description="The last three are those of bitsandbytes."
    )
    micro_batch_size: PositiveInt = Field(
        default=1, description="Samples that one device runs at once."
    )
    batch_size: PositiveInt | None = Field(
        default=None,
        description="Samples of one update, of all processes and micro-batches together; "
        "accumulation follows from it. null: micro_batch_size times processes times "
        "accumulation.",
    )
    accumulation: PositiveInt | None = Field(
        default=None,
        description="Micro-batches of each process in one update. Paper: 32; the released script: "
        "1. null follows `compat`, or batch_size where that is given.",
    )
    epochs: PositiveFloat | None = 1.0
    steps: PositiveInt | None = Field(default=None, description="Updates, instead of epochs.")
    warmup_ratio: Share = Field(default=0.03, description="Of all updates, rounded up.")
    max_grad_norm: NonNegativeFloat | None = Field(
        default=None,
        description="Clip the norm of the gradient; 0 does not, as in effect the released code "
        "and the original. null follows `compat`.",
    )
    loss_weighting: Literal["token", "micro_batch"] | None = Field(
        default=None,
        description="token: the mean over all answers' tokens of an update. micro_batch: the mean "
        "of the micro-batches' means, as the original. null follows `compat`.",
    )
    last_update: Literal["run", "drop"] | None = Field(
        default=None,
        description="Whether an epoch's last update is done with the micro-batches that are left, "
        "or dropped as the original does. null follows `compat`.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of optim.steps and optim.epochs")
        if self.batch_size is not None and self.accumulation is not None:
            raise ValueError("give at most one of optim.batch_size and optim.accumulation")
        return self


class TuningRuntimeConfig(StrictModel):
    """Where and how the run is carried out."""

    seed: NonNegativeInt = 42
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="Of what is frozen, and of the arithmetic; what is trained stays float32.",
    )
    tf32: bool = Field(default=True, description="TF32 where float32 is left, on CUDA.")
    gradient_checkpointing: bool = True
    loss_chunk: PositiveInt = Field(
        default=1024, description="Positions whose logits are held at once."
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="fsdp: each process holds a part of the language model's frozen weights, and "
        "gathers a layer when it runs. What is trained stays whole in each.",
    )
    liger: bool = Field(
        default=False,
        description="Liger kernels in the language model, after a comparison with the stock ones.",
    )
    check_memory: bool = Field(
        default=True, description="Refuse a run that a CUDA device clearly has no memory for."
    )
    log_every: PositiveInt = Field(default=10, description="Updates between rows of metrics.jsonl.")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="Beside metrics.jsonl."
    )


class LoraRecipe(Recipe):
    """Everything that `kuea-mllm lora` needs to know."""

    kind: Literal["lora"]
    compat: Literal["paper", "released"] = Field(
        default="paper",
        description="paper: what the paper states, and where it is silent the original LLaVA "
        "with today's corrections. released: as the script released with the paper in effect "
        "behaves (projector frozen, no accumulation, no clipping, each micro-batch weighs the "
        "same, no cut after splicing, last incomplete update dropped).",
    )
    model: TunedModelConfig = TunedModelConfig()
    data: MixtureConfig = MixtureConfig()
    lora: LoraConfig = LoraConfig()
    optim: TuningOptimConfig = TuningOptimConfig()
    runtime: TuningRuntimeConfig = TuningRuntimeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _packing_fits(self) -> Self:
        if not self.data.packing:
            return self
        released = self.compat == "released"
        weighting = _either(self.optim.loss_weighting, "micro_batch" if released else "token")
        if weighting != "token":
            raise ValueError(
                f"optim.loss_weighting is {weighting}, and data.packing takes token: how many "
                "samples share a row would decide what each weighs"
            )
        if not _either(self.data.cut_after_splicing, not released):
            raise ValueError(
                "data.cut_after_splicing is false, and data.packing needs it: samples must fit "
                "a row of data.max_length"
            )
        if self.data.order == "released":
            raise ValueError("data.order is released, which is an order of samples, not of rows")
        return self

    def accumulation(self, processes: int) -> int:
        """Return the micro-batches of each process in one update.

        Raises:
            RecipeError: If optim.batch_size does not divide among processes and micro-batches.
        """
        optim = self.optim
        if optim.batch_size is None:
            return optim.accumulation or (1 if self.compat == "released" else 32)
        count, rest = divmod(optim.batch_size, processes * optim.micro_batch_size)
        if rest:
            raise RecipeError(
                f"optim.batch_size {optim.batch_size} does not divide among {processes} "
                f"processes with micro-batches of {optim.micro_batch_size}.",
                "The batch size is that of all processes together; choose a multiple.",
            )
        return count

    def resolved(self, *, processes: int = 1) -> LoraRecipe:
        """Return the recipe with every value written out that follows another.

        Args:
            processes: Devices that share an update.

        Raises:
            RecipeError: If optim.batch_size does not divide among processes and micro-batches.
        """
        released = self.compat == "released"
        optim = self.optim
        share = processes * optim.micro_batch_size
        accumulation = self.accumulation(processes)
        return self.model_copy(
            update={
                "data": self.data.model_copy(
                    update={
                        "cut_after_splicing": _either(self.data.cut_after_splicing, not released)
                    }
                ),
                "lora": self.lora.model_copy(
                    update={
                        "projector": _either(self.lora.projector, "freeze" if released else "train")
                    }
                ),
                "optim": optim.model_copy(
                    update={
                        # One of the two: a resumed run may have another number of processes.
                        "accumulation": None,
                        "batch_size": accumulation * share,
                        "max_grad_norm": _either(optim.max_grad_norm, 0.0 if released else 1.0),
                        "loss_weighting": _either(
                            optim.loss_weighting, "micro_batch" if released else "token"
                        ),
                        "last_update": _either(optim.last_update, "drop" if released else "run"),
                    }
                ),
            }
        )


def _either(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
