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
    "tower is neither": ({"tower": ASSETS / "teacher"}, "teacher"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument_ends_in_one_clear_line(kuea, tmp_path, name):
    changes, expected = BAD_ARGUMENTS[name]
    options = {"base": BASE, "tower": ASSETS / "clip", "out": tmp_path / "out", **changes}
    answer = kuea("swap", *(f"--{key}={value}" for key, value in options.items()))
    assert answer.code == 2
    assert expected in answer.err
    assert listing(tmp_path) == []


def test_dry_run_prints_the_report_and_writes_nothing(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower")
    answer = kuea("swap", f"--base={BASE}", f"--tower={tower}", "--dry-run")
    assert answer.code == 0, answer.err
    for words in ("tokens read", "lineage", "unrelated", "drift of the tokens", "warn"):
        assert words in answer.out
    answer = kuea("swap", f"--base={BASE}", f"--tower={tower}", "--dry-run", "--json")
    report = json.loads(answer.out)
    assert report["verdict"] == "warn"
    assert report["drift"]["tap"] == "hidden state -2, patches only, before the final norm"
    assert listing(tmp_path) == ["tower"]


def test_dry_run_of_what_cannot_fit_ends_with_2_and_says_everything(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower", hidden_act="gelu", num_hidden_layers=2)
    answer = kuea("swap", f"--base={BASE}", f"--tower={tower}", "--dry-run", "--json")
    assert answer.code == 2
    refused = [c["name"] for c in json.loads(answer.out)["checks"] if c["verdict"] == "refuse"]
    assert refused == ["number of layers", "activation"]


def test_dry_run_refuses_the_tower_that_is_inside_already(kuea):
    arguments = ["swap", f"--base={BASE}", f"--tower={ASSETS / 'clip'}", "--dry-run", "--json"]
    answer = kuea(*arguments)
    assert answer.code == 2
    report = json.loads(answer.out)
    refused = [c["name"] for c in report["checks"] if c["verdict"] == "refuse"]
    assert (refused, report["verdict"]) == (["lineage"], "refuse")
    assert kuea(*arguments, "--allow-same").code == 0


def test_dry_run_says_a_remedy_once_and_ends_with_the_verdict(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower", hidden_size=32, intermediate_size=128)
    answer = kuea("swap", f"--base={BASE}", f"--tower={tower}", "--dry-run")
    text = " ".join(answer.out.split())
    assert text.count("Take a tower of the same architecture") == 1
    assert "refuse: width, MLP width:" in text
    assert text.endswith("A swap would be refused (13 checks, 3 refused, 0 warnings).")


def test_out_is_needed_unless_nothing_is_written(kuea):
    assert kuea("swap", f"--base={BASE}", f"--tower={ASSETS / 'clip'}").code == 2


def test_force_swaps_another_activation_and_says_so(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower", hidden_act="gelu")
    arguments = ["swap", f"--base={BASE}", f"--tower={tower}", f"--out={tmp_path / 'out'}"]
    refused = kuea(*arguments)
    assert refused.code == 2
    assert "--force" in refused.err
    answer = kuea(*arguments, "--force", "--json")
    assert answer.code == 0, answer.err
    checks = json.loads(answer.out)["compatibility"]["checks"]
    assert [check["name"] for check in checks if check["forced"]] == ["activation"]


def test_mllm_as_tower_swaps_back(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower")
    there, back = tmp_path / "there", tmp_path / "back"
    assert kuea("swap", f"--base={BASE}", f"--tower={tower}", f"--out={there}").code == 0
    answer = kuea("swap", f"--base={there}", f"--tower={BASE}", f"--out={back}", "--no-drift")
    assert answer.code == 0, answer.err
    assert (back / "model.safetensors").read_bytes() == (BASE / "model.safetensors").read_bytes()
    assert "original" in answer.out


def test_interpolate_writes_a_model_per_weight(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower")
    answer = kuea(
        *("swap", f"--base={BASE}", f"--tower={tower}", f"--out={tmp_path / 'out'}"),
        *("--interpolate=0.5,1", "--json"),
    )
    assert answer.code == 0, answer.err
    assert [mix["weight"] for mix in json.loads(answer.out)["mixes"]] == [0.5, 1.0]
    assert listing(tmp_path / "out") == ["0.5", "1"]
    for folder in (tmp_path / "out").iterdir():
        assert kuea("verify", folder).code == 0
    one = tmp_path / "one"
    answer = kuea(
        *("swap", f"--base={BASE}", f"--tower={tower}", f"--out={one}", "--interpolate=0.5"),
    )
    assert answer.code == 0, answer.err
    weights = [folder / "model.safetensors" for folder in (one, tmp_path / "out" / "0.5")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("weights", ["much", "2", "0.5,-1"])
def test_bad_weight_is_refused(kuea, tmp_path, weights):
    answer = kuea(
        *("swap", f"--base={BASE}", f"--tower={ASSETS / 'clip'}", f"--out={tmp_path / 'out'}"),
        f"--interpolate={weights}",
    )
    assert answer.code == 2
    assert listing(tmp_path) == []


def test_push_uploads_the_finished_model(kuea, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "kuea_mllm.share.push_directory",
        lambda directory, repository: pushed.append((directory, repository)) or "https://hub/a/b",
    )
    tower, out = write_tower(tmp_path / "tower"), tmp_path / "out"
    answer = kuea("swap", f"--base={BASE}", f"--tower={tower}", f"--out={out}", "--push=a/b")
    assert answer.code == 0, answer.err
    assert pushed == [(out, "a/b")]
    assert "https://hub/a/b" in answer.out


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
    sizes = found["sizes"]
    assert (found["layout"], sizes["patch_size"], sizes["layers"]) == ("visual", 8, 3)
    assert listing(tmp_path) == ["visual.safetensors"]
    assert kuea("convert", visual).code == 2
