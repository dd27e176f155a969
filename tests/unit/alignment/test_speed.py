"""Counting the work of an update, and knowing the card that does it."""

import pytest
import torch
from torch import nn

from kuea_mllm.alignment.speed import measure_utilisation, update_flops
from kuea_mllm.alignment.targets import LiveTargets
from kuea_mllm.cards import card_of_device
from kuea_mllm.features import Features
from kuea_mllm.towers.spec import CLIP_MEAN, CLIP_STD, TowerSpec

SPEC = TowerSpec(
    family="clip",
    image_size=16,
    patch_size=8,
    width=32,
    layers=2,
    heads=2,
    mlp_width=64,
    embedding_width=24,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    resize="shortest_edge",
)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, 10, bias=False)

    def features(self, pixels, layer=None, *, patches=False):
        return Features(self.layer(pixels.flatten(1)))


def test_flops_of_the_student_equal_the_formula():
    tokens, width, mlp = 5, 32, 64
    block = 4 * width * width + 2 * width * mlp
    attention = 2 * tokens * tokens * width
    patches = 4 * 3 * 8 * 8 * width
    forward = 2 * (2 * (tokens * block + attention) + patches + width * 24)
    # Backward is twice the forward pass, but for pixels, which need no gradient.
    assert update_flops(SPEC, None, device=torch.device("cpu")) == 3 * forward - 2 * patches


def test_frozen_towers_count_once_each():
    alone = update_flops(SPEC, None, device=torch.device("cpu"))
    live = LiveTargets([Linear()], Linear(), torch.device("cpu"))
    both = update_flops(SPEC, live, device=torch.device("cpu"))
    assert both - alone == 2 * (2 * 3 * 16 * 16 * 10)


def test_no_utilisation_is_claimed_for_a_cpu():
    found = measure_utilisation(
        SPEC, None, device=torch.device("cpu"), precision="fp32", processes=1
    )
    assert found is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_card_is_known_by_the_name_of_its_device(name, key):
    assert card_of_device(name).key == key


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA GeForce RTX 5090", "Tesla T4"])
def test_unknown_card_is_not_taken_for_another(name):
    assert card_of_device(name) is None
