"""Counting a tuning's pass without weights gives what the real pass takes."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kuea_mllm.adapters.base import TuningParts
from kuea_mllm.config.lora import LoraConfig
from kuea_mllm.planning.counting import FusedKernels, count_pass, count_saved_bytes
from kuea_mllm.planning.tuning_models import TunedModel
from kuea_mllm.planning.tuning_pass import (
    PassSettings,
    _count,
    count_tuning_pass,
    prepare,
    tuning_counts,
)
from kuea_mllm.planning.without_data import UnpackedLinear
from kuea_mllm.training.memory import recompute_activations
from kuea_mllm.tuning.model import TuningModel
from kuea_mllm.tuning.wrap import wrap_with_lora

PARTS = TuningParts(
    language_model="model.language_model",
    projector=("model.multi_modal_projector",),
    vision_tower="model.vision_tower",
    output_head="lm_head",
    vocabulary_size=90,
)
CONFIG = {
    "model_type": "llava",
    "image_token_index": 90,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 96,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    },
}
MODEL = TunedModel("tiny", "llava", json.dumps(CONFIG), PARTS, tokens_per_image=16, image_size=32)
SETTINGS = PassSettings(
    rows=2,
    tokens=64,
    rank=4,
    targets=None,
    dropout=True,
    trains_projector=True,
    trains_head=False,
    chunk=32,
    checkpointing=True,
    quantised=False,
    is_bf16=True,
)

# transformers writes the causal mask out for tensors without data, one byte for each pair.
MASK = 2 * 64 * 64 + 64


# With a second encoder beside the tower, of another width and patch size.
MIXED = TunedModel(
    "tiny mixed",
    "llava_mof",
    json.dumps(
        CONFIG
        | {
            "model_type": "llava_mof",
            "expert_config": {
                "model_type": "dinov2",
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 24,
                "patch_size": 4,
            },
        }
    ),
    replace(
        PARTS,
        projector=(*PARTS.projector, "model.expert_projection"),
        other_encoders=("model.expert_tower",),
    ),
    tokens_per_image=16,
    image_size=32,
)


def real_model(known=MODEL):
    model = known.build_empty().to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():  # position ids and rotary frequencies
        for name, buffer in module.named_buffers(recurse=False):
            fresh = torch.arange(buffer.numel()).view(buffer.shape).to(buffer.dtype)
            setattr(module, name, fresh)
    return model


def real_batch():
    ids = torch.zeros(2, 64, dtype=torch.long)
    ids[:, 3:19] = 90
    return {
        "input_ids": ids,
        "pixel_values": torch.zeros(2, 3, 32, 32),
        "predicting": torch.arange(128),
        "targets": torch.zeros(128, dtype=torch.long),
    }


def real_counts(settings, known=MODEL):
    model = prepare(real_model(known), known.tuner, known.parts, settings)
    return count_tuning_pass(model, real_batch())


@pytest.mark.parametrize("is_bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all kept"])
def test_counts_without_data_are_those_of_a_real_pass(is_bf16, checkpointing):
    settings = replace(SETTINGS, is_bf16=is_bf16, checkpointing=checkpointing)
    planned, real = asdict(tuning_counts(MODEL, settings)), asdict(real_counts(settings))
    assert planned == pytest.approx(real, rel=0.01, abs=MASK)


def test_second_encoder_is_counted_as_a_real_pass_has_it():
    planned = asdict(tuning_counts(MIXED, SETTINGS))
    assert planned == pytest.approx(asdict(real_counts(SETTINGS, MIXED)), rel=0.01, abs=MASK)
    assert planned["forward_flops"] > tuning_counts(MODEL, SETTINGS).forward_flops


@pytest.mark.parametrize("is_bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all kept"])
def test_counted_pass_is_that_of_the_trainer_s_model(is_bf16, checkpointing):
    settings = replace(SETTINGS, is_bf16=is_bf16, checkpointing=checkpointing, dropout=False)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    config = LoraConfig(rank=4, dropout=0.0, projector="train")
    wrapped = wrap_with_lora(real_model().to(dtype), PARTS, config, uses_autocast=is_bf16)
    trained = TuningModel(wrapped, MODEL.tuner, PARTS, chunk=32, autocast=dtype).train()
    if checkpointing:
        recompute_activations(trained.inner.get_submodule(PARTS.language_model))
    batch = real_batch()
    real = count_pass(trained, list(batch.values()), lambda: trained(**batch), precision="fp32")
    assert asdict(tuning_counts(MODEL, settings)) == pytest.approx(asdict(real), rel=0.01, abs=MASK)


@pytest.mark.parametrize("is_bf16", [True, False], ids=["bf16", "fp32"])
def test_bytes_kept_are_what_saved_tensor_hooks_see(is_bf16):
    settings = replace(SETTINGS, is_bf16=is_bf16, checkpointing=False)
    model = prepare(real_model(), MODEL.tuner, PARTS, settings)
    batch = {name: real_batch()[name] for name in ("input_ids", "pixel_values")}

    def loss():
        return MODEL.tuner.hidden_states(model.inner, batch).float().square().sum()

    precision = "bf16" if is_bf16 else "fp32"
    saved = count_saved_bytes(model, loss, precision=precision)
    counted = count_pass(model, list(batch.values()), loss, precision=precision).kept_bytes
    planned = tuning_counts(MODEL, replace(settings, chunk=128)).kept_bytes
    # The loss of the plan keeps the gathered states beside.
    assert counted == pytest.approx(saved, rel=0.05)
    assert planned == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all kept"])
def test_deep_model_follows_from_two_short_ones(checkpointing):
    settings = replace(SETTINGS, checkpointing=checkpointing)
    assert tuning_counts(MODEL, settings) == _count(MODEL, settings, 6)


def test_checkpointing_keeps_little_and_computes_the_forward_pass_twice():
    few, all_ = (tuning_counts(MODEL, replace(SETTINGS, checkpointing=on)) for on in (True, False))
    assert few.kept_bytes < 0.2 * all_.kept_bytes
    assert few.forward_flops == all_.forward_flops
    assert few.backward_flops - all_.backward_flops > 0.8 * few.forward_flops


def test_frozen_weights_get_no_gradient_products():
    counts = tuning_counts(MODEL, replace(SETTINGS, checkpointing=False, dropout=False))
    # One product for the input's gradient; a trained model would have two.
    assert counts.backward_flops < 1.5 * counts.forward_flops


def test_unpacked_weights_are_alive_during_their_product_and_not_kept():
    values = torch.ones(2, 64, requires_grad=True)
    plain = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    packed = UnpackedLinear(plain)
    one, two = (
        count_pass(layer, [values], lambda layer=layer: layer(values).sum(), precision="fp32")
        for layer in (plain, packed)
    )
    assert two.kept_bytes == one.kept_bytes
    assert two.forward_peak_bytes >= 4 * 64 * 64
    assert two.backward_peak_bytes - one.backward_peak_bytes == pytest.approx(4 * 64 * 64, abs=600)


@pytest.mark.parametrize("is_fake", [True, False], ids=["fake", "real"])
def test_dropout_keeps_one_byte_for_a_number_as_on_a_gpu(is_fake):
    with FakeTensorMode() if is_fake else nullcontext():
        layer = torch.nn.Dropout(0.5)
        values = torch.ones(64, requires_grad=True)
        counts = count_pass(layer, [values], lambda: layer(values).sum(), precision="fp32")
    assert counts.kept_bytes == 64 + 4  # the mask, and the loss itself
    with FusedKernels():
        assert torch.nn.functional.dropout(torch.ones(3), 0.5, training=False).tolist() == [1] * 3
