"""Tower conversion against stored activations, in both precisions and in every layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import (
    absolute_error,
    align_dir,
    align_index,
    checkpoint_of,
    files,
    hyper_parameters,
    tensors,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from kuea_mllm.towers.files.checkpoints import read_checkpoint_file
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.fingerprint import fingerprint_state
from kuea_mllm.towers.model.resize import resize_position_embedding, resize_tower
from kuea_mllm.towers.reading.load import Tower, load_tower
from kuea_mllm.towers.writing.openai_export import save_openai
from kuea_mllm.towers.writing.save import export_visual, save_tower, save_visual

# Of a reference's largest number where that exceeds one, as tokens of deep blocks do.
PRECISIONS = {"float64": (torch.float64, 1e-10), "float32": (torch.float32, 5e-6)}
RESIZE = "tower_resize.safetensors"
# Another head count or activation is part of what a tower file states, never of a checkpoint.
TOWERS = [name for name in files(r"tower_.*\.safetensors") if name != RESIZE]
WITH_FILES = [(name, path) for name in TOWERS for path in checkpoint_of(name)]
HF_FILES = files(r"ckpt/hf_.*\.safetensors")

precisions = pytest.mark.parametrize("precision", PRECISIONS)
tower_files = pytest.mark.parametrize(
    ("name", "path"), WITH_FILES, ids=[f"{name}-{path.name}" for name, path in WITH_FILES]
)


def load(path: Path, stated: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tower:
    """Load a checkpoint with the head count and the activation that the index states."""
    activation = stated["activation"].split()[0]
    return load_tower(path, activation=activation, heads=stated["heads"], dtype=dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return absolute_error(found, expected) <= tolerance * scale


@torch.no_grad()
def activations(tower: Tower, pixels: Tensor) -> dict[str, Tensor]:
    """Compute every quantity that a tower file may hold, from normalised pixels."""
    model: Any = tower.model
    output = model(pixel_values=pixels, output_hidden_states=True)
    states = output.hidden_states
    found = {f"block_out.{index}": state for index, state in enumerate(states[1:])}
    if tower.spec.family == "siglip":
        return found | {"features": output.last_hidden_state, "pooled": output.pooler_output}
    norm = model.vision_model.post_layernorm
    before, tap = states[-1], states[-2]
    return found | {
        "after_ln_pre": states[0],
        "pooled": output.image_embeds,
        "image_embedding": output.image_embeds,
        "hf.image_embeds": output.image_embeds,
        "hf.hidden_states_m2": tap,
        "hf.last_hidden_state": output.last_hidden_state,
        "hf.pooler_output": norm(output.last_hidden_state[:, 0]),
        "llava_patch_features": tap[:, 1:],
        "tokens.before_ln_post": before[:, 1:],
        "tokens.after_ln_post": norm(before)[:, 1:],
        "kuea_llava_tower.before_ln_post": torch.cat([norm(tap[:, :1]), tap[:, 1:]], dim=1),
        "kuea_llava_tower.after_ln_post": norm(tap),
    }


def plain_name(name: str) -> str:
    """Drop the open_clip version from a name, keeping what the version stands for."""
    if match := re.fullmatch(r"tokens\.open_clip_\w+\.(\w+)", name):
        return f"tokens.{match[1]}"
    if match := re.fullmatch(r"kuea_llava_tower\.open_clip_(\d+)_(\d+)_\d+", name):
        # Since 2.23 open_clip normalises the tokens it returns.
        is_normed = (int(match[1]), int(match[2])) >= (2, 23)
        return f"kuea_llava_tower.{'after' if is_normed else 'before'}_ln_post"
    return name


INPUTS = {"images01", "pixel_values", "tokens", "text_embedding"}


def test_the_set_holds_towers_and_their_checkpoints() -> None:
    assert {name for name, _ in WITH_FILES} == set(TOWERS)
    assert HF_FILES


@tower_files
@precisions
def test_every_stored_activation_is_met(name: str, path: Path, precision: str) -> None:
    dtype, tolerance = PRECISIONS[precision]
    tower = load(path, hyper_parameters(name), dtype)
    stored = tensors(name)
    found = activations(tower, stored["pixel_values"].to(dtype))
    for key in stored.keys() - INPUTS:
        assert close(found[plain_name(key)], stored[key], tolerance), key


@tower_files
def test_encoder_normalises_and_pools(name: str, path: Path) -> None:
    tower = load(path, hyper_parameters(name))
    stored = tensors(name)
    encoder = TowerEncoder(tower)
    with torch.no_grad():
        found = encoder(stored["images01"])
        last = encoder.forward_tokens(stored["images01"], layer=-1)
    expected = stored["image_embedding" if "image_embedding" in stored else "pooled"]
    assert absolute_error(found, expected) <= 5e-6
    if "block_out.0" in stored:
        block = stored[f"block_out.{tower.spec.layers - 1}"][:, tower.spec.prefix_tokens :]
        assert close(last, block, 5e-6)


@tower_files
def test_spec_is_read_off_the_weights(name: str, path: Path) -> None:
    stated = hyper_parameters(name)
    spec = load(path, stated).spec
    for key in ("image_size", "patch_size", "width", "layers", "heads", "layer_norm_eps"):
        assert getattr(spec, key) == stated[key], key
    assert spec.mlp_width == round(spec.width * stated["mlp_ratio"])
    assert spec.embedding_width == stated.get("output_dim", spec.width)


def llava_files() -> list[str]:
    index = align_index()["files"]
    return [name for name in TOWERS if "llava_patch_features" in index[name]["tensors"]]


@pytest.mark.parametrize("name", llava_files())
def test_llava_tap_comes_from_the_block_and_not_through_the_final_norm(name: str) -> None:
    tower = load(checkpoint_of(name)[0], hyper_parameters(name))
    stored = tensors(name)
    with torch.no_grad():
        tap = TowerEncoder(tower).forward_tokens(stored["images01"])
    assert close(tap, stored["llava_patch_features"], 5e-6)
    normed = [k for k in stored if plain_name(k) == "kuea_llava_tower.after_ln_post"]
    assert normed
    # What the recipe of the released code yields under its pinned open_clip is something else.
    assert all(absolute_error(tap, stored[k][:, 1:]) > 1e-3 for k in normed)


@tower_files
def test_wrong_activation_is_told_apart(name: str, path: Path) -> None:
    stated = hyper_parameters(name)
    other = "gelu" if stated["activation"].startswith("quick") else "quick_gelu"
    stored = tensors(name)
    found = activations(load(path, stated | {"activation": other}), stored["pixel_values"])
    key = "image_embedding" if "image_embedding" in stored else "pooled"
    assert absolute_error(found[key], stored[key]) > 1e-4


@pytest.mark.parametrize("name", files(r"ckpt/(authors_|visual_|siglip_).*"))
def test_round_trip_is_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    original = read_checkpoint_file(align_dir() / name)
    family = align_index()["files"][name]["hyper_parameters"]
    tower = load_tower(align_dir() / name, activation="gelu", heads=family.get("heads") or 1)
    exported = export_visual(tower)
    assert_equal_states(exported, original)
    for suffix in (".pt", ".safetensors"):
        save_visual(tower, tmp_path / f"out{suffix}")
        assert_equal_states(read_checkpoint_file(tmp_path / f"out{suffix}"), original)


def test_half_precision_weights_pass_unrounded() -> None:
    # open_clip's builder for OpenAI dicts rounds float32 weights to float16 on the way.
    for name in files(r"ckpt/(authors_|visual_).*\.safetensors"):
        state = read_checkpoint_file(align_dir() / name)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            cast = {key: t.to(dtype) for key, t in state.items()}
            back = convert.canonical_to_visual(convert.visual_to_canonical(cast))
            assert_equal_states(back, cast)


@pytest.mark.parametrize("name", HF_FILES)
def test_hf_file_equals_the_conversion_of_its_original(name: str) -> None:
    about = align_index()["files"][name]["about"]
    (original,) = (p for p in (align_dir() / "ckpt").glob("*.p*") if p.stem in about)
    stated = hyper_parameters(name)
    tower = load(original, stated)
    stored = read_checkpoint_file(align_dir() / name)
    assert_equal_states(convert.canonical_to_hf(tower.canonical_state()), stored)
    for key, value in stated["hf_config"].items():
        assert getattr(tower.model.config, key) == value, key
    again = load(align_dir() / name, stated)
    assert_equal_states(again.model.state_dict(), tower.model.state_dict())
    assert again.fingerprint == tower.fingerprint == fingerprint_state(stored)


@pytest.mark.parametrize("name", files(r"ckpt/openai_.*"))
def test_text_half_survives_a_change_of_the_visual_half(name: str) -> None:
    full = read_checkpoint_file(align_dir() / name)
    visual, text = convert.split_openai(full)
    assert_equal_states(convert.join_openai(visual, text), full)
    tower = load_tower(align_dir() / name, heads=hyper_parameters(name)["heads"])
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.add_(1)
    changed = convert.join_openai(export_visual(tower), text)
    assert changed.keys() == full.keys()
    for key in full:
        assert torch.equal(changed[key], full[key]) != key.startswith("visual."), key


@pytest.mark.parametrize("name", files(r"ckpt/openai_.*"))
def test_openai_export_has_the_layout_of_the_file_in_circulation(name: str, tmp_path: Path) -> None:
    path = align_dir() / name
    full = read_checkpoint_file(path)
    tower = load_tower(path, heads=hyper_parameters(name)["heads"])
    save_openai(tower, path, tmp_path / "same.pth")
    assert_equal_states(read_checkpoint_file(tmp_path / "same.pth"), full)
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.mul_(1.001)
    save_openai(tower, path, tmp_path / "other.pth")
    changed = read_checkpoint_file(tmp_path / "other.pth")
    assert {k: (t.shape, t.dtype) for k, t in changed.items()} == {
        k: (t.shape, t.dtype) for k, t in full.items()
    }
    # Float32 values of a fine-tuned tower arrive as they are.
    again = load_tower(tmp_path / "other.pth", heads=hyper_parameters(name)["heads"])
    assert_equal_states(again.model.state_dict(), tower.model.state_dict())


@pytest.mark.parametrize("name", [n for n in TOWERS if "text_width" in hyper_parameters(n)])
@precisions
def test_text_embedding_is_met(name: str, precision: str) -> None:
    dtype, tolerance = PRECISIONS[precision]
    stated, stored = hyper_parameters(name), tensors(name)
    (path,) = checkpoint_of(name)
    _, text = convert.split_openai(read_checkpoint_file(path))
    config = CLIPTextConfig(
        hidden_size=stated["text_width"],
        intermediate_size=4 * stated["text_width"],
        num_hidden_layers=stated["text_layers"],
        num_attention_heads=stated["text_heads"],
        max_position_embeddings=stated["context_length"],
        vocab_size=stated["vocab_size"],
        projection_dim=stated["output_dim"],
        hidden_act="quick_gelu",
        # 2 makes transformers take the token with the largest id as the end, as OpenAI does.
        bos_token_id=0,
        eos_token_id=2,
    )
    model: Any = CLIPTextModelWithProjection(config)
    model = model.to(dtype).eval()
    model.load_state_dict(convert.openai_text_to_hf(text))
    with torch.no_grad():
        found = model(input_ids=stored["tokens"]).text_embeds
    assert close(found, stored["text_embedding"], tolerance)


@tower_files
def test_saved_directory_gives_the_same_tower(name: str, path: Path, tmp_path: Path) -> None:
    tower = load(path, hyper_parameters(name))
    save_tower(tower, tmp_path / "tower", manifest={"base": {"reference": "some/base"}})
    again = load_tower(tmp_path / "tower")
    assert_equal_states(again.model.state_dict(), tower.model.state_dict())
    assert again.spec == tower.spec
    assert again.manifest is not None
    assert again.manifest["fingerprint"] == again.fingerprint == tower.fingerprint


def resize_cases() -> list[str]:
    return [
        name.removesuffix(".images01")
        for name in align_index()["files"][RESIZE]["tensors"]
        if name.endswith(".images01")
    ]


@pytest.mark.parametrize("case", resize_cases())
@precisions
def test_resized_tower_is_open_clips(case: str, precision: str) -> None:
    dtype, tolerance = PRECISIONS[precision]
    stored = {
        k.removeprefix(f"{case}."): t
        for k, t in tensors(RESIZE).items()
        if k.startswith(f"{case}.")
    }
    tower = load(checkpoint_of(RESIZE)[0], hyper_parameters(RESIZE), dtype)
    size = stored["pixel_values"].shape[-1]
    positions = tower.canonical_state()["embeddings.position_embedding.weight"]
    grid = size // tower.spec.patch_size
    found = resize_position_embedding(positions, grid)
    assert close(found, stored["positional_embedding.open_clip"], tolerance)
    assert torch.equal(found[0], positions[0])
    # transformers' own interpolation is something else: no antialias.
    assert absolute_error(found, stored["positional_embedding.hf_interpolate"]) > 1e-3

    resized = resize_tower(tower, size)
    pixels = stored["pixel_values"].to(dtype)
    result = activations(resized, pixels)
    assert close(result["pooled"], stored["pooled.open_clip"], tolerance)
    assert close(result["hf.hidden_states_m2"], stored["penultimate.open_clip"], tolerance)
    model: Any = tower.model
    with torch.no_grad():
        contrast = model(pixel_values=pixels, interpolate_pos_encoding=True).image_embeds
    assert close(contrast, stored["image_embeds.hf_interpolate"], tolerance)
    assert tower.spec.image_size == hyper_parameters(RESIZE)["image_size"]


def assert_equal_states(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype, key
        assert torch.equal(found[key], expected[key]), key
