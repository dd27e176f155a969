"""Counting without weights gives what a real pass takes."""

from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kuea_mllm.cards import CARDS, GIB
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.errors import TowerError, UserError
from kuea_mllm.planning.counting import count_saved_bytes
from kuea_mllm.planning.models import Architecture, find_architecture, known_architectures
from kuea_mllm.planning.plan import plan_alignment, plan_for_recipe
from kuea_mllm.planning.result import check_memory
from kuea_mllm.planning.towers import (
    PatchWork,
    build,
    count_training,
    inference_flops,
    tower_sizes,
    training_counts,
)

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
PATCHES = PatchWork(layer=-2, preserve=True, kernel=True, distill=True, teachers=((9, 24),))
RTX4090 = CARDS["rtx4090"]


def tower(config, *, is_fake):
    """A tower and its pixels, with data or without; made under the mode that is active."""
    model = build(config, has_projection=config["model_type"] == "clip_vision_model")
    pixels = torch.zeros(4, 3, config["image_size"], config["image_size"])
    if not is_fake:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model, pixels


def counts(config, *, is_fake, **settings):
    with FakeTensorMode() if is_fake else nullcontext():
        return count_training(*tower(config, is_fake=is_fake), **settings)


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
def test_counts_without_data_are_those_of_a_real_pass(config, precision, checkpointing):
    settings = {"precision": precision, "checkpointing": checkpointing}
    planned = asdict(counts(config, is_fake=True, **settings))
    real = asdict(counts(config, is_fake=False, **settings))
    # A scalar lives on the CPU in one and not in the other (SigLIP's pooling in bf16).
    assert planned == pytest.approx(real, rel=0, abs=16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counts_with_patch_terms_are_those_of_a_real_pass(precision):
    settings = {"precision": precision, "patches": PATCHES}
    with_patches = counts(CLIP, is_fake=True, **settings)
    assert with_patches == counts(CLIP, is_fake=False, **settings)
    assert with_patches.kept_bytes > counts(CLIP, is_fake=True, precision=precision).kept_bytes


@pytest.mark.parametrize("is_fake", [True, False], ids=["fake", "real"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_kept_are_the_bytes_that_saved_tensor_hooks_see(precision, is_fake):
    kept = counts(CLIP, is_fake=is_fake, precision=precision).kept_bytes
    with FakeTensorMode() if is_fake else nullcontext():
        model, pixels = tower(CLIP, is_fake=is_fake)
        model.train()

        def loss():
            return model(pixel_values=pixels).image_embeds.float().square().sum()

        saved = count_saved_bytes(model, loss, precision=precision)
    # Hooks also see the pixels (fp32 only: autocast saves a copy), and not the loss itself.
    from_outside = pixels.nbytes if precision == "fp32" else 0
    loss_bytes = 4
    slack = 4 * (32 // 8) ** 2 * 8 + 64  # position ids, a scalar or two
    assert abs(saved - from_outside + loss_bytes - kept) <= slack
    assert kept > 20 * slack


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deep_tower_follows_from_two_short_ones(precision):
    architecture = Architecture("tiny", CLIP, 32, "here")
    full = counts(CLIP, is_fake=True, precision=precision)
    assert training_counts(architecture, images=4, precision=precision) == full


def test_parameters_are_those_of_real_tensors():
    model = build(CLIP, has_projection=True)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert tower_sizes(Architecture("tiny", CLIP, 32, "here"), 32).parameters == real


def test_autocast_copies_are_half_of_the_matrices():
    model, _ = tower(CLIP, is_fake=False)
    cast = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [module for module in model.modules() if isinstance(module, cast)]
    numbers = sum(layer.weight.numel() for layer in layers)
    assert counts(CLIP, is_fake=True, precision="bf16").weight_copy_bytes == 2 * numbers
    assert counts(CLIP, is_fake=True, precision="fp32").weight_copy_bytes == 0


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "facebook/dinov2-large"])
def test_flops_are_those_of_the_formula(name):
    architecture = known_architectures()[name]
    width, layers, tokens = 1024, 24, 257
    products = 12 * width**2 * layers * tokens + 256 * 3 * 14**2 * width
    projection = width * 768 if architecture.has_projection else 0
    attention = 2 * tokens**2 * width * layers
    expected = 2 * (products + attention + projection)
    assert inference_flops(architecture, 224) == expected


def test_backward_takes_twice_the_forward():
    full = counts(CLIP, is_fake=True, precision="fp32")
    # The attention's backward computes its scores again: 2.5 instead of 2.
    assert 1.9 < full.backward_flops / full.forward_flops < 2.6


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Equal to timm's vit_large_patch14_reg4_dinov2 etc. but for tensors that only one has
        # (class and register positions, the mask token, the key bias).
        ("facebook/dinov2-with-registers-large", 304_370_688),
        ("facebook/dinov2-with-registers-giant", 1_136_483_840),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", 303_079_424),
        ("google/siglip-so400m-patch14-224", 427_680_704),
        ("openai/clip-vit-large-patch14", 303_966_208),
    ],
)
def test_known_model_has_the_published_number_of_parameters(name, parameters):
    architecture = known_architectures()[name]
    found = tower_sizes(architecture, architecture.image_size).parameters
    assert abs(found / parameters - 1) < 2e-4


