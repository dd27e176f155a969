"""Sampling, post-processing, metrics, ranking and completion against the published evaluation."""

from __future__ import annotations

import io
import json
import shutil
from typing import Any

import pytest
import torch
from openflamingo_golden import (
    TOLERANCE,
    build_processor,
    golden_model,
    openflamingo_dir,
    tensors,
    worst,
)
from PIL import Image

from kuea_mllm.adapters.fewshot_text import cut_answer, cut_caption
from kuea_mllm.adapters.openflamingo.released_beam import released_beam_search
from kuea_mllm.adapters.openflamingo.runtime import OpenFlamingoRuntime
from kuea_mllm.errors import UserError
from kuea_mllm.evaluation.fewshot.captions import corpus_cider, score_captions, tokenise
from kuea_mllm.evaluation.fewshot.sampling import draw_released
from kuea_mllm.evaluation.fewshot.scoring import label_probability, roc_auc
from kuea_mllm.evaluation.fewshot.vqa_accuracy import (
    normalise_answer,
    strip_punctuation,
    vqa_accuracy,
)

PROTOCOL: dict[str, Any] = json.loads((openflamingo_dir() / "protocol.json").read_text())
SAMPLING = PROTOCOL["sampling"]
CIDER = PROTOCOL["cider"]

PIPELINE: dict[str, Any] = json.loads((openflamingo_dir() / "pipeline.json").read_text())
STORED = tensors("pipeline.safetensors")
RANKED = [name for name, run in PIPELINE["runs"].items() if "class_names" in run]
DECODED = [name for name, run in PIPELINE["runs"].items() if "decoded" in run]

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")


def picture(number: int) -> Image.Image:
    return Image.open(io.BytesIO(STORED[f"image{number}.png_bytes"].numpy().tobytes()))


@pytest.mark.parametrize(
    "run", SAMPLING["runs"], ids=lambda run: f"seed{run['seed']}-{run['num_shots']}shots"
)
def test_released_draw_is_the_original_one(run: dict[str, Any]) -> None:
    draw = draw_released(
        SAMPLING["n_test"],
        SAMPLING["n_train"],
        run["effective_shots"],
        run["seed"],
        query_set=SAMPLING["query_set_size"],
    )
    assert draw.query_set[:10].tolist() == run["query_set_first10"]
    assert draw.query_set.sum() == run["query_set_sum"]
    assert draw.documents.tolist() == run["test_order"]
    assert draw.demonstrations.tolist() == run["demo_train_indices"]


@pytest.mark.parametrize("case", PROTOCOL["caption_postprocess"], ids=lambda case: case["raw"])
def test_captions_are_cut_as_published(case: dict[str, str]) -> None:
    assert cut_caption(case["raw"]) == case["post"]


@pytest.mark.parametrize("case", PROTOCOL["vqa_postprocess"], ids=lambda case: case["raw"])
def test_answers_are_cut_as_published(case: dict[str, str]) -> None:
    assert cut_answer(case["raw"]) == case["post"]


@pytest.mark.parametrize("case", PROTOCOL["vqa_answer_normalisation"], ids=lambda case: case["raw"])
def test_answers_are_normalised_as_published(case: dict[str, str]) -> None:
    assert strip_punctuation(case["raw"]) == case["punctuation"]
    assert normalise_answer(case["raw"]) == case["normalised"]


@pytest.mark.parametrize("case", PROTOCOL["vqa_accuracy"], ids=lambda c: str(c["overall"]))
def test_accuracy_with_and_without_ids_is_the_published_one(case: dict[str, Any]) -> None:
    inputs = PROTOCOL["vqa_accuracy_inputs"]
    scores = []
    for annotated, prediction in zip(inputs["answers"], inputs["predictions"], strict=True):
        answers = [answer for answer, _ in annotated]
        entries = [annotated.index(entry) for entry in annotated]
        released = entries if not case["answers_have_answer_id"] else None
        scores.append(100 * vqa_accuracy(prediction, answers, released))
    assert [round(score, 2) for score in scores] == case["per_question"]
    assert round(sum(scores) / len(scores), 2) == case["overall"]


def test_memes_are_scored_as_published() -> None:
    case = PROTOCOL["hateful_memes_auc"]
    names = case["class_names"]
    probabilities = [
        label_probability(dict(zip(names, values, strict=True)), "yes")
        for values in case["logprobs"]
    ]
    assert probabilities == pytest.approx(case["pred_score"], abs=1e-6)
    labels = ["yes" if p > 0.5 else "no" for p in probabilities]
    assert labels == case["pred_label"]
    truth = [int(label == "yes") for label in case["gt"]]
    assert roc_auc(probabilities, truth) == pytest.approx(case["roc_auc"], abs=1e-9)


