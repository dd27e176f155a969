"""Start several processes of one command, and end all of them together.

The machinery is that of torchrun (`torch.distributed.launcher`), used within the parent: it starts
the processes, passes signals on to them, and ends the others when one ends badly. What this module
adds is one clear line instead of one report for every process: a process leaves its error in a file
and the parent prints the one that came first.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.errors import KueaError, UserError

TIMEOUT_VARIABLE = "KUEA_MLLM_TIMEOUT_MINUTES"
REPORTS_VARIABLE = "KUEA_MLLM_REPORTS"

# Long enough to finish a step and write a checkpoint.
_SECONDS_TO_STOP = 300
# A process that others killed for ending late is found dead later than this.
_SECONDS_OF_ONE_EVENT = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# How gloo and nccl say that another process is gone or silent.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "remote process exited",
    "connection refused",
    "socket timeout",
)


class FailedElsewhere(KueaError):
    """Another process of this run failed, and says so itself.

    Args:
        rank: Which process it was.
        problem: Its words.
        remedy: Its words.
        exit_code: Its exit code, and now this one's.
    """

    def __init__(self, rank: int, problem: str, remedy: str, exit_code: int) -> None:
        super().__init__(problem, remedy)
        self.rank = rank
        self.exit_code = exit_code


@dataclass(frozen=True)
class Report:
    """How one process ended.

    Attributes:
        rank: Which one.
        message: What it would have printed.
        exit_code: What it exits with.
        is_echo: Whether it only suffers from the end of another one.
        time: When, in seconds since the epoch.
    """

    rank: int
    message: str
    exit_code: int
    is_echo: bool
    time: float


@dataclass(frozen=True)
class Outcome:
    """How a group of processes ended.

    Attributes:
        exit_code: For the parent to exit with.
        message: What to print; None after success.
    """

    exit_code: int
    message: str | None = None


def launched_world_size() -> int:
    """Return how many processes this one was started among; 1 for a process of its own."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def launched_rank() -> int:
    """Return which of them this process is."""
    return int(os.environ["RANK"]) if launched_world_size() > 1 else 0


def is_launched_by_torchrun() -> bool:
    """Return whether this process is one of a group that was not started by `launch`."""
    return "RANK" in os.environ and not has_parent()


def has_parent() -> bool:
    """Return whether this process was started by `launch`, which prints in its place."""
    return REPORTS_VARIABLE in os.environ


