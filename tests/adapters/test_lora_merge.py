"""Merging LoRA weights into LLaVA: the same outputs, the same files, the same tower."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava_files import VISION
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel
from tuned_models import load, save, tune

from kuea_mllm.adapters.llava.adapter import LlavaAdapter
from kuea_mllm.adapters.lora_directory import find_lora_directory
from kuea_mllm.errors import EnvironmentFailure, OutputError, UserError
from kuea_mllm.model_files import tensor_entries
from kuea_mllm.swapping import swap_tower_files
from kuea_mllm.swapping.sources import load_any_tower
from kuea_mllm.swapping.verify import verify_model
from kuea_mllm.towers.files import model_copy
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.tuning.base_identity import identify_base
from kuea_mllm.tuning.merge import merge_adapter, plan_merge
from kuea_mllm.tuning.quantised import quantization_config
from kuea_mllm.upload_checks import check_upload

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ADAPTER = LlavaAdapter()
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    image = model.config.image_token_id
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    ids = torch.tensor([[1, 40, *[image] * 16, 50, 300, 262]])
    logits: Tensor = model(input_ids=ids, pixel_values=pixels).logits
    return logits


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def new_tower(out: Path, seed: int = 7) -> Path:
    torch.manual_seed(seed)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tuned(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights and projector for the tiny LLaVA. Do not modify."""
    return save(tune(tiny_llava), tiny_llava, tmp_path_factory.mktemp("tuned") / "adapter")


