"""Sampling, stemming, image features, retrieval and trials of the few-shot evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot_data import write_all, write_image
from tokenizers.pre_tokenizers import ByteLevel

from kuea_mllm.config.base import Recipe
from kuea_mllm.config.evaluate import EvalRecipe, FewShotSettings, Retrieval
from kuea_mllm.errors import DataError, EvaluationError, RecipeError
from kuea_mllm.evaluation.answering.questions import GenerationSettings
from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.fewshot import scoring
from kuea_mllm.evaluation.fewshot.captions import tokenise
from kuea_mllm.evaluation.fewshot.completion import Completer
from kuea_mllm.evaluation.fewshot.examples import Example
from kuea_mllm.evaluation.fewshot.images import FeatureCache, StoredImage
from kuea_mllm.evaluation.fewshot.plan import read_plan
from kuea_mllm.evaluation.fewshot.prompts import build_prompt, holds_special, plain
from kuea_mllm.evaluation.fewshot.room import require_room
from kuea_mllm.evaluation.fewshot.sampling import draw_released, draw_uniform
from kuea_mllm.evaluation.fewshot.stemming import Stemmer, stem_table
from kuea_mllm.evaluation.fewshot.task_files import FewShotTask, write_fewshot_tasks
from kuea_mllm.evaluation.fewshot.trials import summarise_trials


def test_demonstrations_depend_on_seed_and_document_alone() -> None:
    full = draw_uniform(50, 3000, 4, 42)
    few = draw_uniform(50, 3000, 4, 42, num_samples=10)
    assert few.documents.tolist() == sorted(set(few.documents.tolist()))
    for document, shown in zip(few.documents, few.demonstrations, strict=True):
        assert (shown == full.demonstrations[document]).all()
    for first in (draw_uniform(40, 3000, 4, 42), draw_uniform(50, 3000, 4, 42, limit=40)):
        assert (first.demonstrations == full.demonstrations[:40]).all()
    assert (draw_uniform(50, 3000, 4, 43).demonstrations != full.demonstrations).any()
    assert full.demonstrations.dtype == "int32"


def test_fewer_shots_are_the_first_of_more() -> None:
    four, sixteen = (draw_uniform(9, 100, shots, 0).demonstrations for shots in (4, 16))
    assert (sixteen[:, :4] == four).all()
    assert all(len(set(shown)) == 16 for shown in sixteen.tolist())


def test_demonstrations_come_from_the_query_set_evenly() -> None:
    draw = draw_uniform(4000, 40, 4, 0, query_set=8)
    counts = torch.tensor(draw.demonstrations).flatten().bincount(minlength=40)
    assert (counts > 0).sum() == 8
    # 16,000 draws over 8 examples: 2,000 each, standard deviation 32.
    assert (counts[counts > 0] - 2000).abs().max() < 160
    assert set(draw.query_set.tolist()) == set(torch.nonzero(counts).flatten().tolist())


def test_released_draw_depends_on_the_number_of_documents() -> None:
    first, second = draw_released(50, 3000, 4, 42), draw_released(40, 3000, 4, 42)
    pairs = [
        dict(zip(d.documents.tolist(), d.demonstrations.tolist(), strict=True))
        for d in (first, second)
    ]
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


HOSTILE = "a <image> <<|endofchunk|> <PAD><|endoftext|><|padding|> <Image> < image>"
HARMLESS = "a < image> << |endofchunk|> < PAD>< |endoftext|>< |padding|> <Image> < image>"


@pytest.mark.parametrize("style", ["caption", "vqa", "hateful"])
@pytest.mark.parametrize("with_images", [True, False])
def test_special_tokens_in_texts_become_words(style: Any, with_images: bool) -> None:
    hostile = Example("a", "a", question=HOSTILE, answers=(HOSTILE,), captions=(HOSTILE,), label=1)
    prompt = build_prompt(style, [hostile, hostile], hostile, with_images=with_images)
    assert HARMLESS in prompt
    assert prompt.count("<image>") == (3 if with_images else 1)
    assert prompt.count("<|endofchunk|>") == 2
    assert holds_special(style, hostile, is_solved=True)
    assert holds_special(style, hostile, is_solved=False)
    answered = Example("a", "a", question=HARMLESS, answers=(HOSTILE,), captions=(HOSTILE,))
    assert not holds_special(style, answered, is_solved=False)
    # Memes are answered by their class.
    assert holds_special(style, answered, is_solved=True) == (style != "hateful")


def test_tokenizer_sees_words_in_place_of_special_tokens() -> None:
    from transformers import GPTNeoXTokenizer

    letters = ["<|endoftext|>", "<|padding|>", *sorted(ByteLevel.alphabet())]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = GPTNeoXTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<image>", "<|endofchunk|>"], "pad_token": "<PAD>"}
    )
    special = set(tokenizer.all_special_ids)
    assert special & set(tokenizer(HOSTILE)["input_ids"]) == special
    assert not special & set(tokenizer(plain(HOSTILE))["input_ids"])


class Counting:
    """A token for each letter."""

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def prompt_room(self, max_new_tokens: int) -> int:
        return 1000 - max_new_tokens

    def _not_asked(self, *_: Any, **__: Any) -> Any:
        raise AssertionError

    encode_images = complete = rank = _not_asked


def test_room_of_a_ranking_is_that_of_its_names() -> None:
    completer = Completer(Counting())
    names = ("no", "yes")
    assert completer.room(GenerationSettings(max_new_tokens=20)) == 980
    ranked = GenerationSettings(max_new_tokens=20, class_names=names)
    assert completer.room(ranked) == 997
    # All names after one another, and one more step.
    assert completer.room(replace(ranked, released=True)) == 994


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", ["vqav2", "hatefulmemes"])
def test_room_is_asked_for_before_the_first_question(name: Any, shots: int, tmp_path: Path) -> None:
    data = write_all(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    settings = FewShotSettings(datasets=[name], shots=[shots])
    task = write_fewshot_tasks(tmp_path / "tasks", settings, data)[0]
    kwargs = {"plan": str(task.path.with_suffix(".json"))}
    lengths = [len(scoring.doc_to_text({"number": n}, kwargs)) for n in range(4)]
    completer = Completer(Counting())
    vars(completer)["room"] = lambda _: max(lengths)
    require_room(completer, [task])
    vars(completer)["room"] = lambda _: max(lengths) - 1
    first = lengths.index(max(lengths))
    message = f"{task.name}, document {first}: the prompt has {max(lengths)} tokens, more than the"
    with pytest.raises(EvaluationError, match=message) as caught:
        require_room(completer, [task])
    assert caught.value.remedy == "Use fewer demonstrations (--shots)."


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
    assert meme["roc_auc"]["score"] == 0.5


needs_java = pytest.mark.skipif(
    shutil.which("java") is None,
    reason="CIDEr splits captions with Java, and there is no `java` on the PATH",
)


@needs_java
def test_every_caption_keeps_its_share_of_the_score() -> None:
    items = [
        {"prediction": "a dog runs here", "references": ["a dog runs here", "a dog"]},
        {"prediction": "nothing", "references": ["two cats sleep there"]},
    ]
    score = scoring.cider(items)
    assert score == pytest.approx(50 * sum(float(item["score"]) for item in items))
    assert float(items[0]["score"]) > float(items[1]["score"]) == 0.0


@needs_java
def test_captions_with_line_breaks_of_any_kind_stay_apart() -> None:
    captions = ["a\u2028b", "", "c\x0cd\re", "caf\u00e9"]
    assert tokenise(captions) == ["a b", "", "c d e", "caf\u00e9"]


def test_memes_of_one_class_have_no_score() -> None:
    with pytest.raises(EvaluationError, match="both classes; all 2 have label 1"):
        scoring.roc_auc([0.1, 0.2], [1, 1])


def test_trials_are_summarised_per_data_set_and_shots() -> None:
    tasks = [FewShotTask(f"coco{s}", "coco", Path(), "", 4, s, {}) for s in (1, 2, 3)]
    tasks.append(FewShotTask("coco0", "coco", Path(), "", 0, 1, {}))
    columns = {f"coco{s}": {"metric": "cider", "score": 80.0 + s} for s in range(4)}
    summary = summarise_trials(tasks, columns)["coco"]
    assert summary["4"]["mean"] == pytest.approx(82.0)
    assert summary["4"]["std"] == pytest.approx(1.0)
    assert summary["4"]["seeds"] == [1, 2, 3]
    assert summary["0"]["std"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "neither `suite` nor `tasks` nor `fewshot`"),
        ({"tasks": ["pope"], "data": {"coco": "x"}}, "belongs to suites and few-shot"),
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
        assert row.tolist() == expected
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    # Another run takes the embeddings from the cache.
    again = Retriever(settings, device="cpu")
    again.encoder = None
    assert (again.most_similar(paths, paths[:2], 3) == found).all()
    with pytest.raises(EvaluationError, match="6 demonstrations"):
        again.most_similar(paths, paths[:2], 6)


def test_half_an_image_is_not_embedded(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image, ImageFile

    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    # As lmms-eval leaves it when it is imported.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    settings = Retrieval(tower=str(tower), cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"half\.png cannot be decoded"):
        Retriever(settings, device="cpu").embed([str(path)])


def test_changed_image_is_embedded_anew(tower: Path, tmp_path: Path) -> None:
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    paths = [image.path for image in stored(tmp_path / "images", 2)]
    settings = Retrieval(tower=str(tower), cache=str(tmp_path / "cache"))
    retriever = Retriever(settings, device="cpu")
    before = retriever.embed(paths)
    write_image(Path(paths[0]), 5)
    after = retriever.embed(paths)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_equal_scores_stand_in_the_order_of_their_columns() -> None:
    from kuea_mllm.evaluation.fewshot.retrieval import top_columns

    generator = torch.Generator().manual_seed(0)
    # Few different numbers, so that ties are everywhere, at the end of the best too.
    scores = torch.randint(0, 4, (50, 30), generator=generator).float()
    for count in (1, 5, 30):
        values, columns = top_columns(scores, count)
        expected = (-scores).argsort(dim=1, stable=True)[:, :count]
        assert torch.equal(columns, expected)
        assert torch.equal(values, scores.gather(1, expected))


def test_examples_of_one_image_are_all_found(tower: Path, tmp_path: Path) -> None:
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    a, b, c, d = (image.path for image in stored(tmp_path / "images", 4))
    settings = Retrieval(tower=str(tower), cache=str(tmp_path / "cache"))
    retriever = Retriever(settings, device="cpu")
    pool = [c, a, b, a, d, a, b]
    found = retriever.most_similar(pool, [a, b, a], 4)
    embedded = torch.stack([retriever.embed([path])[0] for path in pool])
    for query, row in zip((a, b, a), found.tolist(), strict=True):
        scores = embedded @ retriever.embed([query])[0]
        # Rounded, because a product of other shapes may round otherwise.
        expected = (-scores.round(decimals=5)).argsort(stable=True)[:4].flip(0)
        assert row == expected.tolist()
    assert found[0].tolist() == found[2].tolist()


def test_embeddings_are_kept_in_the_common_cache(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    monkeypatch.setenv("KUEA_MLLM_CACHE", str(tmp_path / "common"))
    paths = [image.path for image in stored(tmp_path / "images", 2)]
    retriever = Retriever(Retrieval(tower=str(tower)), device="cpu")
    embedded = retriever.embed(paths)
    (file,) = (tmp_path / "common" / "retrieval").iterdir()
    retriever.encoder = None
    assert torch.equal(retriever.embed(paths), embedded)
    file.write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match=f"{file.name} of kept embeddings cannot be read"):
        retriever.embed(paths)


def test_retrieval_looks_at_no_more_than_it_needs(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kuea_mllm.evaluation.fewshot.retrieval import Retriever

    asked: list[tuple[int, int, int, str]] = []

    def spy(self: Retriever, pool: Any, questions: Any, count: int) -> Any:
        asked.append((len(pool), len(questions), count, self.device))
        return real(self, pool, questions, count)

    real = Retriever.most_similar
    monkeypatch.setattr(Retriever, "most_similar", spy)
    settings = FewShotSettings(
        datasets=["vqav2"],
        shots=[0, 1, 3],
        retrieval=Retrieval(tower=str(tower), cache=str(tmp_path / "cache")),
    )
    (tmp_path / "tasks").mkdir()
    data = write_all(tmp_path / "data")
    tasks = write_fewshot_tasks(tmp_path / "tasks", settings, data, limit=3, device="cpu")
    assert asked == [(6, 3, 3, "cpu")]
    plans = [read_plan(task.path.with_suffix(".json")).demonstrations for task in tasks]
    assert [plan.shape for plan in plans] == [(3, 2), (3, 1), (3, 3)]
    assert (plans[0] == plans[2][:, 1:]).all()


def test_retrieved_demonstrations_end_with_the_most_similar(tower: Path, tmp_path: Path) -> None:
    data = write_all(tmp_path / "data")
    settings = FewShotSettings(
        datasets=["vqav2"],
        shots=[0, 3],
        retrieval=Retrieval(tower=str(tower), cache=str(tmp_path / "cache")),
    )
    (tmp_path / "tasks").mkdir()
    for task in write_fewshot_tasks(tmp_path / "tasks", settings, data):
        shown = read_plan(task.path.with_suffix(".json")).demonstrations.tolist()
        # Question i is about the same picture as training example i.
        assert [row[-1] for row in shown] == [0, 1, 2, 3]
        assert {len(row) for row in shown} == {task.shots or 2}