def timeout_minutes() -> float:
    """Return how long a process waits for the others before it gives up.

    Raises:
        UserError: If the environment variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "10")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if minutes <= 0:
        raise UserError(f"environment variable {TIMEOUT_VARIABLE} is {text!r}, not minutes.")
    return minutes


def lost_another(error: BaseException) -> bool:
    """Return whether an error says no more than that another process is gone or silent."""
    text = str(error).lower()
    return launched_world_size() > 1 and any(sign in text for sign in _LOST)


def report_failure(message: str, *, exit_code: int, is_echo: bool) -> None:
    """Leave the error of this process for the parent; see `has_parent`."""
    if threading.current_thread() is threading.main_thread():
        # The launcher ends processes that are still on their way out, which must not look like an
        # error of theirs.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_code))
    report = Report(launched_rank(), message, exit_code, is_echo, time.time())
    path = Path(os.environ[REPORTS_VARIABLE]) / f"rank-{report.rank}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(report)), encoding="utf-8")
    partial.replace(path)


def launch(arguments: Sequence[str], *, processes: int, resume: Callable[[], str]) -> Outcome:
    """Run `kuea-mllm ARGUMENTS` in several processes of this machine and wait for them.

    Process zero has the terminal; what the others print goes to files, which are kept, and named,
    after a failure that they may explain.

    Args:
        arguments: Command line without the program.
        processes: How many.
        resume: Returns what to say about going on after a process died.
    """
    folder = Path(tempfile.mkdtemp(prefix="kuea-mllm-"))
    with _surroundings(folder, processes):
        exit_codes, stopped_by = _run(arguments, processes, folder)
    outcome = _judge(read_reports(folder), exit_codes, stopped_by, resume=resume(), folder=folder)
    if outcome.message is None or str(folder) not in outcome.message:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def read_reports(folder: Path) -> list[Report]:
    """Return what the processes left, in order of time."""
    found = [
        Report(**json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("rank-*.json")
    ]
    return sorted(found, key=lambda report: report.time)


def _run(
    arguments: Sequence[str], processes: int, folder: Path
) -> tuple[dict[int, tuple[int, float]], signal.Signals | None]:
    """Return exit code and time of each process that failed, and the signal that ended all."""
    from torch.distributed.elastic.multiprocessing.api import (
        DefaultLogsSpecs,
        SignalException,
        Std,
    )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    others: dict[int, Std] = dict.fromkeys(range(1, processes), Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=others),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_SECONDS_TO_STOP,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "kuea_mllm", *arguments)
    except ChildFailedError as error:
        failures = error.failures.items()
        return {rank: (found.exitcode, found.timestamp) for rank, found in failures}, None
    except SignalException as error:
        return {}, error.sigval
    return {}, None


def _judge(
    reports: Sequence[Report],
    exit_codes: Mapping[int, tuple[int, float]],
    stopped_by: signal.Signals | None,
    *,
    resume: str,
    folder: Path,
) -> Outcome:
    own = [report for report in reports if not report.is_echo]
    if stopped_by is not None:
        # Process zero speaks for all: it knows what was saved.
        told = min(own, key=lambda report: report.rank, default=None)
        code = told.exit_code if told else 128 + stopped_by
        return Outcome(code, told.message if told else f"interrupted. {resume}")
    if not exit_codes:
        return Outcome(0)
    killed = {
        rank: (code, when)
        for rank, (code, when) in exit_codes.items()
        # SIGTERM is how the others are ended.
        if code < 0 and code != -signal.SIGTERM
    }
    first_told = own[0] if own else None
    if killed:
        rank, (code, when) = min(killed.items(), key=lambda item: item[1][1])
        caused_by_told = first_told is not None and (
            first_told.exit_code < 128 and when > first_told.time + _SECONDS_OF_ONE_EVENT
        )
        if not caused_by_told:
            return Outcome(1, _killed(rank, -code, resume, folder))
    if first_told is not None:
        where = f"process {first_told.rank}: " if first_told.rank else ""
        return Outcome(first_told.exit_code, where + first_told.message)
    if reports:
        return Outcome(1, f"{reports[0].message}\n  Other processes' output: {folder}. {resume}")
    rank, (code, _) = min(exit_codes.items(), key=lambda item: item[1][1])
    return Outcome(
        1, f"process {rank} ended with exit code {code}.\n  Its output: {folder}. {resume}"
    )


def _killed(rank: int, number: int, resume: str, folder: Path) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    guess = " (out of memory?)" if number == signal.SIGKILL else f"; its output: {folder}"
    return f"process {rank} was killed by {name}{guess}, so the others were ended.\n  {resume}"


@contextmanager
def _surroundings(folder: Path, processes: int) -> Iterator[None]:
    """Set what the processes inherit, keep torchrun's own reports in a file, restore signals."""
    import torch.distributed  # noqa: F401 (sets up its loggers)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = {
        REPORTS_VARIABLE: str(folder),
        # torchrun sets 1, which would leave most of a CPU idle.
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (cores or 1) // processes))
        ),
        # A process that loses another one says so over many lines in C++.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    before: dict[str, str | None] = {name: os.environ.get(name) for name in wanted}
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    machinery = logging.getLogger("torch.distributed")
    to_terminal = machinery.handlers[:]
    to_file = logging.FileHandler(folder / "torchrun.log", encoding="utf-8")
    was_propagating, machinery.propagate = machinery.propagate, False
    machinery.handlers[:] = [to_file]
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for number, handler in handlers.items():
            signal.signal(number, handler)
        machinery.handlers[:] = to_terminal
        to_file.close()
        machinery.propagate = was_propagating
