"""open_clip repositories: read by their configuration, equal to open_clip's own embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_samples import MODELS, edit, write_repository
from tower_samples import CLIP, canonical

from kuea_mllm.errors import TowerError, TowerMismatch
from kuea_mllm.towers.files import checkpoints
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.model.encode import TowerEncoder, normalise
from kuea_mllm.towers.reading.load import load_tower


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_open_clips_own(tmp_path: Path, name: str, suffix: str) -> None:
    model = write_repository(tmp_path, name, suffix=suffix)
    tower = load_tower(tmp_path)
    assert tower.layout == "open_clip_directory"
    assert tower.spec.activation == MODELS[name][2]
    side = tower.spec.image_size
    assert side == MODELS[name][0]["vision_cfg"]["image_size"]
    pixels = torch.rand(3, 3, side, side)
    with torch.no_grad():
        expected = model.encode_image(normalise(pixels, tower.spec.mean, tower.spec.std))
        found = TowerEncoder(tower)(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The difference that a wrong activation would make is far larger than the tolerance.
    if tower.spec.family == "clip":
        state = write_state(tmp_path / "visual.pt", tower.model)
        other = "gelu" if tower.spec.activation == "quick_gelu" else "quick_gelu"
        wrong = load_tower(state, activation=other, heads=tower.spec.heads)
        with torch.no_grad():
            assert float((TowerEncoder(wrong)(pixels) - expected).abs().max()) > 1e-3


def write_state(path: Path, model: Any) -> Path:
    torch.save(convert.canonical_to_visual(convert.hf_to_canonical(model.state_dict())), path)
    return path


def test_pixels_come_from_the_configuration(tmp_path: Path) -> None:
    write_repository(tmp_path, "gelu")
    spec = load_tower(tmp_path).spec
    assert (spec.mean, spec.std, spec.resize) == ((0.4,) * 3, (0.3,) * 3, "squash")
    assert (spec.heads, spec.mlp_width, spec.embedding_width) == (4, 128, 24)
    assert load_tower(tmp_path).layout == "open_clip_directory"
    for wrong in ({"interpolation": "bilinear"}, {"resize_mode": "longest"}):
        edit(tmp_path, "preprocess_cfg", **{"interpolation": "bicubic", "resize_mode": "squash"})
        edit(tmp_path, "preprocess_cfg", **wrong)
        with pytest.raises(TowerError, match="images are resized by"):
            load_tower(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": True},
        {"ls_init_value": 0.1},
        {"pool_type": "avg"},
        {"no_ln_pre": True},
        {"a_key_of_next_year": 1},
        {"act_kwargs": {"inplace": True}},
    ],
)
def test_towers_without_counterpart_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_repository(tmp_path, "gelu")
    edit(tmp_path, "vision_cfg", **change)
    with pytest.raises(TowerError, match=next(iter(change))):
        load_tower(tmp_path)


def test_other_trunks_and_resnets_are_refused(tmp_path: Path) -> None:
    write_repository(tmp_path, "siglip")
    edit(tmp_path, "vision_cfg", timm_pool="avg")
    with pytest.raises(TowerError, match="pooled by 'avg'"):
        load_tower(tmp_path)
    edit(tmp_path, "vision_cfg", timm_pool="map", timm_model_name="no_such_model")
    with pytest.raises(TowerError, match="no_such_model is no SigLIP ViT"):
        load_tower(tmp_path)
    edit(tmp_path, "vision_cfg", timm_model_name="", layers=[1, 1, 1, 1])
    with pytest.raises(TowerError, match="ResNet"):
        load_tower(tmp_path)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    write_repository(tmp_path, "gelu")
    with pytest.raises(TowerMismatch, match="activation gelu, --activation quick_gelu"):
        load_tower(tmp_path, activation="quick_gelu")
    with pytest.raises(TowerMismatch, match="heads 4, --heads 2"):
        load_tower(tmp_path, heads=2)
    assert load_tower(tmp_path, activation="gelu", heads=4).spec.heads == 4
    edit(tmp_path, "vision_cfg", image_size=32)
    with pytest.raises(TowerMismatch, match="image_size 32, the weights say 16"):
        load_tower(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(TowerError, match="no weights"):
        load_tower(tmp_path)


def test_weights_of_transformers_win_over_those_of_open_clip(tmp_path: Path) -> None:
    write_repository(tmp_path, "gelu")
    assert checkpoints.is_open_clip_repository(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert checkpoints.is_open_clip_repository(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert not checkpoints.is_open_clip_repository(tmp_path)


def test_bare_open_clip_file_does_not_pass_for_openais(tmp_path: Path) -> None:
    full = convert.join_openai(convert.canonical_to_visual(canonical(CLIP)), {})
    torch.save(full, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(TowerError, match="does not state its activation") as caught:
        load_tower(tmp_path / "open_clip_pytorch_model.bin")
    assert "whole directory" in caught.value.remedy
    torch.save(full, tmp_path / "clip.pt")
    assert load_tower(tmp_path / "clip.pt").spec.activation == "quick_gelu"


Fetch = Callable[[str], list[str]]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Fetch]:
    """Stand in for a Hub repository of given files; tells which ones were fetched."""
    import fnmatch

    import huggingface_hub

    def with_files(files: list[str]) -> Fetch:
        place = tmp_path / "snapshot"

        def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            del name, revision
            place.mkdir(exist_ok=True)
            for file in files:
                if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                    (place / file).touch()
            return str(place)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

        def run(name: str) -> list[str]:
            return sorted(path.name for path in checkpoints.resolve_source(name).iterdir())

        return run

    return with_files


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"],
            ["config.json", "model.safetensors"],
        ),
        (["config.json", "pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin"]),
        (
            [
                "open_clip_config.json",
                "open_clip_model.safetensors",
                "open_clip_pytorch_model.bin",
                "tokenizer.json",
            ],
            ["open_clip_config.json", "open_clip_model.safetensors"],
        ),
        (
            ["open_clip_config.json", "open_clip_pytorch_model.bin", "README.md"],
            ["open_clip_config.json", "open_clip_pytorch_model.bin"],
        ),
    ],
)
def test_one_kind_of_weights_is_fetched_and_nothing_else(
    fetch: Callable[[list[str]], Fetch], files: list[str], wanted: list[str]
) -> None:
    assert fetch(files)("some/model") == wanted
