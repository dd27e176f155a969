"""Loading towers: what is read, what is asked for, what is refused and in which words."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tower_samples import CLIP, SIGLIP, canonical, make_tower, visual, write_torch
from transformers import BertConfig, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from kuea_mllm.errors import TowerError, TowerMismatch, UserError
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.formats.layouts import measure, read_file
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.model.tower import Tower
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tower(make_tower(CLIP), tmp_path / "tower", manifest={})
    return tmp_path / "tower"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def same_weights(a: Tower, b: Tower) -> bool:
    one, other = a.model.state_dict(), b.model.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def full_openai() -> dict[str, torch.Tensor]:
    text = {"positional_embedding": torch.zeros(4, 8), "logit_scale": torch.tensor(1.0)}
    return convert.join_openai(visual(), text)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_bare_visual_dict_is_read_from_any_file_type(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"final{suffix}"
    if suffix == ".safetensors":
        save_file(visual(), path)
    else:
        write_torch(path, visual())
    tower = load_tower(path, activation="quick_gelu")
    assert tower.spec == CLIP
    assert tower.layout == "visual"
    assert same_weights(tower, make_tower(CLIP))
    assert not tower.model.training


def test_old_torch_format_is_read(tmp_path: Path) -> None:
    torch.save(visual(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_tower(tmp_path / "old.pt", activation="gelu").spec.activation == "gelu"


def test_wrapped_and_full_dicts_are_recognised(tmp_path: Path) -> None:
    robust = write_torch(tmp_path / "a.pt", {"vision_encoder_state_dict": visual()})
    assert load_tower(robust, activation="quick_gelu").layout == "robustvlm"
    tower = load_tower(write_torch(tmp_path / "b.pt", full_openai()))
    assert (tower.layout, tower.spec.activation, tower.spec.heads) == ("openai", "quick_gelu", 1)
    trunk = {f"visual.{k}": t for k, t in convert.canonical_to_trunk(canonical(SIGLIP)).items()}
    path = write_torch(
        tmp_path / "c.pt", trunk | {"text.x": torch.ones(1), "logit_bias": torch.ones(1)}
    )
    tower = load_tower(path, heads=2)
    assert (tower.layout, tower.spec) == ("open_clip_siglip", SIGLIP)


def test_activation_must_be_stated_for_a_bare_dict(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "final.pt", visual())
    with pytest.raises(TowerError, match="does not state its activation") as caught:
        load_tower(path)
    assert "--activation quick_gelu" in caught.value.remedy
    assert "--activation gelu" in caught.value.remedy
    assert str(path) in caught.value.problem
    with pytest.raises(TowerError, match="unknown activation 'relu'"):
        load_tower(path, activation="relu")


def test_heads_must_be_stated_where_the_rule_does_not_apply(tmp_path: Path) -> None:
    trunk = write_torch(tmp_path / "trunk.pt", convert.canonical_to_trunk(canonical(SIGLIP)))
    with pytest.raises(TowerError, match="attention heads") as caught:
        load_tower(trunk)
    assert "--heads" in caught.value.remedy
    with pytest.raises(TowerError, match="cannot have 5 heads"):
        load_tower(trunk, heads=5)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"ln_post.bias": None}, r"lacks key ln_post\.bias"),
        ({"transformer.resblocks.1.mlp.c_fc.bias": None}, r"resblocks\.1\.mlp\.c_fc\.bias"),
        ({"extra.weight": torch.ones(1)}, r"unknown key extra\.weight"),
        ({"ln_pre.bias": "text"}, "ln_pre.bias is a str"),
        ({"positional_embedding": torch.ones(4, 64)}, "form no square"),
        ({"ln_pre.bias": torch.ones(3)}, "pre_layrnorm.bias has shape"),
        (
            {"transformer.resblocks.0.attn.in_proj_bias": torch.ones(100)},
            "no multiple of three",
        ),
    ],
)
def test_damaged_dict_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], pattern: str
) -> None:
    state = {k: v for k, v in (visual() | change).items() if v is not None}
    with pytest.raises(UserError, match=pattern):
        load_tower(write_torch(tmp_path / "final.pt", state), activation="gelu")


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    cases: dict[str, str] = {}
    (tmp_path / "empty.pt").touch()
    cases["empty.pt"] = "empty"
    (tmp_path / "noise.pt").write_bytes(b"no weights at all")
    cases["noise.pt"] = "cannot be read as plain weights"
    (tmp_path / "noise.safetensors").write_bytes(b"no weights at all")
    cases["noise.safetensors"] = "not a readable safetensors file"
    write_torch(tmp_path / "list.pt", [1, 2])
    cases["list.pt"] = "holds a list, not a state dict"
    write_torch(tmp_path / "other.pt", {"epoch": 3, "weights": torch.ones(1)})
    cases["other.pt"] = "no known layout; its first keys are: epoch, weights"
    write_torch(tmp_path / "inner.pt", {"vision_encoder_state_dict": {"a": 1}})
    cases["inner.pt"] = "vision_encoder_state_dict holds no open_clip"
    for name, pattern in cases.items():
        with pytest.raises(TowerError, match=pattern) as caught:
            load_tower(tmp_path / name, activation="gelu")
        assert str(tmp_path / name) in caught.value.problem


class Malice:
    """Runs code when unpickled, unless nothing unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("malice-was-here"),)


