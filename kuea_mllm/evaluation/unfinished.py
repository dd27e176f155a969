"""An evaluation before it is complete: `OUT.unfinished`, which keeps the columns that are.

OUT.unfinished/
evaluation.json       what is evaluated: recipe, model, library versions
lmms_eval.log         lmms-eval's log of all sittings
columns/<task>/       one finished column (see `column_run`); made whole or not at all
answers/<task>/       answers of a column that is not (see `answering.journal`)
work/<task>/          whatever else a column keeps until it is finished (patch probes: their epochs)

Of several processes only the first writes here, but for the answers, which each keeps itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.errors import OutputError, RecipeError, UserError
from kuea_mllm.evaluation.answering.journal import Journal, holds_answers
from kuea_mllm.evaluation.answering.processes import fail_together, from_zero, process_number
from kuea_mllm.evaluation.results import file_name
from kuea_mllm.io import (
    create_directory,
    disk_errors_named,
    read_json,
    remove_empty_parents,
    require_free_output,
    write_json,
)
from kuea_mllm.log import LOGGER
from kuea_mllm.training.lock import LOCK, locked

RECORD, COLUMNS, ANSWERS, LOG = "evaluation.json", "columns", "answers", "lmms_eval.log"
WORK = "work"
COLUMN = "column.json"
"""Of a column's directory; written last."""

# What a resumed evaluation may change: speed and bookkeeping, rounding at most.
FREE_KEYS = (
    "batch_size",
    "max_failures",
    "num_processes",
    "shared_prefix",
    "judge.url",
    "judge.api_key_env",
    "judge.concurrency",
    "judge.timeout_s",
    "judge.retries",
    "fewshot.cache_images",
    "fewshot.retrieval.batch_size",
    "fewshot.retrieval.cache",
    "fewshot.retrieval.workers",
)
_NOTHING = "nothing"
_DROP = "or drop the unfinished evaluation with --restart."


@dataclass(frozen=True)
class Identity:
    """What an evaluation is.

    Attributes:
        settings: All that decides its numbers, by the keys of recipes; plain JSON values.
        versions: Library versions.
    """

    settings: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Unfinished:
    """An unfinished evaluation that this process may write to.

    Attributes:
        path: `OUT.unfinished`.
        identity: What is evaluated.
        is_resumed: Whether columns or answers of an earlier sitting are kept.
    """

    path: Path
    identity: Identity
    is_resumed: bool

    def column(self, task: str) -> Path:
        """Return where the column of a task lies, or will."""
        return self.path / COLUMNS / file_name(task)

    def is_finished(self, task: str) -> bool:
        """Say whether a column is there."""
        return (self.column(task) / COLUMN).is_file()

    def journal(self, task: str, content: str | None = None) -> Journal:
        """Return what keeps the answers of a task until its column is finished.

        Args:
            task: Its name.
            content: What its data are recognised by; None where that is not known.
        """
        return Journal(self.path / ANSWERS / file_name(task), content)

    def work(self, task: str) -> Path:
        """Return a folder, which may not exist, for what a task keeps until it is finished.

        Any file in it that is not hidden is work that a resumed evaluation goes on with.
        """
        return self.path / WORK / file_name(task)

    @property
    def log(self) -> Path:
        """Where lmms-eval's log goes; that of other processes goes nowhere."""
        return self.path / LOG if process_number() == 0 else Path(os.devnull)

    def claim(self, model: str) -> None:
        """Make sure that the finished columns are of this model, and record what is evaluated.

        Args:
            model: Fingerprint of the model's files.

        Raises:
            UserError: If the model is another one.
        """
        if process_number():
            return
        if self.is_resumed:
            _require_same_model(read_json(self.path / RECORD)["model"], model)
        write_json(
            self.path / RECORD,
            {
                "settings": dict(self.identity.settings),
                "model": model,
                "versions": dict(self.identity.versions),
            },
        )


def unfinished_path(out: Path) -> Path:
    """Return where the unfinished evaluation of an output lies."""
    return out.with_name(f"{out.name}.unfinished")


def finished_columns(path: Path) -> int:
    """Count the finished columns of an unfinished evaluation."""
    found = path.glob(f"{COLUMNS}/*/{COLUMN}")
    # Hidden ones are what a killed process left behind.
    return sum(not column.parent.name.startswith(".") for column in found)


def require_startable(out: Path, *, resume: bool, restart: bool) -> None:
    """Refuse what cannot work, before anything is opened; writes nothing.

    Raises:
        OutputError: If the output exists, or if the options do not fit what lies there.
    """
    if resume and restart:
        raise OutputError("--resume and --restart exclude each other.", "Give one of them.")
    require_free_output(out)
    path = unfinished_path(out)
    if path.exists() and not _is_ours(path):
        raise OutputError(
            f"{path} exists and is no unfinished evaluation.",
            "It will not be touched: choose another --out, or move it away.",
        )
    if path.exists() and not (resume or restart):
        with locked(path):
            raise _lies_there(path)
    if resume and not path.exists():
        raise OutputError(
            f"there is no unfinished evaluation to resume: {path} does not exist.",
            "Leave out --resume to begin one.",
        )


