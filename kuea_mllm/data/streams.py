"""Images read front to back, from here or from afar, for data that no position can be asked of.

The order is a function of seed, epoch, number of ranks and number of workers: unlike reading by
position, another number of ranks gives another order.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from kuea_mllm.data.augment import Augment
from kuea_mllm.data.dataset import PixelItem, augmented, make_item
from kuea_mllm.data.huggingface import DatasetStream
from kuea_mllm.data.open import detect_format, is_remote, of_split
from kuea_mllm.data.parquet import ParquetImages
from kuea_mllm.data.shards import expand_braces, list_shards
from kuea_mllm.data.source import decode_cell
from kuea_mllm.data.tar_format import damaged, walk
from kuea_mllm.data.tar_index import is_image_member
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.data.unreadable import pack_name, too_many_unreadable
from kuea_mllm.errors import DataError, EnvironmentFailure, UnreadableImage

_PIECE = 1 << 20
_EMPTY_EPOCHS = 10


class StreamItem(PixelItem, total=False):
    """One item of a stream: as of an `ImageDataset`, with index -1.

    Attributes:
        replaced_name: uint8, only where unreadable images are skipped: the name of the image that
            `replaced` (a hash of it) stands for.
    """

    replaced_name: torch.Tensor


class ShardedRows(Protocol):
    """Rows that come in shards; each shard is read front to back by one worker."""

    def __len__(self) -> int:
        """Return the number of shards."""
        ...

    def rows(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield name and undecoded image of each row, never fewer than the shard holds."""
        ...