def test_pickles_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_torch(tmp_path / "zip.pt", {"class_embedding": Malice()})
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"class_embedding": Malice()}))
    for name in ("zip.pt", "raw.bin"):
        with pytest.raises(TowerError, match="cannot be read as plain weights") as caught:
            load_tower(tmp_path / name, activation="gelu")
        # torch's own words say how to run the code all the same.
        assert "weights_only" not in caught.value.problem
    assert not (tmp_path / "malice-was-here").exists()


def test_torchscript_archive_is_named(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "ViT-L-14.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(TowerError, match="TorchScript"):
        load_tower(tmp_path / "ViT-L-14.pt")


@pytest.mark.parametrize("source", ["no/such/place", "./nowhere", "gone.pt", Path("gone"), "a b"])
def test_missing_path_is_named(source: str | Path) -> None:
    with pytest.raises(TowerError, match="no file or directory"):
        load_tower(source)


def test_hub_id_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("cannot reach the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(TowerError, match=r"some/model is no existing path.*cannot reach"):
        load_tower("some/model")


def test_directory_states_everything(directory: Path) -> None:
    tower = load_tower(directory, activation="quick_gelu", heads=1)
    assert tower.spec == CLIP
    assert tower.layout == "hf_directory"
    assert same_weights(tower, make_tower(CLIP))
    with pytest.raises(TowerMismatch, match="hidden_act quick_gelu, --activation gelu"):
        load_tower(directory, activation="gelu")
    with pytest.raises(TowerMismatch, match="num_attention_heads 1, --heads 2"):
        load_tower(directory, heads=2)


def test_directory_of_another_model_is_named(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(TowerError, match="model of type 'bert'"):
        load_tower(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TowerError, match="not valid JSON"):
        load_tower(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(TowerError, match=r"no config\.json"):
        load_tower(tmp_path)


def test_configuration_that_makes_no_sense_is_refused(directory: Path) -> None:
    edit_json(directory / "config.json", hidden_size="wide")
    with pytest.raises(TowerError, match=r"config\.json.*hidden_size"):
        load_tower(directory)


def test_incomplete_directory_is_refused_by_name(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    gone = weights.pop("vision_model.post_layernorm.bias")
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(TowerError, match=r"lacks key post_layernorm\.bias"):
        load_tower(directory)
    weights["vision_model.post_layernorm.bias"] = gone
    del weights["visual_projection.weight"]
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(TowerError, match=r"lacks key visual_projection\.weight"):
        load_tower(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(TowerError, match="holds no weights"):
        load_tower(directory)


def test_configuration_of_another_tower_is_refused(directory: Path) -> None:
    edit_json(directory / "config.json", num_hidden_layers=3)
    with pytest.raises(TowerMismatch, match="num_hidden_layers 3, the weights say 2"):
        load_tower(directory)


def test_preprocessing_comes_from_the_directory(directory: Path) -> None:
    path = directory / "preprocessor_config.json"
    edit_json(path, image_mean=[0.1, 0.2, 0.3], size={"height": 16, "width": 16})
    tower = load_tower(directory)
    assert tower.spec.mean == (0.1, 0.2, 0.3)
    assert tower.spec.resize == "squash"
    edit_json(path, crop_size=24)
    with pytest.raises(TowerMismatch, match="images of 24 pixels"):
        load_tower(directory)
    edit_json(path, crop_size=16, size={"shortest_edge": 20})
    with pytest.raises(TowerMismatch, match="resized to 20 first"):
        load_tower(directory)
    edit_json(path, size=16, image_std=[1.0])
    with pytest.raises(TowerError, match="image_std must be a list of three"):
        load_tower(directory)
    path.unlink()
    assert load_tower(directory).spec == CLIP


def test_processor_config_of_a_full_model_is_read(directory: Path) -> None:
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    settings["image_mean"] = [0.1, 0.2, 0.3]
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert load_tower(directory).spec.mean == (0.1, 0.2, 0.3)


def test_image_size_may_leave_a_rest_that_no_patch_covers(tmp_path: Path) -> None:
    # As SigLIP SO400M/14 at 384 pixels does: 27 patches of 14 are 378.
    for name, spec in (("siglip", SIGLIP), ("clip", CLIP)):
        tower = make_tower(replace(spec, image_size=21))
        save_tower(tower, tmp_path / name, manifest={})
        again = load_tower(tmp_path / name)
        assert (again.spec.image_size, again.spec.grid) == (21, 2)
        pixels = torch.rand(1, 3, 21, 21)
        torch.testing.assert_close(TowerEncoder(again)(pixels), TowerEncoder(tower)(pixels))


def test_another_resize_filter_is_warned_of(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tower(directory)
    assert "filter" not in caplog.text
    edit_json(directory / "preprocessor_config.json", resample=2)
    load_tower(directory)
    assert "resizes with filter 2" in caplog.text


@pytest.mark.parametrize("has_prefix", [True, False])
def test_both_key_layouts_are_read(directory: Path, has_prefix: bool) -> None:
    weights = load_file(directory / "model.safetensors")
    bare = {k.removeprefix("vision_model."): t for k, t in weights.items()}
    bare["embeddings.position_ids"] = torch.arange(5)[None]
    state = {("vision_model." if has_prefix else "") + k: t for k, t in bare.items()}
    state["visual_projection.weight"] = weights["visual_projection.weight"]
    state.pop("vision_model.visual_projection.weight", None)
    save_file(state, directory / "model.safetensors")
    assert same_weights(load_tower(directory), make_tower(CLIP))


def test_sharded_directory_is_read_and_a_missing_shard_named(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({n: weights[n] for n in part}, directory / shard)
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {n: shard for shard, part in halves.items() for n in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(load_tower(directory), make_tower(CLIP))
    (directory / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard .*b\.safetensors is missing"):
        load_tower(directory)


def vision_settings(**other: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, **other}


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 10,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_vision_half_of_a_full_model_is_taken(tmp_path: Path, family: str) -> None:
    model: Any
    if family == "clip":
        model = CLIPModel(
            CLIPConfig(text_config=TEXT, vision_config=vision_settings(), projection_dim=12)
        )
    else:
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision_settings()))
    model.eval()
    model.save_pretrained(tmp_path)
    tower = load_tower(tmp_path)
    assert tower.spec.family == family
    assert tower.spec.embedding_width == (12 if family == "clip" else 32)
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor(tower.spec.mean), torch.tensor(tower.spec.std)
    normalised = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=normalised)
        found = TowerEncoder(tower)(pixels)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(found, expected)


def test_tower_without_projection_loads_but_has_no_embedding(tmp_path: Path) -> None:
    bare = make_tower(CLIP, with_projection=False)
    save_tower(bare, tmp_path / "tower", manifest={})
    tower = load_tower(tmp_path / "tower")
    assert not tower.has_projection
    assert tower.spec.embedding_width == tower.spec.width
    with pytest.raises(TowerError, match="no CLIP embedding"):
        TowerEncoder(tower)


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    half = {k: t.half() for k, t in visual().items()}
    path = write_torch(tmp_path / "half.pt", half)
    assert measure(*read_file(path), "it").dtype == "float16"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tower = load_tower(path, activation="gelu", dtype=dtype)
        assert tower.model.dtype == dtype
    assert TowerEncoder(tower)(torch.rand(1, 3, 16, 16)).dtype == torch.bfloat16


def test_loaded_weights_are_a_copy(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "final.pt", visual())
    tower = load_tower(path, activation="gelu")
    before = tower.fingerprint
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.add_(1)
    assert tower.fingerprint != before
    assert load_tower(path, activation="gelu").fingerprint == before


def test_sizes_are_read_off_the_weights(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "final.pt", visual())
    shape = measure(*read_file(path), "it")
    assert (shape.layout, shape.family, shape.width, shape.layers) == ("visual", "clip", 64, 2)
    assert shape.embedding_width == 24
    assert "KUEA" in shape.description
    assert shape.image_size == 16
    tensors = visual()
    tensors["conv1.weight"] = tensors["conv1.weight"].to(torch.int8)
    with pytest.raises(TowerError, match=r"patch_embedding\.weight is int8") as caught:
        load_tower(write_torch(path, tensors), activation="gelu")
    assert "float16" in caught.value.remedy


def test_an_adapter_directory_and_no_heads_are_refused(tmp_path: Path) -> None:
    named = json.dumps({"base_model_name_or_path": "openai/clip"})
    (tmp_path / "adapter_config.json").write_text(named)
    with pytest.raises(TowerError, match=r"PEFT adapter .* for openai/clip") as caught:
        load_tower(tmp_path)
    assert "merge_and_unload" in caught.value.remedy
    for heads in (0, -1):
        with pytest.raises(TowerError, match=f"cannot have {heads} heads"):
            load_tower(tmp_path, heads=heads)
