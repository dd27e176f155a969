"""What trains: LoRA in the language model only, the projector as a whole, the tower never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_tuned import PARTS, tiny_model
from torch import nn

from kuea_mllm.adapters.targets import linear_targets
from kuea_mllm.config.lora import LoraConfig, TuningOptimConfig
from kuea_mllm.errors import UserError
from kuea_mllm.tuning.optimizer import parameter_groups
from kuea_mllm.tuning.receipt import LeakedTraining, make_receipt
from kuea_mllm.tuning.wrap import wrap_with_lora

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def wrapped(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = LoraConfig(rank=2, alpha=4, **{"projector": "train", **settings})
    return wrap_with_lora(tiny_model().to(dtype), PARTS, config)


def trained_names(model: Any) -> list[str]:
    return [name for name, p in model.get_base_model().named_parameters() if p.requires_grad]


def test_targets_are_all_linear_layers_of_the_language_model() -> None:
    model = tiny_model()
    targets = linear_targets(model, PARTS)
    assert {name.rpartition(".")[2] for name in targets} == LINEAR
    assert all(name.startswith("model.language_model.layers.") for name in targets)
    # The tower has layers of the same names, which PEFT would match too.
    tower = {name.rpartition(".")[2] for name, _ in model.model.vision_tower.named_modules()}
    assert {"q_proj", "k_proj", "v_proj"} <= tower


def test_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"called 'c_attn'.*\n.*down_proj.*v_proj"):
        linear_targets(tiny_model(), PARTS, ["q_proj", "c_attn"])


@pytest.mark.parametrize("projector", ["train", "freeze"])
def test_nothing_but_lora_and_the_projector_trains(projector: str) -> None:
    names = trained_names(wrapped(projector=projector))
    lora = [name for name in names if "lora_" in name]
    rest = [name for name in names if "lora_" not in name]
    assert all(name.startswith("model.language_model.") for name in lora)
    assert len(lora) == 2 * 2 * len(LINEAR)
    assert len(rest) == (4 if projector == "train" else 0)
    assert all("multi_modal_projector" in name for name in rest)


def test_chosen_targets_and_output_layer() -> None:
    names = trained_names(wrapped(targets=["v_proj"], train_lm_head=True, projector="freeze"))
    assert sum("v_proj.lora_" in name for name in names) == 4
    assert [name for name in names if "lora_" not in name] == [
        "lm_head.modules_to_save.default.weight"
    ]


def test_tied_output_layer_cannot_be_trained() -> None:
    model = tiny_model()
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(UserError, match=r"lora.train_lm_head.*embedding"):
        wrap_with_lora(model, PARTS, LoraConfig(projector="freeze", train_lm_head=True))


def test_what_trains_is_float32_in_a_bfloat16_model() -> None:
    model = wrapped(torch.bfloat16)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_receipt_counts_every_tensor_once() -> None:
    model = wrapped()
    inner = model.get_base_model()
    receipt = make_receipt(inner, PARTS, head_trains=False)
    counted = {group.name: group.parameters for group in receipt.groups}
    tower = sum(p.numel() for p in inner.model.vision_tower.parameters())
    assert counted["vision tower"] == tower
    assert receipt.trainable == sum(p.numel() for p in inner.parameters() if p.requires_grad)
    assert sum(counted.values()) == sum(p.numel() for p in inner.parameters())
    lora = next(group for group in receipt.groups if group.name == "LoRA")
    assert (lora.modules, lora.tensors, lora.trains) == (14, 28, True)


def unfreeze_tower(model: nn.Module) -> None:
    next(model.model.vision_tower.parameters()).requires_grad_()  # type: ignore[union-attr]


def unfreeze_head(model: nn.Module) -> None:
    model.lm_head.requires_grad_()  # type: ignore[operator]


def unfreeze_embeddings(model: nn.Module) -> None:
    model.get_input_embeddings().requires_grad_()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("leak", "place"),
    [
        (unfreeze_tower, "vision tower"),
        (unfreeze_head, "output layer"),
        (unfreeze_embeddings, "language model"),
    ],
)
def test_leak_is_named_before_the_first_step(leak: Callable[[nn.Module], None], place: str) -> None:
    inner = wrapped().get_base_model()
    leak(inner)
    with pytest.raises(LeakedTraining, match=rf"would train, and it belongs to the {place}"):
        make_receipt(inner, PARTS, head_trains=False)


# PEFT 0.21 asks for a property that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_in_the_tower_is_a_leak_even_if_frozen() -> None:
    import peft

    model = tiny_model()
    # As a user's script does it: names alone.
    leaky: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    leaky.requires_grad_(False)
    with pytest.raises(LeakedTraining, match=r"vision_tower.*lora_"):
        make_receipt(leaky.get_base_model(), PARTS, head_trains=False)


def test_groups_are_those_of_the_original() -> None:
    inner = wrapped().get_base_model()
    optim = TuningOptimConfig(lr=1e-3, projector_lr=1e-5, weight_decay=0.1)
    groups = parameter_groups(inner, PARTS, optim)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("LoRA, decay on", 1e-3, 0.1),
        ("projector, decay on", 1e-5, 0.1),
        ("projector, decay off", 1e-5, 0.0),
    ]
    assert [len(g["params"]) for g in groups] == [28, 2, 2]
