"""`kuea-mllm swap` and `convert` on the mini world."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from kuea_mllm.miniworld import ASSETS

BASE = ASSETS / "llava"


def vision_config(**changes):
    stored = json.loads((BASE / "config.json").read_text())["vision_config"]
    kept = {
        name: stored[name]
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
            "hidden_act",
            "projection_dim",
        )
    }
    return CLIPVisionConfig(**{**kept, **changes})


def write_tower(folder, seed=1, **changes):
    torch.manual_seed(seed)
    CLIPVisionModelWithProjection(vision_config(**changes)).save_pretrained(folder)
    return folder


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_swap_equals_a_llava_built_by_hand(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower")
    out = tmp_path / "out"
    answer = kuea("swap", "--mllm=llava", f"--base={BASE}", f"--tower={tower}", f"--out={out}")
    assert answer.code == 0, answer.err

    swapped, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    by_hand = LlavaForConditionalGeneration.from_pretrained(BASE)
    weights = load_file(tower / "model.safetensors")
    state = by_hand.model.vision_tower.state_dict()
    replaced = {}
    for name in state:
        bare = name.removeprefix("vision_model.")
        replaced[name] = weights[f"vision_model.{bare}"]
    by_hand.model.vision_tower.load_state_dict(replaced)

    processor = AutoProcessor.from_pretrained(BASE)
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 32)
    tokens = [processor.tokenizer.bos_token_id] + [by_hand.config.image_token_id] * 16 + [5, 6, 7]
    inputs = {"input_ids": torch.tensor([tokens]), "pixel_values": image}
    with torch.no_grad():
        difference = swapped(**inputs).logits - by_hand(**inputs).logits
    assert difference.abs().max() <= 1e-5
    with torch.no_grad():
        original = LlavaForConditionalGeneration.from_pretrained(BASE)(**inputs).logits
    assert (original - swapped(**inputs).logits).abs().max() > 1e-3


def test_swapping_the_original_back_restores_the_fingerprint_exactly(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower")
    there = kuea(
        "swap", f"--base={BASE}", f"--tower={tower}", f"--out={tmp_path / 'there'}", "--json"
    )
    back = kuea(
        "swap",
        f"--base={tmp_path / 'there'}",
        f"--tower={ASSETS / 'clip'}",
        f"--out={tmp_path / 'back'}",
        "--json",
    )
    assert there.code == back.code == 0, there.err + back.err
    first, second = json.loads(there.out), json.loads(back.out)
    assert first["fingerprint_before"] == second["fingerprint_after"]
    assert first["fingerprint_after"] == second["fingerprint_before"]
    weights = [load_file(folder / "model.safetensors") for folder in (BASE, tmp_path / "back")]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 32}, "32"),
        ({"patch_size": 16}, "16"),
        ({"image_size": 64}, "64"),
        ({"num_hidden_layers": 2}, "2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_attention_heads": 4}, "4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tower_that_does_not_fit_is_refused(kuea, tmp_path, changes, expected):
    tower = write_tower(tmp_path / "tower", **changes)
    answer = kuea("swap", f"--base={BASE}", f"--tower={tower}", f"--out={tmp_path / 'out'}")
    assert answer.code == 2
    assert expected in answer.err
    assert "Traceback" not in answer.err
    assert listing(tmp_path) == ["tower"]


def test_siglip_tower_is_refused(kuea, tmp_path):
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    answer = kuea(
        "swap", f"--base={BASE}", f"--tower={tmp_path / 'siglip'}", f"--out={tmp_path / 'out'}"
    )
    assert answer.code == 2
    assert "siglip" in answer.err.lower()
    assert listing(tmp_path) == ["siglip"]


def test_same_tower_is_refused_unless_allowed(kuea, tmp_path):
    arguments = [
        "swap",
        f"--base={BASE}",
        f"--tower={ASSETS / 'clip'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert kuea(*arguments).code == 2
    assert listing(tmp_path) == []
    assert kuea(*arguments, "--allow-same").code == 0


BAD_ARGUMENTS = {
    "missing base": ({"base": "no/such/model"}, "no/such/model"),
    "base is no MLLM": ({"base": ASSETS / "clip"}, "clip"),
    "missing tower": ({"tower": "./no/such/tower"}, "no/such/tower"),
    "unknown adapter": ({"mllm": "lava"}, "llava"),
    "tower is an MLLM": ({"tower": BASE}, "llava"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument_ends_in_one_clear_line(kuea, tmp_path, name):
    changes, expected = BAD_ARGUMENTS[name]
    options = {"base": BASE, "tower": ASSETS / "clip", "out": tmp_path / "out", **changes}
    answer = kuea("swap", *(f"--{key}={value}" for key, value in options.items()))
    assert answer.code == 2
    assert expected in answer.err
    assert listing(tmp_path) == []


def test_visual_export_round_trips_bit_for_bit(kuea, tmp_path):
    visual, again = tmp_path / "visual.safetensors", tmp_path / "hf"
    assert kuea("convert", ASSETS / "clip", visual, "--to=visual").code == 0
    answer = kuea("convert", visual, again, "--activation=quick_gelu", "--heads=2")
    assert answer.code == 0, answer.err
    first = load_file(ASSETS / "clip" / "model.safetensors")
    second = load_file(again / "model.safetensors")
    assert all(first[name].equal(tensor) for name, tensor in second.items())


def test_convert_refuses_what_is_no_checkpoint(kuea, tmp_path):
    shutil.copy(ASSETS / "clip" / "config.json", tmp_path / "weights.safetensors")
    answer = kuea("convert", tmp_path / "weights.safetensors", tmp_path / "hf")
    assert answer.code == 2
    assert "weights.safetensors" in answer.err
    assert listing(tmp_path) == ["weights.safetensors"]


def test_inspect_names_the_layout_and_writes_nothing(kuea, tmp_path):
    visual = tmp_path / "visual.safetensors"
    assert kuea("convert", ASSETS / "clip", visual, "--to=visual").code == 0
    answer = kuea("convert", visual, "--inspect", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert (found["layout"], found["patch_size"], found["layers"]) == ("visual", 8, 3)
    assert listing(tmp_path) == ["visual.safetensors"]
    assert kuea("convert", visual).code == 2