class StreamImages(IterableDataset[StreamItem]):
    """An endless stream of images, divided among ranks and workers by shards.

    Args:
        rows: Where they come from (`open_stream`).
        transform: What the tower expects.
        augment: Random transform.
        seed: Of the order and of the random transform.
        shuffle_buffer: Encoded images that one rank keeps to draw from; its workers share the
            number. 1 keeps the order within shards.
        skip_unreadable: How many different unreadable images may be left out.
        rank: Of this process.
        world_size: Number of training processes.
    """

    def __init__(
        self,
        rows: ShardedRows,
        transform: ImageTransform,
        *,
        augment: Augment = "none",
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        skip_unreadable: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rows = rows
        self.transform = transform
        self.augment: Augment = augment
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.skip_unreadable = skip_unreadable
        self.rank = rank
        self.world_size = world_size
        self._consumed_batches = 0
        self._batch_size = 1

    def resume_at(self, images: int, *, batch_size: int) -> None:
        """Continue as if this rank had already delivered `images` of the stream.

        They are read again (and decoded again where unreadable images are skipped), but not
        transformed: an epoch takes as long as its download.

        Args:
            images: Delivered to the rank before, by all of its workers.
            batch_size: Of the DataLoader; the workers must be as many as before.
        """
        if images % batch_size:
            raise ValueError(f"{images} images are not whole batches of {batch_size}")
        self._consumed_batches = images // batch_size
        self._batch_size = batch_size

    def require_workers(self, workers: int) -> None:
        """Check, before any worker starts, that each of them will have a shard to read.

        Raises:
            DataError: If there are fewer shards than readers.
        """
        parts = self.world_size * max(1, workers)
        if parts > len(self.rows):
            most = len(self.rows) // self.world_size
            raise DataError(
                f"the stream has {len(self.rows)} shards, fewer than {self.world_size} ranks x "
                f"{max(1, workers)} workers.",
                f"Set data.workers to {most} at most."
                if most
                else "Use fewer ranks, or split the data into more shards.",
            )

    def __iter__(self) -> Iterator[StreamItem]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        self.require_workers(workers)
        # The loader asks worker 0 for the first batch, but that turn may have been another's.
        turn = (worker + self._consumed_batches) % workers
        whole, rest = divmod(self._consumed_batches, workers)
        skip = (whole + (turn < rest)) * self._batch_size
        part, parts = self.rank * workers + turn, self.world_size * workers
        return self._items(part, parts, buffer=max(1, self.shuffle_buffer // workers), skip=skip)

    def _items(self, part: int, parts: int, *, buffer: int, skip: int) -> Iterator[StreamItem]:
        known: dict[int, str] = {}
        pending: deque[int] = deque()
        number = 0
        for name, cell in self._endless(part, parts, buffer):
            if number < skip and not self.skip_unreadable:
                number += 1
                continue
            try:
                image = decode_cell(cell, name)
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise
                key = _name_key(name)
                if key not in known:
                    known[key] = name
                    pending.append(key)
                if len(known) > self.skip_unreadable:
                    names = list(known.values())
                    raise too_many_unreadable(len(known), self.skip_unreadable, names) from error
                continue
            number += 1
            if number > skip:
                yield self._item(image, (number - 1) * parts + part, known, pending)

    def _item(
        self, image: Image.Image, draw: int, known: dict[int, str], pending: deque[int]
    ) -> StreamItem:
        pixels = augmented(image, self.transform, self.augment, self.seed, draw)
        item = cast(StreamItem, make_item(pixels, -1))
        if self.skip_unreadable:
            # One name with each image, so that the main process hears of all of them.
            key = pending.popleft() if pending else -1
            item["replaced"] = key
            item["replaced_name"] = torch.from_numpy(pack_name(known.get(key, "")))
        return item

    def _endless(self, part: int, parts: int, buffer: int) -> Iterator[tuple[str, Any]]:
        epoch = empty = 0
        while True:
            numbers = np.random.default_rng([self.seed, epoch])
            # The same order on every rank, so that each shard is read by one of them.
            mine = numbers.permutation(len(self.rows))[part::parts]
            found = (row for shard in mine for row in self.rows.rows(int(shard)))
            count = 0
            draws = np.random.default_rng([self.seed, epoch, part])
            for row in _shuffled(found, buffer, draws):
                count += 1
                yield row
            empty = 0 if count else empty + 1
            # One part may get shards without an image by chance, but not for ever.
            if empty == _EMPTY_EPOCHS:
                raise DataError(f"the stream gave no image in {empty} epochs.")
            epoch += 1


def open_stream(
    images: str,
    *,
    format: str = "auto",
    split: str = "train",
    column: str | None = None,
    allow_pipes: bool = False,
) -> ShardedRows:
    """Open tar shards (local or URLs), parquet files or a Hugging Face data set as a stream.

    Args:
        images: Path, pattern, URL with braces, or hub id.
        format: tar, parquet or dataset; "auto" tells.
        split: Of a data set, and of parquet files named after their split.
        column: Image column; extension of tar members.
        allow_pipes: Whether `pipe:COMMAND` may run COMMAND in a shell. Off, because a recipe from
            elsewhere must not be able to run programs.

    Raises:
        DataError: If there is no such stream.
    """
    if is_remote(images) and format in {"auto", "tar"}:
        if images.startswith("pipe:") and not allow_pipes:
            raise DataError(
                f"images {images} would run a program.",
                "If you trust it, open the stream with allow_pipes=True from Python.",
            )
        return TarStream(expand_braces(images), extension=column)
    kind = format if format != "auto" else _streamed_format(images)
    if kind == "tar":
        return TarStream(list_shards(images, ".tar"), extension=column)
    if kind == "parquet":
        files = of_split(list_shards(images, ".parquet"), split)
        return ParquetStream(ParquetImages(files, column=column))
    if kind == "dataset":
        return DatasetStream(images, split=split, column=column)
    raise DataError(
        f"images {images} ({kind}) are read by position, not as a stream.",
        "Set data.stream=false.",
    )


class TarStream:
    """Tar shards at paths or URLs, opened by webdataset, which knows how to reach them.

    Args:
        urls: Paths, http(s)://, gs://, hf://, `pipe:COMMAND`, ... ; gzip by the ending .gz or .tgz.
        extension: Only members with this webdataset extension; None takes every image.
    """

    def __init__(self, urls: Sequence[str], *, extension: str | None = None) -> None:
        self.urls = list(urls)
        self.extension = extension.lstrip(".").lower() if extension else None

    def __len__(self) -> int:
        return len(self.urls)

    def rows(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield name and bytes of each image.

        Raises:
            DataError: If the shard is damaged or cut short.
            EnvironmentFailure: If it cannot be reached, or the connection breaks.
        """
        url = self.urls[shard]
        position = 0
        try:
            # webdataset's own reader is not used: it takes damage for the end of a shard.
            with _opened(url) as opened:
                reader = _Streamed(_decompressed(opened, url))
                for member in walk(url, reader):
                    position = member.offset
                    if not self._wanted(member.name):
                        continue
                    data = reader.take(member.size)
                    if len(data) == member.size:  # else `walk` raises
                        yield f"{url}!{member.name.decode(errors='replace')}", data
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged(url, position, "the one before", f"gzip says: {error}") from error
        except OSError as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise EnvironmentFailure(
                f"shard {url} cannot be read to its end: {reason}.",
                "Check that it can be reached from here, then resume the run.",
            ) from error

    def _wanted(self, name: bytes) -> bool:
        if self.extension is None:
            return is_image_member(name)
        base = name.decode(errors="replace").rpartition("/")[2]
        return base.partition(".")[2].lower() == self.extension


class ParquetStream:
    """Row groups of parquet files, each read once and in full.

    Args:
        images: The files.
    """

    def __init__(self, images: ParquetImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images.groups()

    def rows(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield name and undecoded image of each row of a row group."""
        return self.images.group_rows(shard)


class _Streamed:
    """A file object as `walk` reads it."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.position = 0

    def take(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self.file.read(size)):
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def skip(self, size: int) -> int:
        start = self.position
        while size > 0 and (part := self.take(min(size, _PIECE))):
            size -= len(part)
        return self.position - start


def _opened(url: str) -> Any:
    # A file here is opened as one, whatever it is called: gopen would run `pipe:COMMAND.tar`.
    if not is_remote(url):
        return open(url, "rb")  # noqa: PTH123 - the caller closes it
    from webdataset.gopen import gopen

    return gopen(url)


def _decompressed(file: Any, url: str) -> Any:
    path = url if url.startswith("pipe:") else urlparse(url).path
    return gzip.GzipFile(fileobj=file) if path.endswith((".gz", ".tgz")) else file


def _shuffled(
    rows: Iterator[tuple[str, Any]], buffer: int, numbers: np.random.Generator
) -> Iterator[tuple[str, Any]]:
    """Yield all rows, each drawn at random from a buffer of the next ones."""
    kept: list[tuple[str, Any]] = []
    for row in rows:
        if len(kept) < buffer:
            kept.append(row)
            continue
        chosen = int(numbers.integers(buffer))
        kept[chosen], row = row, kept[chosen]  # noqa: PLW2901
        yield row
    for chosen in numbers.permutation(len(kept)).tolist() if buffer > 1 else range(len(kept)):
        yield kept[chosen]


def _name_key(name: str) -> int:
    """Return a number that fits int64 and is never -1."""
    digest = hashlib.blake2b(name.encode("utf-8", errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _streamed_format(images: str) -> str:
    lower = images.lower()
    if lower.endswith((".tar.gz", ".tgz")):
        return "tar"
    return detect_format(images)
