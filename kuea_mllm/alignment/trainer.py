"""KUEA on `transformers.Trainer`: what differs from a stock trainer, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from kuea_mllm.alignment.schedule import lr_multiplier
from kuea_mllm.alignment.targets import Targets, TargetSource
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.errors import UserError
from kuea_mllm.objectives import KernelAlignmentObjective, LossTerms


class AlignmentModel(nn.Module):
    """The trained parts together: student tower and objective (its kernel parameters).

    Args:
        student: Pictures in [0, 1], (batch, 3, size, size), to embeddings (batch, width), not
            normalised.
        objective: Compares embeddings of student, teacher and original.
    """

    def __init__(self, student: nn.Module, objective: KernelAlignmentObjective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, pixels: Tensor, teacher: Tensor, original: Tensor) -> LossTerms:
        """Return the loss of one batch; the kernel matrix covers the whole batch."""
        terms: LossTerms = self.objective(self.student(pixels), teacher, original)
        return terms


class AlignmentTrainer(Trainer):
    """Trainer whose loss compares kernel matrices.

    It differs from the stock trainer in the loss, the two parameter groups (paper and released
    code: weight decay on every tower parameter, none on kernel parameters), the schedule, and
    per-term logging without a device sync in the step.

    Args:
        model: The trained parts.
        targets: Source of teacher and original embeddings.
        dataset: Items {"pixels", "index"}.
        optim: Rates, batch size and length; `steps` and `first_update_at_full_lr` must be set.
        runtime: Seed, device, precision and logging.
        output_dir: Where the trainer may write.
        workers: Processes that decode images.
        shuffle: Draw images in random order; off only where a test brings its own order.
        callbacks: Added to the stock ones.
    """

    def __init__(
        self,
        model: AlignmentModel,
        targets: TargetSource,
        dataset: Dataset[Any],
        *,
        optim: OptimConfig,
        runtime: RuntimeConfig,
        output_dir: Path,
        workers: int = 0,
        shuffle: bool = True,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if optim.steps is None or optim.first_update_at_full_lr is None:
            raise ValueError("the recipe has to be resolved before it reaches the trainer")
        self.optim = optim
        self.targets = targets
        self._trained = model
        self._term_sums: dict[str, Tensor] = {}
        self._steps_summed = 0
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=optim.steps,
            per_device_train_batch_size=optim.batch_size,
            learning_rate=optim.lr,
            max_grad_norm=0.0,  # the released code does not clip
            bf16=runtime.precision == "bf16",
            use_cpu=runtime.device == "cpu",
            seed=runtime.seed,
            train_sampling_strategy="random" if shuffle else "sequential",
            dataloader_drop_last=True,  # a smaller last batch would be another kernel matrix
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_pin_memory=runtime.device == "cuda",
            remove_unused_columns=False,
            logging_steps=runtime.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a NaN must be seen; the filter also syncs every step
            save_strategy="no",
            report_to="none",
        )
        if arguments.world_size > 1:
            raise UserError(
                f"align was started as {arguments.world_size} processes, but runs as one.",
                "Start it without torchrun / accelerate launch: a per-process loss would compare "
                "only a part of the pairs.",
            )
        # Several visible GPUs would make Trainer wrap the model in DataParallel, which splits
        # the kernel matrix.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(
            model=model, args=arguments, train_dataset=dataset, callbacks=callbacks or []
        )
        # The loss is a mean over pairs of one batch, not over tokens.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with decay on the whole tower and none on the objective's parameters."""
        if self.optimizer is None:
            trained = self._trained
            groups = [
                {
                    "params": [p for p in trained.student.parameters() if p.requires_grad],
                    "weight_decay": self.optim.weight_decay,
                },
                {
                    "params": [p for p in trained.objective.parameters() if p.requires_grad],
                    "weight_decay": 0.0,
                },
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=self.optim.lr,
                betas=self.optim.betas,
                eps=self.optim.eps,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Create the schedule of `kuea_mllm.alignment.schedule`."""
        if self.lr_scheduler is None:
            multiplier = lr_multiplier(
                warmup_steps=self.optim.warmup_steps,
                total_steps=num_training_steps,
                first_update_at_full_lr=bool(self.optim.first_update_at_full_lr),
            )
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), multiplier)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the total loss of a batch and remember its terms."""
        # One precision for all three towers: a student in bf16 against an original in fp32 would
        # make the preservation term pull at rounding noise.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            targets: Targets = self.targets(inputs["pixels"], inputs["index"])
            loss: LossTerms = model(
                pixels=inputs["pixels"], teacher=targets.teacher, original=targets.original
            )
        self._remember(loss)
        return (loss.total, loss) if return_outputs else loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term since the last row; rename to the project's terms."""
        if "loss" in logs:
            for name, value in self._drain_terms():
                logs[f"loss_{name}"] = value
            for name, value in self._kernel_constants().items():
                logs[f"kernel_{name}"] = value
            logs["lr"] = logs.pop("learning_rate", 0.0)
            logs.pop("grad_norm", None)
        super().log(logs, start_time)

    def log_measurement(self, values: dict[str, float]) -> None:
        """Log a row from within a callback without losing a row of losses that is due."""
        is_due = self.control.should_log
        self.log(values)
        self.control.should_log = is_due

    def _kernel_constants(self) -> dict[str, float]:
        return self._trained.objective.student_kernel.constants()

    def _remember(self, loss: LossTerms) -> None:
        for name, value in loss.terms.items():
            detached = value.detach()
            held = self._term_sums.get(name)
            self._term_sums[name] = detached if held is None else held + detached
        self._steps_summed += 1

    def _drain_terms(self) -> Iterator[tuple[str, float]]:
        for name, total in self._term_sums.items():
            yield name, total.item() / self._steps_summed
        self._term_sums, self._steps_summed = {}, 0
