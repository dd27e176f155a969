"""Make a pack: decode and crop every image once, on all cores, and go on after an interruption."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from kuea_mllm.data.pack import (
    CHECKSUMS_FILE,
    NAMES_FILE,
    PACK_FILE,
    PACK_VERSION,
    PackedImages,
    shard_file,
)
from kuea_mllm.data.source import ImageSource, Names
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import DataError, EnvironmentFailure, OutputError
from kuea_mllm.io import require_free_output, write_json
from kuea_mllm.log import LOGGER
from kuea_mllm.manifest import current_command, library_versions, utc_now

SHARD_BYTES = 4 << 30
CHUNK_IMAGES = 256
_PLAN_FILE = "plan.json"
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class PackPlan:
    """What a pack will be, known before an image is read.

    Attributes:
        count: Images.
        image_size: Side of the crops.
        images_per_shard: Rows of every shard but the last.
        total_bytes: Size of all pixels.
    """

    count: int
    image_size: int
    images_per_shard: int
    total_bytes: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.images_per_shard)

    def rows(self, shard: int) -> int:
        """Images in one shard."""
        return min(self.images_per_shard, self.count - shard * self.images_per_shard)


def plan_pack(count: int, image_size: int, *, shard_bytes: int = SHARD_BYTES) -> PackPlan:
    """Work out shards and disk need."""
    each = 3 * image_size * image_size
    # Whole chunks, so that no chunk lies in two shards.
    per_shard = max(1, shard_bytes // each // CHUNK_IMAGES) * CHUNK_IMAGES
    return PackPlan(count, image_size, per_shard, count * each)


def write_pack(
    source: ImageSource,
    transform: ImageTransform,
    out: Path,
    *,
    described: str,
    workers: int,
    progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> PackedImages:
    """Write a pack; a second call with the same arguments finishes an interrupted one.

    Args:
        source: What to pack.
        transform: What to do to each image.
        out: Folder to create; work is done in OUT.unfinished beside it.
        described: How `source` was named, for the record.
        workers: Processes.
        progress: Show a bar.
        shard_bytes: Size of one file of pixels, at most.

    Raises:
        OutputError: If `out` exists, or OUT.unfinished is of another pack.
        EnvironmentFailure: If the disk has not enough space.
        UnreadableImage: At the first image that cannot be read; what is done is kept.
    """
    require_free_output(out)
    plan = plan_pack(len(source), transform.image_size, shard_bytes=shard_bytes)
    work = out.with_name(f"{out.name}.unfinished")
    with _full_disk_named(work):
        work.mkdir(parents=True, exist_ok=True)
        with _only_one(work):
            _settle_plan(work, source, transform, plan)
            _require_space(work, plan)
            _allocate(work, plan)
            _write_chunks(source, transform, work, plan, workers=workers, progress=progress)
            _finish(source, transform, work, plan, described)
        work.replace(out)
    return PackedImages(out)


def _settle_plan(
    work: Path, source: ImageSource, transform: ImageTransform, plan: PackPlan
) -> None:
    """Write down what the unfinished folder is for, or check that it is for the same."""
    wanted = {
        "schema_version": PACK_VERSION,
        "source": source.fingerprint(),
        "transform": transform.fingerprint,
        "count": plan.count,
        "images_per_shard": plan.images_per_shard,
        "chunk_images": CHUNK_IMAGES,
    }
    path = work / _PLAN_FILE
    if not path.exists():
        if any(each.name != _LOCK_FILE for each in work.iterdir()):
            raise OutputError(f"folder {work} exists and is not an unfinished pack.", "Remove it.")
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        found = {}
    different = [key for key, value in wanted.items() if found.get(key) != value]
    if different:
        raise OutputError(
            f"{work} is an unfinished pack with another {', '.join(different)}.",
            "Remove it to start again, or choose another --out.",
        )


def _require_space(work: Path, plan: PackPlan) -> None:
    # st_blocks counts what is really there: files are allocated in full but filled bit by bit.
    there = sum(each.stat().st_blocks * 512 for each in work.iterdir() if each.is_file())
    need = max(0, plan.total_bytes - there) + min(_SPARE_BYTES, plan.total_bytes)
    free = shutil.disk_usage(work).free
    LOGGER.info(
        "%d images as %d x %d uint8 need %.2f GiB in %d shards; %.2f GiB are free",
        plan.count,
        plan.image_size,
        plan.image_size,
        plan.total_bytes / 2**30,
        plan.shards,
        free / 2**30,
    )
    if need > free:
        raise EnvironmentFailure(
            f"{work} needs {need / 2**30:.2f} GiB more, its disk has {free / 2**30:.2f} GiB free.",
            "Free some space, choose another --out, or pack fewer images.",
        )


def _allocate(work: Path, plan: PackPlan) -> None:
    """Create every shard in full size, without writing its pixels."""
    for number in range(plan.shards):
        path = work / shard_file(number)
        shape = (plan.rows(number), 3, plan.image_size, plan.image_size)
        if not path.exists():
            partial = path.with_suffix(".partial")
            np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape).flush()
            _reserve(partial)
            partial.replace(path)


def _reserve(path: Path) -> None:
    # Writing to a memory map ends the process without a word when the disk is full, so the space
    # is taken before. macOS has no such call; `_require_space` has to do there.
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _write_chunks(
    source: ImageSource,
    transform: ImageTransform,
    work: Path,
    plan: PackPlan,
    *,
    workers: int,
    progress: bool,
) -> None:
    starts = range(0, plan.count, CHUNK_IMAGES)
    todo = [start for start in starts if not _chunk_file(work, start).exists()]
    done = plan.count - sum(min(CHUNK_IMAGES, plan.count - start) for start in todo)
    if done:
        LOGGER.info("%d of %d images are packed already", done, plan.count)
    task = (source, transform, work, plan)
    with tqdm(None, "pack", plan.count, unit="image", initial=done, disable=not progress) as bar:
        for packed in _run(task, todo, workers=min(workers, len(todo))):
            bar.update(packed)


def _run(task: _Task, starts: Sequence[int], *, workers: int) -> Iterator[int]:
    """Pack chunks, here or in processes; yield the number of images of each."""
    if workers <= 1:
        _prepare(task)
        yield from map(_pack_chunk, starts)
        return
    # Spawned: a fork of a process whose libraries run threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(task,)) as pool:
        jobs = [pool.submit(_pack_chunk, start) for start in starts]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BrokenProcessPool as error:
            raise EnvironmentFailure(
                "a packing process was killed, most likely for lack of memory.",
                "What is done is kept: run the same command again with fewer --workers.",
            ) from error
        finally:
            for job in jobs:
                job.cancel()


_Task = tuple[ImageSource, ImageTransform, Path, PackPlan]
_TASK: list[_Task] = []


def _prepare(task: _Task) -> None:
    torch.set_num_threads(1)
    _TASK[:] = [task]


def _pack_chunk(start: int) -> int:
    """Pack one chunk and record it; in a worker process."""
    source, transform, work, plan = _TASK[0]
    stop = min(start + CHUNK_IMAGES, plan.count)
    shard, row = divmod(start, plan.images_per_shard)
    stored = np.load(work / shard_file(shard), mmap_mode="r+")
    checksums = np.empty(stop - start, dtype=np.uint32)
    for number in range(stop - start):
        pixels = transform.to_uint8(source.read(start + number))
        stored[row + number] = pixels
        checksums[number] = zlib.crc32(pixels.data)
    # The pixels are on the disk before the record that says so.
    stored.flush()
    path = _chunk_file(work, start)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, checksums)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return stop - start


def _chunk_file(work: Path, start: int) -> Path:
    return work / f"done-{start:010}.npy"


def _finish(
    source: ImageSource, transform: ImageTransform, work: Path, plan: PackPlan, described: str
) -> None:
    chunks = [_chunk_file(work, start) for start in range(0, plan.count, CHUNK_IMAGES)]
    checksums = np.concatenate([np.load(path) for path in chunks])
    if len(checksums) != plan.count:
        raise DataError(f"{work} has records of {len(checksums)} of {plan.count} images.")
    names = Names([os.fsencode(source.name(index)) for index in range(plan.count)])
    np.save(work / CHECKSUMS_FILE, checksums)
    np.savez(work / NAMES_FILE, text=names.text, ends=names.ends)
    listing = source.fingerprint()
    content = f"{listing}\0{transform.fingerprint}\0".encode() + checksums.astype("<u4").tobytes()
    write_json(
        work / PACK_FILE,
        {
            "schema_version": PACK_VERSION,
            "kind": "pack",
            "count": plan.count,
            "image_size": plan.image_size,
            "images_per_shard": plan.images_per_shard,
            "pixel_bytes": plan.total_bytes,
            "transform": transform.fingerprint,
            "source": described,
            "source_fingerprint": listing,
            "fingerprint": f"sha256:{hashlib.sha256(content).hexdigest()}",
            "names": NAMES_FILE,
            "checksums": CHECKSUMS_FILE,
            "versions": library_versions(),
            "command": current_command(),
            "created": utc_now(),
        },
    )
    for path in [*chunks, work / _PLAN_FILE, work / _LOCK_FILE, *work.glob("*.partial*")]:
        path.unlink(missing_ok=True)


_LOCK_FILE = "lock"


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Keep a second process from packing into the same folder; a killed one leaves no lock."""
    with (work / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another process is packing into {work}.", "Wait for it, or choose another --out."
            ) from error
        yield


@contextmanager
def _full_disk_named(work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise EnvironmentFailure(
            f"no space left on device while writing {work}.",
            "Free some space and run the same command again: what is done is kept.",
        ) from error


def describe(pack: PackedImages) -> dict[str, Any]:
    """Return what is worth telling about a finished pack."""
    keys = ("count", "image_size", "transform", "pixel_bytes", "source", "fingerprint")
    return {"pack": str(pack.folder), **{key: pack.record[key] for key in keys}}
