"""The directory of a run: `OUT.unfinished` until it is complete, then `OUT`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.config.base import Recipe
from kuea_mllm.config.recipes import load_recipe, recipe_to_yaml
from kuea_mllm.errors import OutputError, RecipeError, UserError
from kuea_mllm.io import (
    create_directory,
    disk_errors_named,
    read_json,
    remove_empty_parents,
    require_free_output,
    sync_to_disk,
    write_json,
    write_text,
)
from kuea_mllm.training.checkpoints import CheckpointStore, latest_checkpoint, read_state
from kuea_mllm.training.distributed import of_process_zero, rank, world_size
from kuea_mllm.training.lock import LOCK, locked

RECIPE, INPUTS, CHECKPOINTS = "run.yaml", "inputs.json", "checkpoints"

DROP = "Set it back, or drop the unfinished run with --restart."


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, and what of it a resumed one may change.

    Attributes:
        recipe: Fully resolved.
        kind: What the run is called in messages, as "alignment".
        keep: How many checkpoints are kept.
        fingerprints: Returns what each input is recognised by; only called by process zero.
        is_free: Says whether a key of the recipe may differ in a resumed run.
        check: Raises if a resumed run differs otherwise; given the state of the checkpoint and the
            keys that changed, with both values.
    """

    recipe: Recipe
    kind: str
    keep: int
    fingerprints: Callable[[], dict[str, str]]
    is_free: Callable[[str], bool]
    check: Callable[[Mapping[str, Any], Mapping[str, tuple[Any, Any]]], None] = (
        lambda state, changed: None
    )


@dataclass(frozen=True)
class RunDirectory:
    """An unfinished run that this process may write to.

    Attributes:
        path: `OUT.unfinished`.
        out: What it is called when it is complete.
        store: Its checkpoints.
        checkpoint: Where to go on from; None for a start from the beginning.
        state: What the checkpoint's `state.json` says; empty without one.
        notes: How the run was begun, for its log.
    """

    path: Path
    out: Path
    store: CheckpointStore
    checkpoint: Path | None
    state: dict[str, Any]
    notes: list[str]

    @property
    def start_step(self) -> int | None:
        """Updates that are done; None for a start from the beginning."""
        return None if self.checkpoint is None else int(self.state["step"])


def unfinished_path(out: Path) -> Path:
    """Return where the unfinished run of an output lies."""
    return out.with_name(f"{out.name}.unfinished")


def require_startable(out: Path, *, kind: str, resume: bool, restart: bool) -> None:
    """Refuse what cannot work, before the inputs are opened; writes nothing.

    Raises:
        OutputError: If the output exists, or if the options do not fit what lies there.
    """
    of_process_zero(lambda: _require_startable(out, kind, resume=resume, restart=restart))


def _require_startable(out: Path, kind: str, *, resume: bool, restart: bool) -> None:
    if resume and restart:
        raise OutputError("--resume and --restart exclude each other.", "Give one of them.")
    require_free_output(out)
    path = unfinished_path(out)
    if path.exists() and not _is_ours(path):
        raise OutputError(
            f"{path} exists and is no unfinished {kind}.",
            "It will not be touched: choose another --out, or move it away.",
        )
    if path.exists() and not (resume or restart):
        with locked(path):
            raise _lies_there(path)
    if resume and not path.exists():
        raise OutputError(
            f"there is no unfinished run to resume: {path} does not exist.",
            "Leave out --resume to begin one.",
        )


@contextmanager
def open_run(
    out: Path, identity: RunIdentity, *, resume: bool, restart: bool
) -> Iterator[RunDirectory]:
    """Create or reopen the unfinished run, and rename it to `out` when the block succeeds.

    A block that fails leaves the unfinished run if it holds a checkpoint to go on from, and nothing
    at all otherwise. Only process zero touches the disk.

    Raises:
        OutputError: If another process works on it.
        UserError: If recipe or inputs are not those of the run to be resumed.
    """
    path = unfinished_path(out)
    store = CheckpointStore(path / CHECKPOINTS, keep=identity.keep)
    with ExitStack() as lock:
        created: Path | None = None

        def claim() -> tuple[Path | None, dict[str, Any], list[str]]:
            nonlocal created
            created = create_directory(path, wanted_for=out)
            lock.enter_context(locked(path))
            if _entries(path) and not (resume or restart):
                raise _lies_there(path)
            lock.callback(_clean_up, path, created)
            return _prepare(path, store, identity, resume=resume)

        checkpoint, state, notes = of_process_zero(claim)
        try:
            yield RunDirectory(path, out, store, checkpoint, state, notes)
        finally:
            store.close()
        if rank() == 0:
            path.rename(out)
            sync_to_disk(out.absolute().parent)
            (out / LOCK).unlink()


