"""Merging LoRA weights into OpenFlamingo, whose output layer is tied and not on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_flamingo import save_tiny_base
from torch import Tensor

from kuea_mllm.adapters.openflamingo.adapter import OpenFlamingoAdapter
from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.errors import UserError
from kuea_mllm.swapping.verify import verify_model
from kuea_mllm.tuning.base_identity import identify_base
from kuea_mllm.tuning.merge import merge_adapter
from kuea_mllm.tuning.output import save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ADAPTER = OpenFlamingoAdapter()


def tune(base: Path, out: Path, *, head: bool = False) -> Any:
    parts = ADAPTER.tuning_parts(base)
    model = ADAPTER.load_for_tuning(base, dtype="float32", device="cpu")
    whole = [*parts.projector, *([parts.output_head] if head else [])]
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(linear_targets(model, parts)),
        modules_to_save=whole,
    )
    tuned: Any = get_peft_model(model, settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    identity = identify_base(base, ADAPTER.tower_slot(base))
    manifest = {"adapter": ADAPTER.name, "base": {"reference": str(base), **identity}}
    save_adapter(tuned, out, manifest=manifest)
    return tuned.eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    config = model.config
    ids = torch.tensor([[config.image_token_id, 40, 50, 60, 70]])
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(1, 1, 3, 16, 16, generator=generator)
    logits: Tensor = model(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)
    ).logits
    return logits


def test_merged_logits_are_those_of_the_lora_model(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    model = tune(base, tmp_path / "adapter")
    receipt = merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
    merged = ADAPTER.load_for_tuning(tmp_path / "merged", dtype="float32", device="cpu")
    assert float((logits_of(merged) - logits_of(model)).abs().max()) <= 1e-4
    plain = ADAPTER.load_for_tuning(base, dtype="float32", device="cpu")
    assert float((logits_of(plain) - logits_of(model)).abs().max()) > 1e-2
    assert receipt.layers_merged == 3 * 4
    found = verify_model(tmp_path / "merged")
    assert found.problems == ()
    old, new = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged"))
    changed = {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    assert changed
    assert not any("cross_attention" in name or "vision_tower" in name for name in changed)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_output_layer_of_its_own_has_no_place(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    tune(base, tmp_path / "adapter", head=True)
    with pytest.raises(UserError, match="ties its output layer"):
        merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
