"""KUEA on `transformers.Trainer`: what differs from a stock trainer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments

from kuea_mllm.alignment.left_out import LeftOut
from kuea_mllm.alignment.schedule import lr_multiplier
from kuea_mllm.alignment.step import WholeBatchStep
from kuea_mllm.alignment.targets import TargetSource
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.data.sampler import GlobalBatchSampler
from kuea_mllm.data.transforms import unit_pixels
from kuea_mllm.errors import UserError
from kuea_mllm.features import Features
from kuea_mllm.objectives import LossTerms, Objective
from kuea_mllm.training.checkpoints import load_weights
from kuea_mllm.training.history import LossHistory
from kuea_mllm.training.interruption import outlive_signals
from kuea_mllm.training.trainer import ResumableTrainer

DIVERGED_REMEDY = "Lower optim.lr or objective.kernel_weight, or use runtime.precision=fp32."

# Of a batch; the host alone reads them.
_STAY_ON_HOST = frozenset({"checksum", "replaced", "replaced_name"})


class AlignmentModel(nn.Module):
    """The trained parts together: student tower and objective (kernel parameters, maps, heads).

    Args:
        student: A tower with `features(pixels, layer)`, as `towers.model.encode.TowerEncoder`.
        objective: Compares features of student, teacher and original.
        patch_layer: Hidden state whose patch tokens the objective reads.
    """

    def __init__(self, student: nn.Module, objective: Objective, *, patch_layer: int = -2) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.patch_layer = patch_layer

    def forward(self, pixels: Tensor, with_patches: bool = False) -> Features:
        """Embed images (n, 3, size, size) in [0, 1]."""
        features: Features = self.student.features(  # type: ignore[operator]
            pixels, self.patch_layer if with_patches else None
        )
        return features


class AlignmentTrainer(ResumableTrainer):
    """Trainer whose loss is over all pairs of the whole batch.

    It differs from the stock trainer in the step (see `alignment.step`), the two parameter groups
    (paper and released code: weight decay on every tower parameter, none on kernel parameters), the
    schedule, the order of the images (a function of seed and step, see `data.sampler`), per-term
    logging without a device sync in the step, and checkpoints that are written beside the training
    and hold all that a resumed run needs to equal one that was never stopped.

    Args:
        model: The trained parts.
        targets: Source of teacher and original features.
        dataset: Items {"pixels", "index", ...}; a map-style data set is read by draws, a stream
            front to back.
        optim: Rates, batch size and length; `steps` and `first_update_at_full_lr` must be set.
        runtime: Seed, device, precision and logging.
        output_dir: Where the trainer may write.
        positions: Positions to train on; all of a map-style data set by default.
        workers: Processes that decode images.
        shuffle: Draw images in random order; off only where a test brings its own order.
        start_step: Steps that an interrupted run has done already.
        unreadable: Takes note of images that batches had to do without.
        image_name: What to call an image, given its position.
        run_name: What trackers call the run.
        callbacks: Added to the stock ones.

    Raises:
        UserError: If the batch does not divide among the processes.
    """

    diverged_remedy = DIVERGED_REMEDY

    def __init__(
        self,
        model: AlignmentModel,
        targets: TargetSource,
        dataset: Dataset[Any],
        *,
        optim: OptimConfig,
        runtime: RuntimeConfig,
        output_dir: Path,
        positions: NDArray[np.int64] | None = None,
        workers: int = 0,
        shuffle: bool = True,
        start_step: int = 0,
        unreadable: LeftOut | None = None,
        image_name: Callable[[int], str] = str,
        run_name: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if optim.steps is None or optim.first_update_at_full_lr is None:
            raise ValueError("the recipe has to be resolved before it reaches the trainer")
        self.optim = optim
        self.runtime = runtime
        self.start_step = start_step
        self._trained = model
        self._positions = positions
        self._workers = workers
        self._shuffle = shuffle
        self._unreadable = unreadable
        self.history = LossHistory(image_name)
        self.last_loss: LossTerms | None = None
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=optim.steps,
            learning_rate=optim.lr,
            max_grad_norm=optim.max_grad_norm,
            use_cpu=runtime.device == "cpu",
            seed=runtime.seed,
            ignore_data_skip=True,  # the sampler starts where the run stopped
            remove_unused_columns=False,
            logging_steps=runtime.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a NaN must be seen; the filter also syncs every step
            save_strategy="no",  # callbacks decide, see `training.interruption`
            run_name=run_name,
            report_to=list(runtime.trackers) or "none",
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
        )
        # Several visible GPUs would make Trainer wrap the model in DataParallel, which splits
        # the kernel matrix.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if optim.batch_size % arguments.world_size:
            raise UserError(
                f"optim.batch_size {optim.batch_size} does not divide among "
                f"{arguments.world_size} processes.",
                "The batch size is that of all processes together; choose a multiple.",
            )
        arguments.per_device_train_batch_size = optim.batch_size // arguments.world_size
        super().__init__(
            model=model, args=arguments, train_dataset=dataset, callbacks=callbacks or []
        )
        self._step = WholeBatchStep(
            model.objective,
            targets,
            autocast=self._autocast,
            backward=self.accelerator.backward,
            no_sync=self.accelerator.no_sync,
            micro_batch_size=runtime.micro_batch_size,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's batches, from `start_step` on."""
        dataset: Any = self.train_dataset
        shared: dict[str, Any] = {
            # A loader without a generator takes a number from torch's own one, and a resumed run,
            # which has a second loader, would go on with other numbers.
            "generator": torch.Generator().manual_seed(self.runtime.seed),
            "worker_init_fn": outlive_signals,
            "num_workers": self._workers,
            "persistent_workers": self._workers > 0,
            "pin_memory": self.args.device.type == "cuda",
        }
        if isinstance(dataset, IterableDataset):
            size = self.args.per_device_train_batch_size
            if self.start_step:
                stream: Any = dataset
                stream.resume_at(self.start_step * size, batch_size=size)
            return DataLoader(dataset, batch_size=size, drop_last=True, **shared)
        positions = self._positions if self._positions is not None else np.arange(len(dataset))
        sampler = GlobalBatchSampler(
            positions,
            batch_size=self.optim.batch_size,
            steps=self.args.max_steps,
            seed=self.runtime.seed,
            population=len(dataset),
            start_step=self.start_step,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            shuffle=self._shuffle,
        )
        return DataLoader(dataset, batch_sampler=sampler, **shared)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with decay on the whole tower and none on the objective's parameters."""
        if self.optimizer is None:
            trained = self._trained
            groups = [
                {
                    "params": [p for p in trained.student.parameters() if p.requires_grad],
                    "weight_decay": self.optim.weight_decay,
                    "lr": self.optim.lr,
                },
                {
                    "params": [p for p in trained.objective.parameters() if p.requires_grad],
                    "weight_decay": 0.0,
                    "lr": self.optim.kernel_lr or self.optim.lr,
                },
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
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

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Accumulate the gradients of one batch; return its total loss."""
        model.train()
        if self._unreadable is not None:
            self._unreadable.update(inputs)
        batch = {
            name: values.to(self.args.device, non_blocking=True)
            for name, values in inputs.items()
            if name not in _STAY_ON_HOST
        }
        loss = self._step(model, {**batch, "pixels": unit_pixels(batch["pixels"])})
        self.last_loss = loss
        values = {"loss": loss.total, **{f"loss_{name}": v for name, v in loss.terms.items()}}
        self.history.add(self.state.global_step + 1, inputs["index"], values)
        return loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term since the last row; rename to the project's terms."""
        # The stock count starts anew in a resumed run and calls the whole run one epoch.
        self.state.epoch = self._epochs()
        if "loss" in logs:
            if self._unreadable is not None:
                self._unreadable.exchange()
            logs |= self.history.drain()
            for name, value in self._kernel_constants().items():
                logs[f"kernel_{name}"] = value
            logs["lr"] = logs.pop("learning_rate", 0.0)
        super().log(logs, start_time)

    def log_measurement(self, values: dict[str, float]) -> None:
        """Log a row from within a callback without losing a row of losses that is due."""
        is_due = self.control.should_log
        self.log(values)
        self.control.should_log = is_due

    def explain_divergence(self) -> str | None:
        """Name the first update since the last row whose loss was not finite, with its images."""
        return self.history.first_bad

    def trained_state(self) -> dict[str, Tensor]:
        """Return student and objective."""
        return self._trained.state_dict()

    def load_trained_state(self, checkpoint: Path) -> None:
        """Load student and objective."""
        load_weights(self._trained, checkpoint)

    def own_state(self) -> dict[str, Any]:
        """Return what else a resumed run needs; JSON values."""
        return {"history": self.history.state()}

    def find_divergence(self) -> str | None:
        """Read the losses that are still on the device and name the first that is not finite."""
        self.history.collect()
        return self.history.first_bad

    def _epochs(self) -> Any:
        if isinstance(self.train_dataset, IterableDataset):
            return None
        dataset: Any = self.train_dataset
        count = len(dataset if self._positions is None else self._positions)
        return self.state.global_step / (count // self.optim.batch_size)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The stock trainer computes it every step, two more passes over all gradients, to log it
        # every so often. Here: in the steps that are logged.
        next_step = self.state.global_step + 1
        if grad_norm is None and (next_step % self.args.logging_steps == 0 or next_step == 1):
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        return grad_norm

    def _autocast(self) -> AbstractContextManager[object]:
        # One precision for all towers: a student in bf16 against an original in fp32 would make
        # the preservation term pull at rounding noise.
        return torch.autocast(
            self.args.device.type, torch.bfloat16, enabled=self.runtime.precision == "bf16"
        )

    def _kernel_constants(self) -> Mapping[str, float]:
        kernels = self._trained.objective.kernels
        return kernels[0].constants() if kernels else {}
