"""Data sets of the probes: every layout, and what is wrong with a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from probe_data import captions_of, picture, write_folder, write_karpathy, write_wds

from kuea_mllm.config.probe import ProbeData
from kuea_mllm.errors import DataError
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.datasets.classes import (
    match_folders,
    package_class_names,
    package_templates,
)
from kuea_mllm.probing.datasets.open import open_dataset

NAMES = ["zero", "one", "two"]


def entry(**changes: Any) -> ProbeData:
    settings: dict[str, Any] = {
        "name": "Toy",
        "key": "toy",
        "source": "someone/toy",
        "layout": "wds",
        "metric": "acc1",
        "documents": 6,
    }
    return ProbeData(**(settings | changes))


def labels_of(dataset: Any) -> list[int]:
    return [int(label) for label in dataset.require_labels()]


def test_wds_reads_shards_by_number_and_keeps_empty_class_names(tmp_path: Path) -> None:
    labels = ["0", "1", "2"] * 5
    write_wds(tmp_path / "toy", "test", labels, shards=12, class_names=["very near", "", "far"])
    data = open_dataset(entry(), tmp_path)
    assert labels_of(data) == [0, 1, 2] * 5
    assert data.class_names == ("very near", "", "far")
    assert data.images.read(14).tobytes() == picture(14).tobytes()
    assert data.images.name(14).endswith("11.tar!s0000014.png")


def test_data_sets_own_prompts_come_before_the_package_s(tmp_path: Path) -> None:
    write_wds(tmp_path / "toy", "test", ["0"], class_names=["a"], templates=["{c}!"], shards=1)
    assert open_dataset(entry(templates="svhn"), tmp_path).templates == ("{c}!",)
    (tmp_path / "toy" / "zeroshot_classification_templates.txt").unlink()
    found = open_dataset(entry(templates="svhn"), tmp_path).templates
    assert found == package_templates("svhn")
    assert len(found) == 6


def test_classes_without_an_image_are_named(tmp_path: Path) -> None:
    write_wds(tmp_path / "toy", "test", ["0", "2", "0"], class_names=[*NAMES, "three"], shards=1)
    with pytest.raises(DataError, match="2 of 4 classes have no image: 'one', 'three'"):
        open_dataset(entry(), tmp_path)
    assert len(open_dataset(entry(may_miss_classes=True), tmp_path)) == 3


def test_label_without_a_class_name_is_refused(tmp_path: Path) -> None:
    write_wds(tmp_path / "toy", "test", ["0", "1", "7"], class_names=NAMES, shards=1)
    with pytest.raises(DataError, match="image 2 has label 7, but there are 3 class names"):
        open_dataset(entry(), tmp_path)


def test_image_without_a_label_is_named(tmp_path: Path) -> None:
    write_wds(tmp_path / "toy", "test", ["0"], extension="json", shards=1, class_names=["a"])
    with pytest.raises(DataError, match=r"0.tar!s0000000.png has no \.cls member"):
        open_dataset(entry(), tmp_path)


def test_captions_that_are_no_text_are_named(tmp_path: Path) -> None:
    write_wds(tmp_path / "toy", "test", ["caf\u00e9"], extension="txt", shards=1)
    path = tmp_path / "toy" / "test" / "0.tar"
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xe9\n"))
    with pytest.raises(DataError, match=r"0\.tar!s0000000\.txt is not UTF-8 text"):
        open_dataset(entry(metric="recall@k"), tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_wds(tmp_path / "toy", "test", ["0", "1", "2"], shards=3, class_names=NAMES)
    (tmp_path / "toy" / "test" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"says 3 shards, and 1\.tar is not there"):
        open_dataset(entry(), tmp_path)


def test_absent_data_set_tells_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hf download someone/toy --repo-type dataset"):
        open_dataset(entry(), tmp_path)


def test_without_a_folder_the_split_alone_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wds(tmp_path, "test", ["0", "1", "2"], class_names=NAMES)
    asked: dict[str, Any] = {}

    def snapshot_download(reference: str, **options: Any) -> str:
        asked.update(options, reference=reference)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(open_dataset(entry(), None)) == 3
    assert asked == {
        "reference": "someone/toy",
        "repo_type": "dataset",
        "allow_patterns": ["test/*", "*.txt"],
    }
    with pytest.raises(DataError, match="cannot be fetched by itself: it comes from someone/toy"):
        open_dataset(entry(layout="karpathy"), None)


def test_another_number_of_images_than_the_recipe_s_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wds(tmp_path / "toy", "test", ["0", "1", "2"], class_names=NAMES)
    monkeypatch.setattr(LOGGER, "propagate", True)  # off once a command has run
    open_dataset(entry(documents=3), tmp_path)
    assert not caplog.records
    open_dataset(entry(documents=4), tmp_path)
    assert "has 3 images in split test, its recipe expects 4" in caplog.text
    write_wds(tmp_path / "toy", "train", ["0", "1", "2"], class_names=NAMES)
    split = entry(documents=3, train_split="train", train_documents=9)
    open_dataset(split, tmp_path, split="train")
    assert "has 3 images in split train, its recipe expects 9" in caplog.text


def test_folders_are_matched_by_name_number_or_order(tmp_path: Path) -> None:
    assert match_folders(["One", "two", "zero"], NAMES, "x") == {"One": 1, "two": 2, "zero": 0}
    assert match_folders(["0", "1", "2"], NAMES, "x") == {"0": 0, "1": 1, "2": 2}
    assert match_folders(["n01", "n02", "n03"], NAMES, "x") == {"n01": 0, "n02": 1, "n03": 2}
    # A folder that is complete but for one class must not move the others up.
    with pytest.raises(DataError, match="2 sub-folders for 3 classes, and n01"):
        match_folders(["n01", "n02"], NAMES, "x")
    with pytest.raises(DataError, match="3 sub-folders for 3 classes"):
        match_folders(["1", "2", "3"], NAMES, "x")
    write_folder(tmp_path / "toy", "test", ["nine", "two"])
    with pytest.raises(DataError, match="8 of 10 classes have no image: 'zero', 'one', 'three'"):
        open_dataset(entry(layout="folder", classnames="svhn"), tmp_path)


def test_order_that_the_names_contradict_is_not_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)  # off once a command has run
    # As in CalTech101: capitals come first in ASCII, and not in the list of names.
    names = ("ant", "centred face", "tick")
    matched = match_folders(["Faces_easy", "ant", "tick"], names, "x")
    assert matched == {"ant": 0, "Faces_easy": 1, "tick": 2}
    assert "matched with class names by their order, from ant as 'ant' to tick" in caplog.text
    with pytest.raises(DataError, match="Faces_easy is the name of none"):
        match_folders(["Faces_easy", "tick", "wasp"], names, "x")


def test_wordnet_ids_are_not_taken_for_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "toy", "test", ["n01443537", "n01484850"])
    with pytest.raises(DataError, match="WordNet ids such as n01443537"):
        open_dataset(entry(layout="folder", templates="cifar10"), tmp_path)
    (tmp_path / "toy" / "classnames.txt").write_text("n01443537\tgoldfish\nn01484850\tshark\n")
    data = open_dataset(entry(layout="folder", templates="cifar10"), tmp_path)
    assert data.class_names == ("goldfish", "shark")


def test_folder_takes_names_of_its_file_or_of_its_sub_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "toy", "test", ["big_dog", "cat"])
    data = open_dataset(entry(layout="folder", templates="cifar10"), tmp_path)
    assert data.class_names == ("big dog", "cat")
    assert labels_of(data) == [0, 0, 1, 1]
    (tmp_path / "toy" / "classnames.txt").write_text("cat\tfeline\nbig_dog\tmastiff\n")
    data = open_dataset(entry(layout="folder", templates="cifar10"), tmp_path)
    assert data.class_names == ("feline", "mastiff")
    assert labels_of(data) == [1, 1, 0, 0]


def test_folder_without_the_split_lists_what_there_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "toy", "val", ["a", "b"])
    with pytest.raises(DataError, match="no split test; its sub-folders are: val"):
        open_dataset(entry(layout="folder"), tmp_path)


def test_table_gives_labels_and_names_of_its_column(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=NAMES),
            "n": datasets.Value("int64"),
        }
    )
    rows = {"img": [picture(i) for i in range(3)], "fine": [2, 0, 1], "n": [5, 6, 7]}
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)})
    saved.save_to_disk(str(tmp_path / "toy"))
    data = open_dataset(entry(layout="table"), tmp_path)
    assert data.class_names == tuple(NAMES)
    assert labels_of(data) == [2, 0, 1]
    assert data.images.read(1).tobytes() == picture(1).tobytes()
    with pytest.raises(DataError, match="has no column label"):
        open_dataset(entry(layout="table", label_column="label"), tmp_path)


def test_table_gives_captions(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
    )
    rows = {"image": [picture(0), picture(1)], "caption": [["a", "b"], ["c"]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "toy"))
    data = open_dataset(entry(metric="recall@k", caption_column="caption"), tmp_path)
    assert data.captions == (("a", "b"), ("c",))


def test_karpathy_gives_the_captions_of_a_split(tmp_path: Path) -> None:
    write_karpathy(tmp_path / "toy", 3)
    data = open_dataset(entry(metric="recall@k", layout="karpathy"), tmp_path)
    assert data.captions == tuple(tuple(captions_of(i)) for i in range(3))
    assert data.images.read(2).tobytes() == picture(2).tobytes()
    few = open_dataset(entry(metric="recall@k", captions_per_image=2), tmp_path)
    assert [len(each) for each in few.captions or ()] == [2, 2, 2]
    with pytest.raises(DataError, match="no images of split val, only test, train"):
        open_dataset(entry(metric="recall@k", split="val"), tmp_path)


def test_caption_file_that_names_missing_images_is_refused(tmp_path: Path) -> None:
    write_karpathy(tmp_path / "toy", 5, missing=2)
    with pytest.raises(DataError, match=r"flickr30k.json names image 3.png.*\(2 of 5 images"):
        open_dataset(entry(metric="recall@k"), tmp_path)


def test_package_lists_are_known_by_name() -> None:
    assert len(package_class_names("imagenet1k")) == 1000
    assert package_class_names("clevr_closest_object_distance")[3] == ""
    with pytest.raises(DataError, match=r"no prompts called 'cifar'"):
        package_templates("cifar")


def test_limit_spreads_over_the_listing(tmp_path: Path) -> None:
    labels = [str(i) for i in range(10) for _ in range(10)]
    write_wds(tmp_path / "toy", "test", labels, class_names=[str(i) for i in range(10)])
    whole = open_dataset(entry(), tmp_path)
    part = whole.limited(10)
    assert sorted(set(labels_of(part))) == list(range(10))
    assert part.images.name(9) == whole.images.name(99)
    assert part.images.fingerprint() not in {
        whole.images.fingerprint(),
        whole.limited(11).images.fingerprint(),
    }
    assert whole.limited(100) is whole
