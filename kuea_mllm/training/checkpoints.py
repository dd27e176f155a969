"""Checkpoints: complete or absent, and written while training goes on.

A checkpoint directory has the file names of `transformers.Trainer`, whose own code reads it back,
and `state.json` with what only this project knows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kuea_mllm.errors import EnvironmentFailure, KueaError, UserError
from kuea_mllm.io import follow_umask, name_disk_error, read_json, sync_to_disk
from kuea_mllm.log import LOGGER

WEIGHTS, STATE, TRAINER_STATE = "model.safetensors", "state.json", "trainer_state.json"
BEST = "best"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Snapshot:
    """All that a resumed run needs, copied to the host: training may go on while it is written.

    Attributes:
        step: Updates that are done.
        weights: What is trained.
        pickles: File names and what goes into them by `torch.save`: tensors and plain values.
        texts: File names and their content.
        state: JSON values of this project.
    """

    step: int
    weights: Mapping[str, Tensor]
    pickles: Mapping[str, Any]
    texts: Mapping[str, str]
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    One background thread writes. A new save waits for the one before, so at most one copy of the
    state is in memory; an error of the thread is raised by the next call here.

    Args:
        directory: Where they lie.
        keep: How many to keep; the newest.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return latest_checkpoint(self.directory)

    def recover(self) -> None:
        """Remove what a killed process left half-written; nobody else may be writing."""
        if not self.directory.is_dir():
            return
        replaced = self.directory / f".{BEST}.old"
        if replaced.is_dir() and not (self.directory / BEST).exists():
            replaced.rename(self.directory / BEST)
        for leftover in self.directory.glob(".*"):
            shutil.rmtree(leftover)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint in the background.

        Raises:
            EnvironmentFailure: If the one before could not be written.
        """
        target = self.directory / f"checkpoint-{snapshot.step}"
        self._start(target, lambda partial: _write(snapshot, partial))

    def save_best(self, write: Callable[[Path], None]) -> None:
        """Replace `best/` in the background.

        Args:
            write: Called with a directory that does not exist, to fill it.

        Raises:
            EnvironmentFailure: If the save before failed.
        """
        self._start(self.directory / BEST, write)

    def check(self) -> None:
        """Raise the error of a save that failed, without waiting for one under way."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            EnvironmentFailure: If it could not be written.
        """
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if error is not None:
            # What was wrong with the disk then is not what is wrong now.
            error.__context__ = None
            raise error

    def last_good(self) -> Path | None:
        """Return the newest checkpoint after what is being written; for a run that has failed."""
        try:
            self.wait()
        except KueaError as error:
            LOGGER.error("%s", error)
        return self.latest()

    def close(self) -> None:
        """Finish what is being written; its error, if any, is logged."""
        self.last_good()
        self._thread.shutdown()

    def _start(self, target: Path, write: Callable[[Path], None]) -> None:
        self.wait()
        self._writing = self._thread.submit(self._replace, target, write)

    def _replace(self, target: Path, write: Callable[[Path], None]) -> None:
        # A fixed name: the lock of the run directory makes this process the only one.
        partial = target.with_name(f".{target.name}.partial")
        old = target.with_name(f".{target.name}.old")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write(partial)
            for file in partial.iterdir():
                sync_to_disk(file)
            sync_to_disk(partial)
            if target.exists():
                target.rename(old)
            partial.rename(target)
            sync_to_disk(self.directory)
        except Exception as error:
            # A broken disk may refuse this too; what matters is the first error.
            shutil.rmtree(partial, ignore_errors=True)
            LOGGER.debug("%s was not written", target, exc_info=True)
            raise self._failure(target, error) from None
        shutil.rmtree(old, ignore_errors=True)
        LOGGER.debug("wrote %s", target)
        self._rotate()

    def _rotate(self) -> None:
        for step in _steps(self.directory)[: -self._keep]:
            path = self.directory / f"checkpoint-{step}"
            # Renamed first, so that a kill does not leave half of one under a name that counts.
            dropped = path.rename(path.with_name(f".{path.name}.dropped"))
            shutil.rmtree(dropped)

    def _failure(self, target: Path, error: Exception) -> KueaError:
        last = self.latest()
        remedy = (
            f"The last good checkpoint is {last}; set the problem right and go on with --resume."
            if last is not None
            else "There is no earlier checkpoint."
        )
        named = name_disk_error(error, target, remedy=remedy)
        if isinstance(named, KueaError):
            return named
        text = " ".join(str(error).split()) or type(error).__name__
        return EnvironmentFailure(f"{target} cannot be written: {text[:300]}.", remedy)


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint of a directory, which need not exist."""
    steps = _steps(directory)
    return directory / f"checkpoint-{steps[-1]}" if steps else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the `state.json` of a checkpoint after checking that no file was lost or cut short.

    Raises:
        UserError: If one was.
    """
    state: dict[str, Any] = read_json(checkpoint / STATE)
    for name, size in state["files"].items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"holds {found} of {size} bytes"
            raise UserError(
                f"file {checkpoint / name} {what}.",
                f"Remove {checkpoint} to go on from the checkpoint before it.",
            )
    return state


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load all tensors of a model strictly.

    Raises:
        UserError: If a tensor is missing, unknown or of another shape.
    """
    load_named_weights(model.state_dict(), checkpoint)


def load_named_weights(wanted: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Copy the weights of a checkpoint into tensors, strictly.

    Args:
        wanted: The tensors by name; changed in place.
        checkpoint: Its directory.

    Raises:
        UserError: If a tensor is missing, unknown or of another shape.
    """
    path = checkpoint / WEIGHTS
    found = load_file(path)
    remedy = "It is not a checkpoint of this recipe; drop the run with --restart."
    for names, what in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted, "has")):
        if names:
            extra = " that the recipe's model does not have" if what == "has" else ""
            raise UserError(f"file {path} {what} tensor {min(names)}{extra}.", remedy)
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"tensor {name} of {path} has shape {tuple(tensor.shape)}, the model's has "
                f"{tuple(wanted[name].shape)}.",
                remedy,
            )
    with torch.no_grad():
        for name, tensor in found.items():
            wanted[name].copy_(tensor)


def host_copy(value: Any) -> Any:
    """Return a copy whose tensors are on the host and shared with nothing."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: host_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(item) for item in value)
    return value


def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that holds a NaN or an infinity; one read from the device."""
    floats = {name: t for name, t in weights.items() if t.is_floating_point()}
    if not floats:
        return None
    good = torch.stack([t.detach().isfinite().all() for t in floats.values()]).cpu()
    return next((name for name, is_good in zip(floats, good, strict=True) if not is_good), None)


def _write(snapshot: Snapshot, partial: Path) -> None:
    partial.mkdir()
    save_file(dict(snapshot.weights), partial / WEIGHTS, metadata={"format": "pt"})
    follow_umask(partial / WEIGHTS)
    for name, content in snapshot.pickles.items():
        # Through a Python file: torch's own writer hides what the system said went wrong.
        with (partial / name).open("wb") as file:
            torch.save(content, file)
    for name, text in snapshot.texts.items():
        (partial / name).write_text(text, encoding="utf-8")
    sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
    text = json.dumps({**snapshot.state, "step": snapshot.step, "files": sizes}, allow_nan=False)
    (partial / STATE).write_text(text + "\n", encoding="utf-8")


def _steps(directory: Path) -> list[int]:
    entries = directory.iterdir() if directory.is_dir() else ()
    matches = (_NAME.fullmatch(entry.name) for entry in entries)
    return sorted(int(match.group(1)) for match in matches if match)
