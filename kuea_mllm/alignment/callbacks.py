"""What happens beside the optimisation: metrics on disk, health checks, held-out measurements."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kuea_mllm.errors import TrainingDiverged
from kuea_mllm.log import LOGGER


class MetricsFile(TrainerCallback):
    """Write every logged row to `metrics.jsonl`, with the rate of images since the last row."""

    def __init__(self, path: Path, *, batch_size: int) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._batch_size = batch_size
        self._last_step = 0
        self._last_time = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock at the first step, not at construction."""
        self._last_time = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append one row; a row of losses also gets `images_per_second`."""
        row: dict[str, Any] = {"step": state.global_step, **(logs or {})}
        if "loss" in row:
            now = time.perf_counter()
            steps = state.global_step - self._last_step
            row["images_per_second"] = steps * self._batch_size / max(now - self._last_time, 1e-9)
            self._last_step, self._last_time = state.global_step, now
        # The trainer's own summary repeats what run.yaml and the rows say already.
        row = {key: value for key, value in row.items() if not key.startswith("train_")}
        row.pop("total_flos", None)
        if len(row) > 2 or "loss" in row:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StopWhenDiverged(TrainerCallback):
    """End the run with a clear line when a loss is not finite or a kernel has lost its meaning.

    The check happens when a row is logged, so that no step waits for the device.
    """

    def __init__(self, check_kernel: Callable[[], None]) -> None:
        self._check_kernel = check_kernel

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Raise when the row cannot come from a healthy run.

        Raises:
            TrainingDiverged: Names the term and the step.
        """
        for name, value in (logs or {}).items():
            if name.startswith("loss") and not math.isfinite(value):
                raise TrainingDiverged(
                    f"{name} is {value} at step {state.global_step}.",
                    "Lower optim.lr or objective.kernel_weight, or use runtime.precision=fp32.",
                )
        try:
            self._check_kernel()
        except TrainingDiverged as error:
            raise TrainingDiverged(
                f"at step {state.global_step} {error.problem}", error.remedy
            ) from error


class AlignmentProgress(TrainerCallback):
    """A progress bar that shows the loss terms of the last logged row."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar."""
        self._bar = tqdm(total=state.max_steps, desc="align", unit="step", dynamic_ncols=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss terms."""
        shown = {
            name.removeprefix("loss_"): f"{value:.3g}"
            for name, value in (logs or {}).items()
            if name.startswith("loss_")
        }
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self._bar.close()


class Measure(TrainerCallback):
    """Measure at the start, every so many steps and at the end; the values join the metrics."""

    def __init__(self, measure: Callable[[], dict[str, float]], *, every: int) -> None:
        self._measure = measure
        self._every = every
        self._log: Callable[[dict[str, float]], None] | None = None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def bind(self, log: Callable[[dict[str, float]], None]) -> None:
        """Give the trainer's `log_measurement`, which reaches all other callbacks."""
        self._log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the untouched tower."""
        self._record()
        self.first = self.last

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure on schedule and at the last step."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._record()

    def _record(self) -> None:
        self.last = self._measure()
        if self._log is not None:
            self._log(dict(self.last))
        LOGGER.debug("held-out: %s", self.last)
