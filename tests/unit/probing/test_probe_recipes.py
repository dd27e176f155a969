"""Every data set of the paper has a recipe, and a local copy of its schema runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coco_samples import write_colours
from fake_partner import fake_partner
from probe_data import picture, write_clip, write_like

from kuea_mllm.config.probe import SUITES, ProbeData, ProbeRecipe
from kuea_mllm.config.recipes import list_shipped, load_recipe
from kuea_mllm.data.transforms import ImageTransform
from kuea_mllm.errors import RecipeError
from kuea_mllm.log import LOGGER
from kuea_mllm.probing.datasets.classes import package_class_names, package_templates
from kuea_mllm.probing.datasets.open import open_dataset
from kuea_mllm.probing.embedder import ImageEmbedder, PixelRule
from kuea_mllm.probing.features import Extraction, extract
from kuea_mllm.probing.retrieval import probe_retrieval
from kuea_mllm.probing.zero_shot import probe_zero_shot
from kuea_mllm.workflows.probe_subject import open_subject
from kuea_mllm.workflows.probe_suites import ProbePlace, plan_jobs, run_job

MODELS = ("ViT-B-16", "ViT-L-14", "ViT-L-14-336")
CLASSES = {
    "ImageNet": 1000,
    "CIFAR10": 10,
    "CIFAR100": 100,
    "CalTech": 102,
    "FER": 7,
    "OxfordPets": 37,
    "DTD": 47,
    "RESISC": 45,
    "EuroSAT": 10,
    "PCAM": 2,
    "ImageNet-S": 1000,
    "ImageNet-O": 200,
    "svhn": 10,
    "gtsrb": 43,
    "clevr distance": 6,
    "clevr counts": 8,
}
TEMPLATES = {
    "ImageNet": 80,
    "CIFAR10": 18,
    "CIFAR100": 18,
    "CalTech": 34,
    "FER": 6,
    "OxfordPets": 1,
    "DTD": 8,
    "RESISC": 4,
    "EuroSAT": 3,
    "PCAM": 2,
    "ImageNet-S": 80,
    "ImageNet-O": 80,
    "svhn": 6,
    "gtsrb": 3,
    "clevr distance": 1,
    "clevr counts": 1,
}


class Mean(torch.nn.Module):
    """Embeds an image as sixteen of its pixels."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :16] - 0.5


EMBEDDER = ImageEmbedder(Mean(), "mean", 16, PixelRule(ImageTransform(8)), "a test")


def recipe(suite: str) -> ProbeRecipe:
    return load_recipe(f"probe/{suite}", ProbeRecipe)


def expected(data: ProbeData, table: int) -> dict[str, dict[str, float]]:
    return {each.column: each.scores for each in data.expected if each.table == table}


def features(data: Any, tmp_path: Path) -> Any:
    return extract(data.images, EMBEDDER, Extraction(workers=0, cache=tmp_path)).embeddings


def test_there_is_a_recipe_for_every_suite() -> None:
    assert {recipe.name for recipe in list_shipped("probe")} == {
        f"probe/{suite.replace('-', '_')}" for suite in SUITES
    }
    assert all(recipe(suite).suite == suite for suite in SUITES)


@pytest.mark.parametrize("name", CLASSES)
def test_zero_shot_data_set_runs_on_a_copy_of_its_schema(name: str, tmp_path: Path) -> None:
    data = next(each for each in recipe("zero-shot").datasets if each.name == name)
    assert data.classnames is None or len(package_class_names(data.classnames)) == CLASSES[name]
    assert data.templates is not None
    assert len(package_templates(data.templates)) == TEMPLATES[name]
    write_like(data, tmp_path, classes=CLASSES[name])
    opened = open_dataset(data, tmp_path)
    assert (len(opened), len(opened.templates)) == (CLASSES[name], TEMPLATES[name])
    vectors = features(opened, tmp_path)
    # All prompts of ImageNet would take a second or more, even drawn.
    few = {"ImageNet": 2, "ImageNet-S": 2, "ImageNet-O": 2}.get(name, TEMPLATES[name])
    short = type(opened)(**(_fields(opened) | {"templates": opened.templates[:few]}))
    column = probe_zero_shot(vectors, short, fake_partner()[0], cache=tmp_path)
    assert len(column.rows) == CLASSES[name]
    assert 0 <= column.score <= 100


def _fields(data: Any) -> dict[str, Any]:
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


@pytest.mark.parametrize("name", ["Flickr30K", "MSCOCO"])
def test_retrieval_data_set_runs_on_a_copy_of_its_schema(name: str, tmp_path: Path) -> None:
    data = next(each for each in recipe("retrieval").datasets if each.name == name)
    write_like(data, tmp_path, classes=12)
    opened = open_dataset(data, tmp_path)
    rows = features(opened, tmp_path)
    columns = probe_retrieval(rows, opened, fake_partner()[0], cache=tmp_path)
    assert {column.name for column in columns} == expected(data, 2).keys()
    assert [len(column.rows) for column in columns] == [12] * 3 + [60] * 3