@pytest.mark.parametrize(
    "layout",
    [{}, {"prefix": "vision_tower.vision_model."}, {"shards": 5}],
    ids=["today", "older", "sharded"],
)
def test_merged_logits_are_those_of_the_lora_model(
    variant: Callable[..., Path], tmp_path: Path, layout: dict[str, Any]
) -> None:
    base = variant(**layout)
    model = tune(base, head=True)
    receipt = merge_adapter(None, save(model, base, tmp_path / "adapter"), tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert float((logits_of(merged) - logits_of(model)).abs().max()) <= 1e-4
    assert float((logits_of(load(base)) - logits_of(model)).abs().max()) > 0.1
    assert (receipt.layers_merged, receipt.tensors_replaced) == (14, 5)
    assert receipt.tensors_checked == 19
    assert receipt.is_same_base


def test_rank_stabilised_scale_and_patterns_are_those_of_peft(
    tiny_llava: Path, tmp_path: Path
) -> None:
    model = tune(
        tiny_llava,
        projector=False,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
        alpha_pattern={"down_proj": 3},
    )
    merge_adapter(None, save(model, tiny_llava, tmp_path / "adapter"), tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert float((logits_of(merged) - logits_of(model)).abs().max()) <= 1e-4


def test_bfloat16_base_is_rounded_once(variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant(dtype=torch.bfloat16)
    adapter = save(tune(base, dtype="bfloat16"), base, tmp_path / "adapter")
    receipt = merge_adapter(None, adapter, tmp_path / "merged")
    lora = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in lora.values()} == {torch.float32}
    old, new = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged"))
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    update = lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
    expected = (old[Q_PROJ].float() + 2 * update).to(torch.bfloat16)
    assert torch.equal(new[Q_PROJ], expected)
    # Half a unit in the last of 8 bits, relative to weights that moved by a quarter.
    assert receipt.change is not None and 0.05 < receipt.change < 1
    assert receipt.rounding is not None and 0 < receipt.rounding < 0.02
    assert receipt.dtype == "bfloat16"


def test_nothing_but_the_tuned_tensors_changes(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant(shards=5)
    before = hashes(base)
    adapter = save(tune(base), base, tmp_path / "adapter")
    receipt = merge_adapter(None, adapter, tmp_path / "merged")
    assert hashes(base) == before
    assert tensor_entries(base) == tensor_entries(tmp_path / "merged")
    changed = 0
    for file in base.glob("*.safetensors"):
        new = load_file(tmp_path / "merged" / file.name)
        for name, tensor in load_file(file).items():
            is_tuned = "_proj.weight" in name and ".layers." in name and "vision" not in name
            is_tuned |= name.startswith("multi_modal_projector.")
            assert torch.equal(tensor, new[name]) is not is_tuned, name
            changed += is_tuned
    assert changed == 14 + 4
    assert receipt.files_linked
    for name in receipt.files_linked:
        assert (base / name).samefile(tmp_path / "merged" / name)


def test_merged_swapped_model_verifies_and_takes_its_old_tower_back(
    tiny_llava: Path, tmp_path: Path
) -> None:
    swapped, merged = tmp_path / "swapped", tmp_path / "merged"
    tower = load_tower(new_tower(tmp_path / "tower"))
    swap_tower_files(tiny_llava, tower, swapped, adapter=ADAPTER, measure_drift=False)
    model = tune(swapped)
    merge_adapter(None, save(model, swapped, tmp_path / "adapter"), merged)
    found = verify_model(merged)
    assert found.problems == ()
    assert found.tower == str(tmp_path / "tower")
    record = json.loads((merged / "kuea.json").read_text())
    assert record["tuned"]["fingerprint"] == found.fingerprint == tower.fingerprint
    assert record["tuned"]["record"]["adapter"] == "llava"
    assert [entry["base"]["reference"] for entry in record["history"]] == [str(tiny_llava)]
    old = load_any_tower(tiny_llava)
    receipt = swap_tower_files(merged, old, tmp_path / "back", adapter=ADAPTER, measure_drift=False)
    assert receipt.compatibility is not None
    assert receipt.compatibility.lineage is not None
    assert receipt.compatibility.lineage.relation == "original"
    assert verify_model(tmp_path / "back").problems == ()


def test_merged_model_can_be_uploaded(tiny_llava: Path, tuned: Path, tmp_path: Path) -> None:
    merge_adapter(None, tuned, tmp_path / "merged", command="kuea-mllm merge /home/me/a b")
    upload = check_upload(tmp_path / "merged", base_model="owner/base")
    assert upload.kind == "mllm"
    assert "/home/" not in str([v for v in upload.files.values() if isinstance(v, str)])


def _scale(base: Path, name: str, factor: float) -> None:
    state = load_file(base / "model.safetensors")
    state[name] = state[name] * factor
    save_file(state, base / "model.safetensors", metadata={"format": "pt", "note": "kept"})


def _set_epsilon(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-6
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda base: _scale(base, "language_model.model.norm.weight", 1.01), "norms and biases"),
        (lambda base: _scale(base, Q_PROJ, 1.01), "weight matrices"),
        (
            lambda base: _scale(base, "vision_tower.embeddings.class_embedding", 1.01),
            "vision tower",
        ),
        (_set_epsilon, "rms_norm_eps (1e-05 then, 1e-06 now)"),
    ],
    ids=["norm", "matrix", "tower", "config"],
)
def test_weights_of_another_base_are_refused_and_the_difference_is_named(
    variant: Callable[..., Path],
    tuned: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    named: str,
) -> None:
    base = variant()
    change(base)
    with pytest.raises(UserError, match="trained on another base") as caught:
        merge_adapter(base, tuned, tmp_path / "merged")
    # One cause, and nothing beside it.
    _, _, said = caught.value.problem.partition("they differ in ")
    assert named in said
    assert "(and" not in said
    assert not (tmp_path / "merged").exists()


def test_identity_does_not_depend_on_the_division_into_files(
    tiny_llava: Path, variant: Callable[..., Path]
) -> None:
    other = variant(shards=3)
    slots = [ADAPTER.tower_slot(base) for base in (tiny_llava, other)]
    assert identify_base(tiny_llava, slots[0]) == identify_base(other, slots[1])


def test_weights_without_a_record_are_compared_by_shapes_and_that_is_said(
    tiny_llava: Path, tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = shutil.copytree(tuned, tmp_path / "plain")
    (plain / "kuea.json").unlink()
    receipt = plan_merge(tiny_llava, plain)
    assert not receipt.is_same_base
    assert "only compared by shapes" in caplog.text


def _edit(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


def _rename(adapter: Path, part: str, other: str) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(part, other): tensor for name, tensor in state.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")


def _drop(adapter: Path, end: str) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(end)}
    save_file(kept, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: _edit(a, use_dora=True), "use_dora"),
        (lambda a: _edit(a, bias="all"), "bias is 'all'"),
        (lambda a: _edit(a, init_lora_weights="pissa"), "init_lora_weights"),
        (lambda a: _edit(a, r=3), "says 3"),
        (lambda a: _edit(a, peft_type="IA3"), "not LORA"),
        (lambda a: _edit(a, something_new=True), "something_new"),
        (lambda a: _edit(a, modules_to_save=None), "multi_modal_projector.linear_1.bias"),
        (lambda a: _drop(a, "layers.0.mlp.up_proj.lora_B.weight"), "lora_B.weight, is not"),
        (
            lambda a: _rename(
                a, "language_model.layers.0.self_attn", "vision_tower.encoder.layers.0.self_attn"
            ),
            "vision tower",
        ),
        (lambda a: _rename(a, "model.language_model.layers.0", "h.0"), "h.0.mlp.down_proj"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.bin"),
    ],
    ids=[
        *("dora", "bias", "pissa", "rank", "type", "unknown", "stray", "half", "tower", "other"),
        "no_weights",
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tuned: Path, tmp_path: Path, change: Callable[[Path], object], named: str
) -> None:
    adapter = shutil.copytree(tuned, tmp_path / "adapter")
    change(adapter)
    problem = {"h.0.mlp.down_proj": "changes", "lora_B.weight, is not": ""}.get(named, named)
    with pytest.raises(UserError) as caught:
        plan_merge(None, adapter)
    assert problem in caught.value.problem
    assert "\n" not in caught.value.problem


def test_output_layer_of_a_tied_base_is_refused(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant()
    adapter = save(tune(base, head=True), base, tmp_path / "adapter")
    (adapter / "kuea.json").unlink()
    config = json.loads((base / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(config))
    state = load_file(base / "model.safetensors")
    del state["language_model.lm_head.weight"]
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="ties its output layer"):
        plan_merge(base, adapter)
    # Without one, the same base is merged into.
    _drop(adapter, "lm_head.weight")
    assert plan_merge(base, adapter).layers_merged == 14


def test_unfinished_and_missing_directories_are_refused(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "run.unfinished" / "adapter")
    with pytest.raises(UserError, match="no finished result"):
        find_lora_directory(tmp_path / "run.unfinished")
    with pytest.raises(UserError, match="does not exist") as caught:
        find_lora_directory(tmp_path / "run")
    assert "run.unfinished is there" in caught.value.remedy
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        find_lora_directory(tmp_path / "empty")
    shutil.copytree(tuned, tmp_path / "done" / "adapter")
    assert find_lora_directory(tmp_path / "done") == tmp_path / "done" / "adapter"


def test_place_of_the_output_is_checked_first(
    tiny_llava: Path, tuned: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        merge_adapter(None, tuned, tmp_path / "there")
    with pytest.raises(OutputError, match="inside of the base"):
        merge_adapter(None, tuned, tiny_llava / "merged")


def test_write_that_went_wrong_is_noticed_and_leaves_nothing_behind(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model_copy, "rewrite_shard", lambda source, target, *_: shutil.copyfile(source, target)
    )
    with pytest.raises(EnvironmentFailure, match="does not read back"):
        merge_adapter(None, tuned, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_value_that_the_dtype_cannot_hold_is_named(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant(dtype=torch.float16)
    adapter = save(tune(base), base, tmp_path / "adapter")
    _edit(adapter, lora_alpha=8e6)
    with pytest.raises(EnvironmentFailure, match=r"holds NaN or infinity in torch\.float16"):
        merge_adapter(None, adapter, tmp_path / "merged")


def test_weights_tuned_on_a_quantised_copy_merge_into_the_model_on_disk(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant(dtype=torch.bfloat16)
    parts = ADAPTER.tuning_parts(base)
    quantised = quantization_config("nf4", parts, dtype=torch.float32)
    adapter = save(tune(base, quantization=quantised), base, tmp_path / "adapter")
    merge_adapter(None, adapter, tmp_path / "merged")
    lora = load_file(adapter / "adapter_model.safetensors")
    old, new = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged"))
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    update = 2 * (lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"])
    assert float(update.abs().max()) > 0.01
    # Not the quantised weight with the update, which differs from it by the quantisation.
    assert torch.equal(new[Q_PROJ], (old[Q_PROJ].float() + update).to(torch.bfloat16))
    assert {name: (t.dtype, t.shape) for name, t in old.items()} == {
        name: (t.dtype, t.shape) for name, t in new.items()
    }
