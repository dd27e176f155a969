"""The Arrow file holds the records, is made once, and is not believed when it was changed."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from mixture_samples import record, turns, write_lines, write_list

from kuea_mllm.errors import DataError
from kuea_mllm.tuning import mixture as module
from kuea_mllm.tuning.mixture import Mixture, open_mixture

RECORDS = [record(number, image="a.png" if number % 3 else None) for number in range(10)]


def opened(path: Path, tmp_path: Path) -> Mixture:
    return open_mixture(path, cache=tmp_path / "cache", progress=False)


def kept_folder(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    return folder


@pytest.fixture(params=[1, 3, 10, 4096])
def _batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", request.param)


@pytest.mark.usefixtures("_batches")
@pytest.mark.parametrize("write", [write_list, write_lines])
def test_records_and_lengths_are_those_of_the_file(write: Any, tmp_path: Path) -> None:
    mixture = opened(write(tmp_path / "mix.json", RECORDS), tmp_path)
    assert len(mixture) == len(RECORDS)
    read = [mixture.record(index) for index in range(len(mixture))]
    assert read == [{**each, "image": each.get("image")} for each in RECORDS]
    words = [sum(len(t["value"].split()) for t in each["conversations"]) for each in RECORDS]
    signs = [1 if "image" in each else -1 for each in RECORDS]
    expected = [word * sign for word, sign in zip(words, signs, strict=True)]
    assert mixture.lengths().tolist() == expected
    with pytest.raises(IndexError):
        mixture.record(len(RECORDS))


def test_file_is_read_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_list(tmp_path / "mix.json", RECORDS)
    opened(path, tmp_path)
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(module, "scan_records", lambda *args, **more: pytest.fail("read again"))
        assert len(opened(copy, tmp_path)) == len(RECORDS)
    write_list(path, RECORDS[:4])
    assert len(opened(path, tmp_path)) == 4


def test_pickle_is_small_and_reads_the_same(tmp_path: Path) -> None:
    mixture = opened(write_list(tmp_path / "mix.json", RECORDS * 100), tmp_path)
    mixture.record(0)
    pickled = pickle.dumps(mixture)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).record(500) == mixture.record(500)


def test_text_of_any_kind_survives(tmp_path: Path) -> None:
    text = "é 中文 🦜 \x00 \u2028 end"
    raw = record(image=None, conversations=turns(text, text))
    mixture = opened(write_list(tmp_path / "mix.json", [raw]), tmp_path)
    assert mixture.record(0)["conversations"] == raw["conversations"]


def test_malformed_records_are_named_with_their_number(tmp_path: Path) -> None:
    bad = record(5, conversations=turns("a", "b"))
    path = write_list(tmp_path / "mix.json", [*RECORDS, bad, *[["x"]] * 4])
    with pytest.raises(DataError) as caught:
        opened(path, tmp_path)
    assert f"{path}, record 10 (id 'r5'): 0 of its 2 turns" in caught.value.problem
    assert "5 malformed records in all" in caught.value.problem
    assert "doctor --data" in caught.value.remedy
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([record()]).replace("A cat", "A \\ud800 cat"))
    with pytest.raises(DataError, match="half a character"):
        opened(path, tmp_path)


def test_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        opened(write_list(tmp_path / "mix.json", []), tmp_path)


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "other"])
def test_damaged_mixture_is_refused(harm: str, tmp_path: Path) -> None:
    path = write_list(tmp_path / "mix.json", RECORDS)
    opened(path, tmp_path)
    folder = kept_folder(tmp_path)
    arrow = folder / "records.arrow"
    data = bytearray(arrow.read_bytes())
    if harm == "bit":
        data[len(data) // 2] ^= 1
        arrow.write_bytes(data)
    elif harm == "cut":
        arrow.write_bytes(data[:-9])
    elif harm == "gone":
        arrow.unlink()
    else:
        statement = json.loads((folder / "mixture.json").read_text())
        (folder / "mixture.json").write_text(json.dumps({**statement, "source_sha256": "0"}))
    with pytest.raises(DataError, match="kept mixture") as caught:
        opened(path, tmp_path)
    assert "Remove that folder" in caught.value.remedy


def test_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_list(tmp_path / "mix.json", RECORDS)
    scan = module.scan_records

    def scan_and_change(*args: Any, **more: Any) -> Any:
        yield from scan(*args, **more)
        write_list(path, RECORDS[:2])

    monkeypatch.setattr(module, "scan_records", scan_and_change)
    with pytest.raises(DataError, match="was changed while"):
        opened(path, tmp_path)


def test_processes_that_come_at_once_make_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_list(tmp_path / "mix.json", RECORDS)
    builds: list[Path] = []
    build = module._build

    def counted(*args: Any, **more: Any) -> None:
        builds.append(args[0])
        build(*args, **more)

    monkeypatch.setattr(module, "_build", counted)
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(len(opened(path, tmp_path))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [len(RECORDS)] * 4
    assert len(builds) == 1


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        opened(tmp_path / "none.json", tmp_path)
