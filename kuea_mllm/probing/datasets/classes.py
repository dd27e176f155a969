"""Class names and prompts: those of clip-benchmark's package, and those beside a data set."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kuea_mllm.errors import DataError, EnvironmentFailure
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.datasets.dataset import Labels

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
_CLASS_NAMES, _TEMPLATES = "en_classnames.json", "en_zeroshot_classification_templates.json"
_SHOWN = 5


def package_class_names(name: str) -> tuple[str, ...]:
    """Return a list of class names that comes with clip-benchmark.

    Raises:
        DataError: If it has none of that name.
    """
    return _of_package(_CLASS_NAMES, name)


def package_templates(name: str) -> tuple[str, ...]:
    """Return a set of prompts, with `{c}` for the class name, that comes with clip-benchmark.

    Raises:
        DataError: If it has none of that name.
    """
    return _of_package(_TEMPLATES, name)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read one class name per line; empty lines count, because one of CLEVR's names is empty."""
    return tuple(line.strip() for line in _text(path).splitlines())


def read_templates(path: Path) -> tuple[str, ...]:
    """Read one prompt per line, with `{c}` (or `{}`) for the class name.

    Raises:
        DataError: If there is none, or one has no place for the name.
    """
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    templates = tuple(line.replace("{}", "{c}") for line in lines)
    for number, line in enumerate(templates, start=1):
        if "{c}" not in line:
            raise DataError(f"prompt {number} of {path} has no {{c}} for the class name: {line!r}.")
    if not templates:
        raise DataError(f"{path} holds no prompt.", "Write one per line, with {c} for the name.")
    return templates


def match_folders(folders: Sequence[str], names: Sequence[str], where: str) -> dict[str, int]:
    """Tell which class each sub-folder holds.

    By name where every sub-folder is called like a class (case, `_` and `-` aside), by number where
    every one is a number, else in sorted order, which takes as many sub-folders as classes. Where
    some are called like a class, that has to be the class of their place, with or without regard
    to case (ASCII sorts capitals first, many lists do not).

    Args:
        folders: Sub-folders, sorted.
        names: Class names in their order.
        where: What to call the data set in errors.

    Raises:
        DataError: If that cannot be told.
    """
    by_name = {_plain(name): number for number, name in enumerate(names)}
    if len(by_name) == len(names) and all(_plain(folder) in by_name for folder in folders):
        return {folder: by_name[_plain(folder)] for folder in folders}
    are_numbers = all(folder.isdecimal() for folder in folders)
    if are_numbers and all(int(folder) < len(names) for folder in folders):
        return {folder: int(folder) for folder in folders}
    # Numbers that do not count from 0 would be sorted as texts, 10 before 2.
    if len(folders) == len(names) and not are_numbers:
        for order in (folders, sorted(folders, key=str.lower)):
            if all(by_name.get(_plain(each), n) == n for n, each in enumerate(order)):
                LOGGER.warning(
                    "%s: sub-folders are matched with class names by their order, from %s as %r to "
                    "%s as %r; a %s beside the splits would tell for certain",
                    where,
                    order[0],
                    names[0],
                    order[-1],
                    names[-1],
                    CLASS_NAMES_FILE,
                )
                return {folder: number for number, folder in enumerate(order)}
    stranger = next((f for f in folders if _plain(f) not in by_name), folders[0])
    raise DataError(
        f"{where} holds {len(folders)} sub-folders for {len(names)} classes, and {stranger} is the "
        "name of none of them.",
        "Call the sub-folders like the classes, or number them from 0; or write a "
        f"{CLASS_NAMES_FILE} beside the splits.",
    )


def check_labels(
    labels: Labels, class_names: Sequence[str], where: str, *, may_miss: bool = False
) -> None:
    """Check that labels and class names belong together.

    Args:
        labels: Class of every image.
        class_names: Names of the classes.
        where: What to call the data set in errors.
        may_miss: Allow classes without an image.

    Raises:
        DataError: If a label has no name, or a class no image; names them.
    """
    outside = labels[(labels < 0) | (labels >= len(class_names))]
    if len(outside):
        raise DataError(
            f"{where}: image {int(np.argmax(labels == outside[0]))} has label {outside[0]}, but "
            f"there are {len(class_names)} class names.",
            "Labels count from 0; the class names are those of another data set.",
        )
    missing = np.setdiff1d(np.arange(len(class_names)), labels)
    if len(missing) and not may_miss:
        shown = ", ".join(repr(class_names[i]) for i in missing[:_SHOWN].tolist())
        more = ", ..." if len(missing) > _SHOWN else ""
        raise DataError(
            f"{where}: {len(missing)} of {len(class_names)} classes have no image: {shown}{more}.",
            "The data set is incomplete: fetch it again; or set may_miss_classes: true in the "
            "recipe if that is how it is meant.",
        )


def fill_templates(templates: Sequence[str], name: str) -> list[str]:
    """Return the prompts of one class."""
    return [template.replace("{c}", name) for template in templates]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


def _of_package(file: str, name: str) -> tuple[str, ...]:
    known = _read_package(file)
    if name not in known:
        what = "class names" if file == _CLASS_NAMES else "prompts"
        raise DataError(
            f"clip-benchmark has no {what} called {name!r}.", f"Known are: {', '.join(known)}."
        )
    return known[name]


@functools.cache
def _read_package(file: str) -> Mapping[str, tuple[str, ...]]:
    # Found, not imported: the package pulls in what reading two files does not need.
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFailure(
            "the package clip-benchmark, whose class names and prompts are used, is not installed.",
            "Run `pip install clip-benchmark`.",
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / file
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: tuple(values) for name, values in content.items() if isinstance(values, list)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}.") from error
