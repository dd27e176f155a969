"""Captioned images as Karpathy's split files describe them (Flickr30K, MSCOCO)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.errors import DataError
from kuea_mllm.io import read_json
from kuea_mllm.probing.datasets.dataset import PathImages, ProbeDataset

_FILES = ("dataset_flickr30k.json", "dataset_coco.json", "dataset.json")
_FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images")


def find_karpathy(folder: Path) -> Path | None:
    """Return the split file in a folder, if there is one."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def open_karpathy(
    folder: Path, split: str, *, name: str, captions_per_image: int | None = None
) -> ProbeDataset:
    """Open a split of captioned images; `restval` belongs to none.

    Args:
        folder: Holds the split file, and the images: in the sub-folder that the file names
            (`filepath`), in `images` or `flickr30k-images`, or at the top.
        split: Which split.
        name: Heading of its columns.
        captions_per_image: Take the first so many; None takes all (some of MSCOCO's have 6 or 7).

    Raises:
        DataError: If the file is none of Karpathy's, or names images that are not there.
    """
    path = find_karpathy(folder)
    if path is None:
        raise DataError(f"data set {folder} holds no {' or '.join(_FILES)}.")
    content = read_json(path)
    listed = content.get("images") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(
            f"file {path} holds no list `images`, so it is no split file of Karpathy's."
        )
    entries = [entry for entry in listed if entry.get("split") == split]
    if not entries:
        splits = sorted({str(entry.get("split")) for entry in listed})
        raise DataError(f"file {path} has no images of split {split}, only {', '.join(splits)}.")
    names = [_name(entry, path) for entry in entries]
    captions = tuple(_captions(entry, path)[:captions_per_image] for entry in entries)
    images = PathImages(_image_folder(folder, names[0]), names, named_by=f"caption file {path}")
    return ProbeDataset(name, split, images, str(folder), captions=captions)


def _name(entry: Mapping[str, Any], path: Path) -> str:
    if "filename" not in entry:
        raise DataError(f"file {path}: an image has no filename.")
    return str(Path(str(entry.get("filepath", ""))) / str(entry["filename"]))


def _captions(entry: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    captions = tuple(str(each["raw"]) for each in entry.get("sentences", ()) if "raw" in each)
    if not captions:
        raise DataError(f"file {path}: image {entry['filename']} has no sentences.")
    return captions


def _image_folder(folder: Path, name: str) -> Path:
    for inner in _FOLDERS:
        if (folder / inner / name).is_file():
            return folder / inner
    # Where most of such files would be, so that the error about missing images names it.
    return next((folder / i for i in _FOLDERS[1:] if (folder / i).is_dir()), folder)
