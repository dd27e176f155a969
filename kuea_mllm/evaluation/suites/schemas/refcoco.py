"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of REFER: refs, instances and COCO's images."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from kuea_mllm.errors import DataError
from kuea_mllm.evaluation.suites import prompts
from kuea_mllm.evaluation.suites.boxes import from_pixels
from kuea_mllm.evaluation.suites.documents import REMEDY, Document, shared
from kuea_mllm.evaluation.suites.schemas.reading import (
    bad_layout,
    converted,
    image_folder,
    read_list,
    stream,
)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, texts and numbers; anything else could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, only plain data is read")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it names an object outside of it ({pid!r})")


def read_refcoco(folder: Path, *, split_by: str, split: str = "val") -> list[Document]:
    """Read one question per expression of a split.

    Args:
        folder: Holds `refs(<split_by>).p` (or the same content as .json) and `instances.json`.
        split_by: Who split the data: unc or umd.
        split: Which split.

    Raises:
        DataError: Naming the file and what is wrong with it.
    """
    path = folder / f"refs({split_by}).p"
    if not path.is_file() and path.with_suffix(".json").is_file():
        path = path.with_suffix(".json")
    references = converted(path, _entries(path), lambda ref: ref if ref["split"] == split else None)
    chosen = [reference for reference in references if reference is not None]
    if not chosen:
        raise bad_layout(path, f"it holds nothing of the split {split!r}")
    instances = folder / "instances.json"
    boxes = _boxes(instances, {reference.get("ann_id") for reference in chosen})
    sizes = _sizes(instances, {reference.get("image_id") for reference in chosen})
    images = image_folder(folder, "train2014")

    def documents(reference: Mapping[str, Any]) -> list[Document]:
        number, annotation = int(reference["image_id"]), reference["ann_id"]
        for key, known in ((annotation, boxes), (number, sizes)):
            if key not in known:
                raise ValueError(f"{instances.name} does not describe {key}")
        width, height = sizes[number]
        box = from_pixels(boxes[annotation], width, height)
        shown = ", ".join(f"{value:.2f}" for value in box)
        return [
            Document(
                image=shared(images / f"COCO_train2014_{number:012d}.jpg"),
                image_id=shared(number),
                prompt=prompts.locate(str(sentence["sent"])),
                target=f"[{shown}]",
                extra={"box": list(box), "width": width, "height": height},
            )
            for sentence in reference["sentences"]
        ]

    return [document for part in converted(path, chosen, documents) for document in part]


def load_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain data; one that names anything else is refused, never run.

    Raises:
        DataError: If it is missing, damaged or not plain.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"file {path} does not exist.", REMEDY) from None
    except OSError as error:
        raise DataError(f"file {path} cannot be read: {error.strerror}.", REMEDY) from error
    try:
        # Written by Python 2: its texts are bytes.
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    # What a damaged pickle makes of the reader is open.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"file {path} cannot be read: {reason}.", REMEDY) from error


def _entries(path: Path) -> list[Any]:
    if path.suffix == ".json":
        return read_list(path)
    content = load_plain_pickle(path)
    if not isinstance(content, list):
        raise bad_layout(path, "a list was expected")
    return content


def _boxes(path: Path, wanted: set[Any]) -> dict[Any, tuple[float, float, float, float]]:
    """Read x, y, width and height of the annotations that are wanted."""

    def box(entry: Mapping[str, Any]) -> tuple[Any, tuple[float, float, float, float]] | None:
        number = entry["id"]
        if number not in wanted:
            return None
        x, y, width, height = map(float, entry["bbox"])
        return number, (x, y, width, height)

    return dict(_kept(converted(path, stream(path, "annotations"), box)))


def _sizes(path: Path, wanted: set[Any]) -> dict[int, tuple[int, int]]:
    def size(entry: Mapping[str, Any]) -> tuple[int, tuple[int, int]] | None:
        number = entry["id"]
        if number not in wanted:
            return None
        return number, (int(entry["width"]), int(entry["height"]))

    return dict(_kept(converted(path, stream(path, "images"), size)))


def _kept(entries: list[Any]) -> Iterator[Any]:
    return (entry for entry in entries if entry is not None)
