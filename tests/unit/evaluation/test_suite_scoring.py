"""Scores of the LLaVA columns against numbers computed by hand."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
from suite_data import make_suite_data

from kuea_mllm.evaluation.answering.session import FAILED_ANSWER
from kuea_mllm.evaluation.statistics import score_items
from kuea_mllm.evaluation.suites import scoring
from kuea_mllm.evaluation.suites.boxes import to_padded
from kuea_mllm.evaluation.suites.documents import document_row
from kuea_mllm.evaluation.suites.sources import SOURCES, Source


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_suite_data(tmp_path_factory.mktemp("suites"))


def function(dotted: str) -> Any:
    module, name = dotted.rsplit(".", maxsplit=1)
    return getattr(importlib.import_module(module), name)


def rows_of(source: Source, data: dict[str, Path]) -> list[dict[str, Any]]:
    return [document_row(document) for document in source.read(data[source.dataset])]


def score(source: Source, rows: list[dict[str, Any]], answers: list[str]) -> float:
    process, aggregate = function(source.process), function(source.aggregate)
    items = [
        process(row, [answer])[source.metric] for row, answer in zip(rows, answers, strict=True)
    ]
    result = float(aggregate(items))
    if not source.judged:
        # What lmms-eval reports and what we compute from the rows is the same number.
        assert result == pytest.approx(score_items(source.statistic, items), abs=1e-12)
    return result


@pytest.mark.parametrize("protocol", SOURCES)
def test_right_answers_score_one_and_missing_answers_zero(
    protocol: str, data: dict[str, Path]
) -> None:
    for column, source in SOURCES[protocol].items():
        rows = rows_of(source, data)
        missing = score(source, rows, [FAILED_ANSWER] * len(rows))
        if source.judged:
            assert math.isnan(missing)
            continue
        assert missing == 0.0, column
        if source.metric in ("accuracy", "pair_accuracy"):
            assert score(source, rows, [row["target"] for row in rows]) == 1.0, column


def test_pope_is_the_mean_of_its_three_parts(data: dict[str, Path]) -> None:
    source = SOURCES["paper"]["pope"]
    rows = rows_of(source, data)
    # Always yes: 2 of 4, 2 of 4, and 2 of 3 of the random part, which is smaller.
    assert score(source, rows, ["Yes"] * 11) == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)


def test_a_choice_is_counted_over_all_questions(data: dict[str, Path]) -> None:
    ai2d, tally = SOURCES["paper"]["AI2D"], SOURCES["paper"]["tallyQA"]
    rows = rows_of(ai2d, data)
    # Right: A, B, D, C, B, D.
    assert score(ai2d, rows, ["A", "B", "C", "C", "A", "A"]) == pytest.approx(3 / 6)
    item = scoring.process_choice(rows[3], ["C"])["accuracy"]
    assert item == {
        "score": 1.0,
        "image_id": "2.png",
        "image": str(data["ai2d"] / "images" / "2.png"),
        "group": "test",
    }
    # Right: 2, 0, 15, 1, 4, 3.
    assert score(tally, rows_of(tally, data), ["C", "A", "P", "A", "A", "A"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("True", 1.0), (" true\n", 1.0), ("TRUE", 1.0), ("True.", 0.0), ("yes", 0.0)],
)
def test_a_written_answer_is_compared_without_case_and_outer_blanks(
    answer: str, is_right: float, data: dict[str, Path]
) -> None:
    rows = rows_of(SOURCES["lmms-eval"]["vsr"], data)
    assert scoring.process_text(rows[1], [answer])["accuracy"]["score"] == is_right


def vqa(answers: list[str], said: str) -> float:
    row = {"image": "x", "image_id": "1", "extra": {"answers": answers}}
    return float(scoring.process_vqav2(row, [said])["vqa_accuracy"]["score"])


def test_vqa_accuracy_leaves_each_annotator_out_once() -> None:
    # Two agree: the two see one other, the eight see two.
    assert vqa(["no"] * 2 + ["yes"] * 8, "no") == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa(["no"] * 3 + ["yes"] * 7, "No.") == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa(["yes"] * 10, " Yes\n") == 1.0


def test_vqa_annotations_lose_punctuation_alone() -> None:
    # Numbers and articles of the answer are normalised, those of the annotators are not.
    assert vqa(["two"] * 10, "two") == 0.0
    assert vqa(["2"] * 10, "two") == 1.0
    assert vqa(["a cat"] * 10, "a cat") == 0.0
    assert vqa(["t-shirt"] * 10, "T-shirt!") == 1.0
    # The mark of an annotator becomes a blank at the end, which no answer has.
    assert vqa(["t-shirt!"] * 10, "T-shirt!") == 0.0
    assert vqa(["dont"] * 10, "dont") == 0.0


def textvqa(answers: list[str], said: str) -> float:
    row = {"image": "x", "image_id": "1", "extra": {"answers": answers}}
    return float(scoring.process_textvqa(row, [said])["textvqa_accuracy"]["score"])


def test_textvqa_brings_both_sides_to_the_same_form() -> None:
    assert textvqa(["two"] * 10, "2") == 1.0
    assert textvqa(["The Cat"] * 10, "a cat?") == 1.0
    assert textvqa(["1,000"] * 10, "1000") == 1.0
    assert textvqa(["mcdonald's"] * 10, "McDonald 's") == 1.0
    assert textvqa(["ten"] * 5 + ["10:20"] * 5, "10") == 1.0
    assert textvqa(["ten"] + ["x"] * 9, "10") == pytest.approx(9 / 30)


def test_textvqa_column_is_the_mean_over_questions(data: dict[str, Path]) -> None:
    source = SOURCES["paper"]["text-ocr"]
    answers = ["Dakota", "5", "", "nous", "ten", "the label"]
    by_hand = [1.0, (2 * 1 / 3 + 8 * 2 / 3) / 10, 0.0, (2 / 3 + 16 / 3) / 10, 1.0, 1.0]
    assert score(source, rows_of(source, data), answers) == pytest.approx(sum(by_hand) / 6)


def said(box: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:.2f}' for value in box)}]"


@pytest.mark.parametrize("column", ["RefCOCO", "RefCOCO+", "RefCOCOg"])
def test_a_model_that_is_right_in_the_padded_square(column: str, data: dict[str, Path]) -> None:
    paper, padded = SOURCES["paper"][column], SOURCES["padded"][column]
    rows = rows_of(paper, data)
    answers = [
        said(to_padded(tuple(row["extra"]["box"]), row["extra"]["width"], row["extra"]["height"]))
        for row in rows
    ]
    assert score(padded, rows, answers) == 1.0
    # The small box near the border is lost (2 expressions), the other two boxes are not.
    assert score(paper, rows, answers) == pytest.approx(4 / 6)
    # And one that answers in the image itself: the reverse.
    plain = [row["target"] for row in rows]
    assert score(paper, rows, plain) == 1.0
    assert score(padded, rows, plain) < 1.0


def test_boxes_are_kept_in_the_frame_they_are_compared_in(data: dict[str, Path]) -> None:
    row = rows_of(SOURCES["paper"]["RefCOCO"], data)[0]
    assert (row["extra"]["width"], row["extra"]["height"]) == (64, 48)
    raw = scoring.process_box_raw(row, ["[0.4, 0.2, 0.5, 0.3]"])["box_accuracy"]
    assert raw["answer_box"] == [0.4, 0.2, 0.5, 0.3]
    assert raw["target_box"] == [0.4, 0.05, 0.5, 0.2]
    mapped = scoring.process_box_padded(row, ["[0.4, 0.2, 0.5, 0.3]"])["box_accuracy"]
    # y * 64 - 8, of 48 rows.
    assert mapped["answer_box"] == pytest.approx([0.4, 0.1, 0.5, 11.2 / 48])
    assert mapped["target_box"] == pytest.approx([0.4, 0.05, 0.5, 0.2])
    nothing = scoring.process_box_padded(row, ["none"])["box_accuracy"]
    assert nothing["score"] == 0.0
    assert "answer_box" not in nothing


def test_the_paper_rounds_annotations_and_padded_does_not() -> None:
    row = {
        "image": "x",
        "image_id": "1",
        "extra": {"box": [0.104, 0.0, 0.204, 1.0], "width": 50, "height": 50},
    }
    # 0.052 of 0.100 where the left edge is at .10, 0.048 of 0.104 where it is at .104.
    answer = ["[0.10, 0.0, 0.152, 1.0]"]
    assert scoring.process_box_raw(row, answer)["box_accuracy"]["score"] == 1.0
    assert scoring.process_box_padded(row, answer)["box_accuracy"]["score"] == 0.0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(a) Moving", "a"),
        ("(B)", "b"),
        ("b", "b"),
        ("B.", "b"),
        ("a) because it runs", "a"),
        ("Moving", "a"),
        ("Not moving.", "b"),
        ("The dog is not moving", "b"),
        ("A dog that is moving", "a"),
        ("The answer is B", "b"),
        ("I think it is (b)", "b"),
        ("It is moving or not moving", None),
        ("(c) Flying", None),
        ("Removing it", None),
        ("maybe", None),
        ("it is (a) or (b)", None),
        ("", None),
    ],
)
def test_which_option_of_mmvp_an_answer_names(answer: str, letter: str | None) -> None:
    assert scoring.read_option(answer, {"a": "Moving", "b": "Not moving"}) == letter


def test_an_mmvp_pair_counts_when_both_answers_are_right(data: dict[str, Path]) -> None:
    source = SOURCES["paper"]["MMVP"]
    # Pairs: right and right, right and wrong, wrong and right, wrong and wrong.
    answers = ["Open", "(b)", "No", "No", "B", "Not moving", "1", "2"]
    assert score(source, rows_of(source, data), answers) == pytest.approx(1 / 4)
    rows = rows_of(source, data)
    assert [row["image_id"] for row in rows[:3]] == ["pair 1", "pair 1", "pair 2"]


def test_an_answer_for_a_judge_carries_no_score(data: dict[str, Path]) -> None:
    row = rows_of(SOURCES["paper"]["llava-wild"], data)[0]
    item = scoring.keep_answer(row, ["Hawaii"])["judged"]
    assert "score" not in item
    assert item["group"] == "conv"
