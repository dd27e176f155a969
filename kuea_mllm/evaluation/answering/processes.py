"""Several processes that answer the questions of one evaluation.

Each loads tasks and model, and answers its share of every column. Process zero gets all answers,
and is the only one that scores and writes. lmms-eval is not told: in its eyes there is one process,
so that its own way of splitting, padding and gathering plays no part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from kuea_mllm.errors import KueaError, UserError
from kuea_mllm.launch import FailedElsewhere, launched_world_size

if TYPE_CHECKING:
    from kuea_mllm.evaluation.answering.questions import PendingQuestion

T = TypeVar("T")

# What tells a process that it is one of several: torchrun's, and what accelerate looks at.
_TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")

# A slow judge keeps process zero busy for hours while the others wait. One that dies is noticed at
# once all the same, by its closed connection.
_PATIENCE = timedelta(days=7)


class AnsweredElsewhereError(Exception):
    """This process has done its share of a column; the rest is up to process zero."""


def join_processes(device: str) -> None:
    """Join the other processes if there are any; to be called before anything is opened.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: If the device cannot be shared out.
    """
    if launched_world_size() == 1:
        return
    if device.startswith("cuda:"):
        raise UserError(
            f"device '{device}' was asked for with {launched_world_size()} processes.",
            "Use --device cuda: each process takes the GPU of its own number.",
        )
    from kuea_mllm.training.distributed import init_if_launched

    init_if_launched(device)
    _patient_group()


def process_number() -> int:
    """Return which process this is, 0 being the one that writes."""
    joined = _joined()
    return 0 if joined is None else int(joined.get_rank())


def process_count() -> int:
    """Return how many there are."""
    joined = _joined()
    return 1 if joined is None else int(joined.get_world_size())


def exchange(value: T) -> list[T]:
    """Return the values of all processes in their order, however long that takes."""
    count = process_count()
    if count == 1:
        return [value]
    import torch.distributed as dist

    values: list[T] = [value] * count
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def from_zero(value: T) -> T:
    """Return the value that process zero has; what the others pass is ignored."""
    return exchange(value)[0]


@contextmanager
def fail_together() -> Iterator[None]:
    """Let all processes fail where one does; also waits for all of them.

    Raises:
        FailedElsewhere: In those that did not fail; says what another one said.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if process_count() == 1:
            raise
        error = caught
    failed = [failure for failure in exchange(_described(error)) if failure is not None]
    if error is not None:
        raise error
    if failed:
        raise FailedElsewhere(*failed[0])


def leave_processes() -> None:
    """Part from the others when process zero has written the results; not after an error."""
    if process_count() == 1:
        return
    import torch.distributed as dist

    exchange(None)
    _patient_group.cache_clear()
    dist.destroy_process_group()


@contextmanager
def seen_as_one() -> Iterator[None]:
    """Hide from libraries that this process is one of several."""
    hidden = {name: os.environ.pop(name) for name in _TOLD if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def share_out(questions: Sequence[PendingQuestion], places: Sequence[int]) -> list[list[int]]:
    """Divide questions among all processes, those about one image together.

    Args:
        questions: All of a column.
        places: Which of them have to be answered.

    Returns:
        The places of each process, about as many each.
    """
    shares: list[list[int]] = [[] for _ in range(process_count())]
    groups: dict[Any, list[int]] = {}
    for place in places:
        question = questions[place]
        key = (question.task, place if question.image is None else question.image)
        groups.setdefault(key, []).append(place)
    # The largest first, each to whoever has least to do.
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    return [sorted(share) for share in shares]


def _joined() -> Any:
    """Return torch's module, None in a process of its own; not by what `seen_as_one` hides."""
    module = sys.modules.get("torch.distributed")
    return module if module and module.is_available() and module.is_initialized() else None


@cache
def _patient_group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _described(error: Exception | None) -> tuple[int, str, str, int] | None:
    if error is None:
        return None
    if isinstance(error, KueaError):
        return process_number(), error.problem, error.remedy, error.exit_code
    text = " ".join(str(error).split())
    return process_number(), f"{type(error).__name__}: {text[:500]}", "", 1
