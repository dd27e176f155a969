"""Packs: the pixels of the live path, finished after any interruption, and refused when wrong."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import typer
from data_samples import write_folder, write_shards
from typer.testing import CliRunner

from kuea_mllm.data import packing
from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.open import open_images
from kuea_mllm.data.pack import PackedImages
from kuea_mllm.data.packing import plan_pack, write_pack
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import DataError, EnvironmentFailure, OutputError, UnreadableImage

SIDE = 16
COUNT = 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 2)


@pytest.fixture
def source(tmp_path):
    return open_images(str(write_folder(tmp_path / "images", COUNT)))


def pack(source, out, transform=None, **options):
    # Four images in a file.
    options = {"workers": 1, "progress": False, "shard_bytes": 4 * 3 * SIDE**2} | options
    return write_pack(source, transform or ImageTransform(SIDE), out, described="x", **options)


@pytest.mark.parametrize("resize", ["shortest_edge", "squash"])
def test_packed_pixels_are_those_of_the_live_path(resize, source, tmp_path):
    transform = ImageTransform(SIDE, resize)
    pack(source, tmp_path / "p", transform)
    packed = open_images(str(tmp_path / "p"))
    assert isinstance(packed, PackedImages)
    live, stored = (ImageDataset(each, transform) for each in (source, packed))
    for position in range(COUNT):
        assert torch.equal(live[position]["pixels"], stored[position]["pixels"])
        assert live[position]["checksum"] == stored[position]["checksum"]
        assert packed.name(position) == source.name(position)
        # The picture of a pack, transformed again, is itself.
        assert np.array_equal(transform.to_uint8(packed.read(position)), packed.pixels(position))
    flips = [ImageDataset(each, transform, augment="flip") for each in (source, packed)]
    for draw in range(30):
        assert flips[0][draw]["checksum"] == flips[1][draw]["checksum"]


def test_pack_has_whole_files_and_a_record(source, tmp_path):
    packed = pack(source, tmp_path / "p")
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    shards = [f"pixels-{number:05}.npy" for number in range(3)]
    assert names == ["checksums.npy", "names.npz", "pack.json", *shards]
    assert packed.record["count"] == COUNT
    assert packed.record["source_fingerprint"] == source.fingerprint()
    assert packed.fingerprint() != source.fingerprint()
    assert not (tmp_path / "p.unfinished").exists()
    assert pack(source, tmp_path / "q").fingerprint() == packed.fingerprint()


def test_processes_pack_the_same_pixels(source, tmp_path, monkeypatch):
    # Spawned workers do not see the patched chunk size of this process.
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 256)
    folder = write_folder(tmp_path / "many", 260)
    many = open_images(str(folder))
    one = pack(many, tmp_path / "p", shard_bytes=1 << 30)
    two = pack(many, tmp_path / "q", shard_bytes=1 << 30, workers=2)
    assert one.fingerprint() == two.fingerprint()
    assert (tmp_path / "p" / "pixels-00000.npy").read_bytes() == (
        tmp_path / "q" / "pixels-00000.npy"
    ).read_bytes()


def test_interrupted_pack_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    expected = pack(source, tmp_path / "whole").fingerprint()
    original, reads = type(source).read, []

    def read(self, index):
        reads.append(index)
        if len(reads) == 6:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(type(source), "read", read)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    with pytest.raises(DataError, match="unfinished pack"):
        open_images(str(tmp_path / "p.unfinished"))
    reads.extend([0] * 10)
    del reads[:6]
    assert pack(source, tmp_path / "p").fingerprint() == expected
    assert min(reads[10:]) == 4  # chunks 0-1 and 2-3 are not read again


KILLED = """
import sys, time
from kuea_mllm.data import packing
from kuea_mllm.data.folder import FolderImages
from kuea_mllm.data.transforms import ImageTransform
from pathlib import Path
packing.CHUNK_IMAGES = 2
read = FolderImages.read
FolderImages.read = lambda self, index: (time.sleep(0.1), read(self, index))[1]
packing.write_pack(FolderImages(sys.argv[1]), ImageTransform(16), Path(sys.argv[2]),
                   described="x", workers=1, progress=False, shard_bytes=4 * 3 * 256)
