"""The second opinion: each format in its own library, and what the comparison must not let pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_samples import MODELS, hf_model, openai_model, write_repository
from safetensors.torch import load_file, save_file
from tower_samples import CLIP, SIGLIP, make_tower, write_torch
from transformers import SiglipConfig, SiglipModel

from kuea_mllm.errors import TowerError
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.towers.converting.parity import (
    ParityReport,
    TowerOutputs,
    compare_outputs,
    outputs_in_own_library,
    outputs_of_tower,
)
from kuea_mllm.towers.converting.probe_images import probe_pixels
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.tower import Tower, build_model
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.spec import TowerSpec
from kuea_mllm.towers.writing.save import export_visual, save_tower

SPECS = {
    "quick_gelu": CLIP,
    "gelu": replace(CLIP, activation="gelu", heads=4, layer_norm_eps=1e-3),
    "tanh": replace(CLIP, activation="gelu_pytorch_tanh", mlp_width=100),
    "siglip": SIGLIP,
    "siglip_tanh": replace(SIGLIP, activation="gelu_pytorch_tanh", image_size=20, mlp_width=50),
    "siglip_quick": replace(SIGLIP, activation="quick_gelu", layers=1),
}
QUANTITIES = ("embedding", "penultimate", "last")


def compared(tower: Tower, source: Path, layout: str, spec: TowerSpec | None = None) -> Any:
    """Compare a tower in memory with what is on disk."""
    pixels = probe_pixels(tower.spec, count=2)
    found = outputs_in_own_library(source, layout=layout, spec=spec or tower.spec, pixels=pixels)
    return compare_outputs(outputs_of_tower(tower, pixels), found, names=("tower", "file"))


@pytest.mark.parametrize("name", SPECS)
def test_every_library_computes_the_same(tmp_path: Path, name: str) -> None:
    tower = make_tower(SPECS[name])
    save_tower(tower, tmp_path / "hf", manifest={})
    visual = write_torch(tmp_path / "visual.pt", export_visual(tower))
    hf_file = tmp_path / "hf" / "model.safetensors"
    bare = "visual" if tower.spec.family == "clip" else "trunk"
    libraries = set()
    for source, layout in ((tmp_path / "hf", "hf_directory"), (visual, bare), (hf_file, "hf")):
        report = compared(tower, source, layout)
        report.require_same()
        assert len(report.rows) == 3
        libraries.add(report.second)
    own = "open_clip" if tower.spec.family == "clip" else "timm"
    assert libraries == {"file in transformers", f"file in {own}"}


def test_outputs_are_those_of_the_encoder_and_of_the_blocks() -> None:
    for spec in (CLIP, SIGLIP):
        tower = make_tower(spec)
        pixels = probe_pixels(spec, count=3)
        found = outputs_of_tower(tower, pixels)
        encoder = TowerEncoder(tower)
        with torch.no_grad():
            expected = encoder(pixels)
            tokens = [encoder.forward_tokens(pixels, layer) for layer in (-2, -1)]
        assert found.embedding is not None
        torch.testing.assert_close(found.embedding, expected)
        torch.testing.assert_close(found.penultimate, tokens[0])
        torch.testing.assert_close(found.last, tokens[1])
        assert found.last.shape == (3, 4, spec.width)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "siglip_16"])
def test_open_clip_repository_runs_in_open_clip(tmp_path: Path, name: str) -> None:
    write_repository(tmp_path, name)
    report = compared(load_tower(tmp_path), tmp_path, "open_clip_directory")
    assert report.second == "file in open_clip"
    report.require_same()


def test_full_models_of_transformers_run_as_a_whole(tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path / "clip")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    text = {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    SiglipModel(
        SiglipConfig(
            text_config={**sizes, **heads, **text, "projection_size": 32},
            vision_config={**sizes, **heads, "image_size": 16, "patch_size": 8},
        )
    ).save_pretrained(tmp_path / "siglip")
    for name in ("clip", "siglip"):
        compared(load_tower(tmp_path / name), tmp_path / name, "hf_directory").require_same()


def test_tower_without_projection_has_no_embedding_to_compare(tmp_path: Path) -> None:
    tower = make_tower(CLIP, with_projection=False)
    save_tower(tower, tmp_path, manifest={})
    report = compared(tower, tmp_path, "hf_directory")
    assert [row.quantity for row in report.rows] == [
        "penultimate patch tokens",
        "last patch tokens",
    ]
    with pytest.raises(TowerError, match="embedding of shape"):
        compared(make_tower(CLIP), tmp_path, "hf_directory")


def test_names_before_the_tensors_do_not_matter(tmp_path: Path) -> None:
    model = openai_model()
    full = model.state_dict()
    plain = write_torch(tmp_path / "plain.pt", full)
    tower = load_tower(plain)
    wrapped = {f"module.{name}": tensor for name, tensor in full.items()}
    path = write_torch(tmp_path / "wrapped.pt", wrapped)
    compared(tower, path, "openai").require_same()
    robust = {"vision_encoder_state_dict": export_visual(tower)}
    compared(tower, write_torch(tmp_path / "robust.pt", robust), "robustvlm").require_same()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_raised_to_float32_without_a_loss(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: t.to(dtype) for k, t in export_visual(make_tower(CLIP)).items()}
    path = write_torch(tmp_path / "half.pt", state)
    tower = load_tower(path, activation="quick_gelu", dtype=None)
    assert tower.model.dtype == dtype
    save_tower(tower, tmp_path / "hf", manifest={})
    for source, layout in ((path, "visual"), (tmp_path / "hf", "hf_directory")):
        report = compared(tower, source, layout)
        report.require_same()
        assert max(row.relative_l2 for row in report.rows) < 1e-5


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_activation_is_caught(tmp_path: Path) -> None:
    tower = make_tower(CLIP)
    save_tower(tower, tmp_path, manifest={})
    edit_config(tmp_path, hidden_act="gelu")
    report = compared(tower, tmp_path, "hf_directory")
    assert not report.is_same
    with pytest.raises(TowerError, match=r"they differ in the .* by") as caught:
        report.require_same()
    assert "Nothing was written" in caught.value.remedy
    # As it is where a bare file is read with the wrong one.
    path = write_torch(tmp_path / "visual.pt", export_visual(tower))
    assert not compared(tower, path, "visual", replace(CLIP, activation="gelu")).is_same


def test_tanh_form_of_gelu_is_caught_on_a_trained_tower() -> None:
    trained = load_tower(ASSETS / "clip")
    outputs = []
    for activation in ("gelu", "gelu_pytorch_tanh"):
        spec = replace(trained.spec, activation=activation)
        model = build_model(spec, trained.canonical_state(), where="a sample")
        tower = Tower(model, spec, "a sample", "visual")
        outputs.append(outputs_of_tower(tower, probe_pixels(spec, count=4)))
    assert not compare_outputs(outputs[0], outputs[1], names=("a", "b")).is_same


def test_wrong_heads_epsilon_and_colours_are_caught(tmp_path: Path) -> None:
    tower = make_tower(CLIP)
    save_tower(tower, tmp_path, manifest={})
    for changes in ({"num_attention_heads": 2}, {"layer_norm_eps": 1e-2}):
        edit_config(tmp_path, **changes)
        assert not compared(tower, tmp_path, "hf_directory").is_same
        edit_config(tmp_path, num_attention_heads=1, layer_norm_eps=1e-5)
    assert compared(tower, tmp_path, "hf_directory").is_same
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    assert not compared(tower, tmp_path, "hf_directory").is_same


def test_transposed_projection_is_caught(tmp_path: Path) -> None:
    spec = replace(CLIP, embedding_width=64)
    tower = make_tower(spec)
    save_tower(tower, tmp_path, manifest={})
    weights = load_file(tmp_path / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].T.contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rows = {r.quantity: r.relative_l2 for r in compared(tower, tmp_path, "hf_directory").rows}
    assert rows["embedding"] > 0.1
    assert rows["last patch tokens"] < 1e-5


def test_tokens_after_the_final_norm_are_caught() -> None:
    tower = make_tower(CLIP)
    pixels = probe_pixels(CLIP, count=2)
    right = outputs_of_tower(tower, pixels)
    model: Any = tower.model
    with torch.no_grad():
        normed = model.vision_model.post_layernorm(right.last)
    report = compare_outputs(right, replace(right, last=normed), names=("a", "b"))
    assert [row.relative_l2 > 0.1 for row in report.rows] == [False, False, True]
    with pytest.raises(TowerError, match="differ in the last patch tokens"):
        report.require_same()


def test_swapped_query_and_key_are_caught(tmp_path: Path) -> None:
    tower = make_tower(SIGLIP)
    state = export_visual(tower)
    stacked = state["trunk.blocks.0.attn.qkv.weight"]
    query, key, value = stacked.chunk(3)
    state["trunk.blocks.0.attn.qkv.weight"] = torch.cat([query, value, key])
    assert not compared(tower, write_torch(tmp_path / "a.pt", state), "trunk").is_same


def test_what_is_no_number_is_not_the_same() -> None:
    tokens = torch.zeros(1, 4, 8)
    bad = tokens.clone()
    bad[0, 0, 0] = torch.nan
    report = compare_outputs(
        TowerOutputs(None, tokens, tokens), TowerOutputs(None, tokens, bad), names=("a", "b")
    )
    assert not report.is_same
    assert report.to_dict()["rows"][1]["max_abs"] is None
    with pytest.raises(TowerError, match="values of the last patch tokens are NaN"):
        report.require_same()
    with pytest.raises(TowerError, match="penultimate patch tokens of shape"):
        compare_outputs(
            TowerOutputs(None, tokens, tokens),
            TowerOutputs(None, tokens[:, :3], tokens),
            names=("a", "b"),
        )


def test_report_counts_relative_to_the_first() -> None:
    one = torch.full((1, 1, 4), 2.0)
    outputs = TowerOutputs(one[:, 0], one, one)
    other = TowerOutputs(one[:, 0] + 1, one + 1, one)
    report = compare_outputs(outputs, other, names=("a", "b"), bound=0.5)
    assert isinstance(report, ParityReport)
    assert [(row.max_abs, row.relative_l2) for row in report.rows] == [(1, 0.5), (1, 0.5), (0, 0)]
    assert report.is_same
    assert not compare_outputs(other, outputs, names=("a", "b"), bound=0.3).is_same


def test_weights_that_a_library_does_not_take_are_named(tmp_path: Path) -> None:
    tower = make_tower(CLIP)
    state = export_visual(tower)
    path = write_torch(tmp_path / "a.pt", state | {"more": torch.ones(1)})
    with pytest.raises(TowerError, match=r"open_clip does not take the weights of .*more"):
        compared(tower, path, "visual")
    save_tower(tower, tmp_path / "hf", manifest={})
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    del weights["vision_model.post_layernorm.bias"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowerError, match=r"finds no value .*post_layernorm\.bias"):
        compared(tower, tmp_path / "hf", "hf_directory")
    write_repository(tmp_path / "clip", "gelu")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["width"] = 32
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(TowerError, match="open_clip does not open"):
        compared(load_tower(tmp_path / "clip"), tmp_path / "clip", "open_clip_directory")
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "some/model"}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(TowerError, match="names a text tower of the Hub, some/model"):
        compared(load_tower(tmp_path / "clip"), tmp_path / "clip", "open_clip_directory")
