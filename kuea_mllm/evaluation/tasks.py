"""From task arguments to loaded lmms-eval tasks.

An argument is a stock task, group or tag of lmms-eval ("pope"), a task YAML file, or a directory of
such files. Own files are loaded directly: lmms-eval's index would let a stock task of the same
name win in silence, and takes seconds to scan.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kuea_mllm.errors import EvaluationError

YAML_SUFFIXES = (".yaml", ".yml")
_LOCAL_BUILDERS = {"parquet", "json", "csv", "text", "arrow", "pandas"}


@dataclass(frozen=True)
class TaskSelection:
    """What was asked for.

    Attributes:
        files: Own tasks: name and YAML file, in the order given.
        stock: Names of stock tasks, groups or tags.
    """

    files: Mapping[str, Path]
    stock: tuple[str, ...]


def resolve_tasks(arguments: Sequence[str]) -> TaskSelection:
    """Sort task arguments into files and stock names; reads YAML files but not lmms-eval.

    Raises:
        EvaluationError: If a file or directory is missing, holds no task, or two sources give
            the same name.
    """
    if not arguments:
        raise EvaluationError("no task given.", "Name a task, a task YAML file or a directory.")
    files: dict[str, Path] = {}
    stock: list[str] = []
    for argument in arguments:
        if not _is_path(argument):
            if argument in stock:
                raise EvaluationError(f"task {argument!r} is given twice.", "Name it once.")
            stock.append(argument)
            continue
        for path in _yaml_files(Path(argument)):
            name = read_task_name(path, is_required=not Path(argument).is_dir())
            if name is not None:
                _add(files, name, path)
    for name in stock:
        if name in files:
            raise EvaluationError(
                f"task name {name!r} has two sources: lmms-eval and {files[name]}.",
                "Rename the task in the file, or give only one of the two.",
            )
    return TaskSelection(files, tuple(stock))


def read_task_name(path: Path, *, is_required: bool) -> str | None:
    """Read the name of the task that a YAML file defines, and check that its data are there.

    Templates and groups (no `task` with a name) give None unless a task is required.

    Raises:
        EvaluationError: If the file cannot be read, is not YAML, names missing data files, or
            defines no task although it is required to.
    """
    content = peek(path)
    if "class" in content:
        raise EvaluationError(
            f"task file {path} defines its task by a Python class, which is not supported.",
            "Write the task as YAML with `doc_to_visual`, `doc_to_text` and `process_results`.",
        )
    name = content.get("task")
    if not isinstance(name, str):
        if is_required:
            raise EvaluationError(
                f"task file {path} has no key `task` with the name of a task.",
                "Add `task: <name>`, or give the stock group by its name.",
            )
        return None
    _require_data_files(path, content)
    return name


def nearest_names(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Return the known names that look most like `name`."""
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    return close or [other for other in known if name in other][:count]


def _is_path(argument: str) -> bool:
    if "/" in argument or argument.endswith(YAML_SUFFIXES):
        return True
    # A bare word is a stock name, unless a directory with task files is called that.
    path = Path(argument)
    return path.is_dir() and any(path.rglob("*.yaml"))


def _yaml_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for suffix in YAML_SUFFIXES for file in path.rglob(f"*{suffix}"))
        if not files:
            raise EvaluationError(
                f"directory {path} holds no task: no *.yaml in it.", "Give the folder of the tasks."
            )
        if all(read_task_name(file, is_required=False) is None for file in files):
            raise EvaluationError(
                f"directory {path} holds no task: none of its {len(files)} YAML files has a key "
                "`task` with a name.",
                "Give the folder of the tasks.",
            )
        return files
    if not path.exists():
        raise EvaluationError(
            f"task file {path} does not exist.",
            "Give a task YAML file, a directory of them, or the name of a stock task.",
        )
    return [path]


def _add(files: dict[str, Path], name: str, path: Path) -> None:
    if name not in files:
        files[name] = path
    elif files[name].resolve() == path.resolve():
        raise EvaluationError(f"task file {path} is given twice.", "Name it once.")
    else:
        raise EvaluationError(
            f"task name {name!r} has two sources: {files[name]} and {path}.",
            "Rename one of them, or give only one.",
        )


class _PeekLoader(yaml.SafeLoader):
    """Reads a task file without importing the functions that it names."""


def _function_name(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_PeekLoader.add_constructor("!function", _function_name)


def peek(path: Path) -> dict[str, Any]:
    """Read a task file without importing the functions that it names.

    Raises:
        EvaluationError: If it cannot be read or is not YAML.
    """
    try:
        # A SafeLoader with one scalar tag more: no objects are built.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PeekLoader)  # noqa: S506
    except OSError as error:
        raise EvaluationError(f"task file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(f"task file {path} is not valid YAML: {reason}.") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"task file {path} is not a task: it holds no keys.")
    return content


def _require_data_files(path: Path, content: Mapping[str, Any]) -> None:
    # lmms-eval tries a missing file five times and then wraps the error: better said at once.
    arguments = content.get("dataset_kwargs")
    if content.get("dataset_path") not in _LOCAL_BUILDERS or not isinstance(arguments, dict):
        return
    for file in _flatten(arguments.get("data_files")):
        is_pattern = "://" in file or any(sign in file for sign in "*?[")
        if not is_pattern and not (path.parent / file).exists():
            raise EvaluationError(
                f"task file {path} names the data file {file}, which does not exist in "
                f"{path.parent}.",
                "Correct `dataset_kwargs.data_files`; paths are relative to the YAML file.",
            )


def _flatten(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, dict):
        return [file for part in entry.values() for file in _flatten(part)]
    if isinstance(entry, list):
        return [file for part in entry for file in _flatten(part)]
    return []
