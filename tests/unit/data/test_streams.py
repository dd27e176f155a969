"""Streams: every image once an epoch, the same order again, and never a silent end."""

from __future__ import annotations

import functools
import gzip
import http.server
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from data_samples import encoded, picture, write_folder, write_parquet, write_shards, write_tar

from kuea_mllm.data.source import as_raised_in_worker
from kuea_mllm.data.streams import StreamImages, open_stream
from kuea_mllm.data.tar_index import read_members
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.data.unreadable import UnreadableCounter
from kuea_mllm.errors import DataError, EnvironmentFailure, UnreadableImage

# What is right must not depend on how many cores the machine has.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SIDE = 8
TRANSFORM = ImageTransform(SIDE)
SHARDS, EACH = 6, 4
COUNT = SHARDS * EACH


@functools.cache
def checksum(number):
    import zlib

    return zlib.crc32(TRANSFORM.to_uint8(picture(number)).tobytes())


def expected(numbers=range(COUNT)):
    return sorted(checksum(number) for number in numbers)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", SHARDS, EACH)


def stream(source, **options):
    rows = open_stream(str(source)) if not hasattr(source, "rows") else source
    return StreamImages(rows, TRANSFORM, **({"shuffle_buffer": 5} | options))


def take(images, count):
    return [item["checksum"] for item in islice(images, count)]


def make(kind, folder):
    if kind == "tar":
        return write_shards(folder, SHARDS, EACH)
    if kind == "parquet":
        write_parquet(folder / "a.parquet", list(range(COUNT)), rows=EACH)
        return folder
    import datasets

    cells = [{"bytes": encoded(number), "path": None} for number in range(COUNT)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", ["tar", "parquet", "dataset"])
def test_ranks_and_workers_share_each_epoch_without_overlap(kind, tmp_path):
    images = make(kind, tmp_path / "s")
    found = []
    for rank in range(2):
        # Three shards for each rank, or an even part of a saved data set.
        loader = torch.utils.data.DataLoader(
            stream(images, rank=rank, world_size=2),
            batch_size=EACH,
            num_workers=3,
            multiprocessing_context="fork",
        )
        for batch in islice(loader, 3):
            assert batch["index"].tolist() == [-1] * EACH
            assert batch["pixels"].dtype == torch.uint8
            found += batch["checksum"].tolist()
    assert sorted(found) == expected()


def test_order_is_that_of_the_seed_and_another_every_epoch(shards):
    first = take(stream(shards), 2 * COUNT)
    assert take(stream(shards), 2 * COUNT) == first
    assert take(stream(shards, seed=1), COUNT) != first[:COUNT]
    assert sorted(first[:COUNT]) == sorted(first[COUNT:]) == expected()
    assert first[:COUNT] != first[COUNT:]


def test_buffer_of_one_keeps_the_order_within_shards(shards):
    found = take(stream(shards, shuffle_buffer=1), COUNT)
    for start in range(0, COUNT, EACH):
        numbers = [[checksum(n) for n in range(COUNT)].index(each) for each in found[start:][:EACH]]
        assert numbers == list(range(numbers[0], numbers[0] + EACH))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("batches", [1, 4, 11])
def test_resumed_stream_goes_on_as_if_it_had_not_stopped(shards, workers, batches):
    def loader(images):
        context = "fork" if workers else None
        return torch.utils.data.DataLoader(
            images, batch_size=3, num_workers=workers, multiprocessing_context=context
        )

    whole = [
        batch["checksum"].tolist()
        for batch in islice(loader(stream(shards, augment="random_resized_crop")), 14)
    ]
    resumed = stream(shards, augment="random_resized_crop")
    resumed.resume_at(3 * batches, batch_size=3)
    rest = [batch["checksum"].tolist() for batch in islice(loader(resumed), 14 - batches)]
    assert rest == whole[batches:]


def test_resumed_stream_counts_only_readable_images(tmp_path):
    images = write_shards(tmp_path / "s", 3, 4, bad=(1, 6))
    whole = take(stream(images, skip_unreadable=2), 30)
    resumed = stream(images, skip_unreadable=2)
    resumed.resume_at(12, batch_size=4)
    assert take(resumed, 18) == whole[12:]
    with pytest.raises(ValueError, match="whole batches"):
        resumed.resume_at(13, batch_size=4)


def test_unreadable_images_are_named_in_the_main_process(tmp_path):
    images = write_shards(tmp_path / "s", 4, 4, bad=(1, 6, 7))
    loader = torch.utils.data.DataLoader(
        stream(images, skip_unreadable=3), batch_size=4, num_workers=2,
        multiprocessing_context="fork",
    )  # fmt: skip
    counter = UnreadableCounter(3)
    for batch in islice(loader, 30):
        counter.update(batch)
    names = [name.rpartition("/")[2] for name in counter.report()["images"]]
    assert names == ["000.tar!00001.png", "001.tar!00006.png", "001.tar!00007.png"]


def test_unreadable_image_ends_the_stream_by_default_or_past_the_limit(tmp_path):
    images = write_shards(tmp_path / "s", 1, 4, bad=(1, 2))
    with pytest.raises(UnreadableImage, match=r"000.tar!0000[12].png"):
        take(stream(images), 4)
    with pytest.raises(UnreadableImage, match="2 images cannot be read, 1 are allowed"):
        take(stream(images, skip_unreadable=1), 4)


@pytest.mark.parametrize("how", ["member", "between", "header"])
def test_shard_broken_in_the_middle_is_named_and_does_not_end_the_epoch(how, shards):
    path = shards / "003.tar"
    members = list(read_members(str(path)))
    data = bytearray(path.read_bytes())
    if how == "member":
        del data[members[2].offset + 10 :]
    elif how == "between":
        del data[members[4].offset - 512 :]
    else:
        data[members[4].offset - 512 :][:8] = b""
        data[members[4].offset - 512 : members[4].offset - 500] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"003.tar is damaged at byte \d+"):
        take(stream(shards), COUNT)


