"""Sampling, stemming, image features, retrieval and trials of the few-shot evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot_data import write_all, write_image

from kuea_mllm.config.base import Recipe
from kuea_mllm.config.evaluate import EvalRecipe, FewShotSettings, Retrieval
from kuea_mllm.errors import DataError, EvaluationError, RecipeError
from kuea_mllm.evaluation.fewshot import scoring
from kuea_mllm.evaluation.fewshot.captions import tokenise
from kuea_mllm.evaluation.fewshot.examples import Example
from kuea_mllm.evaluation.fewshot.images import FeatureCache, StoredImage
from kuea_mllm.evaluation.fewshot.plan import read_plan
from kuea_mllm.evaluation.fewshot.prompts import build_prompt
from kuea_mllm.evaluation.fewshot.sampling import draw_released, draw_uniform
from kuea_mllm.evaluation.fewshot.stemming import Stemmer, stem_table
from kuea_mllm.evaluation.fewshot.task_files import FewShotTask, write_fewshot_tasks
from kuea_mllm.evaluation.fewshot.trials import summarise_trials
from kuea_mllm.evaluation.session import FAILED_ANSWER


def test_demonstrations_depend_on_seed_and_document_alone() -> None:
    full = draw_uniform(50, 3000, 4, 42)
    few = draw_uniform(50, 3000, 4, 42, num_samples=10)
    assert few.documents == sorted(set(few.documents))
    for document, shown in zip(few.documents, few.demonstrations, strict=True):
        assert shown == full.demonstrations[document]
    assert draw_uniform(40, 3000, 4, 42).demonstrations == full.demonstrations[:40]
    assert draw_uniform(50, 3000, 4, 43).demonstrations != full.demonstrations


def test_fewer_shots_are_the_first_of_more() -> None:
    four, sixteen = (draw_uniform(9, 100, shots, 0).demonstrations for shots in (4, 16))
    assert [shown[:4] for shown in sixteen] == four
    assert all(len(set(shown)) == 16 for shown in sixteen)


def test_demonstrations_come_from_the_query_set_evenly() -> None:
    draw = draw_uniform(4000, 40, 4, 0, query_set=8)
    counts = torch.tensor(draw.demonstrations).flatten().bincount(minlength=40)
    assert (counts > 0).sum() == 8
    # 16,000 draws over 8 examples: 2,000 each, standard deviation 32.
    assert (counts[counts > 0] - 2000).abs().max() < 160
    assert set(draw.query_set) == set(torch.nonzero(counts).flatten().tolist())


def test_released_draw_depends_on_the_number_of_documents() -> None:
    first, second = draw_released(50, 3000, 4, 42), draw_released(40, 3000, 4, 42)
    pairs = [dict(zip(d.documents, d.demonstrations, strict=True)) for d in (first, second)]
    assert any(pairs[0][document] != pairs[1][document] for document in range(40))


@pytest.mark.parametrize("sampler", [draw_uniform, draw_released])
def test_pool_smaller_than_the_shots_is_refused(sampler: Any) -> None:
    with pytest.raises(EvaluationError, match=r"5 demonstrations .* only 4 to draw from"):
        sampler(3, 4, 5, 0)


def test_image_tags_of_text_only_demonstrations_are_removed() -> None:
    shown = [Example("a", "a", captions=(" one dog. ",)), Example("b", "b", captions=("two",))]
    asked = Example("c", "c", captions=("three",))
    assert build_prompt("caption", shown, asked, with_images=False) == (
        "Output:one dog.<|endofchunk|>\nOutput:two<|endofchunk|>\n<image>Output:"
    )


def test_memes_stand_without_anything_between_them() -> None:
    shown = [Example("a", "a", question="x", label=1)]
    assert build_prompt("hateful", shown, shown[0], with_images=True) == (
        "<image>is an image with: 'x' written on it. Is it hateful? Answer:yes<|endofchunk|>"
        "<image>is an image with: 'x' written on it. Is it hateful? Answer:"
    )


class English:
    def tag(self, text: str) -> list[tuple[str, str]]:
        return [(word, "NNS" if word.endswith("s") else "NN") for word in text.split()]

    def lemma(self, word: str, part: str) -> str:
        return {("surfing", "v"): "surf", ("dogs", "n"): "dog"}[word, part]


def test_known_stems_win_over_rules() -> None:
    pairs = [("riding horses", "ride horse"), ("tennis", "tennis"), ("riding", "ride")]
    table = stem_table([*pairs, ("riding", "rid"), ("a b", "ab")])
    assert table == {"riding": "ride", "horses": "horse", "tennis": "tennis"}
    stemmer = Stemmer(table, English())
    assert stemmer.stem("riding tennis  surfing dogs cat") == "ride tennis surf dog cat"


class Encoder:
    """Makes one number of each image and remembers how many it saw at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode_images(self, images: Sequence[Any]) -> list[Any]:
        self.batches.append(len(images))
        return [torch.tensor(image.size) for image in images]


def stored(folder: Path, count: int) -> list[StoredImage]:
    for number in range(count):
        write_image(folder / f"{number}.png", number)
    return [StoredImage(str(folder / f"{number}.png")) for number in range(count)]


