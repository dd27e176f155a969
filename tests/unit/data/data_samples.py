"""Small images in every format that the data path reads."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A noisy picture that no other number gives."""
    width, height = size
    noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(number: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(number, size).save(buffer, kind)
    return buffer.getvalue()


def write_folder(folder: Path, count: int, *, bad: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        data = b"not an image" if number in bad else encoded(number)
        (folder / f"{number:03}.png").write_bytes(data)
    return folder


def write_tar(path: Path, members: dict[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int, each: int, *, bad: tuple[int, ...] = ()) -> Path:
    for shard in range(shards):
        members = {}
        for number in range(shard * each, (shard + 1) * each):
            members[f"{number:05}.png"] = b"broken" if number in bad else encoded(number)
            members[f"{number:05}.txt"] = b"a caption that nobody reads"
        write_tar(folder / f"{shard:03}.tar", members)
    return folder


def write_parquet(
    path: Path, numbers: list[int], *, struct: bool = True, rows: int = 3, column: str = "image"
) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [encoded(number) for number in numbers]
    if struct:
        values = [{"bytes": cell, "path": "x.png"} for cell in cells]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    else:
        values, kind = cells, pa.binary()
    table = pa.table({column: pa.array(values, kind), "label": list(range(len(numbers)))})
    pq.write_table(table, path, row_group_size=rows)
    return path
