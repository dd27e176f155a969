"""Zero-shot and retrieval give clip-benchmark's own numbers on the same model and data."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from probe_data import CONFIG, captions_of, write_clip, write_wds

from kuea_mllm.config.probe import ProbeData
from kuea_mllm.probing.datasets.open import open_dataset
from kuea_mllm.probing.embedder import tower_embedder
from kuea_mllm.probing.features import Extraction, extract
from kuea_mllm.probing.partner import load_partner
from kuea_mllm.probing.retrieval import probe_retrieval
from kuea_mllm.probing.zero_shot import probe_zero_shot
from kuea_mllm.towers.reading.load import load_tower

# clip-benchmark leaves webdataset's default unset, and webdataset leaves its shards open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:WebDataset\\(shardshuffle:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CLASSES = ["zebra", "mountain bike", "", "ice cream", "tower", "snail", "violin"]
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}", "{c}"]
HOW = Extraction(workers=0, batch_size=8)


@pytest.fixture(scope="module")
def model_and_directory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("clip")
    return write_clip(directory), directory


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "cache"))
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # closes webdataset's shards here, not where warnings are errors


def theirs(folder: Path, task: str, batch: int = 8) -> tuple[Any, Any]:
    pixels = CONFIG["preprocess_cfg"]
    transform = open_clip.image_transform(16, is_train=False, **pixels)
    dataset = build_dataset("wds/local", str(folder), transform=transform, task=task)
    collate = image_captions_collate_fn if task == "zeroshot_retrieval" else None
    loader = torch.utils.data.DataLoader(
        dataset.batched(batch, collation_fn=collate) if collate else dataset.batched(batch),
        batch_size=None,
    )
    loader.dataset.classes = dataset.classes  # type: ignore[attr-defined]
    return loader, dataset


def accuracy(output: Any, target: Any, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Stands in for clip-benchmark's own, which newer numpy does not run."""
    right = output.topk(max(topk), 1)[1].eq(target[:, None])
    return [right[:, :k].any(1).double().mean().item() for k in topk]


def test_zero_shot_scores_are_those_of_clip_benchmark(
    model_and_directory: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = model_and_directory
    labels = np.random.default_rng(0).permutation(np.arange(84) % len(CLASSES))
    folder = write_wds(
        tmp_path / "toy",
        "test",
        [str(label) for label in labels],
        shards=11,  # 10.tar would sort before 2.tar
        class_names=CLASSES,
        templates=TEMPLATES,
    )
    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    loader, dataset = theirs(folder, "zeroshot_classification")
    tokenizer = open_clip.SimpleTokenizer()
    expected = zeroshot_classification.evaluate(
        model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )

    tower = load_tower(directory)
    data = ProbeData(
        name="toy", key="toy", source="here", layout="wds", metric="acc1", documents=84
    )
    ours = open_dataset(data, tmp_path)
    store = extract(ours.images, tower_embedder(tower), HOW)
    column = probe_zero_shot(store.embeddings, ours, load_partner(tower))

    assert ours.labels is not None
    assert ours.labels.tolist() == labels.tolist()
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    metrics = column.details["metrics"]
    for name in ("acc1", "acc5", "mean_per_class_recall"):
        assert metrics[name] / 100 == pytest.approx(expected[name], abs=1e-6)
    assert column.score == metrics["acc1"]


@pytest.mark.parametrize("count", [5, 3])
def test_retrieval_scores_are_those_of_clip_benchmark(
    model_and_directory: tuple[Any, Path], tmp_path: Path, count: int
) -> None:
    model, directory = model_and_directory
    # Different numbers of captions for some images, as MSCOCO has them.
    texts = ["\n".join(captions_of(i, count + i % 2)) for i in range(40)]
    folder = write_wds(tmp_path / "toy", "test", texts, extension="txt")
    loader, _ = theirs(folder, "zeroshot_retrieval")
    expected = zeroshot_retrieval.evaluate(
        model, loader, open_clip.SimpleTokenizer(), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )

    tower = load_tower(directory)
    data = ProbeData(
        name="toy", key="toy", source="here", layout="wds", metric="recall@k", documents=40
    )
    ours = open_dataset(data, tmp_path)
    store = extract(ours.images, tower_embedder(tower), HOW)
    columns = probe_retrieval(store.embeddings, ours, load_partner(tower), cache=tmp_path)

    scores = {column.name: column.score / 100 for column in columns}
    assert len(scores) == 6
    assert 0 < scores["toy T2I R@10"] < 1
    for k in (1, 5, 10):
        assert scores[f"toy I2T R@{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"])
        assert scores[f"toy T2I R@{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"])
