"""A record names a model so that it is found from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from kuea_mllm.manifest import named_source, recorded_source
from kuea_mllm.model_card import public_record


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models" / "a@b").mkdir(parents=True)
    (tmp_path / "weights.pt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("models", "{here}/models"),
        ("models/a@b", "{here}/models/a@b"),
        ("timm:vit_tiny@weights.pt", "timm:vit_tiny@{here}/weights.pt"),
    ],
)
def test_local_model_is_found_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, typed: str, expected: str
) -> None:
    entry = named_source(typed)
    assert entry["reference"] == typed
    monkeypatch.chdir("/")
    assert recorded_source(entry) == expected.format(here=folder)


@pytest.mark.parametrize(
    "typed", ["openai/clip-vit-large-patch14", "timm:vit_tiny", "timm:vit_tiny@gone.pt"]
)
def test_other_names_stay_as_they_are(typed: str) -> None:
    assert named_source(typed) == {"reference": typed}
    assert recorded_source({"reference": typed}) == typed


def test_folders_that_were_moved_together_find_each_other(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = named_source("models")
    there = folder.rename(tmp_path_factory.mktemp("there") / "moved")
    monkeypatch.chdir("/")
    # Named as it was: a name that looks like an id must not be looked for on the Hub.
    assert recorded_source(entry) == f"{folder}/models"
    monkeypatch.chdir(there)
    assert recorded_source(entry) == "models"


def test_path_is_not_published() -> None:
    assert public_record({"base_tower": named_source("models")}) == {
        "base_tower": {"reference": "models"}
    }