def test_images_are_encoded_once_while_they_are_remembered(tmp_path: Path) -> None:
    images, encoder = stored(tmp_path, 4), Encoder()
    cache = FeatureCache(encoder, 3)  # type: ignore[arg-type]
    rows = cache.features([[images[0], images[1]], [images[1], images[2]], []])
    assert [[int(f[0]) for f in row] for row in rows] == [[20, 21], [21, 22], []]
    assert encoder.batches == [3]
    cache.features([[images[0]], [images[3]]])
    assert (cache.encoded, cache.reused) == (4, 2)
    # Image 1 was the least recently used of four and is forgotten.
    cache.features([[images[0], images[2], images[3]]])
    assert cache.encoded == 4
    cache.features([[images[1]]])
    assert cache.encoded == 5


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png cannot be decoded"):
        StoredImage(str(tmp_path / "x.png")).open()


def test_questions_without_an_answer_score_nothing() -> None:
    document = {"image_id": "1", "answers": ["a"] * 10, "entries": [0] * 10, "captions": ["a"]}
    assert scoring.process_vqa(document, [FAILED_ANSWER])["vqa_accuracy"]["score"] == 0.0
    assert scoring.process_caption(document, [FAILED_ANSWER])["cider"]["prediction"] == ""
    meme = scoring.process_hateful({"image_id": "1", "label": 1}, [FAILED_ANSWER])
    assert meme["roc_auc"]["probability"] == 0.5


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_every_caption_keeps_its_share_of_the_score() -> None:
    items = [
        {"prediction": "a dog runs here", "references": ["a dog runs here", "a dog"]},
        {"prediction": "nothing", "references": ["two cats sleep there"]},
    ]
    score = scoring.cider(items)
    assert score == pytest.approx(50 * sum(float(item["score"]) for item in items))
    assert float(items[0]["score"]) > float(items[1]["score"]) == 0.0


def test_captions_with_line_breaks_of_any_kind_stay_apart() -> None:
    if shutil.which("java") is None:
        pytest.skip("there is no Java")
    captions = ["a\u2028b", "", "c\x0cd\re", "caf\u00e9"]
    assert tokenise(captions) == ["a b", "", "c d e", "caf\u00e9"]


def test_memes_of_one_class_have_no_score() -> None:
    with pytest.raises(EvaluationError, match="both classes; all 2 have label 1"):
        scoring.roc_auc([0.1, 0.2], [1, 1])


def test_trials_are_summarised_per_data_set_and_shots() -> None:
    tasks = [FewShotTask(f"coco{s}", "coco", 4, s, Path()) for s in (1, 2, 3)]
    tasks.append(FewShotTask("coco0", "coco", 0, 1, Path()))
    columns = {f"coco{s}": {"metric": "cider", "score": 80.0 + s} for s in range(4)}
    summary = summarise_trials(tasks, columns)["coco"]
    assert summary["4"]["mean"] == pytest.approx(82.0)
    assert summary["4"]["std"] == pytest.approx(1.0)
    assert summary["4"]["seeds"] == [1, 2, 3]
    assert summary["0"]["std"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "neither `tasks` nor `fewshot`"),
        ({"tasks": ["pope"], "data": {"coco": "x"}}, "there is no `fewshot`"),
        ({"fewshot": {"shots": [4, 4]}}, "shots holds an entry twice"),
        ({"fewshot": {"trials": 2, "retrieval": {"tower": "x"}}}, "set trials to 1"),
        ({"fewshot": {"datasets": ["cocoo"]}}, "fewshot.datasets"),
        ({"fewshot": {"compat": "paper"}}, "fewshot.compat"),
    ],
)
def test_impossible_recipes_are_refused(content: dict[str, Any], message: str) -> None:
    recipe: type[Recipe] = EvalRecipe
    with pytest.raises(RecipeError, match=message):
        recipe.parse({"kind": "eval", **content}, origin="test")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("tower")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_most_similar_images_come_last(tower: Path, tmp_path: Path) -> None:
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    paths = [image.path for image in stored(tmp_path / "images", 5)]
    settings = Retrieval(tower=str(tower), cache=str(tmp_path / "cache"), batch_size=2)
    retriever = Retriever(settings, device="cpu")
    found = retriever.most_similar(paths, paths[:2], 3)
    assert [row[-1] for row in found] == [0, 1]
    embedded = retriever.embed(paths)
    scores = embedded @ embedded.T
    for query, row in enumerate(found):
        expected = scores[query].argsort(descending=True)[:3].flip(0).tolist()
        assert row == expected
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    # Another run takes the embeddings from the cache.
    again = Retriever(settings, device="cpu")
    again.encoder = None
    assert again.most_similar(paths, paths[:2], 3) == found
    with pytest.raises(EvaluationError, match="6 demonstrations"):
        again.most_similar(paths, paths[:2], 6)


def test_changed_image_is_embedded_anew(tower: Path, tmp_path: Path) -> None:
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    paths = [image.path for image in stored(tmp_path / "images", 2)]
    retriever = Retriever(Retrieval(tower=str(tower)), device="cpu")
    before = retriever.embed(paths)
    write_image(Path(paths[0]), 5)
    after = retriever.embed(paths)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_retrieved_demonstrations_end_with_the_most_similar(tower: Path, tmp_path: Path) -> None:
    data = write_all(tmp_path / "data")
    settings = FewShotSettings(
        datasets=["vqav2"], shots=[0, 3], retrieval=Retrieval(tower=str(tower))
    )
    (tmp_path / "tasks").mkdir()
    for task in write_fewshot_tasks(tmp_path / "tasks", settings, data):
        shown = read_plan(task.path.with_suffix(".json")).demonstrations
        # Question i is about the same picture as training example i.
        assert [row[-1] for row in shown] == [0, 1, 2, 3]
        assert {len(row) for row in shown} == {task.shots or 2}
