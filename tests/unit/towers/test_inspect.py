"""What `--inspect` says of files and directories, and what it refuses by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_samples import write_repository
from safetensors.torch import save_file
from torch import Tensor
from tower_samples import CLIP, SIGLIP, canonical, make_tower, visual, write_torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    SiglipConfig,
    SiglipModel,
)

from kuea_mllm.cli.inspect import inspection_rows, print_inspection
from kuea_mllm.errors import TowerError
from kuea_mllm.towers.formats import convert
from kuea_mllm.towers.formats.evidence import implied_activation, implied_heads
from kuea_mllm.towers.formats.layouts import CheckpointShape, measure, read_file
from kuea_mllm.towers.inspecting.inspect import inspect_source, rounded_to_half, unmerged_lora_keys
from kuea_mllm.towers.model.weight_checks import count_non_finite
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 9,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _shape(path: Path) -> CheckpointShape:
    return measure(*read_file(path), str(path))


def full_clip(**extra: Tensor) -> dict[str, Tensor]:
    text = {"positional_embedding": torch.zeros(77, 8), "logit_scale": torch.tensor(1.0)}
    text["token_embedding.weight"] = torch.zeros(16, 8)
    return convert.join_openai(visual(), text) | extra


def write_clip(directory: Path, **vision: Any) -> Path:
    config = CLIPConfig(text_config=TEXT, vision_config=VISION | vision, projection_dim=12)
    CLIPModel(config).save_pretrained(directory)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def test_bare_visual_dict_is_told_with_what_it_does_not_say(tmp_path: Path) -> None:
    found = inspect_source(write_torch(tmp_path / "final.pt", visual()))
    assert (found.layout, found.family, found.dtype) == ("visual", "clip", "float32")
    assert found.sizes == {
        "image_size": 16,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "mlp_width": 128,
        "embedding_width": 24,
    }
    assert found.has_projection
    assert not found.has_text_tower
    assert (found.activation, found.heads) == (None, 1)
    assert "width / 64" in found.heads_evidence[0]
    assert "not stated" in found.preprocessing_evidence[0]
    assert found.fingerprint == make_tower(CLIP).fingerprint
    assert found.warnings == []
    names = [release.name for release in found.releases]
    assert names == ["KUEA", "FARE / TeCoA (RobustVLM)", "un2CLIP"]
    assert {release.confidence for release in found.releases} == {"possible"}
    # Possible is not enough to say which activation it has.
    assert found.activation_evidence[-1].startswith("if it is KUEA or ")
    assert json.loads(json.dumps(found.to_dict()))["releases"][0]["confidence"] == "possible"


def test_full_dict_has_a_text_tower_and_an_implied_activation(tmp_path: Path) -> None:
    found = inspect_source(write_torch(tmp_path / "clip.pth", full_clip()))
    assert found.layout == "openai"
    assert found.has_text_tower
    assert found.activation == "quick_gelu"
    assert "implied by the layout" in found.activation_evidence[0]
    assert "pass --activation gelu" in found.activation_evidence[-1]


@pytest.mark.parametrize(
    "name", ["vit_b_16-laion400m_e32-55e67d44.pt", "open_clip_pytorch_model.bin"]
)
def test_full_dict_of_an_open_clip_training_implies_no_activation(
    tmp_path: Path, name: str
) -> None:
    found = inspect_source(write_torch(tmp_path / name, full_clip()))
    assert found.activation is None
    assert any("gelu" in line for line in found.activation_evidence)


def test_release_trained_with_another_activation_overrides_the_layout(tmp_path: Path) -> None:
    trunk = convert.canonical_to_trunk(canonical(SIGLIP))
    found = inspect_source(write_torch(tmp_path / "siglip_vit_so_14_384.ckpt", trunk))
    assert found.activation == "gelu"
    assert "was trained with it" in found.activation_evidence[-1]
    found = inspect_source(write_torch(tmp_path / "fare_eps_2.pt", trunk))
    assert found.activation is None
    assert found.activation_evidence[-1] == (
        "but FARE / TeCoA (RobustVLM) was trained with quick_gelu: --activation quick_gelu"
    )


def test_trunk_does_not_state_its_heads(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "trunk.pt", convert.canonical_to_trunk(canonical(SIGLIP)))
    found = inspect_source(path)
    assert (found.layout, found.family, found.activation) == ("trunk", "siglip", "gelu")
    assert found.heads is None
    assert "--heads" in found.heads_evidence[-1]


@pytest.mark.parametrize(
    ("width", "patch", "size", "activation"),
    [
        (768, 16, 224, "gelu"),
        (768, 32, 256, "gelu_pytorch_tanh"),
        (1024, 16, 384, "gelu"),
        (1024, 16, 512, "gelu_pytorch_tanh"),
        (1152, 14, 384, "gelu"),
        (1152, 16, 384, "gelu_pytorch_tanh"),
        (1536, 16, 256, "gelu_pytorch_tanh"),
    ],
)
def test_activation_of_a_trunk_is_that_of_timms_model(
    tmp_path: Path, width: int, patch: int, size: int, activation: str
) -> None:
    timm = pytest.importorskip("timm")
    letter = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}[width]
    path = write_torch(tmp_path / "trunk.pt", convert.canonical_to_trunk(canonical(SIGLIP)))
    shape = replace(_shape(path), width=width, patch_size=patch, image_size=size, layers=1)
    assert implied_activation(shape, "trunk.pt") == activation
    with torch.device("meta"):
        model = timm.create_model(f"vit_{letter}_patch{patch}_siglip_{size}", depth=1)
    assert ("tanh" in repr(model.blocks[0].mlp.act).lower()) == (activation != "gelu")


def test_heads_rule_is_not_applied_where_open_clip_departs_from_it(tmp_path: Path) -> None:
    import open_clip

    shape = _shape(write_torch(tmp_path / "final.pt", visual()))
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision:
            continue
        heads = vision["width"] // vision.get("head_width", 64)
        assert implied_heads(replace(shape, width=vision["width"])) in {heads, None}, name
    assert implied_heads(replace(shape, width=1280)) is None
    assert implied_heads(replace(shape, width=1024)) == 16


@pytest.mark.parametrize("kind", ["visual", "openai", "robustvlm", "trunk", "hf", "open_clip"])
def test_inspection_agrees_with_what_is_loaded(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.pt"
    if kind == "visual":
        write_torch(path, visual())
    elif kind == "openai":
        write_torch(path, full_clip())
    elif kind == "robustvlm":
        write_torch(path, {"vision_encoder_state_dict": visual()})
    elif kind == "trunk":
        write_torch(path, convert.canonical_to_trunk(canonical(SIGLIP)))
    elif kind == "hf":
        path = write_clip(tmp_path / "clip", hidden_act="gelu")
    else:
        path = tmp_path / "repository"
        write_repository(path, "gelu")
    found = inspect_source(path)
    tower = load_tower(
        path,
        activation="quick_gelu" if found.activation is None else None,
        heads=2 if found.heads is None else None,
    )
    assert found.fingerprint == tower.fingerprint
    assert found.layout == tower.layout
    assert found.activation in {tower.spec.activation, None}
    assert found.heads in {tower.spec.heads, None}
    assert found.preprocessing["mean"] == list(tower.spec.mean)
    assert found.preprocessing["resize"] == tower.spec.resize
    assert {name: getattr(tower.spec, name) for name in found.sizes} == found.sizes


def test_directory_states_activation_and_heads(tmp_path: Path) -> None:
    found = inspect_source(write_clip(tmp_path, hidden_act="gelu"))
    assert (found.layout, found.activation, found.heads) == ("hf_directory", "gelu", 4)
    assert found.activation_evidence == ["stated by config.json (vision_config.hidden_act)"]
    assert found.has_text_tower
    assert found.has_projection


def test_activation_that_a_directory_leaves_out_is_the_default_of_transformers(
    tmp_path: Path,
) -> None:
    write_clip(tmp_path, hidden_act="quick_gelu")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_source(tmp_path)
    assert found.activation == "quick_gelu"
    assert "leaves vision_config.hidden_act out" in found.activation_evidence[0]


def test_siglip_generation_is_told_by_its_vocabulary(tmp_path: Path) -> None:
    config = SiglipConfig(text_config=TEXT | {"vocab_size": 256}, vision_config=VISION)
    SiglipModel(config).save_pretrained(tmp_path)
    assert [r.name for r in inspect_source(tmp_path).releases] == ["SigLIP or SigLIP 2"]
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 256_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [r.name for r in inspect_source(tmp_path).releases] == ["SigLIP 2"]


def test_open_clip_repository_states_everything(tmp_path: Path) -> None:
    write_repository(tmp_path, "siglip")
    found = inspect_source(tmp_path)
    assert (found.layout, found.activation) == ("open_clip_directory", "gelu_pytorch_tanh")
    assert "vit_sample_siglip" in found.activation_evidence[0]
    assert found.heads == 4
    assert found.sizes["image_size"] == 20
    assert found.has_text_tower


def test_bare_tower_without_projection_is_warned_about(tmp_path: Path) -> None:
    save_tower(make_tower(CLIP, with_projection=False), tmp_path / "t", manifest={})
    found = inspect_source(tmp_path / "t")
    assert not found.has_projection
    assert any("no projection" in warning for warning in found.warnings)


def test_own_towers_are_recognised_by_their_fingerprint(tmp_path: Path) -> None:
    tower = make_tower(CLIP)
    save_tower(tower, tmp_path / "t", manifest={"kind": "tower", "objective": {}})
    found = inspect_source(tmp_path / "t")
    assert [(r.name, r.confidence) for r in found.releases] == [("kuea-mllm", "certain")]
    assert found.provenance is not None
    assert found.provenance["kind"] == "tower"
    named = {"base_tower": {"reference": "openai/clip", "fingerprint": "ab" * 32}}
    rows = inspection_rows(replace(found, provenance=named))
    assert rows["kuea.json"] == "base_tower openai/clip"
    # The file inside is the same tower.
    inside = inspect_source(tmp_path / "t" / "model.safetensors")
    assert inside.provenance == found.provenance
    save_tower(make_tower(CLIP, seed=1), tmp_path / "other", manifest={})
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "t" / "model.safetensors")
    changed = inspect_source(tmp_path / "t")
    assert changed.releases == []
    assert any("changed since" in warning for warning in changed.warnings)


def test_run_directory_of_the_authors_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "args.txt").write_text("Namespace(lr=1e-05, kernel_clip='polynomial')")
    found = inspect_source(write_torch(tmp_path / "checkpoints" / "final.pt", visual()))
    assert [(r.name, r.confidence) for r in found.releases] == [("KUEA", "likely")]
    assert found.activation is None
    assert found.activation_evidence[-1] == (
        "KUEA was trained with quick_gelu: --activation quick_gelu"
    )


def test_image_processor_of_another_size_is_warned_about(tmp_path: Path) -> None:
    save_tower(make_tower(CLIP), tmp_path / "t", manifest={})
    edit_json(
        tmp_path / "t" / "preprocessor_config.json",
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
    )
    assert any("24 pixels" in warning for warning in inspect_source(tmp_path / "t").warnings)


def test_mllm_directory_is_named_as_one(tmp_path: Path) -> None:
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1},
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path)
    found = inspect_source(tmp_path)
    assert found.layout == "mllm_directory"
    assert "LlavaForConditionalGeneration" in found.description
    assert (found.family, found.activation, found.heads) == ("clip", "quick_gelu", 4)
    assert found.sizes["width"] == 32
    assert "kuea-mllm swap" in found.warnings[0]
    assert inspection_rows(found)["family"] == "clip"


def test_mllm_that_only_names_its_tower_is_told_so(tmp_path: Path) -> None:
    content = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = inspect_source(tmp_path)
    assert (found.family, found.activation, found.dtype) == (None, None, "float16")
    assert any("openai/clip-vit-large-patch14-336" in warning for warning in found.warnings)


def test_adapter_directory_is_refused_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TowerError, match=r"PEFT adapter .* for owner/base") as caught:
        inspect_source(tmp_path)
    assert "merge_and_unload" in caught.value.remedy


LORA = [
    "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_B.default.weight",
    "vision_model.encoder.layers.0.self_attn.q_proj.base_layer.weight",
]


def test_unmerged_lora_is_refused(tmp_path: Path) -> None:
    assert unmerged_lora_keys([*LORA, "lora_alpha_like.weight", "color_A"]) == LORA
    path = tmp_path / "lora.pt"
    for names in (LORA[:2], ["embeddings.patch_embedding.weight", LORA[2]]):
        write_torch(path, {name: torch.ones(2, 2) for name in names})
        for read in (inspect_source, load_tower):
            with pytest.raises(TowerError, match="LoRA weights that were not merged"):
                read(path)


def test_unmerged_lora_in_a_directory_is_refused(tmp_path: Path) -> None:
    save_tower(make_tower(CLIP), tmp_path / "t", manifest={})
    state = canonical(CLIP) | {LORA[0]: torch.ones(2, 2)}
    save_file(state, tmp_path / "t" / "model.safetensors")
    with pytest.raises(TowerError, match="not merged"):
        inspect_source(tmp_path / "t")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["visual.trunk.cls_token", "visual.trunk.blocks.0.attn.q_proj.weight"], "EVA-CLIP"),
        (["visual.trunk.cls_token", "visual.trunk.blocks.0.attn.q_bias"], "EVA-CLIP"),
        (["visual.cls_token", "visual.blocks.0.attn.q_proj.weight"], "EVA-CLIP"),
        (["visual.trunk.norm_pre.weight", "visual.trunk.attn_pool.latent"], "Perception Encoder"),
        (["trunk.patch_embed.backbone.stem.conv1.weight"], "ViTamin"),
        (["visual.trunk.stages.0.blocks.0.conv_dw.weight"], "ConvNeXt"),
        (["visual.attnpool.c_proj.weight", "visual.layer1.0.conv1.weight"], "ResNet"),
        (["cls_token", "blocks.0.attn.qkv.weight", "register_tokens"], "DINOv2"),
    ],
)
def test_other_vision_models_are_refused_by_name(
    tmp_path: Path, names: list[str], kind: str
) -> None:
    path = write_torch(tmp_path / "other.pt", {name: torch.ones(1) for name in names})
    with pytest.raises(TowerError, match=f"looks like .*{kind}"):
        inspect_source(path)


@pytest.mark.parametrize(
    ("prefix", "container"),
    [
        ("module.", None),
        ("_orig_mod.", None),
        ("module._orig_mod.", None),
        ("model.", "state_dict"),
        ("", "state_dict"),
        ("", "model"),
    ],
)
def test_wrapping_of_training_tools_is_taken_off(
    tmp_path: Path, prefix: str, container: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in full_clip().items()}
    path = write_torch(
        tmp_path / "epoch_1.pt",
        state if container is None else {"epoch": 1, container: state, "optimizer": {"state": {}}},
    )
    with caplog.at_level("INFO", logger="kuea_mllm"):
        tower = load_tower(path)
    assert tower.fingerprint == make_tower(CLIP).fingerprint
    assert "read without" in caplog.text
    found = inspect_source(path)
    assert found.has_text_tower
    assert len(found.taken_off) == bool(prefix) + (container is not None)
    assert any(warning.startswith("read without") for warning in found.warnings)


def test_prefix_that_only_some_keys_have_is_not_taken_off(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in visual().items()}
    path = write_torch(tmp_path / "mixed.pt", state | {"step": torch.ones(1)})
    with pytest.raises(TowerError, match=r"A tower lies below 'module\.'") as caught:
        inspect_source(path)
    assert "module.class_embedding" in caught.value.problem


def test_two_models_in_one_file_are_not_chosen_between(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "two.pt", {"model": visual(), "state_dict": visual(1)})
    with pytest.raises(TowerError, match=r"no known layout; its first keys are: model, state_dict"):
        inspect_source(path)


def test_tower_below_another_prefix_is_pointed_out(tmp_path: Path) -> None:
    state = {"lm_head.weight": torch.ones(1)}
    state |= {f"model.vision_tower.vision_model.{k}": t for k, t in canonical(CLIP).items()}
    with pytest.raises(TowerError, match=r"below 'model\.vision_tower\.'"):
        inspect_source(write_torch(tmp_path / "mllm.pt", state))


def test_long_clip_is_read_and_recognised(tmp_path: Path) -> None:
    long = torch.zeros(248, 8)
    state = full_clip(positional_embedding=long, positional_embedding_res=long)
    path = write_torch(tmp_path / "file.pt", state)
    found = inspect_source(path)
    assert [(r.name, r.confidence) for r in found.releases] == [("Long-CLIP", "certain")]
    assert found.activation == "quick_gelu"
    assert load_tower(path).fingerprint == make_tower(CLIP).fingerprint


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_rounding_to_half_is_seen(half: torch.dtype) -> None:
    name = str(half).removeprefix("torch.")
    state = canonical(CLIP)
    assert rounded_to_half(state) is None
    # As open_clip's builder does it: matrices only.
    rounded = {k: t.to(half).float() if t.dim() > 1 else t for k, t in state.items()}
    rounded["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"]
    assert rounded_to_half(rounded) == name
    one = "encoder.layers.1.mlp.fc2.weight"
    kept = rounded[one].clone()
    kept[-1, -1] = 0.1
    assert rounded_to_half(rounded | {one: kept}) is None
    # Stored in half precision, there is nothing to warn about.
    assert rounded_to_half({k: t.to(half) for k, t in state.items()}) is None
    assert rounded_to_half({k: torch.zeros_like(t) for k, t in state.items()}) is None


def test_rounded_tower_is_warned_about_unless_it_is_openais(tmp_path: Path) -> None:
    rounded = {name: tensor.half().float() for name, tensor in full_clip().items()}
    found = inspect_source(write_torch(tmp_path / "clip.pth", rounded))
    assert any("float16 values only" in warning for warning in found.warnings)
    original = rounded | {"input_resolution": torch.tensor(16)}
    found = inspect_source(write_torch(tmp_path / "clip.pt", original))
    assert [release.name for release in found.releases] == ["OpenAI CLIP"]
    assert found.warnings == []


def test_non_finite_values_are_counted(tmp_path: Path) -> None:
    state = visual()
    state["ln_post.bias"][:2] = float("nan")
    state["conv1.weight"][0, 0, 0, 0] = float("inf")
    assert count_non_finite(state)[0] == 3
    found = inspect_source(write_torch(tmp_path / "final.pt", state))
    assert any(warning.startswith("3 values are NaN") for warning in found.warnings)


def test_mixed_types_are_counted(tmp_path: Path) -> None:
    state = {k: t.half() if t.dim() > 1 else t for k, t in visual().items()}
    found = inspect_source(write_torch(tmp_path / "final.pt", state))
    assert found.dtype == "float16"
    assert set(found.dtypes) == {"float16", "float32"}
    assert sum(found.dtypes.values()) == len(canonical(CLIP))


def test_print_gives_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_torch(tmp_path / "final.pt", {f"module.{k}": t for k, t in visual().items()})
    print_inspection(str(path), json_output=True)
    assert json.loads(capsys.readouterr().out) == inspect_source(str(path)).to_dict()
    print_inspection(str(path), json_output=False)
    printed = capsys.readouterr().out
    # In one piece, however narrow the terminal.
    assert f"fingerprint {inspect_source(path).fingerprint}\n" in printed
    for part in ("quick_gelu", "KUEA (possible", "width 64", "warning: read without"):
        assert part in printed
