"""Finds what would end or spoil a training, before it starts: broken records and images."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from tqdm.auto import tqdm

from kuea_mllm.data.source import IMAGE_SUFFIXES, read_image
from kuea_mllm.errors import DataError, UnreadableImage
from kuea_mllm.io import create_directory, disk_errors_named, require_free_output
from kuea_mllm.tuning.examples import image_path
from kuea_mllm.tuning.records import MalformedRecord, normalise, untrained_reason
from kuea_mllm.tuning.scanning import scan_records

Action = Literal["leave out", "correct", "keep"]

_NO_IMAGE = -1
_PATH_KEYS = ("image", "path")
# A container of several JPEGs, as phones write it; any reader takes it for a JPEG.
_SAME_FORMAT = {"MPO": "JPEG"}


@dataclass(frozen=True)
class Finding:
    """Something about one record.

    Attributes:
        kind: Short name, the same for all records of which this is true.
        index: Position in the file, from 0.
        id: The record's id.
        image: Its image, None for text alone.
        detail: What was found.
        action: What a cleaned file does: "leave out", "correct" (the image's name), or "keep" what
            harms no training.
        corrected: Name to correct to.
    """

    kind: str
    index: int
    id: str
    image: str | None
    detail: str
    action: Action
    corrected: str | None = None


@dataclass(frozen=True)
class MixtureReport:
    """What was found in one file.

    Attributes:
        data: The file.
        images: Folder of its images, None if they were not looked at.
        records: Number of records.
        text_only: Of them, those that are sound and have no image.
        different_images: Number of files they name.
        findings: In the order of the file, at most one of each record.
    """

    data: Path
    images: Path | None
    records: int
    text_only: int
    different_images: int
    findings: tuple[Finding, ...]

    def counts(self) -> dict[tuple[str, Action], int]:
        """Return how often each kind was found, most frequent first."""
        return dict(Counter((each.kind, each.action) for each in self.findings).most_common())

    @property
    def problems(self) -> list[Finding]:
        """What a cleaned file leaves out or corrects."""
        return [each for each in self.findings if each.action != "keep"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "data": str(self.data),
            "images": None if self.images is None else str(self.images),
            "records": self.records,
            "text_only": self.text_only,
            "different_images": self.different_images,
            "counts": {kind: count for (kind, _), count in self.counts().items()},
            "findings": [asdict(each) for each in self.findings],
        }


class CleanIndex(NamedTuple):
    """A cleaned file.

    Attributes:
        path: Where it was written.
        records: Number of records in it.
        left_out: Records that are not.
        corrected: Records whose image has another name now.
    """

    path: Path
    records: int
    left_out: int
    corrected: int


class _Fault(NamedTuple):
    kind: str
    detail: str
    action: Action
    corrected: str | None = None


class _Listing:
    """All records of a file: their ids, and which image each has."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.image_numbers = array("q")
        self.numbers: dict[str, int] = {}
        self.text_only = 0
        self.faults: dict[int, _Fault] = {}

    def add(self, raw: Any) -> None:
        index = len(self.ids)
        self.ids.append(str(raw.get("id", "")) if isinstance(raw, dict) else "")
        self.image_numbers.append(_NO_IMAGE)
        try:
            record = normalise(raw)
        except MalformedRecord as error:
            self.faults[index] = _Fault(error.kind, error.detail, "leave out")
            return
        reason = untrained_reason(record)
        if reason is not None:
            self.faults[index] = _Fault("nothing to learn", reason, "leave out")
            return
        if record["image"] is None:
            self.text_only += 1
        else:
            number = self.numbers.setdefault(record["image"], len(self.numbers))
            self.image_numbers[index] = number


def check_mixture(data: Path, images: Path | None, *, progress: bool = True) -> MixtureReport:
    """Look at every record, and decode every image once.

    Args:
        data: JSON list or JSONL.
        images: Folder that the records' paths are relative to; None leaves images alone.
        progress: Whether to show bars.

    Raises:
        DataError: If the file is no JSON or the folder is missing.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"image folder {images} does not exist.")
    size = data.stat().st_size if data.is_file() else 0
    listing = _Listing()
    with tqdm(total=size, desc="read", unit="B", unit_scale=True, disable=not progress) as bar:
        for raw in scan_records(data, progress=bar.update):
            listing.add(raw)
    names = list(listing.numbers)
    faulty: dict[int, _Fault] = {}
    if images is not None and names:
        with ThreadPool() as pool:
            # Threads are enough: Pillow decodes without holding the interpreter lock.
            found: Iterable[_Fault | None] = pool.imap(
                partial(_check_image, images), names, chunksize=16
            )
            found = tqdm(found, "decode", len(names), unit="image", disable=not progress)
            faulty = {number: fault for number, fault in enumerate(found) if fault is not None}
    return MixtureReport(
        data=data,
        images=images,
        records=len(listing.ids),
        text_only=listing.text_only,
        different_images=len(names),
        findings=tuple(_findings(listing, names, faulty)),
    )


def write_clean(report: MixtureReport, out: Path) -> CleanIndex:
    """Write the records that can be trained on, otherwise as they are.

    Args:
        report: Of the file to clean.
        out: File to create; JSONL if it ends in .jsonl, else a JSON list.

    Raises:
        DataError: If no record would be left.
        OutputError: If `out` exists or cannot be written.
    """
    require_free_output(out)
    actions = {each.index: each for each in report.problems}
    left_out = sum(each.action == "leave out" for each in actions.values())
    if left_out == report.records:
        raise DataError(
            f"of {report.data} no record would be left.",
            "Are the paths in it relative to --images?" if report.images else "",
        )
    kept = (
        _corrected(raw, actions[index]) if index in actions else raw
        for index, raw in enumerate(scan_records(report.data))
        if index not in actions or actions[index].action == "correct"
    )
    create_directory(out.absolute().parent, wanted_for=out)
    partial_file = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with disk_errors_named(out), partial_file.open("x", encoding="utf-8") as file:
            file.writelines(_lines(kept, is_list=out.suffix != ".jsonl"))
        partial_file.replace(out)
    finally:
        partial_file.unlink(missing_ok=True)
    return CleanIndex(out, report.records - left_out, left_out, len(actions) - left_out)


def _findings(listing: _Listing, names: list[str], faulty: dict[int, _Fault]) -> Iterator[Finding]:
    for index, number in enumerate(listing.image_numbers):
        fault = listing.faults.get(index) or faulty.get(number)
        if fault is not None:
            image = names[number] if number != _NO_IMAGE else None
            yield Finding(
                fault.kind,
                index,
                listing.ids[index],
                image,
                fault.detail,
                fault.action,
                fault.corrected,
            )


def _check_image(folder: Path, name: str) -> _Fault | None:
    path = image_path(folder, name)
    if not path.is_file():
        return _check_missing(folder, name)
    if path.stat().st_size == 0:
        return _Fault("empty image file", f"{path} has no byte", "leave out")
    try:
        image = read_image(path)
    except UnreadableImage as error:
        return _Fault("corrupt image", error.problem.rstrip("."), "leave out")
    promised = Image.registered_extensions().get(path.suffix.lower())
    format_name = _SAME_FORMAT.get(str(image.format), str(image.format))
    if promised is not None and promised != format_name:
        detail = f"{path} is a {format_name} file; training reads it by its content"
        return _Fault("misnamed image file", detail, "keep")
    return None


def _check_missing(folder: Path, name: str) -> _Fault:
    """Some downloads end in .gif where the mixture says .jpg."""
    path = folder / name
    for suffix in sorted({*IMAGE_SUFFIXES, *(each.upper() for each in IMAGE_SUFFIXES)}):
        other = path.with_suffix(suffix) if path.name not in ("", "..") else path
        if other != path and other.is_file() and _is_readable(other):
            corrected = str(Path(name).with_suffix(suffix))
            detail = f"{path} is missing, and there is {other.name}"
            return _Fault("image under another name", detail, "correct", corrected)
    return _Fault("missing image", f"{path} does not exist", "leave out")


def _is_readable(path: Path) -> bool:
    try:
        read_image(path)
    except UnreadableImage:
        return False
    return True


def _corrected(value: Any, finding: Finding) -> Any:
    """Return a record with another name of its image, wherever it is named."""
    if isinstance(value, list):
        return [_corrected(each, finding) for each in value]
    if not isinstance(value, dict):
        return value
    result: dict[str, Any] = {}
    for key, each in value.items():
        if key in _PATH_KEYS and each == finding.image:
            result[key] = finding.corrected
        elif key == "images" and each == [finding.image]:
            result[key] = [finding.corrected]
        else:
            result[key] = _corrected(each, finding)
    return result


def _lines(records: Iterable[Any], *, is_list: bool) -> Iterator[str]:
    separator = "[\n" if is_list else ""
    for record in records:
        yield separator + json.dumps(record, ensure_ascii=False)
        separator = ",\n" if is_list else "\n"
    yield "\n]\n" if is_list else "\n"
