"""Every place that images can come from: the same pictures, and clear words when it is broken."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import encoded, picture, write_folder, write_parquet, write_shards, write_tar
from PIL import ImageFile

from kuea_mllm.data.dataset import ImageDataset
from kuea_mllm.data.folder import FolderImages, ListedImages
from kuea_mllm.data.huggingface import DatasetImages
from kuea_mllm.data.open import detect_format, open_images
from kuea_mllm.data.parquet import ParquetImages
from kuea_mllm.data.source import Names, check_images
from kuea_mllm.data.tar import TarImages
from kuea_mllm.data.tar_index import read_members
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import DataError, UnreadableImage

COUNT = 7


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(folder))
    return folder


def save_dataset(folder: Path, count: int) -> Path:
    import datasets

    cells = [{"bytes": encoded(number), "path": None} for number in range(count)]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    data = {"picture": cells, "label": list(range(count))}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(folder)
    return folder


def make(kind: str, folder: Path) -> str:
    """Write COUNT pictures; return what `open_images` takes."""
    if kind == "folder":
        return str(write_folder(folder, COUNT))
    if kind == "list":
        write_folder(folder / "pictures", COUNT)
        lines = ["# pictures", ""] + [f"pictures/{number:03}.png" for number in range(COUNT)]
        (folder / "list.txt").write_text("\n".join(lines))
        return str(folder / "list.txt")
    if kind == "tar":
        members = {f"a/{n:03}.png": encoded(n) for n in range(4)}
        write_tar(folder / "00.tar", members)
        write_tar(folder / "01.tar", {f"b/{n:03}.png": encoded(n) for n in range(4, COUNT)})
        return str(folder / "{00..01}.tar")
    if kind == "parquet":
        write_parquet(folder / "train-0.parquet", [0, 1, 2, 3])
        write_parquet(folder / "train-1.parquet", [4, 5, 6])
        return str(folder)
    if kind == "binary parquet":
        return str(write_parquet(folder / "x.parquet", list(range(COUNT)), struct=False))
    return str(save_dataset(folder, COUNT))


KINDS = ["folder", "list", "tar", "parquet", "binary parquet", "dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_pictures_in_order(kind, tmp_path):
    source = open_images(make(kind, tmp_path / "a"))
    assert len(source) == COUNT
    for index in range(COUNT):
        assert np.array_equal(np.asarray(source.read(index)), np.asarray(picture(index)))
    assert len({source.name(index) for index in range(COUNT)}) == COUNT
    with pytest.raises(IndexError):
        source.name(COUNT)
        source.read(COUNT)


@pytest.mark.parametrize("kind", KINDS)
def test_source_survives_pickling_and_forked_workers(kind, tmp_path):
    source = open_images(make(kind, tmp_path / "a"))
    source.read(3)  # whatever is opened lazily is open now
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(np.asarray(copy.read(5)), np.asarray(picture(5)))
    dataset = ImageDataset(source, ImageTransform(16))
    expected = {index: dataset[index]["checksum"] for index in range(COUNT)}
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    found = {}
    for batch in loader:
        found |= dict(zip(batch["index"].tolist(), batch["checksum"].tolist(), strict=True))
    assert found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_is_stable_and_tells_listings_apart(kind, tmp_path):
    images = make(kind, tmp_path / "a")
    first = open_images(images).fingerprint()
    assert first.startswith("sha256:")
    assert open_images(images).fingerprint() == first
    other = {
        "folder": lambda: (tmp_path / "a" / "zz.png").write_bytes(encoded(9)),
        "list": lambda: (tmp_path / "a" / "list.txt").write_text("pictures/001.png\n"),
        "tar": lambda: write_tar(tmp_path / "a" / "01.tar", {"b/004.png": encoded(1)}),
        "parquet": lambda: write_parquet(tmp_path / "a" / "train-1.parquet", [4, 5]),
        "binary parquet": lambda: write_parquet(tmp_path / "a" / "x.parquet", [1, 2], struct=False),
    }
    if kind in other:
        other[kind]()
        assert open_images(images).fingerprint() != first


def test_names_table_equals_a_list():
    names = [b"a", b"", b"long" * 100, b"\xff\xfe", b"end\0"]
    table = Names(names)
    assert list(table) == names
    with pytest.raises(IndexError):
        table[len(names)]


# Lists


def test_list_names_the_line_of_a_missing_file(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "l.txt").write_text("# head\n000.png\n\nabsent.png\nalso.png\n")
    with pytest.raises(DataError, match=r"l.txt, line 4: file absent.png .*2 such lines"):
        ListedImages(tmp_path / "l.txt")


def test_list_takes_absolute_paths_spaces_and_windows_line_ends(tmp_path):
    write_folder(tmp_path / "p", 2)
    (tmp_path / "p" / "a b.png").write_bytes(encoded(0))
    text = f"\ufeff{tmp_path / 'p' / '001.png'}\r\np/a b.png\r\n"
    (tmp_path / "l.txt").write_text(text, encoding="utf-8", newline="")
    source = ListedImages(tmp_path / "l.txt")
    assert source.name(0) == str(tmp_path / "p" / "001.png")
    assert source.name(1) == str(tmp_path / "p" / "a b.png")


def test_list_without_a_path_is_refused(tmp_path):
    (tmp_path / "l.txt").write_text("# nothing\n\n")
    with pytest.raises(DataError, match="names no image"):
        ListedImages(tmp_path / "l.txt")
    with pytest.raises(DataError, match="cannot be read"):
        ListedImages(tmp_path / "absent.txt")


# Folders


def test_folder_keeps_names_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.png")
    path.write_bytes(encoded(0))
    source = FolderImages(tmp_path)
    assert source.name(0) == str(path)
    assert source.read(0).size == (40, 30)


def test_folder_follows_links_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "a" / "b", 2)
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / "a")
    write_folder(tmp_path / "other", 1)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "other")
    assert len(FolderImages(tmp_path / "a")) == 3


def test_folder_fingerprint_names_a_file_that_vanished(tmp_path):
    source = FolderImages(write_folder(tmp_path, 2))
    (tmp_path / "001.png").unlink()
    with pytest.raises(DataError, match=r"001.png was removed"):
        source.fingerprint()


# Tar shards


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(format, tmp_path):
    prefix = "d" * 60 + "/" + "e" * 50
    long = f"{prefix}/{'x' * 90}.png" if format == tarfile.USTAR_FORMAT else "y" * 300 + ".png"
    members = {"a.png": encoded(0), long: encoded(1), "empty.png": b"", "z.PNG": encoded(2)}
    if format == tarfile.PAX_FORMAT:
        members["bildér.png"] = encoded(3)
    path = write_tar(tmp_path / "s.tar", members, format=format)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    found = [(os.fsdecode(m.name), m.offset, m.size) for m in read_members(str(path))]
    assert found == expected


def test_sparse_entries_links_and_folders_are_passed_over(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x" * 200
        tar.addfile(link)
    write_tar(tmp_path / "t.tar", {"a.png": encoded(0), "._a.png": b"x", "a.txt": b"x"})
    source = TarImages([str(path), str(tmp_path / "t.tar")])
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path / 't.tar'}!a.png"]


def test_shard_cut_in_a_member_names_byte_and_last_whole_member(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.png": encoded(0), "b.png": encoded(1)})
    second = list(read_members(str(path)))[1]
    with path.open("r+b") as file:
        file.truncate(second.offset + second.size - 1)
    pattern = rf"s.tar is damaged at byte {second.offset - 512}: member b.png needs .* a.png"
    with pytest.raises(DataError, match=pattern):
        TarImages([str(path)])


@pytest.mark.parametrize("extra", [0, 100])
def test_shard_cut_between_members_is_noticed(extra, tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.png": encoded(0), "b.png": encoded(1)})
    second = list(read_members(str(path)))[1]
    with path.open("r+b") as file:
        file.truncate(second.offset - 512 + extra)
    with pytest.raises(DataError, match=r"without the end mark.*last whole member is a.png"):
        TarImages([str(path)])


def test_shard_with_a_damaged_header_is_not_taken_for_its_end(tmp_path):
    path = write_tar(tmp_path / "s.tar", {f"{n}.png": encoded(n) for n in range(3)})
    second = list(read_members(str(path)))[1]
    with path.open("r+b") as file:
        file.seek(second.offset - 512)
        file.write(b"garbage")
    with pytest.raises(DataError, match=rf"byte {second.offset - 512}: there is no valid .* 0.png"):
        TarImages([str(path)])


def test_shard_with_a_hole_of_zeros_is_not_taken_for_its_end(tmp_path):
    path = write_tar(tmp_path / "s.tar", {f"{n}.png": encoded(n) for n in range(3)})
    second = list(read_members(str(path)))[1]
    with path.open("r+b") as file:
        file.seek(second.offset - 512)
        file.write(bytes(1024))
    with pytest.raises(DataError, match="the file goes on"):
        TarImages([str(path)])


def test_compressed_or_foreign_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"(?s)compressed.*data.stream=true"):
        TarImages([str(tmp_path / "s.tar")])
    (tmp_path / "t.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"t.tar is damaged at byte 0.*is none"):
        TarImages([str(tmp_path / "t.tar")])
    (tmp_path / "e.tar").write_bytes(b"")
    with pytest.raises(DataError, match="cut short"):
        TarImages([str(tmp_path / "e.tar")])


def test_index_is_kept_and_made_again_when_the_shard_changes(tmp_path, cache, monkeypatch):
    path = write_tar(tmp_path / "s.tar", {"a.png": encoded(0)})
    TarImages([str(path)])
    kept = list((cache / "tar_index").iterdir())
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr("kuea_mllm.data.tar_index.read_members", lambda path: pytest.fail("read"))
        assert np.array_equal(np.asarray(TarImages([str(path)]).read(0)), np.asarray(picture(0)))
    write_tar(path, {"a.png": encoded(1), "b.png": encoded(2)})
    assert len(TarImages([str(path)])) == 2
    for each in (cache / "tar_index").iterdir():
        each.write_bytes(each.read_bytes()[:50])
    assert len(TarImages([str(path)])) == 2


def test_unwritable_cache_only_costs_time(tmp_path, cache):
    (cache / "tar_index").write_text("a file where a folder should be")
    path = write_tar(tmp_path / "s.tar", {"a.png": encoded(0)})
    assert len(TarImages([str(path)])) == 1


def test_extension_chooses_among_the_members_of_a_sample(tmp_path):
    members = {"1.jpg": encoded(0, kind="JPEG"), "1.seg.png": encoded(1), "2.jpg": encoded(2)}
    write_tar(tmp_path / "s.tar", members)
    source = open_images(str(tmp_path), column="seg.png")
    assert [source.name(i).rpartition("!")[2] for i in range(len(source))] == ["1.seg.png"]
    with pytest.raises(DataError, match="no member with the extension bmp"):
        open_images(str(tmp_path), column="bmp")


def test_damaged_member_is_named(tmp_path, monkeypatch):
    # As lmms-eval does for the whole process when it is imported.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = write_tar(tmp_path / "s.tar", {"a.png": encoded(0)[:60], "b.png": encoded(1)})
    source = TarImages([str(path)])
    with pytest.raises(UnreadableImage, match=r"s.tar!a.png cannot be read"):
        source.read(0)
    path.write_bytes(path.read_bytes()[:1600])
    with pytest.raises(UnreadableImage, match=r"s.tar!b.png.*shorter"):
        source.read(1)


def test_many_shards_do_not_exhaust_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("kuea_mllm.data.handles.OPEN_FILES", 3)
    write_shards(tmp_path, 20, 1)
    source = open_images(str(tmp_path))
    problems = [problem for _, problem in check_images(source) if problem]
    assert problems == []
    assert len(source._files._open) == 3


# Parquet


def test_missing_column_names_the_columns_there_are(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0])
    with pytest.raises(DataError, match=r"no column jpg: image \(struct.*label \(int64\)"):
        ParquetImages([str(path)], column="jpg")
    with pytest.raises(DataError, match=r"column label is int64, not binary"):
        ParquetImages([str(path)], column="label")


def test_several_binary_columns_need_a_choice(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [encoded(0)]
    pq.write_table(pa.table({"a": cells, "b": cells}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"several columns.*a \(binary\), b"):
        open_images(str(tmp_path))
    assert len(open_images(str(tmp_path), column="b")) == 1


def test_parquet_cut_short_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0, 1])
    path = write_parquet(tmp_path / "b.parquet", [2, 3])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"b.parquet cannot be opened"):
        open_images(str(tmp_path))


def test_parquet_row_without_bytes_is_unreadable_and_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": encoded(0), "path": "a"}, {"bytes": None, "path": "b"}, None]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "a.parquet")
    source = open_images(str(tmp_path))
    for row in (1, 2):
        with pytest.raises(UnreadableImage, match=rf"a.parquet!{row} .*no bytes"):
            source.read(row)


def test_parquet_keeps_few_row_groups_and_names_rows_within_their_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", list(range(10)), rows=1)
    write_parquet(tmp_path / "b.parquet", list(range(10, 15)), rows=2)
    source = open_images(str(tmp_path))
    for index in range(15):
        assert np.array_equal(np.asarray(source.read(index)), np.asarray(picture(index)))
    assert len(source._groups) == 4
    assert source.name(13) == f"{tmp_path / 'b.parquet'}!3"


def test_only_the_files_of_the_split_are_read(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [0, 1])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [2])
    assert len(open_images(str(tmp_path))) == 2
    assert len(open_images(str(tmp_path), split="test")) == 1


# Hugging Face data sets


def test_dataset_names_missing_split_and_column(tmp_path):
    folder = str(save_dataset(tmp_path / "d", 2))
    with pytest.raises(DataError, match=r"no column img: picture \(Image\), label"):
        DatasetImages(folder, column="img")
    import datasets

    datasets.DatasetDict({"val": datasets.load_from_disk(folder)}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match="no split train, only val"):
        open_images(str(tmp_path / "dict"))
    assert len(open_images(str(tmp_path / "dict"), split="val")) == 2


def test_dataset_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"data set .*x cannot be opened \(split train\)"):
        open_images(str(tmp_path / "x"), format="dataset")


# What is it?


def test_format_is_told_by_name_and_content(tmp_path):
    write_folder(tmp_path / "f", 1)
    write_shards(tmp_path / "t", 1, 1)
    assert detect_format(str(tmp_path / "f")) == "folder"
    assert detect_format(str(tmp_path / "t")) == "tar"
    assert detect_format(str(tmp_path / "t" / "*.tar")) == "tar"
    assert detect_format(str(tmp_path / "t" / "000.tar")) == "tar"
    assert detect_format("some-organisation/some-data") == "dataset"


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("/absent/folder", "does not exist"),
        ("absent.txt", "absent.txt does not exist"),
        ("tests/absent", "does not exist"),
        ("/absent/{0..2}.tar", r"/absent/0.tar does not exist \(3 of 3"),
        ("/absent/*.tar", "no file matches"),
        ("/absent/{0..2.tar", "not closed"),
        ("/absent/{2..0}.tar", "not an ascending"),
        ("https://host/{0..2}.tar", "remote.*"),
        ("pipe:cat x.tar", "remote"),
        ("a.{zip,rar}", "unknown kind"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_line(images, words):
    with pytest.raises(DataError, match=words):
        open_images(images)


def test_folder_of_neither_or_both_is_told(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no image, only notes.md"):
        open_images(str(tmp_path))
    write_folder(tmp_path, 1)
    write_shards(tmp_path, 1, 2)
    with pytest.raises(DataError, match="holds tar files and images"):
        open_images(str(tmp_path))
    assert len(open_images(str(tmp_path), format="tar")) == 2
    with pytest.raises(DataError, match="format zip is unknown"):
        open_images(str(tmp_path), format="zip")


def test_all_unreadable_images_of_a_source_are_found(tmp_path):
    write_shards(tmp_path, 2, 3, bad=(1, 5))
    found = [name for name, problem in check_images(open_images(str(tmp_path))) if problem]
    assert [name.rpartition("!")[2] for name in found] == ["00001.png", "00005.png"]


def test_doctor_finds_unreadable_images_in_any_source(tmp_path):
    from kuea_mllm.cli.doctor import _check_images

    write_shards(tmp_path, 2, 3, bad=(1, 5))
    problems = _check_images(str(tmp_path / "{000..001}.tar"), show_progress=False)
    assert [problem.partition(" cannot")[0].rpartition("!")[2] for problem in problems] == [
        "00001.png",
        "00005.png",
    ]