def test_cider_of_tokenised_captions_is_the_published_one() -> None:
    score, each = corpus_cider(CIDER["tokenised_predictions"], CIDER["tokenised_references"])
    assert score == pytest.approx(CIDER["cider"], abs=1e-9)
    assert each == pytest.approx(CIDER["cider_per_image"], abs=1e-9)


@needs_java
def test_captions_are_tokenised_and_scored_as_published() -> None:
    assert [tokenise(known) for known in CIDER["references"]] == CIDER["tokenised_references"]
    assert tokenise(CIDER["predictions"]) == CIDER["tokenised_predictions"]
    score, each = score_captions(CIDER["predictions"], CIDER["references"])
    assert 100 * score == pytest.approx(CIDER["cider_x100"], abs=1e-6)
    assert each == pytest.approx(CIDER["cider_per_image"], abs=1e-6)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("is_encoded", [False, True], ids=["images", "features"])
def test_memes_are_ranked_as_the_original(name: str, is_encoded: bool) -> None:
    run = PIPELINE["runs"][name]
    runtime = OpenFlamingoRuntime(golden_model(), build_processor())
    images: Any = [[picture(number) for number in row] for row in run["image_indices"]]
    if is_encoded:
        images = [runtime.encode_images(row) for row in images]
    names = run["class_names"]
    # More images than the text has places for: only the published way takes them.
    has_places = all(
        text.count("<image>") == len(row) for text, row in zip(run["text"], images, strict=True)
    )
    ways = {"kvcache": True, "recompute": False} if has_places else {"kvcache": True}
    for way, released in ways.items():
        found = torch.tensor(runtime.rank(run["text"], images, names, released=released))
        assert worst(found, STORED[f"{name}.logprobs_{way}_mean"]) <= TOLERANCE, way
    if not has_places:
        with pytest.raises(UserError, match="holds 1 <image> tokens and comes with"):
            runtime.rank(run["text"], images, names)


def test_order_of_names_is_nothing_to_the_correct_ranking() -> None:
    run = PIPELINE["runs"]["rank_multi_token"]
    runtime = OpenFlamingoRuntime(golden_model(), build_processor())
    images = [[picture(number) for number in row] for row in run["image_indices"]]
    names = run["class_names"]
    ranked = {
        released: torch.tensor(
            [
                runtime.rank(run["text"], images, names, released=released),
                [
                    row[::-1]
                    for row in runtime.rank(run["text"], images, names[::-1], released=released)
                ],
            ]
        )
        for released in (False, True)
    }
    assert worst(ranked[False][0], ranked[False][1]) <= 1e-5
    assert worst(ranked[True][0], ranked[True][1]) > 1e-3


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("released", [False, True], ids=["default", "released"])
def test_completions_from_features_equal_the_original(name: str, released: bool) -> None:
    run = PIPELINE["runs"][name]
    runtime = OpenFlamingoRuntime(golden_model(), build_processor())
    found = runtime.complete(
        run["text"],
        [runtime.encode_images([picture(n) for n in row]) for row in run["image_indices"]],
        max_new_tokens=run["max_new_tokens"],
        num_beams=run["num_beams"],
        length_penalty=run["length_penalty"],
        released=released,
    )
    assert found == run["decoded"]


def test_features_have_to_match_the_places_in_the_prompt() -> None:
    runtime = OpenFlamingoRuntime(golden_model(), build_processor())
    one, two = runtime.encode_images([picture(0), picture(1)])
    for prompt, images in (("<image><image>", [one]), ("<image>", [one, two]), ("a", [one])):
        message = f"prompt 0 holds {prompt.count('<image>')} <image> tokens and comes with "
        with pytest.raises(UserError, match=message + f"{len(images)} images"):
            runtime.complete([prompt], [images], max_new_tokens=2)
    with pytest.raises(UserError, match="prompt 0 holds 1 <image> tokens and comes with 0"):
        runtime.complete(["<image>"], [[]], max_new_tokens=2)


def test_released_completion_weighs_lengths_the_published_way() -> None:
    run = PIPELINE["runs"]["caption_2shot_uneven"]
    model, processor = golden_model(), build_processor()
    runtime = OpenFlamingoRuntime(model, processor)
    images = [[picture(n) for n in row] for row in run["image_indices"]]
    inputs = runtime.prepare(run["text"], images)
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": -2.0}
    end = processor.endofchunk_token_id
    expected = model.generate(
        **inputs,
        **options,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
        custom_generate=released_beam_search,
    )
    texts = processor.decode_new(expected, inputs["input_ids"].shape[1])
    assert runtime.complete(run["text"], images, **options, released=True) == texts
