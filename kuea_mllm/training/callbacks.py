"""What happens beside the optimisation: metrics on disk, health checks, a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kuea_mllm.errors import TrainingDiverged, UserError
from kuea_mllm.io import write_text
from kuea_mllm.log import LOGGER


class MetricsFile(TrainerCallback):
    """Write every logged row to `metrics.jsonl`, with the rate since the last row.

    Only process zero writes. The rate leaves out the time spent on held-out measurements, since it
    is about training.

    Args:
        path: File to write.
        batch_size: Items in one update, of all processes together.
        unit: What the items are called; the column of the rate is "<unit>_per_second".
        resume_step: Steps that a resumed run has done; rows of later steps are dropped and the
            file is continued. None starts a new file.
        flops_per_item: Floating-point operations of one item's update, of all models that run.
        peak_flops: What the devices could do per second together; None (as on CPU) leaves out
            the column `mfu`.
        idle_seconds: Time so far that was not spent on training, such as `Measure.seconds`.
    """

    def __init__(
        self,
        path: Path,
        *,
        batch_size: int,
        unit: str = "images",
        resume_step: int | None = None,
        flops_per_item: float | None = None,
        peak_flops: float | None = None,
        idle_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._was_opened = False
        self._batch_size = batch_size
        self._resume_step = resume_step
        self._column = f"{unit}_per_second"
        self._flops_per_item, self._peak_flops = flops_per_item, peak_flops
        self._idle_seconds = idle_seconds
        self._last_step = resume_step or 0
        self._last_time = self._clock()
        self.per_second: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock at the first step, not at construction."""
        self._last_step = state.global_step
        self._last_time = self._clock()
        if state.is_world_process_zero:
            self._open()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append one row; a row of losses also gets the rate and, if known, `mfu`."""
        if not state.is_world_process_zero:
            return
        row: dict[str, Any] = {"step": state.global_step, **(logs or {})}
        if "loss" in row:
            row |= self._rate(state.global_step)
        # The trainer's own summary repeats what run.yaml and the rows say already.
        row = {key: value for key, value in row.items() if not key.startswith("train_")}
        row.pop("total_flos", None)
        if "loss" in row or any(key.startswith("heldout_") for key in row):
            file = self._open()
            file.write(json.dumps(row) + "\n")
            file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[str]:
        if self._file is None:
            if self._resume_step is not None and not self._was_opened:
                keep_rows(self._path, up_to=self._resume_step)
            # A row that comes after `close` must not empty the file.
            is_new = self._resume_step is None and not self._was_opened
            self._file = self._path.open("w" if is_new else "a", encoding="utf-8")
            self._was_opened = True
        return self._file

    def _rate(self, step: int) -> dict[str, float]:
        now = self._clock()
        items = (step - self._last_step) * self._batch_size
        rate = items / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time, self.per_second = step, now, rate
        if self._flops_per_item is None or self._peak_flops is None:
            return {self._column: rate}
        mfu = rate * self._flops_per_item / self._peak_flops
        return {self._column: rate, "mfu": mfu}

    def _clock(self) -> float:
        return time.perf_counter() - self._idle_seconds()


def keep_rows(path: Path, *, up_to: int) -> None:
    """Drop the rows of `metrics.jsonl` after a step: what a killed run did after its checkpoint.

    The file is replaced at once, so that another kill leaves either the old or the new one.

    Raises:
        UserError: If a row is not JSON; a last one that was cut short is dropped.
    """
    if not path.exists():
        LOGGER.warning("%s is missing: the metrics begin at step %d", path, up_to)
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {path} is not a row of metrics.", "Remove that line."
            ) from error
        if step <= up_to:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class StopWhenDiverged(TrainerCallback):
    """End the run with a clear line when a number is not finite or lost its meaning.

    The check happens when a row is logged, so that no step waits for the device.

    Args:
        check: Raises `TrainingDiverged` if something else left its range, as a kernel constant.
        remedy: What to change when a loss is not finite.
        explain: Returns which update and which images were the first to go wrong, if it is known.
        last_good: Returns the last checkpoint from before, if there is one.
    """

    def __init__(
        self,
        check: Callable[[], None] = lambda: None,
        *,
        remedy: str,
        explain: Callable[[], str | None] = lambda: None,
        last_good: Callable[[], str | Path | None] = lambda: None,
    ) -> None:
        self._check = check
        self._remedy = remedy
        self._explain = explain
        self._last_good = last_good

    def bind(
        self,
        *,
        explain: Callable[[], str | None] | None = None,
        last_good: Callable[[], str | Path | None] | None = None,
    ) -> None:
        """Give what exists only after this callback, such as the trainer's history."""
        self._explain = explain or self._explain
        self._last_good = last_good or self._last_good

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
            TrainingDiverged: Names the term, the step, and the batch and checkpoint if known.
        """
        # A single term says more than the total it makes infinite.
        for name, value in sorted((logs or {}).items(), key=lambda item: item[0] == "loss"):
            if name.startswith(("loss", "heldout_")) and not math.isfinite(value):
                raise self._error(f"{name} is {value} at step {state.global_step}.", self._remedy)
        try:
            self._check()
        except TrainingDiverged as error:
            raise self._error(
                f"at step {state.global_step} {error.problem}", error.remedy
            ) from error

    def _error(self, problem: str, remedy: str) -> TrainingDiverged:
        if found := self._explain():
            problem = f"{problem} First seen: {found.rstrip('.')}."
        if checkpoint := self._last_good():
            remedy = f"{remedy} The last good checkpoint is {checkpoint}."
        return TrainingDiverged(problem, remedy)


class TrainingProgress(TrainerCallback):
    """A progress bar that shows the loss terms and the rate of the last logged row.

    Args:
        verb: What is going on, in front of the bar.
        rate: Returns the rate, such as that of `MetricsFile`, if it is known.
        unit: Short name of what the rate counts.
    """

    def __init__(
        self, verb: str, *, rate: Callable[[], float | None] = lambda: None, unit: str = "img"
    ) -> None:
        self._verb = verb
        self._rate = rate
        self._unit = unit
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar; the steps of a resumed run count as done."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                # Not part of the rate, which is of this session only.
                initial=state.global_step,
                desc=f"{self._verb} (resumed)" if state.global_step else self._verb,
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the terms of the loss, or the loss where it has none, and the rate."""
        losses = {name: v for name, v in (logs or {}).items() if name.startswith("loss")}
        terms = {name: v for name, v in losses.items() if name != "loss"} or losses
        shown = {name.removeprefix("loss_"): f"{value:.3g}" for name, value in terms.items()}
        if shown and (rate := self._rate()) is not None:
            shown[f"{self._unit}/s"] = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
        if shown and self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar where it stands, so that what is said next begins on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