def test_error_of_a_shard_in_a_worker_is_one_line_again(shards):
    path = shards / "003.tar"
    path.write_bytes(path.read_bytes()[:-8000])
    loader = torch.utils.data.DataLoader(
        stream(shards), batch_size=4, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(DataError) as caught:
        list(islice(loader, SHARDS))
    assert as_raised_in_worker(caught.value).problem.startswith(f"shard {path} is damaged")


def test_gzip_shards_are_read_and_their_damage_noticed(tmp_path):
    plain = write_tar(tmp_path / "x.tar", {f"{n}.png": encoded(n) for n in range(4)})
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert sorted(take(stream(packed), 4)) == expected(range(4))
    packed.write_bytes(packed.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"x.tar.gz is damaged"):
        take(stream(packed), 4)


@pytest.fixture
def server(shards):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if "cut" in self.path:
                data = (shards / "000.tar").read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:5000])
                self.close_connection = True
                return
            super().do_GET()

    handler = functools.partial(Quiet, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_shards_behind_urls_are_read(server, shards):
    remote = stream(f"{server}/{{000..005}}.tar")
    assert take(remote, 2 * COUNT) == take(stream(shards), 2 * COUNT)


@pytest.mark.parametrize("name", ["absent.tar", "cut.tar"])
def test_url_that_fails_names_the_shard(name, server):
    with pytest.raises((EnvironmentFailure, DataError), match=rf"shard {server}/{name}"):
        take(stream(f"{server}/{name}"), COUNT)


def test_programs_only_run_when_they_are_allowed(shards):
    command = f"pipe:cat {shards}/{{000..005}}.tar"
    with pytest.raises(DataError, match="would run a program"):
        open_stream(command)
    allowed = StreamImages(open_stream(command, allow_pipes=True), TRANSFORM, shuffle_buffer=5)
    assert sorted(take(allowed, COUNT)) == expected()
    failing = open_stream("pipe:cat /absent.tar 2>/dev/null", allow_pipes=True)
    with pytest.raises((EnvironmentFailure, DataError), match=r"shard pipe:cat /absent.tar"):
        take(StreamImages(failing, TRANSFORM), 1)


def test_parquet_stream_reads_its_split_only(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "test-0.parquet", [2])
    rows = open_stream(str(tmp_path), split="test")
    assert take(StreamImages(rows, TRANSFORM), 2) == [checksum(2)] * 2


def test_file_that_is_called_like_a_program_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "pipe:touch ran;.tar", {"1.png": encoded(0)})
    assert take(stream("."), 1) == [checksum(0)]
    assert not (tmp_path / "ran").exists()


def test_more_readers_than_shards_are_refused_with_a_number(shards):
    with pytest.raises(DataError, match=r"6 shards, fewer than 2 ranks x 4 workers") as caught:
        stream(shards, world_size=2).require_workers(4)
    assert "data.workers to 3" in caught.value.remedy
    stream(shards, world_size=2).require_workers(3)


def test_stream_without_an_image_is_an_error_and_no_endless_loop(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match="gave no image"):
        take(stream(tmp_path), 1)


def test_extension_chooses_among_members(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": encoded(0), "1.seg.png": encoded(1)})
    rows = open_stream(str(tmp_path), column="seg.png")
    assert take(StreamImages(rows, TRANSFORM), 2) == [checksum(1)] * 2


def test_folder_is_no_stream(tmp_path):
    with pytest.raises(DataError, match="by position"):
        open_stream(str(write_folder(tmp_path / "f", 1)))


def test_rows_of_parquet_are_read_once_for_each_group(tmp_path, monkeypatch):
    rows = open_stream(str(make("parquet", tmp_path / "s")))
    reads = []
    original = rows.images._read_group
    monkeypatch.setattr(
        rows.images, "_read_group", lambda *place: (reads.append(place), original(*place))[1]
    )
    assert sorted(take(stream(rows), COUNT)) == expected()
    assert len(reads) == SHARDS
    assert np.unique(reads, axis=0).shape == (SHARDS, 2)
