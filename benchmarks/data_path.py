"""Images per second and core through every kind of source, in one process.

    python benchmarks/data_path.py --count 400 --size 224

Realistic JPEGs (about 500 x 375 pixels, 110 KB) are generated into a temporary folder, so what is
measured is decoding and cropping with files in the page cache, not the disk. Every figure is the
median over repeats, each of which reads all images in random order (streams: shuffled shards).
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.open import open_images
from kuea_mllm.data.packing import write_pack
from kuea_mllm.data.streams import StreamImages, open_stream
from kuea_mllm.data.transforms import ImageTransform

WIDTH, HEIGHT, KILOBYTES = 500, 375, 110


def realistic_jpeg(number: int) -> bytes:
    """Return a JPEG with detail at every scale, of about the usual size of an ImageNet picture."""
    numbers = np.random.default_rng(number)
    total = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
    for level in range(1, 9):
        side = 2**level
        noise = numbers.standard_normal((side, side, 3)).astype(np.float32)
        scaled = [
            Image.fromarray(noise[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            for channel in range(3)
        ]
        total += np.stack([np.asarray(each) for each in scaled], axis=-1) / level
    total = 128 + 50 * total / total.std() + 20 * numbers.standard_normal(total.shape)
    image = Image.fromarray(total.clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_sources(folder: Path, count: int, transform: ImageTransform) -> dict[str, str]:
    """Write the same images in every format; return what to open."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [realistic_jpeg(number) for number in range(count)]
    print(f"{count} JPEGs of {sum(map(len, data)) / count / 1000:.0f} KB on average")
    (folder / "images").mkdir()
    (folder / "tar").mkdir()
    for number, content in enumerate(data):
        (folder / "images" / f"{number:06}.jpg").write_bytes(content)
    each = -(-count // 4)
    for shard in range(4):
        with tarfile.open(folder / "tar" / f"{shard:03}.tar", "w") as tar:
            for number in range(shard * each, min(count, (shard + 1) * each)):
                info = tarfile.TarInfo(f"{number:06}.jpg")
                info.size = len(data[number])
                tar.addfile(info, io.BytesIO(data[number]))
    cells = [{"bytes": content, "path": None} for content in data]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind)})
    pq.write_table(table, folder / "images.parquet", row_group_size=100)
    source = open_images(str(folder / "images"))
    pack = folder / "pack"
    write_pack(source, transform, pack, described="images", workers=1, progress=False)
    return {
        "folder": str(folder / "images"),
        "tar": str(folder / "tar"),
        "parquet": str(folder / "images.parquet"),
        "pack": str(pack),
    }


def by_position(images: str, transform: ImageTransform) -> Callable[[int], Iterator[object]]:
    """Read every image of a source in random order."""
    dataset = ImageDataset(open_images(images), transform)

    def read(repeat: int) -> Iterator[object]:
        order = np.random.default_rng(repeat).permutation(len(dataset))
        return (dataset[int(position)] for position in order)

    return read


def streamed(images: str, transform: ImageTransform) -> Callable[[int], Iterator[object]]:
    """Read a stream front to back."""
    return lambda repeat: iter(StreamImages(open_stream(images), transform, seed=repeat))


def main() -> None:
    """Measure, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transform = ImageTransform(options.size)
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(Path(folder), options.count, transform)
        readers = {name: by_position(images, transform) for name, images in sources.items()}
        readers["tar, stream"] = streamed(sources["tar"], transform)
        readers["parquet, stream"] = streamed(sources["parquet"], transform)
        # Repeats outside, so that a busy moment of the machine does not hit one source only.
        for repeat in range(options.repeats):
            for name, reader in readers.items():
                started = time.process_time()
                read = sum(1 for _ in islice(reader(repeat), options.count))
                seconds = time.process_time() - started
                figures.setdefault(name, []).append(read / seconds)
    print(f"\n{'source':<16} {'images/s per core':>18} {'repeats':>24}")
    for name, rates in figures.items():
        shown = " ".join(f"{rate:.0f}" for rate in rates)
        print(f"{name:<16} {statistics.median(rates):>18.0f} {shown:>24}")
    if options.json:
        record = {
            "count": options.count,
            "image_size": options.size,
            "jpeg": {"width": WIDTH, "height": HEIGHT, "kilobytes": KILOBYTES},
            "clock": "CPU seconds of the process",
            "images_per_second_and_core": figures,
            "python": sys.version.split()[0],
            "machine": platform.machine(),
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
