"""`kuea-mllm push`, without a network: dry runs, refusals, and what it prints."""

import json
import shutil

import pytest

from kuea_mllm.miniworld import ASSETS

BASE_MODEL = "--base-model=openai/clip-vit-base-patch16"


@pytest.fixture
def tower(kuea, tmp_path):
    out = tmp_path / "tower"
    assert kuea("convert", ASSETS / "clip", out).code == 0
    return out


def test_dry_run_prints_what_would_be_sent(kuea, tower):
    answer = kuea(
        "push",
        tower,
        "ada/tower",
        "--dry-run",
        "--json",
        "--base-model=openai/clip-vit-base-patch16",
    )
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["url"] == "https://huggingface.co/ada/tower"
    assert found["uploaded"] is False
    assert found["kind"] == "tower"
    assert {"kuea.json", "README.md", "model.safetensors"} <= set(found["files"])
    assert set(found["rewritten"]) == {"kuea.json", "README.md"}
    plain = kuea("push", tower, "ada/tower", "--dry-run", BASE_MODEL)
    assert plain.code == 0
    assert "would upload" in plain.out


def test_card_without_base_is_refused_with_the_line_to_add(kuea, tower):
    answer = kuea("push", tower, "ada/tower", "--dry-run")
    assert answer.code == 2
    assert "does not state base_model" in answer.err
    assert "--base-model OWNER/NAME" in answer.err


def test_offline_machine_uploads_nothing(kuea, tower, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer = kuea("push", tower, "ada/tower", BASE_MODEL)
    assert answer.code == 2
    assert "HF_HUB_OFFLINE is set" in answer.err


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda tower: (tower / "kuea.json").unlink(), "has no kuea.json"),
        (lambda tower: (tower / "model.safetensors").write_bytes(b"x"), "model.safetensors"),
    ],
    ids=["missing", "no record", "damaged"],
)
def test_unfit_directory_ends_in_one_clear_line(kuea, tower, break_it, expected):
    break_it(tower)
    answer = kuea("push", tower, "ada/tower", "--dry-run")
    assert answer.code == 2
    assert expected in answer.err
    assert "Traceback" not in answer.err