@pytest.mark.parametrize("name", ["svhn", "gtsrb", "clevr distance", "clevr counts"])
def test_linear_data_set_has_both_splits_in_a_copy_of_its_schema(name: str, tmp_path: Path) -> None:
    data = next(each for each in recipe("linear").datasets if each.name == name)
    write_like(data, tmp_path, classes=CLASSES[name])
    train, test = (open_dataset(data, tmp_path, split=s) for s in (data.train_split, data.split))
    assert len(train) == len(test) == CLASSES[name]
    assert expected(data, 3).keys() == {f"{name} linear"}


def test_patch_data_set_runs_on_a_copy_of_its_schema(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, count in (("train", 4), ("val", 3)):
        write_colours(tmp_path / "data" / "coco", split, count)
    write_clip(tmp_path / "clip")
    monkeypatch.setattr(LOGGER, "propagate", True)  # off once a command has run
    changes = ["patch.epochs=1", "patch.batch_size=2"]
    short = load_recipe("probe/patch", ProbeRecipe, overrides=changes)
    [job] = plan_jobs([short])
    place = ProbePlace(tmp_path / "data", workers=0, cache=tmp_path)
    found = run_job(job, open_subject(str(tmp_path / "clip")), place)
    assert [column.name for column in found.columns] == list(expected(job.data, 4))
    assert [len(column.rows) for column in found.columns] == [3, 3]
    # Half a COCO would be scored like a whole one.
    assert "4 images in split train2017, its recipe expects 118287" in caplog.text
    assert "3 images in split val2017, its recipe expects 5000" in caplog.text


def test_mmvp_vlm_runs_on_a_copy_of_its_schema(tmp_path: Path) -> None:
    [job] = plan_jobs([recipe("mmvp-vlm")])
    folder = tmp_path / "data" / job.data.key
    patterns = [column for column in expected(job.data, 10) if column != job.data.name]
    lines = ["id,pattern,statement"]
    for number in range(1, 2 * len(patterns) + 1):
        pattern = patterns[(number - 1) // 2]
        (folder / pattern).mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / pattern / f"{number}.jpg")
        lines.append(f"{number},{pattern},thing {number}")
    (folder / "Questions.csv").write_text("\n".join(lines))
    write_clip(tmp_path / "clip")
    place = ProbePlace(tmp_path / "data", workers=0, cache=tmp_path)
    [column] = run_job(job, open_subject(str(tmp_path / "clip")), place).columns
    assert column.name == job.data.name
    assert list(column.details["patterns"]) == patterns


def test_expected_scores_have_the_averages_that_the_paper_prints() -> None:
    zero_shot = recipe("zero-shot")
    by_name = {data.name: data for data in zero_shot.datasets}
    covered = zero_shot.averages["Average Zero-shot"]
    assert len(covered) == 11
    for models, table, averages in (
        (MODELS, 1, (61.22, 65.26, 66.10)),
        (("SigLIP", "DFN", "MetaCLIP"), 8, (70.26, 71.40, 67.86)),
    ):
        for model, average in zip(models, averages, strict=True):
            values = [expected(by_name[name], table)[name][model] for name in covered]
            assert sum(values) / 11 == pytest.approx(average, abs=0.00501)


def test_expected_pattern_scores_of_mmvp_vlm_average_to_the_printed_ones() -> None:
    scores = expected(recipe("mmvp-vlm").datasets[0], 10)
    average = scores.pop("MMVP-VLM")
    assert len(scores) == 9
    for model in MODELS:
        mean = sum(values[model] for values in scores.values()) / 9
        assert mean == pytest.approx(average[model], abs=0.01)


def test_patch_recipe_expects_local_and_global_of_every_tower() -> None:
    scores = expected(recipe("patch").datasets[0], 4)
    assert {column: tuple(values) for column, values in scores.items()} == {
        "local": MODELS,
        "global": MODELS,
    }


def test_faults_apply_with_compat_released_only() -> None:
    correct = recipe("retrieval")
    released = load_recipe("probe/retrieval", ProbeRecipe, overrides=["compat=released"])
    data = correct.datasets[0]
    assert correct.faults_of(data) == []
    assert released.faults_of(data) == ["raw_pixels", "cut_captions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"averages": {"all": ["CIFAR"]}}, "average 'all' covers 'CIFAR', which is no data set"),
        ({"suite": "linear"}, "suite linear needs section 'linear'"),
        ({"suite": "linear", "linear": {}}, "needs a train_split"),
        ({"patch": {}}, "suite zero-shot takes no section 'patch'"),
        ({"datasets": []}, "datasets"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, Any], message: str) -> None:
    content = recipe("zero-shot").model_dump() | change
    with pytest.raises(RecipeError, match=message):
        ProbeRecipe.parse(content, origin="a test")
