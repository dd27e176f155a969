"""The linear probe equals clip-benchmark's own, and its shortcuts change nothing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import linear_probe as reference
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.probing import linear_training
from kuea_mllm.probing.datasets.dataset import ProbeDataset
from kuea_mllm.probing.linear import probe_linear
from kuea_mllm.probing.linear_training import (
    COARSE,
    WEIGHT_DECAYS,
    Labelled,
    LinearSettings,
    search_weight_decay,
    split_off,
    train_classifiers,
)

CLASSES = 6
WIDTH = 16
SHORT = LinearSettings(epochs=2, batch_size=32)


class NoImages:
    """Names of images that are never opened."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Image.Image:
        raise AssertionError(index)

    def name(self, index: int) -> str:
        return f"{index:04d}.png"

    def fingerprint(self) -> str:
        return f"none-{self._count}"


def make_split(
    seed: int, count: int, noise: float = 2.0, split: str = "train"
) -> tuple[NDArray[np.float32], ProbeDataset]:
    """Return features that tell their classes more or less, and their data set."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    features = centres[labels] + noise * generator.normal(size=(count, WIDTH))
    dataset = ProbeDataset(
        name="toy",
        split=split,
        images=NoImages(count),
        source="nowhere",
        labels=labels.astype(np.int64),
        class_names=tuple("abcdef"),
    )
    return features.astype(np.float32), dataset


def labelled(seed: int, count: int) -> Labelled:
    return Labelled.of(*make_split(seed, count))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clip-benchmark's module run without CUDA and with today's numpy."""

    def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
        right = output.topk(max(topk), 1).indices == target[:, None]
        return [float(right[:, :k].any(1).double().mean()) for k in topk]

    train, infer = reference.train, reference.infer

    def train_here(*arguments: Any) -> Any:
        *others, _, seed = arguments
        return train(*others, "cpu", seed)

    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(reference, "accuracy", accuracy)
    monkeypatch.setattr(reference, "train", train_here)
    monkeypatch.setattr(
        reference, "infer", lambda model, loader, amp, _: infer(model, loader, amp, "cpu")
    )