@pytest.mark.parametrize("name", known_architectures())
def test_known_model_can_be_built_and_names_its_source(name):
    architecture = find_architecture(name, role="teacher.model")
    assert architecture.source
    sizes = tower_sizes(architecture, architecture.image_size)
    assert sizes.parameters > 80e6
    assert sizes.patches == (architecture.image_size // architecture.config["patch_size"]) ** 2


def test_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(TowerError, match=r"student\.model.*\n.*openai/clip-vit-large-patch14"):
        find_architecture("nobody/nothing", role="student.model")


def l14_336(*overrides, **settings):
    recipe = load_recipe("align/vit_l_14_336", AlignRecipe, overrides=overrides)
    return plan_alignment(recipe, card=RTX4090, **settings)


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        ([], False),
        (["runtime.precision=bf16", "targets.cache=true"], False),
        (["runtime.precision=bf16", "runtime.micro_batch_size=16"], True),
        (["runtime.precision=bf16", "targets.cache=true", "runtime.micro_batch_size=16"], True),
        (["runtime.gradient_checkpointing=true"], True),
    ],
)
def test_vit_l_14_336_with_32_images_on_one_24_gb_card(overrides, fits):
    assert l14_336(*overrides).fits == fits


def test_vit_l_14_336_fits_four_24_gb_cards_in_every_precision():
    assert l14_336(processes=4).fits
    assert l14_336("runtime.precision=bf16", processes=4).fits


def test_paper_schedule_of_vit_l_14_takes_under_four_hours_on_two_4090():
    recipe = load_recipe("align/vit_l_14_fast", AlignRecipe)
    hours = plan_alignment(recipe, card=RTX4090, processes=2, mfu=0.5).hours
    student = 3 * 162e9 * 64 * 40_000 / (2 * 165.2e12 * 0.5) / 3600
    assert hours.training == pytest.approx(student, rel=0.01)
    assert hours.bound == "compute"
    assert hours.total < 4


def test_cached_targets_take_the_frozen_towers_out():
    live, cached = l14_336(processes=4), l14_336("targets.cache=true", processes=4)
    names = {part.name for part in cached.memory}
    assert not names & {"original tower", "teachers"}
    assert live.memory_bytes - cached.memory_bytes >= 4 * 2 * 304e6
    assert cached.cache_bytes == 1_281_167 * 4 * (768 + 1024)
    assert cached.hours.targets > 0 == live.hours.targets


def test_patch_terms_keep_the_original_tower_beside_a_cache():
    plan = l14_336("targets.cache=true", "objective.patch_preserve_weight=0.3", processes=4)
    names = {part.name for part in plan.memory}
    assert "original tower" in names
    assert "teachers" not in names


def test_micro_batches_cost_one_more_forward_pass():
    whole, cut = l14_336(processes=4), l14_336("runtime.micro_batch_size=4", processes=4)
    flops = cut.gflops_per_image
    assert flops["student forward again (micro-batches)"] == flops["student forward"]
    assert cut.memory_bytes < whole.memory_bytes
    assert cut.hours.training > whole.hours.training


def test_slow_decoding_bounds_the_rate():
    plan = l14_336("data.workers=1", processes=4, images_per_core=5.0)
    assert plan.hours.bound == "decode"
    assert plan.hours.images_per_second == 20.0


def test_part_of_the_images_shortens_epochs():
    half = ["optim.steps=null", "optim.epochs=2", "data.fraction=0.5"]
    assert l14_336(*half).steps == 2 * (640_584 // 32)


def test_projection_trains_nothing():
    plan = plan_for_recipe(load_recipe("align/vit_l_14_projection", AlignRecipe))
    assert plan.steps == plan.parameters["trained"] == plan.checkpoint_bytes == 0
    assert "gradients" not in {part.name for part in plan.memory}


def test_a_run_that_needs_too_much_is_refused_before_loading():
    plan = l14_336(processes=4)
    check_memory(plan, plan.memory_bytes)
    with pytest.raises(UserError, match=r"needs about 16\.\d GiB.*device has 12\.0.*activations"):
        check_memory(plan, 12 * GIB)
