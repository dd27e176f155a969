"""What several processes need to act as one; every function is a no-op in a single process.

Processes are started by `kuea-mllm align --num-processes N` (`kuea_mllm.launch`) or by torchrun;
both tell each process by environment variables which one it is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kuea_mllm.errors import KueaError, UserError
from kuea_mllm.launch import TIMEOUT_VARIABLE, FailedElsewhere, launched_world_size, timeout_minutes

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if _is_joined() else 1


def rank() -> int:
    """Return which process this is, 0 being the one that writes."""
    return dist.get_rank() if _is_joined() else 0


def is_main() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return rank() == 0


def init_if_launched(device: str) -> None:
    """Join the other processes if this one was started as one of several; else do nothing.

    Has to come before anything that asks for `rank`. Calling it again does nothing.

    Args:
        device: auto, cpu or cuda. auto is cuda where there is one, else cpu.

    Raises:
        UserError: If the device cannot be shared out among the processes of this machine.
    """
    count = launched_world_size()
    if count == 1 or _is_joined():
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in {"cpu", "cuda"}:
        raise UserError(
            f"device '{device}' was asked for with {count} processes.",
            "Several processes run on cpu or cuda, where each takes the GPU of its own number.",
        )
    if device == "cuda":
        _take_own_gpu()
    # torch 2.15 deprecates what transformers passes on; its successor is unknown to older ones.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    timeout = timedelta(minutes=timeout_minutes())
    # Objects and flags travel over gloo on either device, embeddings and gradients over nccl.
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:
        raise KueaError(
            f"process {os.environ['RANK']} of {count} cannot reach the others: {error}",
            "Check MASTER_ADDR and MASTER_PORT, and that all processes were started "
            f"({TIMEOUT_VARIABLE} is how long they wait, in minutes).",
        ) from error


def leave() -> None:
    """Part from the other processes after the work is done; not after an error."""
    if _is_joined():
        dist.barrier()
        dist.destroy_process_group()


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of their ranks, without gradient.

    Args:
        rows: (n, ...), of one shape in every process.

    Returns:
        (world_size * n, ...).
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process; all of them have to ask."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def broadcast_object(value: T) -> T:
    """Return the value that process zero has; all of them have to ask.

    Args:
        value: Anything small that can be pickled; what other processes pass is ignored.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def fails_together() -> Iterator[None]:
    """Let all processes fail where one does, so that none waits for one that is gone.

    Also a barrier: a block is left when all processes are through it. There must be no other
    exchange between processes inside of it, since one that has failed takes no part.

    Raises:
        FailedElsewhere: In the processes that did not fail first; says what the other one said.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if world_size() == 1:
            raise
        error = caught
    failures = [failure for failure in gather_objects(_described(error)) if failure is not None]
    if not failures:
        return
    first = failures[0]
    if error is not None and first[0] == rank():
        raise error
    raise FailedElsewhere(*first) from error


def of_process_zero(do: Callable[[], T]) -> T:
    """Return what process zero found, in every process; or raise its error in all of them."""
    found: T | None = None
    with fails_together():
        if rank() == 0:
            found = do()
    return cast(T, broadcast_object(found))


def in_turn(do: Callable[[], T]) -> T:
    """Call a function in one process of each machine at a time, and return what it found.

    For what needs much of a machine's memory for a while. All processes fail where one does; there
    must be no exchange between processes inside of it.

    Raises:
        FailedElsewhere: In the processes that did not fail; says what the other one said.
    """
    found: T | None = None
    local_rank = int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else 0
    for turn in range(max(gather_objects(local_rank)) + 1):
        with fails_together():
            if turn == local_rank:
                found = do()
    return cast(T, found)


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _take_own_gpu() -> None:
    local_rank, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= found:
        asked = os.environ.get("LOCAL_WORLD_SIZE", str(local_rank + 1))
        raise UserError(
            f"{asked} processes were started on this machine, and torch finds {found} GPUs.",
            "Each process takes a GPU of its own: start fewer, or use --device cpu.",
        )
    torch.cuda.set_device(local_rank)


def _described(error: Exception | None) -> tuple[int, str, str, int] | None:
    if error is None:
        return None
    if isinstance(error, KueaError):
        return rank(), error.problem, error.remedy, error.exit_code
    text = " ".join(str(error).split())
    return rank(), f"{type(error).__name__}: {text[:500]}", "", 1
