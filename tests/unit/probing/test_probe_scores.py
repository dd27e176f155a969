"""Zero-shot and retrieval on cases that can be computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_partner import fake_partner

from kuea_mllm.errors import DataError, TowerError
from kuea_mllm.probing.datasets.dataset import PathImages, ProbeDataset
from kuea_mllm.probing.embedder import CUT_CAPTIONS
from kuea_mllm.probing.retrieval import probe_retrieval, rank_right_items
from kuea_mllm.probing.zero_shot import embed_classes, probe_zero_shot


def dataset(tmp_path: Path, count: int, **content: Any) -> ProbeDataset:
    names = [f"{number}.png" for number in range(count)]
    for name in names:
        (tmp_path / name).touch()
    images = PathImages(tmp_path, names, named_by="a test")
    return ProbeDataset("Toy", "test", images, str(tmp_path), **content)


def test_class_vector_is_the_normalised_mean_of_normalised_prompts() -> None:
    partner, _ = fake_partner({"a cat": [3.0, 0.0], "the cat": [0.0, 0.5]})
    vectors = embed_classes(partner, ["cat"], ["a {c}", "the {c}"])
    assert torch.allclose(vectors, torch.tensor([[0.5**0.5, 0.5**0.5]]))


def test_zero_shot_counts_images_classes_and_groups(tmp_path: Path) -> None:
    partner, text = fake_partner({"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]})
    data = dataset(
        tmp_path,
        5,
        labels=np.array([0, 0, 0, 1, 2]),
        class_names=("a", "b", "c"),
        templates=("{c}",),
    )
    # Long and short vectors: the length of an image embedding must not matter.
    features = np.array([[9, 1], [0.2, 0.1], [0.1, 0.2], [1, 3], [1, 0.1]], dtype=np.float32)
    column = probe_zero_shot(features, data, partner, cache=tmp_path / "cache")
    assert [row.score for row in column.rows] == [1, 1, 0, 1, 0]
    assert [row.answer for row in column.rows] == ["a", "a", "b", "b", "a"]
    assert (column.name, column.metric, column.score) == ("Toy", "acc1", 60.0)
    metrics = column.details["metrics"]
    assert metrics["acc5"] is None
    assert metrics["mean_per_class_recall"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert column.rows[4].group == "c"
    # Named as inside of the data set: a copy elsewhere has the same clusters.
    assert column.rows[4].cluster == "4.png"
    assert column.rows[4].image == str(tmp_path / "4.png")
    # Texts are embedded once for all towers of one text half.
    probe_zero_shot(features, data, partner, cache=tmp_path / "cache")
    assert text.seen == ["a", "b", "c"]


def test_damaged_class_vectors_in_the_cache_are_named(tmp_path: Path) -> None:
    content = {"labels": np.array([0, 1]), "class_names": ("a", "b"), "templates": ("{c}",)}
    data, partner = dataset(tmp_path, 2, **content), fake_partner()[0]
    features = np.ones((2, 16), dtype=np.float32)
    probe_zero_shot(features, data, partner, cache=tmp_path / "cache")
    [path] = (tmp_path / "cache").rglob("classes-*.npy")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"cached vectors of classes \S+\.npy are damaged"):
        probe_zero_shot(features, data, partner, cache=tmp_path / "cache")


def test_zero_shot_without_prompts_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, 1, labels=np.array([0]), class_names=("a",))
    with pytest.raises(DataError, match="has no prompts for zero-shot"):
        probe_zero_shot(np.ones((1, 2), np.float32), data, fake_partner()[0], cache=tmp_path)


def test_zero_shot_on_features_of_other_images_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, 2, labels=np.array([0, 0]), class_names=("a",), templates=("{c}",))
    with pytest.raises(DataError, match="2 images, but 3 embeddings"):
        probe_zero_shot(np.ones((3, 2), np.float32), data, fake_partner()[0], cache=tmp_path)


def test_texts_that_embed_to_nan_are_named(tmp_path: Path) -> None:
    partner, _ = fake_partner({"a": [1.0, 0.0], "b": [float("nan"), 1.0]})
    with pytest.raises(TowerError, match="NaN or infinity for class 'b'"):
        embed_classes(partner, ["a", "b"], ["{c}"])
    data = dataset(tmp_path, 2, captions=(("a",), ("b",)))
    with pytest.raises(TowerError, match="NaN or infinity for the caption 'b'"):
        probe_retrieval(np.ones((2, 2), np.float32), data, partner, cache=tmp_path)
    # Vectors with such a hole would be served from the cache from then on.
    assert not list(tmp_path.rglob("*.npy"))


def test_captions_are_embedded_once_for_all_towers_of_one_text_half(tmp_path: Path) -> None:
    data = dataset(tmp_path, 2, captions=(("p", "q"), ("r",)))
    features = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    (partner, text), (other, asked) = fake_partner(), fake_partner()
    asked.fingerprint = "another text tower"
    cache = tmp_path / "cache"
    first = probe_retrieval(features, data, partner, cache=cache)
    again = probe_retrieval(features, data, partner, cache=cache)
    assert text.seen == ["p", "q", "r"]
    assert again == first
    probe_retrieval(features, data, other, cache=cache)
    assert asked.seen == ["p", "q", "r"]
    shuffled = dataset(tmp_path, 2, captions=(("q", "p"), ("r",)))
    probe_retrieval(features, shuffled, partner, cache=cache)
    assert text.seen[3:] == ["q", "p", "r"]
    assert len(list(cache.rglob("captions-*.npy"))) == 3


def test_damaged_captions_in_the_cache_are_named(tmp_path: Path) -> None:
    data, features = dataset(tmp_path, 1, captions=(("p", "q"),)), np.ones((1, 16), np.float32)
    probe_retrieval(features, data, fake_partner()[0], cache=tmp_path / "cache")
    [path] = (tmp_path / "cache").rglob("captions-*.npy")
    np.save(path, np.load(path)[:1])
    with pytest.raises(DataError, match=r"cached vectors of captions \S+\.npy are damaged"):
        probe_retrieval(features, data, fake_partner()[0], cache=tmp_path / "cache")


def test_retrieval_counts_any_right_caption(tmp_path: Path) -> None:
    vectors = {"p": [1.0, 0.0], "q": [0.0, 1.0], "r": [0.9, 0.4], "s": [0.6, 0.8]}
    data = dataset(tmp_path, 2, captions=(("q", "r"), ("p", "s")))
    partner, _ = fake_partner(vectors)
    # Image 0 looks most like p (wrong), then r (right); image 1 like s (right).
    features = np.array([[1, 0.1], [0.5, 0.9]], dtype=np.float32)
    columns = probe_retrieval(features, data, partner, recall_at=(1, 2), cache=tmp_path)
    scores = {column.name: column.score for column in columns}
    assert scores == {
        "Toy I2T R@1": 50.0,
        "Toy I2T R@2": 100.0,
        "Toy T2I R@1": 50.0,  # r and s; q prefers image 1, p image 0
        "Toy T2I R@2": 100.0,
    }
    first = columns[0].rows[0]
    assert (first.target, first.answer, first.score) == ("q | r", "p", 0)
    assert [row.cluster for row in columns[2].rows] == ["0.png", "0.png", "1.png", "1.png"]
    assert columns[2].rows[1].question == "Which image shows: r"


@pytest.mark.parametrize("block", [3, 7, 1000])
def test_ranks_do_not_depend_on_the_block(block: int) -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(17, 6), torch.randn(40, 6)
    owner = torch.arange(40) % 17
    scores = images @ texts.T
    found = rank_right_items(images, texts, torch.arange(17), owner, block=block)
    for image in range(17):
        order = scores[image].argsort(descending=True).tolist()
        expected = next(rank for rank, text in enumerate(order) if owner[text] == image)
        assert found.rank[image] == expected
        assert found.best[image] == order[0]


def test_tower_that_embeds_everything_alike_scores_like_a_guess() -> None:
    same = torch.ones(10, 3) / 3**0.5
    ranks = rank_right_items(same, same, torch.arange(10), torch.arange(10), block=4)
    assert sorted(ranks.rank.tolist()) == list(range(10))


def test_released_code_cuts_captions_to_77_characters(tmp_path: Path) -> None:
    long = "a long caption " * 8
    data = dataset(tmp_path, 2, captions=((long,), ("short",)))
    features = np.eye(2, 16, dtype=np.float32)
    partner, text = fake_partner()
    probe_retrieval(features, data, partner, cache=tmp_path)
    assert text.seen == [long, "short"]
    partner, text = fake_partner()
    column = probe_retrieval(features, data, partner, faults=[CUT_CAPTIONS], cache=tmp_path)[0]
    assert text.seen == [long[:77], "short"]
    assert column.details["faults"] == ["cut_captions"]
    assert column.rows[0].target == long
