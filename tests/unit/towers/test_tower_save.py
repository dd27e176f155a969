"""Writing towers: plain transformers and open_clip must read what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tower_samples import CLIP, SIGLIP, make_tower
from transformers import (
    AutoImageProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipVisionModel,
)

from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import OutputError, TowerError
from kuea_mllm.towers.model.encode import TowerEncoder, normalise
from kuea_mllm.towers.model.resize import resize_position_embedding, resize_tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.spec import TowerSpec
from kuea_mllm.towers.writing.save import export_visual, save_tower, save_visual

FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "kuea.json", "README.md"}
MANIFEST = {
    "base_tower": {"reference": "openai/clip-vit-large-patch14", "fingerprint": "ab" * 32},
    "objective": {"kernel": "polynomial", "note": "a | b"},
    "steps": 12,
    "data": None,
}
specs = pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])


@specs
def test_plain_transformers_reads_the_directory(tmp_path: Path, spec: TowerSpec) -> None:
    tower = make_tower(spec)
    save_tower(tower, tmp_path / "tower", manifest=MANIFEST)
    assert {p.name for p in (tmp_path / "tower").iterdir()} == FILES
    classes: list[Any] = [SiglipVisionModel]
    if spec.family == "clip":
        classes = [CLIPVisionModelWithProjection, CLIPVisionModel]
    pixels = torch.rand(2, 3, spec.image_size, spec.image_size)
    ours: Any = tower.model
    for model_class in classes:
        model = model_class.from_pretrained(tmp_path / "tower").eval()
        with torch.no_grad():
            found, expected = (m(pixel_values=pixels).last_hidden_state for m in (model, ours))
        assert torch.equal(found, expected)


@specs
def test_auto_image_processor_does_what_the_spec_says(tmp_path: Path, spec: TowerSpec) -> None:
    save_tower(make_tower(spec), tmp_path / "tower", manifest={})
    load: Any = AutoImageProcessor.from_pretrained
    processor = load(tmp_path / "tower")
    picture = Image.effect_noise((30, 20), 64).convert("RGB")
    found = processor(picture, return_tensors="pt")["pixel_values"]
    expected = normalise(ImageTransform.from_spec(spec)(picture)[None], spec.mean, spec.std)
    # transformers resizes tensors, we resize with Pillow as open_clip does: a rounding apart.
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 0.05


def test_written_files_name_no_path_of_this_machine(tmp_path: Path) -> None:
    save_tower(make_tower(CLIP), tmp_path / "one", manifest=MANIFEST)
    again = load_tower(tmp_path / "one")
    save_tower(again, tmp_path / "two", manifest=MANIFEST)
    for name in FILES:
        one, two = (tmp_path / place / name for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name
    assert "_name_or_path" not in (tmp_path / "one" / "config.json").read_text()


def test_manifest_and_card(tmp_path: Path) -> None:
    tower = make_tower(CLIP)
    save_tower(tower, tmp_path / "tower", manifest=MANIFEST)
    record = json.loads((tmp_path / "tower" / "kuea.json").read_text())
    assert record["schema_version"] == 1
    assert record["fingerprint"] == tower.fingerprint
    assert {k: record[k] for k in MANIFEST} == MANIFEST
    _, front, body = (tmp_path / "tower" / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["base_model"] == "openai/clip-vit-large-patch14"
    assert meta["library_name"] == "transformers"
    assert tower.fingerprint in body
    assert "KUEA-aligned" in body
    assert "a \\| b" in body


def test_finished_directory_is_not_overwritten(tmp_path: Path) -> None:
    save_tower(make_tower(CLIP), tmp_path, manifest={})
    with pytest.raises(OutputError, match="exists already"):
        save_tower(make_tower(CLIP), tmp_path, manifest={})


def test_visual_file_is_refused_without_projection_or_suffix(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="ends in no suffix"):
        save_visual(make_tower(CLIP), tmp_path / "final.onnx")
    with pytest.raises(TowerError, match="no projection"):
        save_visual(make_tower(CLIP, with_projection=False), tmp_path / "final.pt")
    save_visual(make_tower(CLIP), tmp_path / "final.pt")
    with pytest.raises(OutputError, match="exists already"):
        save_visual(make_tower(CLIP), tmp_path / "final.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["final.pt"]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_reads_the_export_and_agrees(activation: str) -> None:
    transformer = pytest.importorskip("open_clip.transformer")
    from dataclasses import replace

    spec = replace(CLIP, activation=activation, heads=2)
    tower = make_tower(spec)
    act_layer = transformer.QuickGELU if activation == "quick_gelu" else torch.nn.GELU
    visual = transformer.VisionTransformer(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        width=spec.width,
        layers=spec.layers,
        heads=spec.heads,
        mlp_ratio=spec.mlp_width / spec.width,
        output_dim=spec.embedding_width,
        act_layer=act_layer,
    ).eval()
    visual.load_state_dict(export_visual(tower))
    pixels = torch.rand(2, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        expected = visual(normalise(pixels, spec.mean, spec.std))
        found = TowerEncoder(tower)(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


@specs
def test_resized_tower_takes_other_images(spec: TowerSpec) -> None:
    tower = make_tower(spec)
    resized = resize_tower(tower, 32)
    assert resized.spec.image_size == 32
    assert tower.spec.image_size == 16
    tokens = TowerEncoder(resized).forward_tokens(torch.rand(1, 3, 32, 32))
    assert tokens.shape == (1, 16, spec.width)
    with pytest.raises(TowerError, match="no multiple of the patch size"):
        resize_tower(tower, 28)


def test_position_resize_keeps_its_class_row_and_dtype() -> None:
    weight = torch.randn(1 + 9, 4).half()
    found = resize_position_embedding(weight, 5)
    assert found.shape == (26, 4)
    assert found.dtype == torch.float16
    assert torch.equal(found[0], weight[0])
    assert torch.equal(resize_position_embedding(weight, 3), weight)
    with pytest.raises(TowerError, match="cannot be resized"):
        resize_position_embedding(weight[:-1], 5)
