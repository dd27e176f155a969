"""KUEA on `transformers.Trainer`: what differs from a stock trainer, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from kuea_mllm.alignment.checkpoints import (
    TRAINER_STATE,
    CheckpointStore,
    Snapshot,
    first_not_finite,
    host_copy,
    load_weights,
)
from kuea_mllm.alignment.distributed import fails_together, gather_objects
from kuea_mllm.alignment.history import LossHistory
from kuea_mllm.alignment.interruption import outlive_signals
from kuea_mllm.alignment.left_out import LeftOut
from kuea_mllm.alignment.schedule import lr_multiplier
from kuea_mllm.alignment.step import WholeBatchStep
from kuea_mllm.alignment.targets import TargetSource
from kuea_mllm.config.align import OptimConfig, RuntimeConfig
from kuea_mllm.data.sampler import GlobalBatchSampler
from kuea_mllm.data.transforms import unit_pixels
from kuea_mllm.errors import TrainingDiverged, UserError
from kuea_mllm.features import Features
from kuea_mllm.objectives import LossTerms, Objective

# Of a batch; the host alone reads them.
_STAY_ON_HOST = frozenset({"checksum", "replaced", "replaced_name"})


class AlignmentModel(nn.Module):
    """The trained parts together: student tower and objective (kernel parameters, maps, heads).

    Args:
        student: A tower with `features(pixels, layer)`, as `towers.encode.TowerEncoder`.
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


class AlignmentTrainer(Trainer):
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
        self._checkpoints: CheckpointStore | None = None
        self._run_state: Callable[[], dict[str, Any]] = dict
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
            save_strategy="no",  # callbacks decide, see `alignment.interruption`
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

    def bind_checkpoints(
        self, store: CheckpointStore, run_state: Callable[[], dict[str, Any]]
    ) -> None:
        """Say where checkpoints go and what they hold besides the trainer's own state.

        Args:
            store: Writes them.
            run_state: Returns JSON values; called at each checkpoint.
        """
        self._checkpoints, self._run_state = store, run_state

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for handler in arguments.get("kwargs_handlers") or []:
            if isinstance(handler, DistributedDataParallelKwargs):
                # Gradients live in the buckets that are exchanged, instead of beside them.
                handler.gradient_as_bucket_view = True
        return arguments

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
        self.history.add(self.state.global_step + 1, inputs["index"], loss)
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

    def _epochs(self) -> Any:
        if isinstance(self.train_dataset, IterableDataset):
            return None
        dataset: Any = self.train_dataset
        count = len(dataset if self._positions is None else self._positions)
        return self.state.global_step / (count // self.optim.batch_size)

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        done: tuple[int, int] = super()._init_training_state(max_steps, *rest)
        # A resumed run may log at other steps than its checkpoint says.
        state: Any = self.state
        state.compute_steps(self.args, max_steps)
        return done

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # The stock loader only warns of missing tensors.
        load_weights(model or self._trained, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._checkpoints is None:
            raise ValueError("a checkpoint was asked for before `bind_checkpoints`")
        self.history.collect()
        weights = self._trained.state_dict()
        bad = self.history.first_bad
        if bad is None and (name := first_not_finite(weights)) is not None:
            bad = f"tensor {name} is not finite after step {self.state.global_step}"
        if bad is not None:
            # Saving it would push a good checkpoint out.
            last = self._checkpoints.last_good()
            raise TrainingDiverged(
                f"{bad}.",
                "Lower optim.lr or objective.kernel_weight, or use runtime.precision=fp32."
                + (f" The last good checkpoint is {last}." if last is not None else ""),
            )
        pickles = self._random_states()  # of all processes
        # All of them end here if an earlier checkpoint could not be written.
        with fails_together():
            if self.args.should_save:
                self._checkpoints.save(self._snapshot(weights, pickles))

    def _snapshot(self, weights: dict[str, Tensor], pickles: dict[str, Any]) -> Snapshot:
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        pickles["optimizer.pt"] = host_copy(optimizer.state_dict())
        pickles["scheduler.pt"] = host_copy(scheduler.state_dict())
        # metrics.jsonl holds the history already.
        state = {**dataclasses.asdict(self.state), "log_history": []}
        return Snapshot(
            step=self.state.global_step,
            weights=host_copy(weights),
            pickles=pickles,
            texts={TRAINER_STATE: json.dumps(state, indent=2, sort_keys=True)},
            state={"history": self.history.state(), **self._run_state()},
        )

    def _random_states(self) -> dict[str, Any]:
        """Return the random states of all processes under the names that the stock loader reads."""
        own: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
        }
        world_size = self.args.world_size
        if torch.cuda.is_available():
            own["cuda"] = (
                torch.cuda.get_rng_state_all() if world_size > 1 else torch.cuda.get_rng_state()
            )
        if world_size == 1:
            return {"rng_state.pth": own}
        states = gather_objects(own)
        return {f"rng_state_{process}.pth": state for process, state in enumerate(states)}

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
