"""What a tuning takes at the true sizes, and which way to run it is chosen."""

import json
from dataclasses import replace

import pytest

from kuea_mllm.cards import CARDS, GIB, card_or_device
from kuea_mllm.config.lora import LoraConfig, LoraRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.errors import UserError
from kuea_mllm.planning.tuning import check_tuning_memory, plan_tuning
from kuea_mllm.planning.tuning_memory import model_sizes, moment_bytes, trained_sizes
from kuea_mllm.planning.tuning_models import find_mllm, known_mllms
from kuea_mllm.planning.tuning_pass import decoder_layers
from kuea_mllm.planning.tuning_text import tuning_plan_text
from kuea_mllm.tuning.wrap import wrap_with_lora

LLAVA_7B = known_mllms()["llava-hf/llava-1.5-7b-hf"]
PAPER = "lora/llava15_7b_665k_4x4090"


def recipe(**settings):
    return load_recipe(PAPER, LoraRecipe, settings=settings)


def test_true_7b_trains_the_published_number_of_parameters():
    trained = trained_sizes(
        LLAVA_7B, rank=128, targets=None, trains_projector=True, trains_head=False
    )
    assert (trained.lora, trained.lora_modules, trained.projector) == (319_815_680, 224, 20_979_712)
    assert model_sizes(LLAVA_7B).total == 7_063_427_072


def test_true_mixture_has_dinov2_beside_the_7b():
    mixture = known_mllms()["llava-1.5-7b-mof"]
    sizes, plain = model_sizes(mixture), model_sizes(LLAVA_7B)
    assert sizes == replace(plain, other_encoders=304_368_640)
    plan = plan_tuning(recipe(**{"model.path": "llava-1.5-7b-mof"}), compare=False)
    assert plan.frozen["other encoders"] == 304_368_640
    more = plan.memory_gib - plan_tuning(recipe(), compare=False).memory_gib
    # Both encoders are 1024 wide, so what is tuned is the same: DINOv2 itself, in bfloat16.
    assert more * GIB == pytest.approx(2 * 304_368_640, rel=0.1)


def test_peft_makes_as_many_parameters_of_a_true_layer():
    model = LLAVA_7B.build_empty()
    del decoder_layers(model, LLAVA_7B.parts)[1:]
    wrapped = wrap_with_lora(model, LLAVA_7B.parts, LoraConfig(projector="train"))
    real = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert real == 319_815_680 // 32 + 20_979_712


def test_constants_of_nf4_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    import torch

    packed, state = functional.quantize_4bit(
        torch.randn(512, 1024), quant_type="nf4", compress_statistics=True
    )
    tables = (state.code, state.state2.code, state.offset)
    real = [state.absmax, state.state2.absmax, *tables]
    numbers = 512 * 1024
    blocks = numbers // 64
    assert packed.nbytes == numbers // 2
    counted = blocks + 4 * blocks // 256 + 4 * (256 + 16)
    assert counted == pytest.approx(sum(tensor.nbytes for tensor in real), abs=8)


def test_paper_s_setting_fits_four_24_gb_cards_as_it_is():
    plan = plan_tuning(recipe(), card="rtx4090", processes=4)
    assert plan.fits
    assert plan.memory_gib < 22.5
    assert plan.steps == 5198
    assert plan.choice.settings == ()
    assert plan.choice.method == "plain DDP with a bf16 base"
    assert plan.memory_gib == pytest.approx(plan.choice.gib)
    nf4 = next(option for option in plan.options if option.settings == ("model.quantization=nf4",))
    assert nf4.gib < 12
    sharded = next(option for option in plan.options if "runtime.sharding=fsdp" in option.settings)
    assert sharded.hours > 2 * plan.hours.total
    json.dumps(plan.to_dict())
    for words in ("LoRA 319,815,680", "fits", "*   2", "5198 updates", "assumed"):
        assert words in tuning_plan_text(plan)


def test_16_gb_take_nf4_and_the_check_says_so():
    plan = plan_tuning(recipe(), card="rtx4080")
    assert not plan.fits
    assert plan.choice.settings == ("model.quantization=nf4",)
    assert "does not fit" in plan.reasons[0]
    with pytest.raises(UserError, match=r"about 2\d\.\d GiB .* device has 15\.6") as raised:
        check_tuning_memory(plan, plan.card.memory_bytes)
    assert "--set model.quantization=nf4" in raised.value.remedy
    assert "optim.optimizer=adamw_8bit (" not in raised.value.remedy
    check_tuning_memory(plan, 24 * GIB)


def test_no_way_at_all_is_said():
    plan = plan_tuning(recipe(), card="rtx4080")
    with pytest.raises(UserError) as raised:
        check_tuning_memory(plan, 4 * GIB)
    assert "No setting here makes it fit." in raised.value.remedy


def test_released_script_takes_its_number_of_steps():
    released = load_recipe("lora/llava15_7b_665k_released", LoraRecipe)
    plan = plan_tuning(released, card="rtx4090", processes=4)
    assert plan.steps == 166_325
    assert plan.trained["projector"] == 0
    assert plan.hours.exchanging > 5  # gradients of 1.2 GiB at every step


def test_moments_in_eight_bits_take_a_quarter():
    assert moment_bytes("adamw", 1 << 20) == 8 << 20
    assert moment_bytes("paged_adamw", 1 << 20) == 8 << 20
    assert moment_bytes("adamw_8bit", 1 << 20) == pytest.approx(2 << 20, rel=0.02)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (None, "'model.path' is not set"),
        ("nobody/nothing", "the sizes of nobody/nothing are not known"),
    ],
)
def test_unknown_model_is_one_clear_line(reference, expected):
    with pytest.raises(UserError, match=expected):
        find_mllm(reference)


def test_unknown_device_has_its_own_memory():
    assert card_or_device("NVIDIA GeForce RTX 4090", 1) is CARDS["rtx4090"]
    assert card_or_device("NVIDIA Something", 10 * GIB).memory_bytes == 10 * GIB