@contextmanager
def open_unfinished(
    out: Path, identity: Identity, *, resume: bool, restart: bool
) -> Iterator[Unfinished]:
    """Create or reopen the unfinished evaluation of an output; remove it when the block succeeds.

    A block that fails leaves it if work is kept, and nothing at all otherwise.

    Raises:
        OutputError: If another process works on it.
        UserError: If it is resumed with another recipe or other library versions.
    """
    path = unfinished_path(out)
    if process_number():
        # What process zero finds out while it opens, or what stops it.
        with fail_together():
            pass
        yield Unfinished(path, identity, from_zero(False))
        return
    with ExitStack() as opened:
        with fail_together():
            is_resumed = opened.enter_context(_opened(path, out, identity, resume, restart))
        yield Unfinished(path, identity, from_zero(is_resumed))


@contextmanager
def _opened(
    path: Path, out: Path, identity: Identity, resume: bool, restart: bool
) -> Iterator[bool]:
    """Do the work of `open_unfinished` in process zero; give whether something is resumed."""
    created = create_directory(path, wanted_for=out)
    with locked(path):
        if _entries(path) and not (resume or restart):
            raise _lies_there(path)
        is_resumed = resume and _holds_work(path)
        if resume and not is_resumed:
            LOGGER.info("%s holds no work yet: starting from the beginning.", path)
        if is_resumed:
            # Before data sets are read or images embedded under the wrong recipe.
            _require_same_recipe(path, identity)
        try:
            if not is_resumed:
                _empty(path)
            remedy = "Free some space and run it again, with --resume if work was kept."
            with disk_errors_named(path, remedy=remedy):
                yield is_resumed
            _empty(path)
            shutil.rmtree(path)
        except BaseException:
            if _holds_work(path):
                LOGGER.warning(
                    "Kept in %s: finished columns: %d%s. Go on with --resume.",
                    path,
                    finished_columns(path),
                    ", and what was done of another" if _is_begun(path) else "",
                )
            else:
                shutil.rmtree(path, ignore_errors=True)
                remove_empty_parents(path.parent, created if created != path else None)
            raise


def _holds_work(path: Path) -> bool:
    return finished_columns(path) > 0 or _is_begun(path)


def _is_begun(path: Path) -> bool:
    """Say whether work of a column is kept that is not finished."""
    return holds_answers(path / ANSWERS) or any(path.glob(f"{WORK}/*/[!.]*"))


def fingerprint_files(model_dir: Path) -> str:
    """Hash the files of a model directory: weights, configuration, tokenizer (SHA-256, hex)."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.rglob("*")):
        name = path.relative_to(model_dir)
        is_hidden = any(part.startswith(".") for part in name.parts)
        # A model card has no part in the answers.
        if path.is_file() and not is_hidden and path.suffix != ".md":
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name.as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _require_same_recipe(path: Path, identity: Identity) -> None:
    known = read_json(path / RECORD)
    for line in _changes(known["settings"], identity.settings):
        LOGGER.info("%s", line)
    _require_same_versions(known["versions"], identity.versions)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which keys differ and may."""
    old, new = flatten(before), flatten(now)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        values = old.get(key, _NOTHING), new.get(key, _NOTHING)
        if values[0] == values[1]:
            continue
        if key not in FREE_KEYS:
            raise RecipeError(
                f"--resume: key '{key}' is {values[1]!r}, and the unfinished evaluation was "
                f"started with {values[0]!r}.",
                f"Set it back, {_DROP}",
            )
        lines.append(f"{key} is {values[1]!r} now, was {values[0]!r}")
    return lines


def _require_same_model(before: str, now: str) -> None:
    if before != now:
        raise UserError(
            f"--resume: the model is not that of the unfinished evaluation (fingerprint of its "
            f"files {now[:16]}, was {before[:16]}).",
            f"Give it the same files, {_DROP}",
        )


def _require_same_versions(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"--resume: {name} is {now.get(name, 'not installed')}, and the unfinished "
                f"evaluation was started with {before.get(name, 'none')}.",
                f"Install that version again, {_DROP}",
            )


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a recipe by their dotted keys."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _is_ours(path: Path) -> bool:
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {"a file"}
    return not names - {LOCK, LOG} or RECORD in names  # the log is opened first


def _lies_there(path: Path) -> OutputError:
    return OutputError(
        f"an unfinished evaluation lies in {path} (finished columns: {finished_columns(path)}).",
        "Add --resume to go on with it, or --restart to drop it and begin anew.",
    )


def _entries(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.name != LOCK]


def _empty(path: Path) -> None:
    # A process that is killed in here must leave no column that looks finished and is not whole,
    # and the record, by which the rest is known for ours.
    for column in path.glob(f"{COLUMNS}/*/{COLUMN}"):
        column.unlink()
    for entry in sorted(_entries(path), key=lambda entry: entry.name == RECORD):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