def _is_ours(path: Path) -> bool:
    """Whether a run wrote the directory, or began to: it writes its recipe first."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {"a file"}
    return not names - {LOCK} or RECIPE in names or INPUTS in names


def _clean_up(path: Path, created: Path | None) -> None:
    """Remove an unfinished run that nothing could go on with; one that was renamed is gone."""
    if path.is_dir() and latest_checkpoint(path / CHECKPOINTS) is None:
        shutil.rmtree(path, ignore_errors=True)
        remove_empty_parents(path.parent, created if created != path else None)


def _lies_there(path: Path) -> OutputError:
    return OutputError(
        f"an unfinished run lies in {path} ({_progress(path)}).",
        "Add --resume to go on with it, or --restart to drop it and begin anew.",
    )


def _prepare(
    path: Path, store: CheckpointStore, identity: RunIdentity, *, resume: bool
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Make the directory ready; return the checkpoint to go on from, its state, and notes."""
    found = identity.fingerprints()
    store.recover()
    checkpoint = store.latest() if resume else None
    state: dict[str, Any] = {}
    notes: list[str] = []
    if checkpoint is not None:
        before = load_recipe(str(path / RECIPE), type(identity.recipe))
        changed = compare_recipes(before, identity.recipe, identity.is_free)
        _require_same_inputs(read_json(path / INPUTS), found)
        state = read_state(checkpoint)
        identity.check(state, changed)
        notes.append(f"resumed from {checkpoint}")
        notes += [f"{key} is {new!r} now, was {old!r}" for key, (old, new) in changed.items()]
        if state["processes"] != world_size():
            notes.append(f"{world_size()} processes now, were {state['processes']}")
    else:
        if resume:
            notes.append(f"{path} holds no checkpoint: the run starts from the beginning")
        _empty(path)
    with disk_errors_named(path):
        write_text(path / RECIPE, recipe_to_yaml(identity.recipe))
        write_json(path / INPUTS, found)
    return checkpoint, state, notes


def compare_recipes(
    old: Recipe, new: Recipe, is_free: Callable[[str], bool]
) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ and may, with both values.

    Args:
        old: Of the interrupted run.
        new: Of the one that is to go on with it.
        is_free: Says whether a key may differ.

    Raises:
        RecipeError: If another key differs; names it.
    """
    before, now = (_flat(recipe.model_dump(mode="json")) for recipe in (old, new))
    changed = {}
    for key in sorted(before.keys() | now.keys()):
        values = before.get(key), now.get(key)
        if values[0] == values[1]:
            continue
        if not is_free(key):
            raise RecipeError(
                f"--resume: key '{key}' is {values[1]!r}, and the unfinished run was started with "
                f"{values[0]!r}.",
                DROP,
            )
        changed[key] = values
    return changed


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        items = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list) and any(isinstance(item, dict | list) for item in node):
        items = [(str(number), value) for number, value in enumerate(node)]
    else:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _require_same_inputs(before: dict[str, str], now: dict[str, str]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"--resume: the {name} is not that of the unfinished run (fingerprint "
                f"{str(now.get(name))[:23]}, was {str(before.get(name))[:23]}).",
                "Give it the same files, or drop the unfinished run with --restart.",
            )


def _progress(path: Path) -> str:
    checkpoint = latest_checkpoint(path / CHECKPOINTS)
    if checkpoint is None:
        return "no checkpoint yet"
    state = read_json(checkpoint / "trainer_state.json")
    return f"saved at step {state['global_step']} of {state['max_steps']}"


def _entries(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.name != LOCK]


def _empty(path: Path) -> None:
    for entry in _entries(path):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
