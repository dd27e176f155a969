"""One sample: its tokens, its pixels, and which record a bad image belongs to."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixture_samples import record, write_image, write_list
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from kuea_mllm.errors import DataError, UnreadableImage
from kuea_mllm.tuning.collate import Collator
from kuea_mllm.tuning.examples import TuningExamples, image_path
from kuea_mllm.tuning.mixture import open_mixture


class Words:
    """An encoder in which every word is one token."""

    placeholder = -1
    pad_token_id = 0
    max_length = 64

    def encode(self, record: Mapping[str, Any]) -> Any:
        text = " ".join(turn["value"] for turn in record["conversations"])
        ids = [self.placeholder if word == "<image>" else len(word) for word in text.split()]
        return SimpleNamespace(input_ids=ids, labels=ids, left_out=0)


def preprocess(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([pil_to_tensor(each.resize((8, 8))) for each in images]) / 255


def examples(tmp_path: Path, records: list[Any], images: Path | None) -> TuningExamples:
    path = write_list(tmp_path / "mix.json", records)
    return TuningExamples(
        open_mixture(path, cache=tmp_path / "cache", progress=False),
        Words(),
        images=images,
        preprocess=preprocess,
    )


def test_only_samples_with_an_image_have_pixels(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png")
    found = examples(tmp_path, [record(0), record(1, image=None)], tmp_path / "images")
    assert len(found) == 2
    assert found[0].pixels is not None
    assert found[0].pixels.shape == (3, 8, 8)
    assert found[1].pixels is None
    assert found[1].position == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_give_the_same_batches(workers: int, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png")
    records = [record(number, image="a.png" if number % 2 else None) for number in range(6)]
    found = examples(tmp_path, records, tmp_path / "images")
    collate = Collator(
        placeholder=-1, image_token_id=99, tokens_per_image=4, pad_token_id=0, max_length=64
    )
    loader = DataLoader(
        found,
        batch_sampler=[[0, 1], [3, 2], [4]],
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    batches = list(loader)
    assert [batch["positions"].tolist() for batch in batches] == [[0, 1], [3, 2], [4]]
    assert [len(batch.get("pixel_values", ())) for batch in batches] == [1, 1, 0]
    assert torch.equal(batches[1]["input_ids"], collate([found[3], found[2]])["input_ids"])


def test_pickle_holds_no_record(tmp_path: Path) -> None:
    found = examples(tmp_path, [record(n, image=None) for n in range(500)], None)
    again = pickle.loads(pickle.dumps(found))
    assert again[499] == found[499]
    assert len(pickle.dumps(found.mixture)) < 1000


def test_bad_image_names_record_and_file(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (write_image(folder / "a.png")).write_bytes(b"no image")
    found = examples(tmp_path, [record(0), record(1, image="gone.png")], folder)
    for position, name in enumerate(["a.png", "gone.png"]):
        with pytest.raises(UnreadableImage) as caught:
            found[position]
        assert f"record {position} (id 'r{position}')" in caught.value.problem
        assert str(folder / name) in caught.value.problem
        assert "doctor --data" in caught.value.remedy


def test_images_without_a_folder_are_refused(tmp_path: Path) -> None:
    found = examples(tmp_path, [record(0)], None)
    with pytest.raises(DataError, match="no image folder is given"):
        found[0]


def test_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not lie below"):
        image_path(tmp_path, "../a.png")
    assert image_path(tmp_path, "x/a.png") == tmp_path / "x" / "a.png"
