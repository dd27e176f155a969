"""Data sets as folders: `SPLIT/CLASS/image`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kuea_mllm.data.folder import FolderImages
from kuea_mllm.errors import DataError
from kuea_mllm.probing.datasets.classes import (
    CLASS_NAMES_FILE,
    TEMPLATES_FILE,
    match_folders,
    read_class_names,
    read_templates,
)
from kuea_mllm.probing.datasets.dataset import ProbeDataset

_WORDNET = re.compile(r"n\d{8}")


def open_folder(
    folder: Path, split: str, *, name: str, class_names: Sequence[str] = ()
) -> ProbeDataset:
    """Open a split of labelled images.

    Class names are those of `classnames.txt` beside the splits (one per line, or
    `sub-folder<TAB>name`), else those given, else the names of the sub-folders with spaces for
    underscores. Prompts are those of `zeroshot_classification_templates.txt`, if there is one.

    Args:
        folder: Folder of the data set.
        split: Which split.
        name: Heading of its columns.
        class_names: Names to use where the data set has none of its own.

    Raises:
        DataError: If it is not such a folder, or sub-folders and class names do not match.
    """
    root = folder / split
    if not root.is_dir():
        found = sorted(each.name for each in folder.iterdir() if each.is_dir())
        raise DataError(
            f"data set {folder} has no split {split}; its sub-folders are: "
            f"{', '.join(found[:8]) or 'none'}.",
            f"Images lie in {split}/CLASS/.",
        )
    images = FolderImages(root)
    folders = []
    for index in range(len(images)):
        inside = Path(images.name(index)).relative_to(root).parts
        if len(inside) < 2:
            raise DataError(f"image {images.name(index)} lies in no sub-folder of a class.")
        folders.append(inside[0])
    number_of, names = _classes(folder, sorted(set(folders)), class_names, str(root))
    templates = folder / TEMPLATES_FILE
    return ProbeDataset(
        name,
        split,
        images,
        str(folder),
        labels=np.array([number_of[each] for each in folders], dtype=np.int64),
        class_names=names,
        templates=read_templates(templates) if templates.is_file() else (),
    )


def _classes(
    folder: Path, folders: Sequence[str], given: Sequence[str], where: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    path = folder / CLASS_NAMES_FILE
    names = read_class_names(path) if path.is_file() else tuple(given)
    if path.is_file() and all("\t" in name for name in names):
        pairs = [name.split("\t", 1) for name in names]
        number_of = {key: number for number, (key, _) in enumerate(pairs)}
        if absent := [each for each in folders if each not in number_of]:
            raise DataError(f"{path} gives no name for the sub-folder {absent[0]!r}.")
        return number_of, tuple(name.strip() for _, name in pairs)
    if names:
        return match_folders(folders, names, where), names
    if all(_WORDNET.fullmatch(each) for each in folders):
        raise DataError(
            f"{where}: the sub-folders are WordNet ids such as {folders[0]}, not names.",
            f"Write a {CLASS_NAMES_FILE} beside the splits, `{folders[0]}<TAB>name` in each line.",
        )
    plain = tuple(each.replace("_", " ") for each in folders)
    return {each: number for number, each in enumerate(folders)}, plain
