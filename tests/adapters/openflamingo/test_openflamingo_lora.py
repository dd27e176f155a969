"""LoRA by PEFT on the language model alone: what is trained, with checkpointing, and merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_flamingo import END, IMAGE, PAD, tiny_batch, tiny_model
from torch import Tensor, nn

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

BATCH = tiny_batch()
LABELS = BATCH["input_ids"].masked_fill(~BATCH["attention_mask"], -100)
LAYERS = r"model\.language_model\.layers\.\d+\."
# Every linear layer of the language model's own blocks; the gated blocks have an `attention` too.
BLOCKS = LAYERS + r"(attention\.(qkv_proj|out_proj)|mlp\.(up_proj|down_proj))"
GATED = LAYERS + r"cross_attention\.attention\.(q_proj|kv_proj|out_proj)"
IN_BLOCKS = ("attention.qkv_proj", "attention.out_proj", "mlp.up_proj", "mlp.down_proj")


def tuned(targets: str = BLOCKS, **settings: Any) -> Any:
    """Put LoRA weights on the tiny model, random ones: zeros would hide errors."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **settings
    )
    model: Any = tiny_model()
    return get_peft_model(model, config)


def gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**BATCH, labels=LABELS).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def owners(found: Mapping[str, Tensor]) -> set[str]:
    """Name the layers that the gradients of LoRA weights belong to."""
    return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in found}


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(**BATCH).logits
    return logits


def answers(model: Any) -> Tensor:
    output: Tensor = model.generate(
        **BATCH,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=PAD,
        suppress_tokens=[IMAGE, PAD],
    )
    return output


def test_targets_are_all_linear_layers_of_the_blocks_and_no_others() -> None:
    model: Any = tiny_model()
    text = model.model.language_model
    expected = {
        f"model.language_model.{name}"
        for name, module in text.named_modules()
        if isinstance(module, nn.Linear) and "cross_attention" not in name
    }
    assert len(expected) == len(IN_BLOCKS) * len(text.layers)
    assert set(tuned().base_model.targeted_module_names) == expected


def test_gradients_reach_the_lora_weights_of_the_blocks_alone() -> None:
    model = tuned().train()
    _, found = gradients(model)
    layers = len(model.base_model.model.model.language_model.layers)
    expected = {
        f"model.language_model.layers.{layer}.{name}"
        for layer in range(layers)
        for name in IN_BLOCKS
    }
    assert owners(found) == expected
    assert all(".lora_A." in name or ".lora_B." in name for name in found)
    assert len(found) == 2 * len(expected)
    assert all(bool(gradient.any()) for gradient in found.values())


def test_gated_blocks_and_resampler_are_trained_where_asked() -> None:
    model = tuned(f"{BLOCKS}|{GATED}", modules_to_save=["resampler"]).train()
    _, found = gradients(model)
    parts = {"cross_attention": 0, "resampler": 0, "vision_tower": 0}
    for name in found:
        for part in parts:
            parts[part] += part in name
    layers = model.base_model.model.model.language_model.layers
    assert parts["cross_attention"] == 2 * 3 * len(layers)
    assert parts["resampler"] == len(list(tiny_model().model.resampler.parameters()))
    assert parts["vision_tower"] == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = tuned().train()
    loss, expected = gradients(model)
    runs: list[int] = []
    layers = model.base_model.model.model.language_model.layers
    layers[0].attention.register_forward_hook(lambda *_: runs.append(1))
    # transformers 5 renamed it on the way.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        # Re-entrant checkpointing needs an input that wants a gradient.
        model.enable_input_require_grads()
    again, found = gradients(model)
    # Once forward and once more for the gradient.
    assert len(runs) == 2
    assert again == pytest.approx(loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6, rtol=1e-4), name


def test_merged_model_equals_the_one_with_lora_weights() -> None:
    model = tuned().eval()
    expected, said = logits_of(model), answers(model)
    before = logits_of(tiny_model())
    assert float((expected - before).abs().max()) > 0.1
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    merged = model.merge_and_unload()
    assert float((logits_of(merged) - expected).abs().max()) <= 1e-4
    assert torch.equal(answers(merged), said)
    # Nothing of PEFT is left, and only the blocks changed.
    original = tiny_model().state_dict()
    state = merged.state_dict()
    assert state.keys() == original.keys()
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, original[name])}
    assert changed == {
        f"model.language_model.layers.{layer}.{name}.weight"
        for layer in range(len(merged.model.language_model.layers))
        for name in IN_BLOCKS
    }
