"""`kuea-mllm merge`, and what other verbs do with LoRA weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from kuea_mllm.adapters.lora_directory import describe_tensors, write_lora_directory
from kuea_mllm.adapters.registry import adapter_for
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.tuning.base_identity import identify_base

BASE = ASSETS / "llava"
LAYER = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    """LoRA on one layer of the mini world's LLaVA, written as files."""
    model = adapter_for(BASE)
    width = json.loads((BASE / "config.json").read_text())["text_config"]["hidden_size"]
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.full((2, width), 0.1),
        f"base_model.model.{LAYER}.lora_B.weight": torch.full((width, 2), 0.1),
    }
    manifest = {
        "kind": "lora",
        "adapter": "llava",
        "base": {"reference": str(BASE), **identify_base(BASE, model.tower_slot(BASE))},
        "lora": {"rank": 2, "alpha": 4},
        "tensors": describe_tensors(tensors),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [LAYER]}
    out = tmp_path / "run" / "adapter"
    out.mkdir(parents=True)
    write_lora_directory(out, config | {"base_model_name_or_path": str(BASE)}, tensors, manifest)
    return out


def test_merge_of_a_finished_run_gives_a_model_that_verifies(kuea, adapter, tmp_path):
    answer = kuea("merge", adapter.parent, tmp_path / "merged", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert (found["layers_merged"], found["tensors_checked"]) == (1, 1)
    assert found["files_rewritten"] == ["model.safetensors"]
    assert kuea("verify", tmp_path / "merged").code == 0
    shown = kuea("merge", adapter, tmp_path / "again")
    assert "read back and compared" in shown.out


def test_dry_run_says_what_would_be_done_and_writes_nothing(kuea, adapter, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    answer = kuea("merge", adapter, "--dry-run")
    assert answer.code == 0, answer.err
    assert "would merge" in answer.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{base}", "{out}"], "no adapter_config.json"),
        (["{adapter}", "{there}"], "exists already"),
        (["{adapter}", "{out}", "--base={clip}"], "no adapter recognises"),
        (["{unfinished}", "{out}"], "no finished result"),
        (["{nothing}", "{out}"], "does not exist"),
        (["{other}", "{out}"], "trained on another base"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(kuea, adapter, tmp_path, arguments, named):
    there, unfinished = tmp_path / "there", tmp_path / "x.unfinished"
    there.mkdir()
    shutil.copytree(adapter, unfinished)
    other = shutil.copytree(adapter, tmp_path / "other")
    record = json.loads((other / "kuea.json").read_text())
    record["base"]["matrices"] = "0" * 64
    (other / "kuea.json").write_text(json.dumps(record))
    places = {"base": BASE, "adapter": adapter, "out": tmp_path / "out", "there": there}
    places |= {"clip": ASSETS / "clip", "unfinished": unfinished, "nothing": tmp_path / "nothing"}
    places |= {"other": other}
    answer = kuea("merge", *(text.format(**places) for text in arguments))
    assert answer.code == 2
    assert named in answer.err
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_inspection_says_what_lora_weights_are(kuea, adapter):
    found = json.loads(kuea("convert", adapter, "--inspect", "--json").out)
    assert found["layout"] == "LoRA weights (peft)"
    assert (found["base"], found["rank"], found["lora_layers"]) == (str(BASE), 2, 1)


def test_upload_of_lora_weights_is_checked(kuea, adapter):
    options = ["push", adapter, "owner/name", "--dry-run", "--json"]
    found = json.loads(kuea(*options, "--base-model=owner/base").out)
    assert found["kind"] == "lora"
    assert "adapter_config.json" in found["rewritten"]
    assert kuea(*options).code == 2


def test_conversion_to_the_authors_layout_and_back(kuea, adapter, tmp_path):
    there = ["convert", adapter, tmp_path / "theirs", "--mllm=llava", "--to=released"]
    refused = kuea(*there)
    assert refused.code == 2
    assert "--tower" in refused.err
    answer = kuea(*there, "--tower=openai/clip-vit-large-patch14-336")
    assert answer.code == 0, answer.err
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.bin",
        "config.json",
        "non_lora_trainables.bin",
    }
    answer = kuea("convert", tmp_path / "theirs", tmp_path / "ours", "--mllm=llava")
    assert answer.code == 0, answer.err
    refused = kuea("merge", tmp_path / "theirs", "--dry-run", f"--base={BASE}")
    assert "layout of LLaVA's authors" in refused.err
    plan = kuea("merge", tmp_path / "ours", "--dry-run", f"--base={BASE}", "--json")
    assert json.loads(plan.out)["is_same_base"] is False
    refused = kuea("convert", adapter, tmp_path / "x", "--mllm=openflamingo", "--to=released")
    assert "no layout of its own" in refused.err
