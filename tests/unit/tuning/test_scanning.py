"""A large file is read record by record, whatever its blocks cut in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixture_samples import record, write_lines, write_list

from kuea_mllm.errors import DataError
from kuea_mllm.tuning import scanning
from kuea_mllm.tuning.scanning import scan_records

RECORDS = [record(number, image=f"ö{number}\n.png") for number in range(20)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("write", [write_list, write_lines])
def test_records_are_those_of_the_file(
    write: Any, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_CHUNK", chunk)
    path = write(tmp_path / "mix.json", RECORDS)
    read: list[int] = []
    assert list(scan_records(path, progress=read.append)) == RECORDS
    assert sum(read) == path.stat().st_size


@given(values=st.lists(st.dictionaries(st.text(), st.text() | st.integers())), indent=st.booleans())
def test_any_list_of_objects_is_read_back(
    values: list[Any], indent: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("scan") / "mix.json"
    text = json.dumps(values, indent=2 if indent else None, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    assert list(scan_records(path)) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("records", "begins neither"),
        ('[{"a": 1}', "at record 1, character 9: it ends"),
        ('[{"a": 1},', "at record 1, character 10: it ends"),
        ('[{"a": 1} {"a": 2}]', "no comma"),
        ('[{"a": 1}] x', "something follows"),
        ('[{"a": 1}, {"a": nul}]', "at record 1, character 17"),
        ('{"a": 1}\n{"a": \n', "at record 1"),
        ("[" + "[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_file_is_named_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(scan_records(path))
    assert str(path) in caught.value.problem


def test_broken_record_does_not_make_the_whole_file_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_CHUNK", 100)
    monkeypatch.setattr(scanning, "_LONGEST_RECORD", 1000)
    path = write_list(tmp_path / "mix.json", RECORDS * 100)
    path.write_text('[{"id": ?},' + path.read_text()[1:])
    read: list[int] = []
    with pytest.raises(DataError, match="record 0"):
        list(scan_records(path, progress=read.append))
    assert sum(read) < 5000 < path.stat().st_size


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    path.write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(scan_records(path))
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        list(scan_records(tmp_path / "none.json"))