def test_weight_decays_are_those_of_clip_benchmark() -> None:
    coarse = np.logspace(-6, 2, num=7).tolist()
    assert [WEIGHT_DECAYS[i] for i in COARSE] == coarse
    assert len(WEIGHT_DECAYS) == 97


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_classifier_equals_the_one_that_clip_benchmark_trains(weight_decay: float) -> None:
    data, how = labelled(1, 210), LinearSettings(epochs=3)
    loader = DataLoader(TensorDataset(data.features, data.labels), batch_size=64, shuffle=True)
    theirs: Any = reference.train(
        loader, WIDTH, CLASSES, weight_decay, how.lr, how.epochs, False, "cpu", how.seed
    ).module
    ours = train_classifiers(data, CLASSES, [weight_decay], how)
    torch.testing.assert_close(ours.weight[0], theirs.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.bias[0], theirs.bias.detach(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("with_validation", [False, True])
def test_scores_equal_those_of_clip_benchmark(tmp_path: Path, with_validation: bool) -> None:
    """Its whole `evaluate`, from the features it would have cached."""
    splits = {
        "train": make_split(1, 300),
        "val": make_split(2, 120, split="val"),
        "test": make_split(3, 240, split="test"),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    for name, (features, dataset) in splits.items():
        data = Labelled.of(features, dataset)
        torch.save(data.features, folder / f"features_{name}.pt")
        torch.save(data.labels, folder / f"targets_{name}.pt")
    torch.manual_seed(5)
    theirs = reference.evaluate(
        torch.nn.Identity(),
        None,
        None,
        fewshot_k=-1,
        batch_size=64,
        num_workers=0,
        lr=0.1,
        epochs=4,
        model_id="model",
        seed=0,
        feature_root=str(tmp_path),
        device="cuda",
        val_dataloader=object() if with_validation else None,
        amp=False,
    )
    # It shuffles the training images once before everything else.
    torch.manual_seed(5)
    order = torch.randperm(300).numpy()
    features, train = splits["train"]
    shuffled = dataclasses.replace(train, labels=train.require_labels()[order])
    ours = probe_linear(
        features[order],
        shuffled,
        *splits["test"],
        validation=splits["val"] if with_validation else None,
        how=LinearSettings(epochs=4),
    )
    metrics = ours.details["metrics"]
    assert 0.3 < theirs["lp_acc1"] < 0.95  # neither chance nor ceiling
    assert ours.score / 100 == pytest.approx(theirs["lp_acc1"], abs=1e-6)
    assert metrics["acc5"] / 100 == pytest.approx(theirs["lp_acc5"], abs=1e-6)
    assert metrics["mean_per_class_recall"] / 100 == pytest.approx(
        theirs["lp_mean_per_class_recall"], abs=1e-6
    )
    assert ours.details["weight_decay"] == theirs["weight_decay"]


def test_side_by_side_equals_one_after_the_other() -> None:
    data, how = labelled(1, 300), LinearSettings()
    decays = [WEIGHT_DECAYS[i] for i in COARSE[:6]]
    together = train_classifiers(data, CLASSES, decays, how)
    for index, decay in enumerate(decays):
        alone = train_classifiers(data, CLASSES, [decay], how)
        torch.testing.assert_close(
            together.logits(data.features)[index],
            alone.logits(data.features)[0],
            rtol=0,
            atol=2e-6,
        )


def test_diverged_classifier_harms_no_other_and_is_never_chosen() -> None:
    data, how = labelled(1, 300), LinearSettings(batch_size=32)
    together = train_classifiers(data, CLASSES, [0.01, 100.0], how)
    assert together.is_finite.tolist() == [True, False]
    alone = train_classifiers(data, CLASSES, [0.01], how)
    torch.testing.assert_close(together.weight[0], alone.weight[0])
    assert together.accuracies(data)[1] == 0
    assert search_weight_decay(data, labelled(2, 120), CLASSES, how).weight_decay < 20


def test_search_finds_the_best_and_trains_no_point_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies are laid out as a hill, so the walk is known."""
    tried: list[int] = []

    class Hill:
        def __init__(self, points: list[int]) -> None:
            self.points = points

        def accuracies(self, _: Labelled) -> Tensor:
            return torch.tensor([1 - abs(i - 43) / 100 for i in self.points], dtype=torch.float64)

    def train(_: Labelled, __: int, decays: list[float], ___: LinearSettings) -> Hill:
        points = [WEIGHT_DECAYS.index(decay) for decay in decays]
        tried.extend(points)
        return Hill(points)

    monkeypatch.setattr(linear_training, "train_classifiers", train)
    data = labelled(1, 12)
    found = search_weight_decay(data, data, CLASSES, SHORT)
    assert found.weight_decay == WEIGHT_DECAYS[43]
    # 40 of (40, 48, 56), 44 of (36, 40, 44), 42 of (42, 44, 46) as first of equals, then 43.
    assert tried == [0, 16, 32, 48, 64, 80, 96, 40, 56, 36, 44, 42, 46, 41, 43]
    assert found.accuracies[WEIGHT_DECAYS[43]] == 100


def test_another_seed_gives_another_classifier_and_leaves_the_global_one_alone() -> None:
    data = labelled(1, 100)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = train_classifiers(data, CLASSES, [0.0], SHORT)
    assert torch.equal(torch.rand(2), expected)
    again = train_classifiers(data, CLASSES, [0.0], SHORT)
    other = train_classifiers(data, CLASSES, [0.0], dataclasses.replace(SHORT, seed=1))
    assert torch.equal(one.weight, again.weight)
    assert not torch.equal(one.weight, other.weight)


def test_length_of_an_embedding_does_not_matter() -> None:
    features, train = make_split(1, 60)
    longer = features * np.linspace(0.5, 40, 60, dtype=np.float32)[:, None]
    torch.testing.assert_close(
        Labelled.of(features, train).features, Labelled.of(longer, train).features
    )


def test_rows_say_what_was_answered() -> None:
    column = probe_linear(
        *make_split(1, 300, noise=1.0), *make_split(2, 60, split="test"), how=SHORT
    )
    assert column.name == "toy linear"
    assert column.statistic == "mean"
    assert [row.doc_id for row in column.rows] == list(range(60))
    for index, row in enumerate(column.rows):
        assert row.target == row.group == "abcdef"[index % CLASSES]
        assert row.score == float(row.answer == row.target)
    mean = sum(row.score or 0 for row in column.rows) / 60
    assert column.score == pytest.approx(100 * mean)
    assert column.details["weight_decay"] == 0
    assert column.details["settings"]["seed"] == 0


def test_class_without_training_image_is_refused() -> None:
    features, train = make_split(1, 60)
    kept = train.require_labels() != 4
    incomplete = dataclasses.replace(
        train, labels=train.require_labels()[kept], images=NoImages(int(kept.sum()))
    )
    with pytest.raises(DataError, match="1 classes of split test have no image in split train: e"):
        probe_linear(features[kept], incomplete, *make_split(2, 60, split="test"))


def test_splits_with_other_class_names_are_refused() -> None:
    features, test = make_split(2, 60, split="test")
    renamed = dataclasses.replace(test, class_names=tuple("abcdeg"))
    with pytest.raises(DataError, match="differ in name or order"):
        probe_linear(*make_split(1, 60), features, renamed)


def test_nan_is_refused_with_the_name_of_its_image() -> None:
    features, train = make_split(1, 60)
    features[17, 3] = np.nan
    with pytest.raises(TowerError, match=r"image 0017\.png holds NaN"):
        Labelled.of(features, train)


def test_embeddings_are_read_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    features, dataset = make_split(1, 50)
    whole = Labelled.of(features, dataset)
    monkeypatch.setattr(linear_training, "BLOCK", 8)
    assert torch.equal(Labelled.of(features, dataset).features, whole.features)
    features[43, 0] = np.nan
    with pytest.raises(TowerError, match=re.escape(dataset.images.name(43))):
        Labelled.of(features, dataset)


def test_other_number_of_embeddings_is_refused() -> None:
    features, train = make_split(1, 60)
    with pytest.raises(DataError, match="60 images, but 59 embeddings"):
        Labelled.of(features[1:], train)


def test_split_off_parts_everything_once() -> None:
    rest, part = split_off(10, 0.25, seed=0)
    assert len(part) == 2
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(10))
    assert not np.array_equal(split_off(1000, 0.25, 1)[1], split_off(1000, 0.25, 0)[1])
    with pytest.raises(DataError, match="leaves nothing"):
        split_off(3, 0.25, 0)
