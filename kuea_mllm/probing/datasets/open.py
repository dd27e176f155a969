"""Open the data set of a recipe, in whatever layout a copy of it lies here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kuea_mllm.config.probe import ProbeData
from kuea_mllm.errors import DataError
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.datasets.classes import (
    check_labels,
    package_class_names,
    package_templates,
)
from kuea_mllm.probing.datasets.dataset import ProbeDataset
from kuea_mllm.probing.datasets.folder import open_folder
from kuea_mllm.probing.datasets.hub import open_table
from kuea_mllm.probing.datasets.karpathy import find_karpathy, open_karpathy
from kuea_mllm.probing.datasets.wds import is_wds, open_wds

_WDS_FILES = ("*.txt",)


def locate(data: ProbeData, folder: Path) -> Path | None:
    """Return where a data set lies below a folder of data sets, None if it does not."""
    for name in (data.key, f"wds_{data.key}"):
        if (folder / name).is_dir():
            return folder / name
    return None


def open_dataset(
    data: ProbeData, folder: Path | None, *, split: str | None = None, is_checked: bool = False
) -> ProbeDataset:
    """Open one split of a recipe's data set.

    Args:
        data: The recipe's entry.
        folder: Folder of data sets, each in a sub-folder called like its `key`; None fetches from
            the hub.
        split: Which split; None takes the one that is scored.
        is_checked: Whether it was opened before, so that nothing is said about its size again.

    Raises:
        DataError: If it is not there, or damaged; if classes have no image, or images no class.
    """
    split = split or data.split
    if folder is None:
        opened = _from_hub(data, split)
    else:
        place = locate(data, folder)
        if place is None:
            raise DataError(
                f"data set {data.name} is not in {folder}.", _how_to_fetch(data, folder)
            )
        opened = _open_local(data, place, split)
    if not is_checked:
        warn_of_size(data, split, len(opened))
    return _checked(opened, data)


def warn_of_size(data: ProbeData, split: str, count: int) -> None:
    """Say it if a split has another number of images than its recipe expects.

    Args:
        data: The recipe's entry.
        split: Which split.
        count: Images that were found.
    """
    wanted = {data.train_split: data.train_documents, data.split: data.documents}.get(split)
    if wanted is not None and count != wanted:
        LOGGER.warning(
            "data set %s has %d images in split %s, its recipe expects %d; published scores are of "
            "another set",
            data.name,
            count,
            split,
            wanted,
        )


def _open_local(data: ProbeData, place: Path, split: str) -> ProbeDataset:
    if is_wds(place, split):
        return open_wds(place, split, name=data.name)
    if find_karpathy(place) is not None:
        return open_karpathy(
            place, split, name=data.name, captions_per_image=data.captions_per_image
        )
    if _is_table(place):
        return _table(data, str(place), split)
    if data.layout == "karpathy" or data.metric == "recall@k":
        raise DataError(
            f"data set {data.name}: {place} holds neither {split}/nshards.txt nor Karpathy's split "
            "file nor a table.",
            f"It should be a copy of {data.source}.",
        )
    given = () if data.classnames is None else package_class_names(data.classnames)
    return open_folder(place, split, name=data.name, class_names=given)


def _from_hub(data: ProbeData, split: str) -> ProbeDataset:
    if data.layout == "wds":
        return open_wds(_fetch(data, split), split, name=data.name)
    if data.layout == "table":
        return _table(data, data.source, split)
    raise DataError(
        f"data set {data.name} cannot be fetched by itself: it comes from {data.source}.",
        f"Fetch it into DIR/{data.key} and give --data DIR.",
    )


def _table(data: ProbeData, reference: str, split: str) -> ProbeDataset:
    return open_table(
        reference,
        split,
        name=data.name,
        image_column=data.image_column,
        label_column=data.label_column,
        caption_column=data.caption_column,
    )


def _checked(dataset: ProbeDataset, data: ProbeData) -> ProbeDataset:
    """Fill in class names and prompts from the package, and cut and check what was read."""
    if data.metric == "recall@k":
        captions = dataset.require_captions()
        kept = tuple(each[: data.captions_per_image] for each in captions)
        empty = next((i for i, each in enumerate(kept) if not each), None)
        if empty is not None:
            raise DataError(f"image {dataset.images.name(empty)} of {data.name} has no caption.")
        return replace(dataset, captions=kept)
    labels = dataset.require_labels()
    names = dataset.class_names
    if not names and data.classnames is not None:
        names = package_class_names(data.classnames)
    if not names:
        raise DataError(
            f"data set {data.name} ({dataset.source}) does not state the names of its classes.",
            "Write a classnames.txt beside its splits, one name per line.",
        )
    templates = dataset.templates
    if not templates and data.templates is not None:
        templates = package_templates(data.templates)
    where = f"data set {data.name} ({dataset.source}, split {dataset.split})"
    check_labels(labels, names, where, may_miss=data.may_miss_classes)
    return replace(dataset, class_names=names, templates=templates)


def _is_table(place: Path) -> bool:
    names = ("state.json", "dataset_dict.json")
    return any((place / name).is_file() for name in names) or any(place.rglob("*.parquet"))


def _fetch(data: ProbeData, split: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                data.source, repo_type="dataset", allow_patterns=[f"{split}/*", *_WDS_FILES]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"data set {data.name}: the hub did not give {data.source}: {reason}.",
            f"Fetch it elsewhere into DIR/{data.key} and give --data DIR.",
        ) from error


def _how_to_fetch(data: ProbeData, folder: Path) -> str:
    place = folder / data.key
    if data.layout in {"wds", "table"}:
        return f"Run `hf download {data.source} --repo-type dataset --local-dir {place}`."
    return f"It comes from {data.source}; put it into {place}."
