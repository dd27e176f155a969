"""CKA between layers, in batches."""

import pytest
import torch
from torch import nn

from kuea_mllm.diagnostics import linear_cka
from kuea_mllm.errors import TowerError
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.probing.layers import (
    StreamedCKA,
    compare_layers,
    layered_teacher,
    layered_tower,
)
from kuea_mllm.teachers.load import load_teacher
from kuea_mllm.towers.model.encode import TowerEncoder
from kuea_mllm.towers.reading.load import load_tower


def gaussian(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def cka_of(*layers, batch=None):
    cka = StreamedCKA()
    for start in range(0, len(layers[0]), batch or len(layers[0])):
        cka.add([layer[start : start + (batch or len(layer))] for layer in layers])
    return cka.matrix()


def test_a_layer_is_like_itself_turned_and_scaled():
    x = gaussian(64, 12, 0)
    turn, _ = torch.linalg.qr(gaussian(12, 12, 1))
    matrix = cka_of(x, 3.0 * x @ turn + 5.0, batch=16)
    torch.testing.assert_close(matrix, torch.ones(2, 2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_hsic_in_one_batch_is_the_u_statistic_by_hand():
    x, y = gaussian(7, 3, 0), gaussian(7, 4, 1)
    grams = [(each @ each.T).double().fill_diagonal_(0) for each in (x, y)]

    def hsic(k, m):
        n, one = len(k), torch.ones(len(k), dtype=torch.float64)
        total = torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    expected = hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt()
    assert cka_of(x, y)[0, 1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_batches_estimate_what_all_images_together_have():
    x = gaussian(4096, 8, 0)
    y = x @ gaussian(8, 8, 1) + 2.0 * gaussian(4096, 8, 2)
    assert cka_of(x, y, batch=64)[0, 1].item() == pytest.approx(linear_cka(x, y), abs=0.02)


def test_wide_unrelated_layers_are_not_alike_in_small_batches():
    x, y = gaussian(640, 512, 0), gaussian(640, 512, 1)
    assert abs(cka_of(x, y, batch=32)[0, 1].item()) < 0.05
    assert linear_cka(x[:32], y[:32]) > 0.9  # which is why the plain formula would not do


def test_a_constant_layer_is_like_nothing():
    matrix = cka_of(gaussian(16, 4, 0), torch.full((16, 4), 3.7))
    assert matrix[0, 1] == 0.0
    assert matrix[1, 1] == 0.0


def test_three_images_are_too_few():
    with pytest.raises(ValueError, match="4 images or more"):
        StreamedCKA().add([gaussian(3, 2, 0)])


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_blocks_of_a_teacher_give_the_hidden_states_that_transformers_gives(pixels):
    teacher = load_teacher(ASSETS / "teacher")
    found = layered_teacher("teacher", teacher, pixels[:1])
    states = found.states(pixels)
    assert found.prefix == 3  # class token and two registers
    assert len(states) == teacher.model.config.num_hidden_layers + 1
    normed = (pixels - torch.tensor(teacher.mean)[:, None, None]) / torch.tensor(teacher.std)[
        :, None, None
    ]
    with torch.no_grad():
        expected = teacher.model(pixel_values=normed, output_hidden_states=True).hidden_states
    for own, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


def test_layers_of_a_tower_and_itself_are_one_on_the_diagonal(pixels):
    encoder = TowerEncoder(load_tower(ASSETS / "clip"))
    models = [layered_tower("original", encoder), layered_tower("aligned", encoder)]
    # The last batch, of two, cannot be used.
    names, matrix, used = compare_layers(models, [pixels[:5], pixels[5:10], pixels[10:]])
    assert names == [(model, layer) for model in ("original", "aligned") for layer in range(4)]
    assert used == 10
    torch.testing.assert_close(matrix[:4, :4], matrix[:4, 4:], atol=1e-9, rtol=0)
    assert matrix[:4, 4:].diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-9)


def test_a_teacher_without_rows_of_blocks_is_refused(pixels):
    teacher = load_teacher(ASSETS / "teacher")
    teacher.model.encoder.layer = nn.ModuleList(list(teacher.model.encoder.layer)[:1])
    with pytest.raises(TowerError, match="no row of blocks"):
        layered_teacher("teacher", teacher, pixels[:1])
