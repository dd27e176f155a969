"""LoRA tuning on `transformers.Trainer`: what differs from a stock trainer, and nothing else."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.errors import RecipeError
from kuea_mllm.training.checkpoints import load_named_weights
from kuea_mllm.training.history import LossHistory
from kuea_mllm.training.interruption import outlive_signals
from kuea_mllm.training.trainer import ResumableTrainer
from kuea_mllm.tuning.collate import Collator, DataCounter
from kuea_mllm.tuning.loss import supervised_positions
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.optimizer import make_optimizer
from kuea_mllm.tuning.packing import PackedBatchSampler
from kuea_mllm.tuning.sampler import GroupedBatchSampler
from kuea_mllm.tuning.sharding import exchange_gradients, is_sharded

DIVERGED_REMEDY = (
    "Another run would meet the same samples. If the record that is named is the cause, leave it "
    "out: --set 'data.skip_records=[NUMBER]', with --resume from a checkpoint. If not, begin anew "
    "with a lower optim.lr or optim.max_grad_norm=1."
)


class TuningTrainer(ResumableTrainer):
    """Trainer for LoRA layers, and the projector at a rate of its own.

    It differs from the stock trainer in the order of the samples (`tuning.sampler`), in the loss
    (only where something is to be predicted, weighted over the whole update or by micro-batch as
    the original), in the parameter groups of the original, and in checkpoints that hold what is
    trained and nothing else.

    Args:
        model: The model with its LoRA layers.
        dataset: Samples by position, see `tuning.examples.TuningExamples`.
        collator: Makes batches of them.
        sampler: Positions of the micro-batches of this process, or of their rows; its `epoch` is
            set here.
        recipe: Resolved; with `optim.steps` or `optim.epochs`.
        accumulation: Micro-batches of this process in one update.
        output_dir: Where the trainer may write.
        counter: Counts what is cut off.
        record_name: What to call a sample, given its position.
        run_name: What trackers call the run.
        callbacks: Added to the stock ones.
    """

    diverged_remedy = DIVERGED_REMEDY
    # The loss comes from `compute_loss` as it is to be added up.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: TuningModel,
        dataset: Dataset[Any],
        collator: Collator,
        sampler: GroupedBatchSampler | PackedBatchSampler,
        *,
        recipe: LoraRecipe,
        accumulation: int,
        output_dir: Path,
        counter: DataCounter,
        record_name: Callable[[int], str] = str,
        run_name: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        optim, runtime = recipe.optim, recipe.runtime
        self.recipe = recipe
        self.history = LossHistory(record_name, items="records")
        self._trained = model
        self._collator = collator
        self._counter = counter
        self._batches = EpochBatches(
            sampler, accumulation=accumulation, drop_last=optim.last_update == "drop"
        )
        self._positions: deque[Tensor] = deque()
        updates = math.ceil(len(self._batches) / accumulation)
        steps = optim.steps or math.ceil(updates * (optim.epochs or 1.0))
        if recipe.data.order == "released" and steps > updates:
            raise RecipeError(
                f"key 'data.order' is released, which is known of the first epoch only, and "
                f"{steps} updates were asked for where an epoch has {updates}.",
                "Set data.order=seed, or fewer optim.steps.",
            )
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=optim.micro_batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=optim.lr,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(optim.warmup_ratio * steps),
            max_grad_norm=optim.max_grad_norm or 0.0,
            use_cpu=runtime.device == "cpu",
            seed=runtime.seed,
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
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            callbacks=[LogLastUpdate(), *(callbacks or [])],
        )

    @property
    def updates_per_epoch(self) -> int:
        """Optimiser steps of one pass over the data."""
        return math.ceil(len(self._batches) / self.args.gradient_accumulation_steps)

    def train_from(self, checkpoint: Path | None, step: int) -> None:
        """Train, or go on from a checkpoint; one of the last update has nothing left to train.

        Args:
            checkpoint: Its directory, None for a start from the beginning.
            step: Updates that are done.
        """
        if checkpoint is not None and step >= self.args.max_steps:
            # The stock loop would do one more.
            self.load_trained_state(checkpoint)
            self.state.global_step = self.state.max_steps = step
            return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's micro-batches of one epoch."""
        workers = self.recipe.data.workers
        dataset: Any = self.train_dataset
        return DataLoader(
            dataset,
            batch_sampler=self._batches,
            collate_fn=self._collator,
            # A loader without a generator takes a number from torch's own one, and a resumed run,
            # which makes another loader, would go on with other dropout.
            generator=torch.Generator().manual_seed(self.recipe.runtime.seed),
            worker_init_fn=outlive_signals,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            pin_memory=self.args.device.type == "cuda",
        )

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: DataLoader[Any] | None = None
    ) -> nn.Module:
        if training and model is self._trained and is_sharded(model):
            settings: dict[str, Any] = self.accelerator.ddp_handler.to_kwargs()
            return exchange_gradients(model, self.args.device, **settings)
        wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
        return wrapped

    def _run_epoch(self, model: Any, epoch: Any, *rest: Any, **named: Any) -> Any:
        self._batches.epoch = epoch
        run: Any = super()._run_epoch
        return run(model, epoch, *rest, **named)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return the micro-batches of one update, and how many tokens all processes predict."""
        batches: list[dict[str, Tensor]] = []
        supervised = 0
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            positions = batch["positions"]
            self._counter.take(batch)
            # On the host, where it makes nobody wait for the device.
            batch["predicting"], batch["targets"] = supervised_positions(batch.pop("labels"))
            supervised += len(batch["targets"])
            batches.append(batch)
            # Not with the batch, which goes to the device.
            self._positions.append(positions)
        count = torch.tensor(supervised, device=device)
        if self.args.world_size > 1:
            dist.all_reduce(count)
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the share of one micro-batch in the loss of its update.

        The shares of all micro-batches and processes, averaged over processes, add up to the mean
        over all predicted tokens of the update, or to the mean of the micro-batches' means.
        """
        total: Tensor = model(**inputs)
        own = len(inputs["targets"])
        positions = self._positions.popleft()
        mean = total / max(own, 1)
        self.history.add(self.state.global_step + 1, positions, {"loss": mean.detach()})
        if self.recipe.optim.loss_weighting == "micro_batch":
            return mean / self.current_gradient_accumulation_steps
        if num_items_in_batch is None:
            raise ValueError("the number of predicted tokens of the update is not known")
        # Averaging over processes is what distributed training does to gradients.
        share: Tensor = total * self.args.world_size / torch.as_tensor(num_items_in_batch).clamp(1)
        return share

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser with the original's four groups."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(
                self._trained.inner,
                self._trained.parts,
                self.recipe.optim,
                is_cuda=self.args.device.type == "cuda",
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Rename to the project's terms."""
        if "loss" in logs:
            self.history.drain()
            self._counter.require_something_learned()
            logs["lr"] = logs.pop("learning_rate", 0.0)
        super().log(logs, start_time)

    def trained_state(self) -> dict[str, Tensor]:
        """Return what is trained: LoRA layers, and the projector and output layer if they are."""
        return {
            name: parameter.detach()
            for name, parameter in self._trained.wrapped.named_parameters()
            if parameter.requires_grad
        }

    def load_trained_state(self, checkpoint: Path) -> None:
        """Load what `trained_state` gave."""
        load_named_weights(self.trained_state(), checkpoint)

    def own_state(self) -> dict[str, Any]:
        """Return what else a resumed run needs; JSON values."""
        return {"data": self._counter.exchange()}

    def find_divergence(self) -> str | None:
        """Name the first micro-batch whose loss was not finite."""
        self.history.collect()
        return self.history.first_bad


class LogLastUpdate(TrainerCallback):
    """Log a row at the end too, whatever the interval."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for it."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class EpochBatches(Sampler[list[Any]]):
    """Micro-batches of one epoch, without those that would make an incomplete update.

    Args:
        sampler: All of them.
        accumulation: Micro-batches of this process in one update.
        drop_last: Whether micro-batches that do not fill an update are left out.

    Raises:
        RecipeError: If none is left.
    """

    def __init__(
        self,
        sampler: GroupedBatchSampler | PackedBatchSampler,
        *,
        accumulation: int,
        drop_last: bool,
    ) -> None:
        count = len(sampler)
        self._sampler = sampler
        self._count = count - count % accumulation if drop_last else count
        if not self._count:
            raise RecipeError(
                f"key 'optim.last_update' is drop, and the {count} micro-batches of an epoch do "
                f"not fill one update of {accumulation} (for each process).",
                "Set a smaller optim.batch_size, or optim.last_update=run.",
            )
        self.epoch = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Any]]:
        self._sampler.epoch = self.epoch
        batches: Sequence[list[Any]] = list(self._sampler)
        yield from batches[: self._count]
