"""Open images of any kind, named by one string."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from kuea_mllm.data.folder import FolderImages, ListedImages, holds_an_image
from kuea_mllm.data.huggingface import DatasetImages
from kuea_mllm.data.pack import PackedImages, is_pack
from kuea_mllm.data.parquet import ParquetImages
from kuea_mllm.data.shards import list_shards
from kuea_mllm.data.source import IMAGE_SUFFIXES, ImageSource
from kuea_mllm.data.tar import TarImages
from kuea_mllm.errors import DataError
from kuea_mllm.log import LOGGER

Format = Literal["folder", "list", "tar", "parquet", "dataset", "pack"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REMOTE = re.compile(r"(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")
_KNOWN = (
    "Known are a folder of images, a list of files (.txt), tar shards (.tar), parquet files, a "
    "Hugging Face data set and a pack; set data.format to say which."
)


def open_images(
    images: str, *, format: str = "auto", split: str = "train", column: str | None = None
) -> ImageSource:
    """Open images that can be read by position.

    Args:
        images: A path, a pattern of shards, or the id of a data set on the hub.
        format: folder, list, tar, parquet, dataset or pack; "auto" tells by name and content.
        split: Of a Hugging Face data set, and of parquet files named after their split.
        column: Image column of parquet files or a data set; extension of tar members.

    Raises:
        DataError: If there are no such images; says what was found instead.
    """
    if is_remote(images):
        raise DataError(
            f"images {images} are remote, so they cannot be read by position.",
            "Set data.stream=true, or copy them here first.",
        )
    kind = format if format != "auto" else detect_format(images)
    if kind == "folder":
        return FolderImages(images)
    if kind == "list":
        return ListedImages(images)
    if kind == "pack":
        return PackedImages(images)
    if kind == "tar":
        return TarImages(list_shards(images, ".tar"), extension=column)
    if kind == "parquet":
        files = of_split(list_shards(images, ".parquet"), split)
        return ParquetImages(files, column=column)
    if kind == "dataset":
        return DatasetImages(images, split=split, column=column)
    raise DataError(f"image format {format} is unknown.", _KNOWN)


def is_remote(images: str) -> bool:
    """Whether a name is a URL (or webdataset's `pipe:`), not a path."""
    return _REMOTE.match(images) is not None and not Path(images).exists()


def detect_format(images: str) -> Format:
    """Tell what a string stands for, by its name and by what lies there.

    Raises:
        DataError: If it is none of the known formats; says what was found.
    """
    path = Path(images)
    if path.is_dir():
        return _format_of_folder(path)
    if path.is_file():
        return _format_of_name(path.name, f"image source {images} is a file")
    if any(character in images for character in "{*?["):
        return _format_of_name(path.name, f"image source {images} is a pattern")
    if path.suffix in {".txt", ".tar", ".parquet"}:
        raise DataError(f"file {images} does not exist.")
    # A mistyped path must not be looked for on the network.
    if _HUB_ID.fullmatch(images) and not path.parent.exists():
        return "dataset"
    raise DataError(f"image folder {images} does not exist.", _KNOWN)


def _format_of_folder(folder: Path) -> Format:
    if is_pack(folder):
        return "pack"
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return "dataset"
    if folder.name.endswith(".unfinished"):
        raise DataError(
            f"{folder} is an unfinished pack.",
            "Run the same `kuea-mllm pack` command again to finish it.",
        )
    holds: dict[Format, bool] = {
        "tar": next(folder.rglob("*.tar"), None) is not None,
        "parquet": next(folder.rglob("*.parquet"), None) is not None,
        "folder": holds_an_image(folder),
    }
    found = [kind for kind, is_there in holds.items() if is_there]
    if len(found) == 1:
        return found[0]
    if found:
        names = {"tar": "tar files", "parquet": "parquet files", "folder": "images"}
        raise DataError(
            f"folder {folder} holds {' and '.join(names[kind] for kind in found)}.",
            f"Say which to use: data.format={' or '.join(found)}.",
        )
    entries = sorted(each.name for each in folder.iterdir())
    listed = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "")
    raise DataError(
        f"image folder {folder} holds no image" + (f", only {listed}." if entries else "."),
        f"Looked in all sub-folders for {', '.join(sorted(IMAGE_SUFFIXES))}, .tar and .parquet.",
    )


def _format_of_name(name: str, what: str) -> Format:
    lower = name.lower()
    for suffix, kind in ((".txt", "list"), (".tar", "tar"), (".parquet", "parquet")):
        if lower.endswith(suffix):
            return kind  # type: ignore[return-value]
    if lower.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise DataError(
            f"{what} of compressed tar shards, which cannot be read by position.",
            "Decompress them, or set data.stream=true (gzip only).",
        )
    raise DataError(f"{what} of an unknown kind.", _KNOWN)


def of_split(files: list[str], split: str) -> list[str]:
    """Keep the files of one split where names tell: `train-00000-of-00005.parquet`."""
    named = re.compile(rf"{re.escape(split)}([-._].*)?\.parquet")
    kept = [path for path in files if named.fullmatch(Path(path).name)]
    if kept and len(kept) < len(files):
        LOGGER.info("%d of %d parquet files belong to split %s", len(kept), len(files), split)
        return kept
    return files