"""


def test_killed_pack_is_finished_by_the_same_command(source, tmp_path):
    out = tmp_path / "p"
    arguments = [sys.executable, "-c", KILLED, str(source.folder), str(out)]
    process = subprocess.Popen(arguments)
    work = tmp_path / "p.unfinished"
    deadline = time.monotonic() + 120
    while len(list(work.glob("done-*.npy"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(OutputError, match="another process is packing"):
        pack(source, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert pack(source, out).fingerprint() == pack(source, tmp_path / "q").fingerprint()


def test_unfinished_pack_of_something_else_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "p")
    with pytest.raises(OutputError, match="with another transform"):
        pack(source, tmp_path / "p", ImageTransform(SIDE, "squash"))
    (tmp_path / "q.unfinished").mkdir()
    (tmp_path / "q.unfinished" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="is not an unfinished pack"):
        pack(source, tmp_path / "q")


def test_full_disk_is_refused_before_anything_is_decoded(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(EnvironmentFailure, match=r"needs .* GiB more, its disk has 0.00 GiB"):
        pack(source, tmp_path / "p")


def test_disk_that_fills_up_on_the_way_keeps_what_is_done(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing.np, "save", full)
        with pytest.raises(EnvironmentFailure, match=r"no space left .*p.unfinished"):
            pack(source, tmp_path / "p")
    assert len(pack(source, tmp_path / "p")) == COUNT


def test_unreadable_image_ends_the_pack_with_its_name(tmp_path):
    images = open_images(str(write_shards(tmp_path / "t", 1, 4, bad=(2,))))
    with pytest.raises(UnreadableImage, match=r"000.tar!00002.png"):
        pack(images, tmp_path / "p")


def test_pack_of_another_transform_is_refused(source, tmp_path):
    packed = pack(source, tmp_path / "p")
    for other in (ImageTransform(8), ImageTransform(SIDE, "squash")):
        with pytest.raises(DataError, match=r"holds crops of .*shortest_edge:16, the tower needs"):
            ImageDataset(packed, other)
    with pytest.raises(DataError, match="needs whole pictures"):
        ImageDataset(packed, ImageTransform(SIDE), augment="random_resized_crop")


def test_changed_pixels_are_noticed(source, tmp_path):
    packed = pack(source, tmp_path / "p")
    path = tmp_path / "p" / "pixels-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    packed = pickle.loads(pickle.dumps(packed))
    packed.pixels(6)
    with pytest.raises(UnreadableImage, match=r"007.png .*have changed"):
        packed.pixels(7)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "pixels-00001.npy").unlink(), "incomplete: pixels-00001.npy"),
        (lambda p: (p / "checksums.npy").unlink(), "is damaged"),
        (lambda p: (p / "names.npz").write_bytes(b"PK\x03\x04 no zip"), "is damaged"),
        (lambda p: np.save(p / "pixels-00001.npy", np.zeros(3)), "has the shape"),
        (
            lambda p: (p / "pixels-00000.npy").write_bytes(
                (p / "pixels-00000.npy").read_bytes()[:-9]
            ),
            "incomplete: pixels-00000.npy",
        ),
        (lambda p: (p / "pack.json").write_text('{"schema_version": 99}'), "schema_version 99"),
        (lambda p: (p / "pack.json").write_text('{"schema_version": 1}'), "lacks count"),
    ],
)
def test_damaged_pack_is_refused_when_it_is_opened(damage, words, source, tmp_path):
    pack(source, tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(DataError, match=words):
        open_images(str(tmp_path / "p"), format="pack")


def test_existing_output_is_never_overwritten(source, tmp_path):
    (tmp_path / "p").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        pack(source, tmp_path / "p")


def test_plan_keeps_files_below_four_gib_and_covers_all_images():
    plan = plan_pack(1_281_167, 336)
    assert plan.images_per_shard * 3 * 336**2 <= 4 << 30
    assert sum(plan.rows(shard) for shard in range(plan.shards)) == 1_281_167
    assert plan.total_bytes == 1_281_167 * 3 * 336**2
    assert plan.images_per_shard % packing.CHUNK_IMAGES == 0


def test_command_packs_and_prints_json(source, tmp_path):
    from kuea_mllm.cli.pack import pack as command

    app = typer.Typer()
    app.command()(command)
    arguments = ["--images", str(source.folder), "--size", "16", "--out", str(tmp_path / "p")]
    result = CliRunner().invoke(app, [*arguments, "--workers", "1", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["count"] == COUNT
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert os.listdir(tmp_path / "p")  # noqa: PTH208
