"""LoRA weights as files: PEFT loads what was trained, the card and the record say what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration
from tuned_models import save, tune

from kuea_mllm.adapters.lora_directory import describe_lora_directory, read_lora_directory
from kuea_mllm.errors import EnvironmentFailure, UserError
from kuea_mllm.tuning.merge_plan import find_base
from kuea_mllm.upload_checks import check_upload

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_loads_every_bit_of_what_was_trained(
    variant: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    base = variant(dtype=getattr(torch, dtype))
    model = tune(base, dtype=dtype)
    adapter = save(model, base, tmp_path / "adapter")
    plain = LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype)
    loaded = PeftModel.from_pretrained(plain, adapter)
    trained, found = model.state_dict(), loaded.state_dict()
    assert trained.keys() == found.keys()
    for name, tensor in trained.items():
        # PEFT gives a module that is trained as a whole the dtype of the model it is put into.
        assert torch.equal(tensor.to(found[name].dtype), found[name]), name
    matrices = [name for name in trained if "lora_" in name]
    assert {found[name].dtype for name in matrices} == {torch.float32}


def test_base_keeps_the_name_that_it_was_given(tiny_llava: Path, tmp_path: Path) -> None:
    adapter = save(tune(tiny_llava), tiny_llava, tmp_path / "a", reference="owner/model")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model"
    card = (adapter / "README.md").read_text()
    assert '- "owner/model"' in card
    assert str(tmp_path) not in card
    assert str(tiny_llava) not in card


def test_relative_base_is_found_from_elsewhere(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llava.parent)
    adapter = save(tune(tiny_llava), tiny_llava, tmp_path / "a", reference=tiny_llava.name)
    monkeypatch.chdir(tmp_path)
    assert find_base(read_lora_directory(adapter)) == tiny_llava
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_llava.name


def test_same_weights_give_the_same_files(tiny_llava: Path, tmp_path: Path) -> None:
    model = tune(tiny_llava)
    first, second = (save(model, tiny_llava, tmp_path / name) for name in "ab")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_values_that_are_not_finite_are_not_written(tiny_llava: Path, tmp_path: Path) -> None:
    model = tune(tiny_llava)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = torch.inf
    with pytest.raises(EnvironmentFailure, match=r"multi_modal_projector\.linear_1\.weight"):
        save(model, tiny_llava, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_upload_names_the_base_for_others(tiny_llava: Path, tmp_path: Path) -> None:
    adapter = save(tune(tiny_llava), tiny_llava, tmp_path / "adapter")
    upload = check_upload(adapter, base_model="owner/base")
    assert upload.kind == "lora"
    record = json.loads((adapter / "kuea.json").read_text())
    assert upload.fingerprint == record["base"]["vision_tower"]
    config = upload.files["adapter_config.json"]
    assert isinstance(config, str)
    assert json.loads(config)["base_model_name_or_path"] == "owner/base"
    assert str(tiny_llava) not in str(list(upload.files.values())).replace(str(adapter), "")
    with pytest.raises(UserError, match="does not state base_model"):
        check_upload(adapter)


def test_upload_of_changed_weights_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    adapter = save(tune(tiny_llava), tiny_llava, tmp_path / "adapter")
    other = save(tune(tiny_llava, projector=False), tiny_llava, tmp_path / "other")
    (other / "adapter_model.safetensors").replace(adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"other tensors than its kuea\.json"):
        check_upload(adapter, base_model="owner/base")


def test_description_says_base_rank_and_what_is_inside(tiny_llava: Path, tmp_path: Path) -> None:
    found = describe_lora_directory(save(tune(tiny_llava), tiny_llava, tmp_path / "adapter"))
    assert found["base"] == str(tiny_llava)
    assert (found["rank"], found["lora_layers"], len(found["whole"])) == (4, 14, 4)
