"""When a run saves itself, and how it ends when it is asked to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kuea_mllm.log import LOGGER
from kuea_mllm.training.checkpoints import CheckpointStore
from kuea_mllm.training.distributed import world_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Agree = Callable[[bool], bool]


class Interruption(TrainerCallback):
    """End training after the present step, with a checkpoint, when the first signal comes.

    A second signal ends the process at once.

    Args:
        agree: Given whether this process was asked to stop, returns whether any was.
        every: Steps between two such questions. One process asks itself after every step; several
            ask at the steps that are logged, since an answer makes each wait for its device.
    """

    def __init__(self, *, agree: Agree = lambda wish: wish, every: int = 1) -> None:
        self._agree = agree
        self._every = every
        self.received: signal.Signals | None = None
        self.stopped_at: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the length of the block; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def exit_code(self) -> int:
        """Exit code of an interrupted process: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.received or signal.SIGTERM)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save and stop if a signal came; a run that ends here anyway just ends."""
        if control.should_training_stop or state.global_step % self._every:
            return
        if self._agree(self.received is not None):
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        # Not by the logger: it may be what was interrupted.
        os.write(2, b"\nfinishing this step and saving; once more ends it at once\n")


class SaveCheckpoints(TrainerCallback):
    """Ask for a checkpoint every so many steps or minutes, and pass on what the writer met.

    Args:
        store: Where they go.
        every_steps: Steps between checkpoints.
        every_minutes: Minutes between checkpoints, by the clock of process zero.
        agree: As of `Interruption`.
        every: As of `Interruption`; steps between two looks at the clock.
        at_end: Whether one is due after the last step, for work that follows and may fail.
        clock: Seconds.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        every_steps: int | None,
        every_minutes: float | None,
        agree: Agree = lambda wish: wish,
        every: int = 1,
        at_end: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._at_end = at_end
        self._every_steps = every_steps
        self._seconds = None if every_minutes is None else 60 * every_minutes
        self._agree = agree
        self._every = every
        self._clock = clock
        self._last = clock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._last = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Decide; every process comes to the same decision.

        Raises:
            EnvironmentFailure: If an earlier checkpoint could not be written.
        """
        if world_size() == 1:  # several processes fail together, at the next save
            self._store.check()
        if control.should_training_stop:
            control.should_save = control.should_save or self._at_end
            return
        step = state.global_step
        is_due = self._every_steps is not None and step % self._every_steps == 0
        if self._seconds is not None and step % self._every == 0:
            late = state.is_world_process_zero and self._clock() - self._last >= self._seconds
            is_due = self._agree(late) or is_due
        if is_due:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock anew."""
        self._last = self._clock()
        LOGGER.debug("saving a checkpoint of step %d", state.global_step)


def outlive_signals(_: int) -> None:
    """Let a decoding process outlive the signal that its parent answers with a checkpoint.

    Ctrl-C and job schedulers signal all processes; without its decoders the parent could not finish
    the step. Given to a DataLoader as `worker_init_fn`. A parent ends its decoders by SIGTERM too,
    so that one is obeyed; a dead parent is noticed by torch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where no scheduler signals anybody
        return
    # Handlers are not told who sent a signal; a thread that waits for it is.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
