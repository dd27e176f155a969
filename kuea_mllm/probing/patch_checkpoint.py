"""Patch probing between two epochs, on disk: what was killed goes on at the next epoch.

FOLDER/epochs.safetensors
    heads/<name>                    weights
    optimizer/<number>/<name>       AdamW's state of each parameter
    found/<epoch>/<task>/<name>     what was found on the validation pictures, see `Tally`

The order of the pictures follows from seed and epoch, and nothing else in the training is random,
so that no state of a random number generator is kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kuea_mllm.errors import DataError, UserError
from kuea_mllm.io import create_directory, disk_errors_named, sync_to_disk
from kuea_mllm.probing.patch_heads import Task
from kuea_mllm.probing.patch_tally import Tally

FILE = "epochs.safetensors"

_HEADS, _OPTIMIZER, _FOUND = "heads", "optimizer", "found"
_RESTART = "or drop it with --restart."


@dataclasses.dataclass(frozen=True)
class PatchCheckpoint:
    """Where a training keeps its finished epochs.

    Attributes:
        folder: Made when the first epoch is written.
        key: All that the numbers depend on, by what to call it in an error.
    """

    folder: Path
    key: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    def write(
        self,
        heads: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        found: Sequence[Mapping[Task, Tally]],
    ) -> None:
        """Keep what was reached; the epoch before stays until this one is whole and on disk.

        Raises:
            EnvironmentFailure: If the disk is full.
        """
        tensors = {f"{_HEADS}/{name}": value for name, value in heads.state_dict().items()}
        state = optimizer.state_dict()
        for number, values in state["state"].items():
            tensors |= {f"{_OPTIMIZER}/{number}/{name}": value for name, value in values.items()}
        for epoch, tallies in enumerate(found):
            for task, tally in tallies.items():
                for field in dataclasses.fields(Tally):
                    values = torch.from_numpy(getattr(tally, field.name))
                    tensors[f"{_FOUND}/{epoch}/{task}/{field.name}"] = values
        settings = {
            "key": dict(self.key),
            "groups": state["param_groups"],
            "schedule": schedule.state_dict(),
        }
        create_directory(self.folder)
        # Hidden, so that it does not count as work that was kept.
        partial = self.folder / f".{FILE}.partial-{os.getpid()}"
        try:
            with disk_errors_named(self.path):
                whole = {name: value.contiguous() for name, value in tensors.items()}
                save_file(whole, partial, {"settings": json.dumps(settings)})
                sync_to_disk(partial)
                partial.replace(self.path)
                sync_to_disk(self.folder)
        finally:
            partial.unlink(missing_ok=True)

    def read(
        self, heads: nn.Module, optimizer: Optimizer, schedule: LRScheduler
    ) -> list[dict[Task, Tally]]:
        """Put heads, optimizer and schedule back to where they were.

        Returns:
            What was found after each finished epoch; empty where nothing was kept.

        Raises:
            DataError: If the file is damaged.
            UserError: If it is of another tower, other pictures or settings; names them.
        """
        if not self.path.is_file():
            return []
        try:
            settings, tensors = _load(self.path)
            self._require_same(settings["key"])
            state = {"state": _by_number(tensors), "param_groups": settings["groups"]}
            heads.load_state_dict(_below(tensors, _HEADS))
            optimizer.load_state_dict(state)
            schedule.load_state_dict(settings["schedule"])
            return _found(tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DataError(
                f"the kept epochs {self.path} are damaged ({reason}).",
                "Remove that file, and the training begins anew with --resume.",
            ) from error

    def _require_same(self, before: Mapping[str, str]) -> None:
        for name, now in self.key.items():
            if before.get(name) != now:
                raise UserError(
                    f"--resume: the {name} of the patch probe changed since its epochs in "
                    f"{self.folder} (now {now[:16]}, was {str(before.get(name))[:16]}).",
                    f"Set it back, {_RESTART}",
                )


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
        return settings, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _below(tensors: Mapping[str, Tensor], top: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{top}/"): value
        for name, value in tensors.items()
        if name.startswith(f"{top}/")
    }


def _by_number(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, _OPTIMIZER).items():
        number, _, what = name.partition("/")
        state.setdefault(int(number), {})[what] = value
    return state


def _found(tensors: Mapping[str, Tensor]) -> list[dict[Task, Tally]]:
    parts: dict[int, dict[Task, dict[str, Any]]] = {}
    for name, value in _below(tensors, _FOUND).items():
        epoch, task, field = name.split("/")
        tasks = parts.setdefault(int(epoch), {})
        tasks.setdefault(cast(Task, task), {})[field] = value.numpy()
    return [
        {task: Tally(**fields) for task, fields in parts[epoch].items()} for epoch in sorted(parts)
    ]
