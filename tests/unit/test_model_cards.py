"""Cards: what they state, and that no path of a machine is left in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kuea_mllm.model_card import (
    base_card_metadata,
    front_matter,
    hub_id,
    license_metadata,
    public_record,
    read_front_matter,
)
from kuea_mllm.swapping.card import render_mllm_card
from kuea_mllm.towers.writing.card import render_card

SPEC = {
    "family": "clip",
    "layers": 2,
    "width": 16,
    "image_size": 8,
    "patch_size": 4,
    "activation": "quick_gelu",
}
ALIGNED: dict[str, Any] = {
    "schema_version": 1,
    "kind": "tower",
    "base_tower": {"reference": "openai/clip-vit-large-patch14", "fingerprint": "ab" * 32},
    "teacher": {"reference": "/data/teachers/dinov2-large"},
    "objective": {"kernel_weight": 0.5},
    "steps": 12,
    "data": {"images": "/home/ada/imagenet/train", "trained_on": 1000},
    "heldout": {
        "before": {"heldout_cka_teacher": 0.5},
        "after": {"heldout_cka_teacher": 0.75, "heldout_patch_drift": 0.125},
        "images": 6,
    },
    "command": "kuea-mllm align --images '/home/ada/my images/train' --out=/scratch/ada/run -x 1/2",
    "spec": SPEC,
    "fingerprint": "cd" * 32,
}
SWAPPED: dict[str, Any] = {
    "schema_version": 1,
    "kind": "mllm",
    "adapter": "llava",
    "base": {"reference": "llava-hf/llava-1.5-7b-hf", "path": "/scratch/ada/llava-base"},
    "base_card": {"license": "llama2", "language": ["en"]},
    "tower": {"source": "/scratch/ada/run/tower", "fingerprint": "ef" * 32},
    "replaced": {
        "fingerprint_before": "01" * 32,
        "fingerprint_after": "23" * 32,
        "dtype": "float16",
        "tensors": 391,
    },
    "compatibility": {
        "verdict": "warn",
        "checks": [
            {"name": "width", "base": "1024", "tower": "1024", "verdict": "ok", "remedy": ""},
            {
                "name": "drift",
                "base": "below 0.3",
                "tower": "0.41",
                "verdict": "warn",
                "remedy": "Compare with /scratch/ada/other first.",
                "forced": True,
            },
        ],
        "lineage": {"relation": "descends", "evidence": "Its record names the base's tower."},
        "drift": {
            "images": 16,
            "tap": "layer -2",
            "tap_relative": 0.41,
            "embedding": {"bound_mean": 0.2},
        },
    },
    "command": "kuea-mllm swap --base /scratch/ada/llava-base --out ~/models/new",
    "history": [],
}


def metadata_of(card: str) -> dict[str, Any]:
    content = yaml.safe_load(card.split("---\n", 2)[1])
    assert content == read_front_matter(card)
    return dict(content)


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llava").mkdir(parents=True)
    assert hub_id("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
    # It looks like a Hub id, but there is such a directory.
    assert hub_id("models/llava") is None
    for path in ("/data/x", "./runs/tower", "~/x", "runs/a/tower", "tower", None, 3):
        assert hub_id(path) is None
    cached = "/home/ada/.cache/huggingface/hub/models--org--a-model/snapshots/0123abc"
    assert hub_id(cached) == "org/a-model"


def test_public_record_keeps_everything_but_folders() -> None:
    found = public_record(
        {
            "path": "/home/ada/x",
            "reference": "org/name",
            "where": ["/home/ada/run/tower", "C:\\Users\\ada\\tower", "~/t/x"],
            "text": "read /mnt/d/a.bin (see https://a.org/b/c) at 5 images/s",
            "command": "kuea-mllm swap --base=/mnt/my models/llava --tower '/a b/t' --force",
            "number": 3,
            "nothing": None,
        }
    )
    assert found == {
        "reference": "org/name",
        "where": ["tower", "tower", "x"],
        "text": "read a.bin (see https://a.org/b/c) at 5 images/s",
        "command": "kuea-mllm swap --base=my models/llava --tower t --force",
        "number": 3,
        "nothing": None,
    }


def test_front_matter_survives_what_yaml_would_change() -> None:
    content = {"license": "other", "language": ["no", "en"], "name": 'a: "b" #c', "tags": []}
    card = front_matter(content | {"left_out": None}) + "\n\n# Title"
    assert read_front_matter(card) == {k: v for k, v in content.items() if v}
    for text in ("", "# no front matter", "---\n[broken\n---\n", "x\n---\na: b\n---\n"):
        assert read_front_matter(text) == {}


def test_licence_is_inherited() -> None:
    assert license_metadata({"license": "mit"}, "org/base") == {"license": "mit"}
    assert license_metadata({}, "org/base") == {
        "license": "other",
        "license_name": "same-as-base-model",
        "license_link": "https://huggingface.co/org/base",
    }
    assert "license_link" not in license_metadata({}, None)


def test_tower_card_says_what_was_done_and_measured() -> None:
    card = render_card(ALIGNED)
    metadata = metadata_of(card)
    assert metadata["base_model"] == "openai/clip-vit-large-patch14"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["pipeline_tag"] == "image-feature-extraction"
    assert metadata["license_link"].endswith("openai/clip-vit-large-patch14")
    assert "1000 of them, for 12 steps" in card
    assert "| linear CKA with the teacher | 0.5 | 0.75 |" in card
    assert "`dinov2-large`" in card
    assert "@inproceedings" in card


def test_card_of_a_converted_tower_claims_no_training() -> None:
    record = {"base_tower": {"reference": "/x/final.pt"}, "spec": SPEC, "fingerprint": "ab"}
    card = render_card(record)
    assert "Converted from `final.pt`" in card
    assert "base_model" not in metadata_of(card)
    assert "@inproceedings" not in card
    assert "KUEA-aligned" not in card
    assert "Changed on the way" not in card
    mixed = {"interpolate": {"weight": 0.5}, "dtype": {"to": "float16"}}
    assert "Changed on the way: interpolate, dtype." in render_card(
        record | {"conversion": {"changes": mixed}}
    )


def test_card_of_a_changed_tower_does_not_claim_the_measurements_before_it() -> None:
    changed = ALIGNED | {"conversion": {"changes": {"image_size": {"to": 16}}}}
    card = render_card(changed)
    assert "| measured | original | before the changes |" in card
    assert "The conversion (image size) came later" in card
    assert "this tower |" not in card
    unchanged = render_card(ALIGNED | {"conversion": {"changes": {}}})
    assert "| measured | original | this tower |" in unchanged


def test_mllm_card_shows_towers_and_compatibility() -> None:
    card = render_mllm_card(SWAPPED)
    metadata = metadata_of(card)
    assert metadata["base_model"] == ["llava-hf/llava-1.5-7b-hf"]
    assert metadata["license"] == "llama2"
    assert metadata["language"] == ["en"]
    assert metadata["pipeline_tag"] == "image-text-to-text"
    for fingerprint in ("01" * 32, "23" * 32, "ef" * 32):
        assert fingerprint in card
    assert "| drift | below 0.3 | 0.41 | warn (forced) |" in card
    assert "- drift: Compare with other first." in card
    assert "Lineage: descends." in card
    assert "| embedding bound mean | 0.2 |" in card


def test_base_given_as_a_relative_path_is_no_hub_id() -> None:
    base = {"reference": "models/llava-1.5", "path": "/home/ada/models/llava-1.5"}
    card = render_mllm_card(SWAPPED | {"base": base, "base_card": {}})
    assert "base_model" not in metadata_of(card)
    assert "# llava-1.5 with another vision tower" in card


def test_second_swap_still_names_the_first_base_and_a_mix_is_called_one() -> None:
    tower = SWAPPED["tower"] | {"mix": {"weight": 0.25, "rest": "the base's own tower"}}
    again = SWAPPED | {"base": {"reference": "models/x"}, "history": [SWAPPED], "tower": tower}
    card = render_mllm_card(again)
    assert metadata_of(card)["base_model"] == ["llava-hf/llava-1.5-7b-hf"]
    assert "a mix of `tower` (weight 0.25) and the base's own tower" in card


@pytest.mark.parametrize("card", [render_card(ALIGNED), render_mllm_card(SWAPPED)])
def test_cards_name_no_path(card: str) -> None:
    for folder in ("/home", "/scratch", "/data", "~/", "my images/"):
        assert folder not in card


def test_card_of_the_base_gives_licence_and_language(tmp_path: Path) -> None:
    assert base_card_metadata(tmp_path) == {}
    (tmp_path / "README.md").write_text(
        "---\nlicense: llama2\nlanguage: [en]\ndatasets: [x]\n---\n# LLaVA\n"
    )
    assert base_card_metadata(tmp_path) == {"license": "llama2", "language": ["en"]}
