"""What the trainers of this project share: checkpoints that a resumed run equals."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import Trainer

from kuea_mllm.errors import TrainingDiverged
from kuea_mllm.training.callbacks import TrainingProgress
from kuea_mllm.training.checkpoints import (
    TRAINER_STATE,
    CheckpointStore,
    Snapshot,
    first_not_finite,
    host_copy,
)
from kuea_mllm.training.distributed import fails_together, gather_objects


class ResumableTrainer(Trainer):
    """A trainer whose checkpoints are written beside the training and hold all that goes on.

    The stock checkpoint lacks what only this project knows, holds the whole model, and is written
    in the middle of the step. What a subclass trains is said by `trained_state`; whoever makes one
    calls `bind_checkpoints` before training.
    """

    # What to change when a loss is not finite.
    diverged_remedy: str = ""

    _checkpoints: CheckpointStore | None = None
    _run_state: Callable[[], dict[str, Any]] = dict

    def bind_checkpoints(
        self, store: CheckpointStore, run_state: Callable[[], dict[str, Any]]
    ) -> None:
        """Say where checkpoints go and what they hold besides the trainer's own state.

        Args:
            store: Writes them.
            run_state: Returns JSON values; called at each checkpoint.
        """
        self._checkpoints, self._run_state = store, run_state

    def trained_state(self) -> dict[str, Tensor]:
        """Return the tensors that are trained, by name."""
        raise NotImplementedError

    def load_trained_state(self, checkpoint: Path) -> None:
        """Load what `trained_state` gave, strictly.

        Raises:
            UserError: If a tensor is missing, unknown or of another shape.
        """
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the stock trainer does; the progress bar is closed however that ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TrainingProgress):
                    callback.close()

    def own_state(self) -> dict[str, Any]:
        """Return what else the subclass needs to go on, JSON values; all processes are asked."""
        return {}

    def find_divergence(self) -> str | None:
        """Name the first update whose loss was not finite; all processes are asked at once."""
        return None

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for handler in arguments.get("kwargs_handlers") or []:
            if isinstance(handler, DistributedDataParallelKwargs):
                # Gradients live in the buckets that are exchanged, instead of beside them.
                handler.gradient_as_bucket_view = True
        return arguments

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
        self.load_trained_state(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._checkpoints is None:
            raise ValueError("a checkpoint was asked for before `bind_checkpoints`")
        bad = self.find_divergence()
        weights = self.trained_state()
        if bad is None and (name := first_not_finite(weights)) is not None:
            bad = f"tensor {name} is not finite after step {self.state.global_step}"
        if bad is not None:
            # Saving it would push a good checkpoint out.
            last = self._checkpoints.last_good()
            raise TrainingDiverged(
                f"{bad}.",
                self.diverged_remedy
                + (f" The last good checkpoint is {last}." if last is not None else ""),
            )
        pickles, own = self._random_states(), self.own_state()  # of all processes
        # All of them end here if an earlier checkpoint could not be written.
        with fails_together():
            if self.args.should_save:
                self._checkpoints.save(self._snapshot(weights, pickles, own))

    def _snapshot(
        self, weights: dict[str, Tensor], pickles: dict[str, Any], own: dict[str, Any]
    ) -> Snapshot:
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
            state={**own, **self._run_state()},
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
