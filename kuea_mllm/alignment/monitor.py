"""Held-out measurements during training, and the decision to end a run early because of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kuea_mllm.config.align import EarlyStopConfig
from kuea_mllm.errors import RecipeError
from kuea_mllm.log import LOGGER

GAP = "heldout_kernel_gap"
DRIFT_BOUND = "heldout_drift_bound_mean"
HIGHER_IS_BETTER = frozenset(
    {"heldout_cka_teacher", "heldout_zero_shot", "heldout_drift_cosine_mean"}
)


class Measure(TrainerCallback):
    """Measure at the start, every so many steps and at the end; the values join the metrics.

    Only process zero measures, and nothing here waits for the others.

    Args:
        measure: Returns the measurements by name.
        every: Steps between measurements.
        on_best: Called with the step whenever training has reached the lowest kernel gap so far;
            the untouched tower at the start counts as a mark to beat, not as a best.
    """

    def __init__(
        self,
        measure: Callable[[], dict[str, float]],
        *,
        every: int,
        on_best: Callable[[int], None] | None = None,
    ) -> None:
        self._measure = measure
        self._every = every
        self._on_best = on_best
        self._log: Callable[[dict[str, float]], None] | None = None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.last_step = -1
        self.seconds = 0.0

    def bind(
        self,
        log: Callable[[dict[str, float]], None],
        *,
        on_best: Callable[[int], None] | None = None,
    ) -> None:
        """Give what exists only after this callback: the trainer's `log_measurement` and hook."""
        self._log = log
        self._on_best = on_best or self._on_best

    def is_due(self, state: TrainerState) -> bool:
        """Tell whether a measurement follows the present step; the same in every process."""
        return state.global_step % self._every == 0 or state.global_step >= state.max_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the untouched tower; a resumed run has done so."""
        if not self.first and state.is_world_process_zero:
            self._record(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure on schedule and at the last step."""
        if self.is_due(state) and state.is_world_process_zero:
            self._record(state.global_step)

    def measure_now(self, state: TrainerState) -> None:
        """Measure off schedule, as when a run ends early; nothing if this step was measured."""
        if self.last_step != state.global_step and state.is_world_process_zero:
            self._record(state.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know; plain JSON values."""
        return {
            "first": self.first,
            "last": self.last,
            "last_step": self.last_step,
            "best": self.best,
            "best_step": self.best_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.first, self.last = dict(state["first"]), dict(state["last"])
        self.best = dict(state["best"])
        self.best_step, self.last_step = int(state["best_step"]), int(state["last_step"])

    def _record(self, step: int) -> None:
        started = time.perf_counter()
        self.last, self.last_step = self._measure(), step
        self.seconds += time.perf_counter() - started
        # Before anything else: a measurement that is not finite ends the run here, and is not
        # remembered as the first or the best.
        if self._log is not None:
            self._log(dict(self.last))
        LOGGER.debug("held-out: %s", self.last)
        if not self.first:
            self.first = self.best = self.last
            self.best_step = step
        elif GAP in self.last and self.last[GAP] < self.best[GAP]:
            self.best, self.best_step = self.last, step
            if self._on_best is not None:
                self._on_best(step)


class EarlyStop(TrainerCallback):
    """End training when a measurement stopped improving or the tower drifted too far.

    Has to come after the `Measure` it follows. Process zero decides; `agree` tells the others.

    Args:
        config: What to watch, and when to lose patience.
        measure: Where the measurements come from.
        agree: Given this process's wish to stop, returns that of all; every process calls it at
            the same steps.
    """

    def __init__(
        self,
        config: EarlyStopConfig,
        measure: Measure,
        *,
        agree: Callable[[bool], bool] = lambda wish: wish,
    ) -> None:
        self._config = config
        self._measure = measure
        self._agree = agree
        self._sign = -1.0 if config.metric in HIGHER_IS_BETTER else 1.0
        self._best: float | None = None
        self._best_step = 0
        self._misses = 0
        self.reason: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check that what is watched gets measured; take the first value as the mark to beat.

        Raises:
            RecipeError: If it is not.
        """
        if not state.is_world_process_zero:
            return
        needed: dict[str, str] = {"monitor.early_stop.metric": self._config.metric}
        if self._config.max_drift_bound is not None:
            needed["monitor.early_stop.max_drift_bound"] = DRIFT_BOUND
        for key, name in needed.items():
            if name not in self._measure.first:
                raise RecipeError(
                    f"key '{key}' watches {name!r}, which is not measured.",
                    f"Measured are: {', '.join(self._measure.first)}.",
                )
        if self._best is None:
            self._best, self._best_step = self._measure.first[self._config.metric], 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Judge a measurement that was just made."""
        if not self._measure.is_due(state) or state.global_step >= state.max_steps:
            return
        if state.is_world_process_zero:
            if self._measure.last_step != state.global_step:
                raise ValueError("EarlyStop has to come after Measure in the list of callbacks")
            self.reason = self._judge(state.global_step)
            if self.reason is not None:
                LOGGER.warning(
                    "stopped early at step %d of %d: %s",
                    state.global_step,
                    state.max_steps,
                    self.reason,
                )
        if self._agree(self.reason is not None):
            control.should_training_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know; plain JSON values."""
        return {"best": self._best, "best_step": self._best_step, "misses": self._misses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._best, self._best_step = state["best"], int(state["best_step"])
        self._misses = int(state["misses"])

    def _judge(self, step: int) -> str | None:
        config, values = self._config, self._measure.last
        value = values[config.metric]
        if self._best is None or self._sign * (self._best - value) > config.min_delta:
            self._best, self._best_step, self._misses = value, step, 0
        else:
            self._misses += 1
        limit = config.max_drift_bound
        if limit is not None and values[DRIFT_BOUND] > limit:
            return (
                f"{DRIFT_BOUND} is {values[DRIFT_BOUND]:.4g}, above "
                f"monitor.early_stop.max_drift_bound {limit:g}"
            )
        if self._misses >= config.patience:
            return (
                f"{config.metric} has not improved for {self._misses} measurements "
                f"(best {self._best:.4g} at step {self._best_step})"
            )
        return None
